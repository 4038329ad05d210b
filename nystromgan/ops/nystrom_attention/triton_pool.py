"""Landmark means in Triton: over the blocks of a layout, or over any index; and how many tokens an index gives each.

Letters: B batch, H heads, N tokens, M landmarks, D head dim; `docs/notation.md`.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nystromgan import _triton
from nystromgan._triton import dot
from nystromgan.ops.nystrom_attention import tuning
from nystromgan.ops.nystrom_attention.landmarks import Layout
from nystromgan.ops.nystrom_attention.triton_tokens import head_of, load_tokens


@triton.jit
def _range_of(i, size, count):
    """First position and length of block i of `count` blocks on an axis of `size`."""
    short, longer = size // count, size % count
    return i * short + tl.minimum(i, longer), short + (i < longer).to(tl.int32)


@triton.jit
def _part_of(position, size, count):
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
        b_index, b_count = _part_of(o_n, members[0], members[1])
        b_index = tl.where(valid, b_index, -1)
    elif MEMBERS == "blocks":
        plane = o_n // members[2]
        x, size_x = _part_of(o_n - plane * members[2], members[2], members[5])
        t = plane // members[1]
        y, size_y = _part_of(plane - t * members[1], members[1], members[4])
        t, size_t = _part_of(t, members[0], members[3])
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
    first0, size0 = _range_of(m // (c1 * c2), g0, c0)
    first1, size1 = _range_of((m // c2) % c1, g1, c1)
    first2, size2 = _range_of(m % c2, g2, c2)
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


@triton.jit
def index_sum_kernel(
    p_tokens, s_b, s_h, s_n, s_d, p_index, s_ib, s_ih, s_in, p_sums, p_counts,
    H, N, M, D: tl.constexpr, splits, m_blocks, ACCESS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums and counts of BLOCK_M landmarks over one split of the tokens: a one-hot product."""
    pid = tl.program_id(0)
    i_bh = pid // (splits * m_blocks)
    i_split = (pid // m_blocks) % splits
    o_m = (pid % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_tokens, s_n = head_of(p_tokens, s_b, s_h, s_n, i_b, i_h, ACCESS)
    p_index += i_b * s_ib + i_h * s_ih
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b_count = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, SPLIT, BLOCK_N):
        first = i_split * SPLIT + start
        o_n = first + tl.arange(0, BLOCK_N)
        b_index = tl.load(p_index + o_n.to(tl.int64) * s_in, mask=o_n < N, other=-1)  # (BLOCK_N,)
        b = load_tokens(p_tokens, s_n, s_d, first, b_index >= 0, D, ACCESS, BLOCK_N, BLOCK_D)
        member = o_m[:, None] == b_index[None, :]  # (BLOCK_M, BLOCK_N)
        b_sum = dot(member.to(tl.float32).to(b.dtype), b, b_sum, PRECISION)
        b_count += tl.sum(member.to(tl.float32), 1)
    row = (i_bh * splits + i_split).to(tl.int64) * M + o_m
    tl.store(p_sums + row[:, None] * D + o_d[None, :], b_sum, mask=(o_m[:, None] < M) & (o_d[None, :] < D))
    tl.store(p_counts + row, b_count, mask=o_m < M)


@triton.jit
def mean_kernel(
    p_sums, p_counts, p_fallback, p_means, M, D: tl.constexpr, splits, m_blocks,
    FALLBACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the splits' sums in their order; an empty landmark gets zeros, or its row of p_fallback."""
    i_bh = (tl.program_id(0) // m_blocks).to(tl.int64)
    o_m = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    inside = (o_m[:, None] < M) & (o_d[None, :] < D)
    offsets = o_m[:, None] * D + o_d[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b_count = tl.zeros((BLOCK_M,), tl.float32)
    for i in range(0, splits):
        split = i_bh * splits + i
        b_sum += tl.load(p_sums + split * M * D + offsets, mask=inside, other=0.0)
        b_count += tl.load(p_counts + split * M + o_m, mask=o_m < M, other=0.0)
    b_mean = b_sum / tl.maximum(b_count, 1.0)[:, None]
    if FALLBACK:
        b_kept = tl.load(p_fallback + i_bh * M * D + offsets, mask=inside, other=0.0)
        b_mean = tl.where((b_count > 0.0)[:, None], b_mean, b_kept)
    tl.store(p_means + i_bh * M * D + offsets, b_mean, mask=inside)


@triton.jit
def count_kernel(
    p_index, s_ib, s_ih, s_in, p_counts, H, N, M, splits, m_blocks,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the tokens of BLOCK_M landmarks in one split of one row of an index; of integers in any order."""
    i_part = tl.program_id(0) // m_blocks
    i_bh, i_split = i_part // splits, i_part % splits
    o_m = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_index += (i_bh // H).to(tl.int64) * s_ib + (i_bh % H).to(tl.int64) * s_ih
    b_count = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, SPLIT, BLOCK_N):
        o_n = (i_split * SPLIT + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        b_index = tl.load(p_index + o_n * s_in, mask=o_n < N, other=-1)
        b_count += (o_m[:, None] == b_index[None, :]).to(tl.int32)
    tl.atomic_add(p_counts + i_bh.to(tl.int64) * M + o_m, tl.sum(b_count, 1), mask=o_m < M, sem="relaxed")


def index_strides(index: Tensor) -> tuple[int, int, int]:
    """Strides of an index (B|1, H|1, N), zero along an axis that it shares."""
    return tuple(0 if size == 1 else stride for size, stride in zip(index.shape, index.stride(), strict=True))  # type: ignore[return-value]


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


def index_means(tokens: Tensor, index: Tensor, num_landmarks: int, fallback: Tensor | None = None) -> Tensor:
    """Means (B, H, M, D) float32 of tokens over an index; where it is empty, zeros or `fallback`'s rows."""
    batch, heads, count, dim = tokens.shape
    architecture = _triton.architecture(tokens)
    split = tuning.split_tokens(count, architecture)
    splits = triton.cdiv(count, split)
    block_d = _triton.tile(dim)
    config = tuning.choose("index_sum", architecture, block_d, tokens.element_size())
    block_m = _triton.tile(num_landmarks, config.landmarks)
    m_blocks = triton.cdiv(num_landmarks, block_m)
    sums = tokens.new_empty(batch * heads, splits, num_landmarks, dim, dtype=torch.float32)
    totals = tokens.new_empty(batch * heads, splits, num_landmarks, dtype=torch.float32)
    index_sum_kernel[(batch * heads * splits * m_blocks,)](
        tokens, *tokens.stride(), index, *index_strides(index), sums, totals,
        heads, count, num_landmarks, dim, splits, m_blocks, ACCESS=access(tokens), SPLIT=split,
        BLOCK_M=block_m, BLOCK_N=config.tokens, BLOCK_D=block_d, PRECISION=_triton.precision(tokens.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages, **_triton.FUSED,
    )  # fmt: skip
    return means_of_sums(sums, totals, (batch, heads, num_landmarks, dim), fallback)


def means_of_sums(sums: Tensor, totals: Tensor, shape: tuple[int, ...] | torch.Size, fallback: Tensor | None) -> Tensor:
    """Means of `shape` (B, H, M, D) from the sums (B H, splits, M, D) and counts (B H, splits, M) of the splits."""
    batch, heads, num_landmarks, dim = shape
    means = sums.new_empty(shape)
    block_d = _triton.tile(dim)
    rows = max(16, min(_triton.tile(num_landmarks), 2048 // block_d))
    row_blocks = triton.cdiv(num_landmarks, rows)
    mean_kernel[(batch * heads * row_blocks,)](
        sums, totals, means if fallback is None else fallback, means, num_landmarks, dim, sums.shape[1], row_blocks,
        FALLBACK=fallback is not None, BLOCK_M=rows, BLOCK_D=block_d, num_warps=4, **_triton.FUSED,
    )  # fmt: skip
    return means


def index_counts(index: Tensor, num_landmarks: int) -> Tensor:
    """Tokens of every landmark (B|1, H|1, M) int32."""
    batch, heads, count = index.shape
    counts = torch.zeros(batch, heads, num_landmarks, dtype=torch.int32, device=index.device)
    split = tuning.split_tokens(count, _triton.architecture(index))
    splits, blocks = triton.cdiv(count, split), triton.cdiv(num_landmarks, 16)
    count_kernel[(batch * heads * splits * blocks,)](
        index, *index.stride(), counts, heads, count, num_landmarks, splits, blocks,
        SPLIT=split, BLOCK_M=16, BLOCK_N=256, num_warps=4, **_triton.FUSED,
    )  # fmt: skip
    return counts
