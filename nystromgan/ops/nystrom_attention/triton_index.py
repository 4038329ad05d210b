"""Landmark means in Triton over any index, and how many tokens it gives each landmark.

Letters: B batch, H heads, N tokens, M landmarks, D head dim, E value dim; `docs/notation.md`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nystromgan import _triton
from nystromgan._triton import dot
from nystromgan.ops.nystrom_attention import tuning
from nystromgan.ops.nystrom_attention.triton_pool import access
from nystromgan.ops.nystrom_attention.triton_tokens import head_of, load_tokens


@triton.jit
def _sum_by_index(
    side, pid, p_rows, H, M, D: tl.constexpr, m_blocks, HAS_ROWS: tl.constexpr, ACCESS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program of a side, if `pid` is one of its own: a one-hot product over one split of the tokens.

    With HAS_ROWS, of the batch's rows that p_rows marks only.
    """
    p_tokens, s_b, s_h, s_n, s_d, p_index, s_ib, s_ih, s_in, p_sums, p_counts, N, split, splits, begin, end = side
    wanted = (pid >= begin) & (pid < end)
    pid -= begin
    i_bh = pid // (splits * m_blocks)
    if HAS_ROWS:
        wanted = tl.load(p_rows + i_bh // H, mask=wanted, other=0) != 0
    if wanted:
        i_split = (pid // m_blocks) % splits
        o_m = (pid % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_d = tl.arange(0, BLOCK_D)
        i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
        p_head, s_row = head_of(p_tokens, s_b, s_h, s_n, i_b, i_h, ACCESS)
        p_index += i_b * s_ib + i_h * s_ih
        b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        b_count = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, split, BLOCK_N):
            first = i_split * split + start
            o_n = first + tl.arange(0, BLOCK_N)
            b_index = tl.load(p_index + o_n.to(tl.int64) * s_in, mask=o_n < N, other=-1)  # (BLOCK_N,)
            b = load_tokens(p_head, s_row, s_d, first, b_index >= 0, D, ACCESS, BLOCK_N, BLOCK_D)
            member = o_m[:, None] == b_index[None, :]  # (BLOCK_M, BLOCK_N)
            b_sum = dot(member.to(tl.float32).to(b.dtype), b, b_sum, PRECISION)
            b_count += tl.sum(member.to(tl.float32), 1)
        row = (i_bh * splits + i_split).to(tl.int64) * M + o_m
        tl.store(p_sums + row[:, None] * D + o_d[None, :], b_sum, mask=(o_m[:, None] < M) & (o_d[None, :] < D))
        tl.store(p_counts + row, b_count, mask=o_m < M)


@triton.jit
def index_sum_kernel(
    first, second, values, p_rows, H, M, D: tl.constexpr, E: tl.constexpr, m_blocks,
    SIDES: tl.constexpr, HAS_VALUES: tl.constexpr,
    ACCESS: tl.constexpr, VALUE_ACCESS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums and counts of BLOCK_M landmarks over one split of the tokens a program, of up to two SIDES and of values.

    The values are summed in the batch's rows that p_rows marks.
    """
    pid = tl.program_id(0)
    if SIDES > 0:
        _sum_by_index(
            first, pid, p_rows, H, M, D, m_blocks, False, ACCESS, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
        )  # fmt: skip
    if SIDES > 1:
        _sum_by_index(
            second, pid, p_rows, H, M, D, m_blocks, False, ACCESS, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
        )  # fmt: skip
    if HAS_VALUES:
        _sum_by_index(
            values, pid, p_rows, H, M, E, m_blocks, True, VALUE_ACCESS, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION
        )  # fmt: skip


@triton.jit
def _mean_of_sums(
    side, pid, p_rows, p_fallback, H, M, D: tl.constexpr, m_blocks, HAS_ROWS: tl.constexpr, FALLBACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program of a side, if `pid` is one of its own; with HAS_ROWS, of the batch's rows that p_rows marks only."""
    p_sums, p_counts, p_means, splits, begin, end = side
    wanted = (pid >= begin) & (pid < end)
    i_bh = ((pid - begin) // m_blocks).to(tl.int64)
    if HAS_ROWS:
        wanted = tl.load(p_rows + i_bh // H, mask=wanted, other=0) != 0
    if wanted:
        o_m = (pid % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
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
def mean_kernel(
    first, second, values, p_rows, p_fallback, H, M, D: tl.constexpr, E: tl.constexpr, m_blocks,
    SIDES: tl.constexpr, HAS_VALUES: tl.constexpr, FALLBACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Adds the splits' sums in their order; an empty landmark gets zeros, or its row of p_fallback."""
    pid = tl.program_id(0)
    if SIDES > 0:
        _mean_of_sums(first, pid, p_rows, p_fallback, H, M, D, m_blocks, False, FALLBACK, BLOCK_M, BLOCK_D)
    if SIDES > 1:
        _mean_of_sums(second, pid, p_rows, p_fallback, H, M, D, m_blocks, False, FALLBACK, BLOCK_M, BLOCK_D)
    if HAS_VALUES:
        _mean_of_sums(
            values, pid, p_rows, p_fallback, H, M, E, m_blocks, True, FALLBACK, BLOCK_M, BLOCK_E
        )  # fmt: skip


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


class Side(NamedTuple):
    """Tokens (B, H, N, D), and the index (B|1, H|1, N) of each one's landmark, over which they are pooled."""

    tokens: Tensor
    landmark: Tensor


class Sums(NamedTuple):
    """What the splits of one side's tokens add to every landmark."""

    sums: Tensor  # (B H, splits, M, D) float32
    counts: Tensor  # (B H, splits, M) float32


def index_means(
    sides: Sequence[Side], num_landmarks: int, values: Side | None = None, rows: Tensor | None = None,
    fallback: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Means (B, H, M, D) float32 of up to two sides of one head dim, then of values, in two launches for all.

    Where an index is empty, zeros or `fallback`'s rows. Of the values, only the batch's rows that are True in `rows`
    (B,) are pooled, and only theirs are written.
    """
    slots = [*sides, values] if values is not None else list(sides)
    if not slots:
        return []
    batch, heads, _, dim = slots[0].tokens.shape
    value_dim = slots[-1].tokens.shape[3]
    architecture = _triton.architecture(slots[0].tokens)
    block_d, block_e = _triton.tile(dim), _triton.tile(value_dim)
    config = tuning.choose("index_sum", architecture, max(block_d, block_e), slots[0].tokens.element_size())
    block_m = _triton.tile(num_landmarks, config.landmarks)
    m_blocks = triton.cdiv(num_landmarks, block_m)
    summed: list[Sums] = []
    arguments: list[tuple] = []
    programs = 0
    for tokens, index in slots:
        count, width = tokens.shape[2:]
        split = tuning.split_tokens(count, architecture)
        splits = triton.cdiv(count, split)
        sums = tokens.new_empty(batch * heads, splits, num_landmarks, width, dtype=torch.float32)
        summed.append(Sums(sums, torch.empty_like(sums[..., 0])))
        begin, programs = programs, programs + batch * heads * splits * m_blocks
        arguments.append((
            tokens, *tokens.stride(), index, *index_strides(index), *summed[-1], count, split, splits, begin, programs,
        ))  # fmt: skip
    index_sum_kernel[(programs,)](
        *_slots(arguments, len(sides)), _triton.as_bytes(rows, summed[0].sums),
        heads, num_landmarks, dim, value_dim, m_blocks, SIDES=len(sides), HAS_VALUES=values is not None,
        ACCESS=access(*(side.tokens for side in sides)) if sides else None,
        VALUE_ACCESS=None if values is None else access(values.tokens),
        BLOCK_M=block_m, BLOCK_N=config.tokens, BLOCK_D=block_d, BLOCK_E=block_e,
        PRECISION=_triton.precision(slots[0].tokens.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages, **_triton.FUSED,
    )  # fmt: skip
    return means_of_sums(summed, len(sides), batch, rows, fallback)


def means_of_sums(
    summed: Sequence[Sums], sides: int, batch: int, rows: Tensor | None = None, fallback: Tensor | None = None
) -> list[Tensor]:
    """Means (B, H, M, D) from sums, the first `sides` of one head dim, the one after them of values; see above."""
    count, _, num_landmarks, dim = summed[0].sums.shape
    value_dim = summed[-1].sums.shape[3]
    heads = count // batch
    means = [one.sums.new_empty(batch, heads, num_landmarks, one.sums.shape[3]) for one in summed]
    block_d, block_e = _triton.tile(dim), _triton.tile(value_dim)
    block_m = max(16, min(_triton.tile(num_landmarks), 2048 // max(block_d, block_e)))
    m_blocks = triton.cdiv(num_landmarks, block_m)
    programs = count * m_blocks
    arguments = [
        (*one, mean, one.sums.shape[1], i * programs, (i + 1) * programs)
        for i, (one, mean) in enumerate(zip(summed, means, strict=True))
    ]
    uneven: dict[str, int] = {}
    if len(summed) == 3:
        architecture = _triton.architecture(means[0])
        uneven = tuning.uneven("means_of_three", architecture, max(dim, value_dim), 4, num_landmarks)
    mean_kernel[(len(summed) * programs,)](
        *_slots(arguments, sides), _triton.as_bytes(rows, means[0]), means[0] if fallback is None else fallback,
        heads, num_landmarks, dim, value_dim, m_blocks,
        SIDES=sides, HAS_VALUES=len(summed) > sides, FALLBACK=fallback is not None,
        BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_E=block_e, num_warps=4, **_triton.FUSED, **uneven,
    )  # fmt: skip
    return means


def _slots(arguments: Sequence[tuple], sides: int) -> tuple[tuple, tuple, tuple]:
    """A kernel's arguments for its first and second side and for its values; (0,) for none."""
    first, second = (*arguments[:sides], (0,), (0,))[:2]
    return first, second, arguments[sides] if len(arguments) > sides else (0,)


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
