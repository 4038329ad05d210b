"""How the Triton kernels of `nystrom_attention` read and write tokens (B, H, N, D) and landmarks (B, H, M, D)."""

import triton
import triton.language as tl


@triton.jit
def load_landmarks(p, i_bh, o_m, M, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows o_m of a contiguous (B H, M, D) float32 tensor, zero outside."""
    o_d = tl.arange(0, BLOCK_D)
    p += i_bh.to(tl.int64) * M * D
    return tl.load(p + o_m[:, None] * D + o_d[None, :], mask=(o_m[:, None] < M) & (o_d[None, :] < D), other=0.0)


@triton.jit
def head_of(p, s_b, s_h, s_n, i_b, i_h, ACCESS: tl.constexpr):
    """The tokens of one head and their stride, which the compiler learns are multiples of what a load may take at once.

    ACCESS is what `triton_pool.access` gives for the tensor.
    """
    VECTOR: tl.constexpr = ACCESS[0]
    return p + (i_b * (s_b // VECTOR * VECTOR) + i_h * (s_h // VECTOR * VECTOR)), s_n // VECTOR * VECTOR


@triton.jit
def load_tokens(
    p, s_n, s_d, first, valid, D: tl.constexpr, ACCESS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """BLOCK_N tokens of one head from `first`, zero where not `valid`, which may hold anything.

    The first token's offset takes 64 bits. Within a tile 32 do, in half the registers, unless the tensor is WIDE.
    """
    WIDE: tl.constexpr = ACCESS[1]
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if WIDE:
        o_n, o_d = o_n.to(tl.int64), o_d.to(tl.int64)
    p += tl.cast(first, tl.int64) * s_n
    return tl.load(p + (o_n[:, None] * s_n + o_d[None, :] * s_d), mask=valid[:, None] & (o_d[None, :] < D), other=0.0)


@triton.jit
def store_tokens(
    p, first, tile, N, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TOKEN_MAJOR: tl.constexpr
):  # fmt: skip
    """Writes BLOCK_N tokens of one head from `first`: of (N, D) contiguous where TOKEN_MAJOR, else of (D, N)."""
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (o_n[:, None] < N - first) & (o_d[None, :] < D)
    if TOKEN_MAJOR:
        p += tl.cast(first, tl.int64) * D
        p_tile = p + (o_n[:, None] * D + o_d[None, :])
    else:
        p_tile = p + first + (o_n[:, None] + o_d[None, :].to(tl.int64) * N)
    tl.store(p_tile, tile.to(p.dtype.element_ty), mask=inside)


@triton.jit
def absent(p_mask, i_b, o_m, M, HAS_MASK: tl.constexpr):
    """Which landmarks of o_m there are not."""
    beyond = o_m >= M
    if HAS_MASK:
        beyond |= tl.load(p_mask + i_b.to(tl.int64) * M + o_m, mask=o_m < M, other=1) != 0
    return beyond
