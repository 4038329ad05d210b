"""What a padding mask says, in Triton: each token's landmark, which landmarks there are, and which rows are exact.

Letters: B batch, N tokens, M landmarks; `docs/notation.md`.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nystromgan import _triton
from nystromgan.ops.nystrom_attention.triton_pool import part_of, range_of, three_axes


@triton.jit
def mask_segments_kernel(
    p_mask, p_index, p_absent, p_exact, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Segments of one row's valid tokens a program, by their rank."""
    i_b = tl.program_id(0).to(tl.int64)
    p_mask += i_b * N
    o_n = tl.arange(0, BLOCK_N)
    b_total = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        b_mask = tl.load(p_mask + start + o_n, mask=start + o_n < N, other=1)
        b_total += (b_mask == 0).to(tl.int32)
    total = tl.sum(b_total, 0)
    size = tl.maximum(total, 1)
    before = total * 0
    for start in range(0, N, BLOCK_N):
        b_valid = tl.load(p_mask + start + o_n, mask=start + o_n < N, other=1) == 0
        b_rank = before + tl.cumsum(b_valid.to(tl.int32), 0) - 1
        b_segment, _ = part_of(tl.maximum(b_rank, 0), size, tl.minimum(size, M))
        tl.store(p_index + i_b * N + start + o_n, tl.where(b_valid, b_segment, -1), mask=start + o_n < N)
        before += tl.sum(b_valid.to(tl.int32), 0)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        tl.store(p_absent + i_b * M + o_m, (o_m >= total).to(tl.uint8), mask=o_m < M)
    tl.store(p_exact + i_b, (total <= M).to(tl.uint8))


@triton.jit
def mask_blocks_kernel(p_mask, p_index, p_absent, N, M, g0, g1, g2, c0, c1, c2, BLOCK_N: tl.constexpr):
    """One block of one row's grid a program."""
    i_b, m = (tl.program_id(0) // M).to(tl.int64), tl.program_id(0) % M
    first0, size0 = range_of(m // (c1 * c2), g0, c0)
    first1, size1 = range_of((m // c2) % c1, g1, c1)
    first2, size2 = range_of(m % c2, g2, c2)
    o_n = tl.arange(0, BLOCK_N)
    count = size0 * size1 * size2
    b_valid = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, count, BLOCK_N):
        o = start + o_n
        t = first0 + o // (size1 * size2)
        y = first1 + (o // size2) % size1
        token = (t * g1 + y) * g2 + first2 + o % size2
        b_mask = tl.load(p_mask + i_b * N + token, mask=o < count, other=1)
        tl.store(p_index + i_b * N + token, tl.where(b_mask == 0, m, -1), mask=o < count)
        b_valid += (b_mask == 0).to(tl.int32)
    tl.store(p_absent + i_b * M + m, (tl.sum(b_valid, 0) == 0).to(tl.uint8))


def masked_landmarks(padding_mask: Tensor, grid: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """index (B, 1, N) int32, landmark_mask (B, M) and exact_rows (B,) of a mask (B, N) over at most three axes."""
    batch, tokens = padding_mask.shape
    landmarks = math.prod(counts)
    index = padding_mask.new_empty(batch, 1, tokens, dtype=torch.int32)
    absent = padding_mask.new_empty(batch, landmarks)
    exact = padding_mask.new_empty(batch) if len(grid) == 1 else padding_mask.new_zeros(batch)
    if batch == 0:
        return index, absent, exact
    mask, flags = _triton.as_bytes(padding_mask, index), absent.view(torch.uint8)
    with _triton.launch_on(padding_mask):
        if len(grid) == 1:
            mask_segments_kernel[(batch,)](
                mask, index, flags, exact.view(torch.uint8), tokens, landmarks,
                BLOCK_N=2048, BLOCK_M=512, num_warps=8, **_triton.FUSED,
            )  # fmt: skip
        else:
            mask_blocks_kernel[(batch * landmarks,)](
                mask, index, flags, tokens, landmarks, *three_axes(grid), *three_axes(counts),
                BLOCK_N=512, num_warps=4, **_triton.FUSED,
            )  # fmt: skip
    return index, absent, exact
