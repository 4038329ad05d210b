"""`cluster_landmarks` in Triton: a Lloyd step assigns and adds up in one pass over the tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nystromgan import _triton
from nystromgan._triton import dot, dot_rows
from nystromgan.ops.nystrom_attention import tuning
from nystromgan.ops.nystrom_attention.triton_index import Side, Sums, index_means, index_strides, means_of_sums
from nystromgan.ops.nystrom_attention.triton_pool import access
from nystromgan.ops.nystrom_attention.triton_tokens import absent, head_of, load_landmarks, load_tokens


@triton.jit
def _exact_products(b_token, b_landmark, PRECISION: tl.constexpr):
    """x . m to float32's digits: half precision tokens are exact as they are, and landmarks are sums of three such."""
    if b_token.dtype == tl.float32 or PRECISION == "interpreted":
        return dot_rows(b_token.to(tl.float32), b_landmark, PRECISION)
    high = b_landmark.to(b_token.dtype)
    rest = b_landmark - high.to(tl.float32)
    middle = rest.to(b_token.dtype)
    low = (rest - middle.to(tl.float32)).to(b_token.dtype)
    score = tl.dot(b_token, tl.trans(middle), tl.dot(b_token, tl.trans(low)))
    return tl.dot(b_token, tl.trans(high), score)


@triton.jit
def _nearest(b_token, b_landmark, missing, o_m, M, PRECISION: tl.constexpr):
    """Each token's largest x . m - |m|^2 / 2 among landmarks o_m, and the first of them that has it."""
    score = _exact_products(b_token, b_landmark, PRECISION) - 0.5 * tl.sum(b_landmark * b_landmark, 1)[None, :]
    score = tl.where(missing[None, :], float("-inf"), score)  # (BLOCK_N, M)
    largest = tl.max(score, 1)
    return largest, tl.min(tl.where(score == largest[:, None], o_m[None, :], M), 1)


