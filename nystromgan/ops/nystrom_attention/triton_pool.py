"""Landmark means in Triton over the blocks of a layout, and which mean each token is in.

Letters: B batch, H heads, N tokens, M landmarks, D head dim; `docs/notation.md`.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nystromgan import _triton
from nystromgan.ops.nystrom_attention.landmarks import Layout
from nystromgan.ops.nystrom_attention.triton_tokens import head_of


@triton.jit
def range_of(i, size, count):
    """First position and length of block i of `count` blocks on an axis of `size`."""
    short, longer = size // count, size % count
    return i * short + tl.minimum(i, longer), short + (i < longer).to(tl.int32)


@triton.jit
def part_of(position, size, count):
    """The block of each position on an axis of `size` in `count` blocks, and the block's length."""
    short, longer = size // count, size % count
    early = position < longer * (short + 1)
    length = short + early.to(tl.int32)
    return (position - tl.where(early, 0, longer)) // length, length


@triton.jit
def membership(members, i_b, i_h, o_n, valid, MEMBERS: tl.constexpr):
    """The landmark that each token of o_n is in the mean of, -1 for none or beyond, and how many tokens that is of.

    By MEMBERS, `members` is of "segments" (tokens, landmarks), of "blocks" the grid (T, H, W) and the blocks along each
    axis, of an "index" its pointer and strides and those of its counts.
    """
    if MEMBERS == "segments":
        b_index, b_count = part_of(o_n, members[0], members[1])
        b_index = tl.where(valid, b_index, -1)
    elif MEMBERS == "blocks":
        plane = o_n // members[2]
        x, size_x = part_of(o_n - plane * members[2], members[2], members[5])
        t = plane // members[1]
        y, size_y = part_of(plane - t * members[1], members[1], members[4])
        t, size_t = part_of(t, members[0], members[3])
        b_index = tl.where(valid, (t * members[4] + y) * members[5] + x, -1)
        b_count = size_t * size_y * size_x
    else:
        p_index = members[0] + i_b * members[1] + i_h * members[2]
        p_counts = members[4] + i_b * members[5] + i_h * members[6]
        b_index = tl.load(p_index + o_n.to(tl.int64) * members[3], mask=valid, other=-1)
        b_count = tl.load(p_counts + b_index, mask=b_index >= 0, other=1)
    return b_index, b_count


@triton.jit
def block_mean_kernel(
    p_query, s_qb, s_qh, s_qn, s_qd, q0, q1, q2,
    p_key, s_kb, s_kh, s_kn, s_kd, k0, k1, k2,
    p_query_means, p_key_means, H, M, D: tl.constexpr, c0, c1, c2, programs,
    ACCESS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean of one block of tokens a program: `programs` of queries, then as many of keys."""
    pid = tl.program_id(0)
    if pid < programs:
        p, s_b, s_h, s_n, s_d, p_means = p_query, s_qb, s_qh, s_qn, s_qd, p_query_means
        g0, g1, g2 = q0, q1, q2
    else:
        p, s_b, s_h, s_n, s_d, p_means = p_key, s_kb, s_kh, s_kn, s_kd, p_key_means
        g0, g1, g2 = k0, k1, k2
        pid -= programs
    i_bh, m = pid // M, pid % M
    first0, size0 = range_of(m // (c1 * c2), g0, c0)
    first1, size1 = range_of((m // c2) % c1, g1, c1)
    first2, size2 = range_of(m % c2, g2, c2)
    p, s_n = head_of(p, s_b, s_h, s_n, (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), ACCESS)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    count = size0 * size1 * size2
    b_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, count, BLOCK_N):
        o = start + o_n
        t = first0 + o // (size1 * size2)
        y = first1 + (o // size2) % size1
        x = first2 + o % size2
        token = (t * g1 + y) * g2 + x
        inside = (o[:, None] < count) & (o_d[None, :] < D)
        offsets = token[:, None].to(tl.int64) * s_n + o_d[None, :].to(tl.int64) * s_d
        b_sum += tl.load(p + offsets, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_N, D)
    p_means += pid.to(tl.int64) * D
    tl.store(p_means + o_d, tl.sum(b_sum, 0) / count, mask=o_d < D)


def access(*tokens: Tensor) -> tuple[int, bool]:
    """How kernels read rows of tensors (B, H, N, D): what is known of addresses, and whether they are WIDE.

    The first is the most elements, up to 16 bytes, of which every row begins at a multiple; WIDE is a tensor of which a
    tile may span more elements than 32 bits count.
    """
    together = (math.gcd(16 // x.element_size(), *x.stride()[:3]) if x.stride(3) == 1 else 1 for x in tokens)
    return min(together), any(256 * max(x.stride()[2:]) > 2**30 for x in tokens)


def three_axes(axes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of at most three axes as (T, H, W)."""
    return (1,) * (3 - len(axes)) + tuple(axes)


def block_means(query: Tensor, key: Tensor, layout: Layout, num_landmarks: int) -> tuple[Tensor, Tensor]:
    """Means (B, H, M, D) float32 of queries and keys over the blocks of a layout of at most three axes."""
    batch, heads, _, dim = query.shape
    query_grid, key_grid, counts = map(three_axes, layout)
    means = query.new_empty(2, batch, heads, num_landmarks, dim, dtype=torch.float32)
    block_d = _triton.tile(dim)
    programs = batch * heads * num_landmarks
    block_mean_kernel[(2 * programs,)](
        query, *query.stride(), *query_grid, key, *key.stride(), *key_grid, means[0], means[1],
        heads, num_landmarks, dim, *counts, programs, ACCESS=access(query, key),
        BLOCK_N=max(16, 4096 // block_d), BLOCK_D=block_d, num_warps=4, **_triton.FUSED,
    )  # fmt: skip
    return means[0], means[1]
