"""What follows F W in Triton, in the passes that have the tokens at hand: gamma, and the convolution of the values.

A tile's convolution is a product with a band of the weight's Toeplitz matrix, on tensor cores: 64 tokens at 33 taps
take one and a half tiles of values, where a load for every tap would take 33 from the cache.
"""

import triton
import triton.language as tl

from nystromgan._triton import dot, dot_rows
from nystromgan.ops.nystrom_attention.triton_tokens import head_of, load_tokens


@triton.jit
def factor(p_gamma, HAS_GAMMA: tl.constexpr):
    """gamma, 1 without it."""
    gamma = 1.0
    if HAS_GAMMA:
        gamma = tl.load(p_gamma).to(tl.float32)
    return gamma


@triton.jit
def load_convolved(
    tokens, i_b, i_h, first, N, E: tl.constexpr, ACCESS: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_N tokens from `first`, which may lie before the first one; zero outside and where they are masked.

    `tokens` is the pointer and strides of (B, H, N, E) and of its mask (B, N).
    """
    o_n = first + tl.arange(0, BLOCK_N)
    valid = (o_n >= 0) & (o_n < N)
    if HAS_MASK:
        valid &= tl.load(tokens[5] + i_b * tokens[6] + o_n.to(tl.int64) * tokens[7], mask=valid, other=1) == 0
    p_tokens, s_n = head_of(tokens[0], tokens[1], tokens[2], tokens[3], i_b, i_h, ACCESS)
    return load_tokens(p_tokens, s_n, tokens[4], first, valid, E, ACCESS, BLOCK_N, BLOCK_E)


@triton.jit
def convolve(
    b_sum, tokens, p_weight, taps, gamma, i_b, i_h, first, N, E: tl.constexpr, FLIP: tl.constexpr,
    ACCESS: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """b_sum + gamma times the convolution of tokens at BLOCK_N places from `first`; with FLIP, its transpose."""
    p_weight += i_h * taps
    o_n, o_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    for start in tl.range(0, BLOCK_N + taps - 1, BLOCK_K, num_stages=1):
        begin = first - taps // 2 + start
        b_tokens = load_convolved(tokens, i_b, i_h, begin, N, E, ACCESS, HAS_MASK, BLOCK_K, BLOCK_E)
        tap = start + o_k[None, :] - o_n[:, None]  # (BLOCK_N, BLOCK_K)
        inside = (tap >= 0) & (tap < taps)
        if FLIP:
            tap = taps - 1 - tap
        b_band = tl.load(p_weight + tap, mask=inside, other=0.0).to(tl.float32) * gamma
        b_sum = dot(b_band.to(b_tokens.dtype), b_tokens, b_sum, PRECISION)
    return b_sum


@triton.jit
def weight_gradient_kernel(
    grad, value, p_parts, H, N, E: tl.constexpr, splits, chunks, taps,
    GRAD_ACCESS: tl.constexpr, VALUE_ACCESS: tl.constexpr, HAS_MASK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d weight without gamma, of one split of the tokens against values one chunk of taps further.

    Every tile of tokens adds to one product dO V^T, whose diagonals are the taps: they are summed once, at the end.
    """
    pid = tl.program_id(0)
    i_bh, i_split, start = pid // (splits * chunks), (pid // chunks) % splits, (pid % chunks) * BLOCK_K
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    b_product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for step in tl.range(0, SPLIT, BLOCK_N):
        first = i_split * SPLIT + step
        b_grad = load_convolved(grad, i_b, i_h, first, N, E, GRAD_ACCESS, False, BLOCK_N, BLOCK_E)
        begin = first - taps // 2 + start
        b_value = load_convolved(value, i_b, i_h, begin, N, E, VALUE_ACCESS, HAS_MASK, BLOCK_K, BLOCK_E)
        b_product = dot_rows(b_grad, b_value, PRECISION, b_product)
    tap = start + tl.arange(0, BLOCK_K)[None, :] - tl.arange(0, BLOCK_N)[:, None]  # (BLOCK_N, BLOCK_K)
    p_parts += pid.to(tl.int64) * taps
    for i in tl.range(0, taps, num_stages=1):
        tl.store(p_parts + i, tl.sum(tl.where(tap == i, b_product, 0.0)))  # along an axis each, 3.6 fails on sm_100