@triton.jit
def lloyd_kernel(
    p_tokens, s_b, s_h, s_n, s_d, p_start, s_ib, s_ih, s_in, p_landmarks, p_absent, p_frozen,
    p_index, p_sums, p_counts, H, N, M, D: tl.constexpr, splits,
    ACCESS: tl.constexpr, HAS_ABSENT: tl.constexpr, HAS_FROZEN: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gives each token of one split the landmark with the largest x . m - |m|^2 / 2, the first of equals.

    With ADD, where one tile holds all landmarks, adds the tokens up by landmark too. Scores are float32 whatever the
    tokens' dtype: rounding must not move a token that lies between two landmarks.
    """
    i_bh = tl.program_id(0) // splits
    i_split = tl.program_id(0) % splits
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_tokens, s_n = head_of(p_tokens, s_b, s_h, s_n, i_b, i_h, ACCESS)
    p_start += i_b * s_ib + i_h * s_ih
    o_d = tl.arange(0, BLOCK_D)
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b_count = tl.zeros((BLOCK_M,), tl.float32)
    o_m = tl.arange(0, BLOCK_M)
    if ADD:
        b_landmark = load_landmarks(p_landmarks, i_bh, o_m, M, D, BLOCK_D)  # (M, D)
        missing = absent(p_absent, i_bh // H, o_m, M, HAS_ABSENT)
    for begin in tl.range(0, SPLIT, BLOCK_N):
        first_n = i_split * SPLIT + begin
        o_n = first_n + tl.arange(0, BLOCK_N)
        start = tl.load(p_start + o_n.to(tl.int64) * s_in, mask=o_n < N, other=-1)
        b_token = load_tokens(p_tokens, s_n, s_d, first_n, start >= 0, D, ACCESS, BLOCK_N, BLOCK_D)
        if ADD:
            largest, b_index = _nearest(b_token, b_landmark, missing, o_m, M, PRECISION)
            b_index = tl.where(largest > float("-inf"), b_index, 0)
        else:
            best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            b_index = tl.zeros((BLOCK_N,), tl.int32)
            for first in tl.range(0, M, BLOCK_M, num_stages=1):
                b_other = load_landmarks(p_landmarks, i_bh, first + o_m, M, D, BLOCK_D)
                none = absent(p_absent, i_bh // H, first + o_m, M, HAS_ABSENT)
                largest, place = _nearest(b_token, b_other, none, first + o_m, M, PRECISION)
                b_index = tl.where(largest > best, place, b_index)
                best = tl.maximum(best, largest)
        b_index = tl.where(start >= 0, b_index, start)
        if HAS_FROZEN:
            b_index = tl.where(tl.load(p_frozen + i_b) != 0, start, b_index)
        tl.store(p_index + i_bh.to(tl.int64) * N + o_n, b_index, mask=o_n < N)
        if ADD:
            member = o_m[:, None] == b_index[None, :]  # (M, BLOCK_N)
            b_sum = dot(member.to(tl.float32).to(b_token.dtype), b_token, b_sum, PRECISION)
            b_count += tl.sum(member.to(tl.float32), 1)
    if ADD:
        row = (i_bh * splits + i_split).to(tl.int64) * M + o_m
        tl.store(p_sums + row[:, None] * D + o_d[None, :], b_sum, mask=(o_m[:, None] < M) & (o_d[None, :] < D))
        tl.store(p_counts + row, b_count, mask=o_m < M)


def _lloyd_step(
    tokens: Tensor, start: Tensor, landmarks: Tensor, absent: Tensor | None, frozen: Tensor | None, index: Tensor
) -> Tensor:
    """The landmarks after one step; writes the assignment to `index`."""
    batch, heads, count, dim = tokens.shape
    num_landmarks = landmarks.shape[2]
    block_d = _triton.tile(dim)
    architecture = _triton.architecture(tokens)
    config = tuning.choose("lloyd", architecture, block_d, tokens.element_size())
    block_m = _triton.tile(num_landmarks, config.landmarks)
    fused = num_landmarks <= block_m
    split = tuning.split_tokens(count, architecture)
    splits = triton.cdiv(count, split)
    sums = landmarks.new_empty(batch * heads, splits, num_landmarks, dim if fused else 0)
    totals = landmarks.new_empty(batch * heads, splits, num_landmarks)
    lloyd_kernel[(batch * heads * splits,)](
        tokens, *tokens.stride(), start, *index_strides(start), landmarks,
        index if absent is None else absent.contiguous().view(torch.uint8),
        index if frozen is None else frozen.contiguous().view(torch.uint8),
        index, sums, totals, heads, count, num_landmarks, dim, splits,
        ACCESS=access(tokens), HAS_ABSENT=absent is not None, HAS_FROZEN=frozen is not None, ADD=fused, SPLIT=split,
        BLOCK_M=block_m, BLOCK_N=config.tokens, BLOCK_D=block_d,
        PRECISION=_triton.precision(tokens.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
        **_triton.FUSED,
        **tuning.uneven("lloyd", architecture, dim, tokens.element_size(), num_landmarks),
    )  # fmt: skip
    if fused:
        return means_of_sums([Sums(sums, totals)], 1, batch, fallback=landmarks)[0]
    return index_means([Side(tokens, index)], num_landmarks, fallback=landmarks)[0]


def cluster_landmarks(
    tokens: Tensor,
    index: Tensor,
    landmark_mask: Tensor | None,
    frozen_rows: Tensor | None,
    num_landmarks: int,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """(landmarks (B, H, M, D) float32, index (B, H, N) int32) after Lloyd steps from the means over `index`."""
    shape = tokens.shape[:3]
    with _triton.launch_on(tokens):
        landmarks = index_means([Side(tokens, index)], num_landmarks)[0]
        if iterations == 0:
            return landmarks, index.expand(shape).contiguous()
        assigned = torch.empty(shape, dtype=torch.int32, device=tokens.device)
        for _ in range(iterations):
            landmarks = _lloyd_step(tokens, index, landmarks, landmark_mask, frozen_rows, assigned)
    return landmarks, assigned
