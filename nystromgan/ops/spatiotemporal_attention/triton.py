"""Exact attention in Triton: one forward launch, two backward launches, nothing of N x S stored.

Tiles are read as they lie in memory, channels by tokens, and transposed inside the products; rows of a softmax stay in
the registers of one program. The backward gives dQ (and the row sums of dO O, which it needs) in its first launch and
dK, dV in its second, each summed by one program in a fixed order, so results are the same from run to run. Wide float32
heads are cut into slices of channels: each slice of a result has a program of its own, which makes the weights anew.

Source: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nystromgan import _triton
from nystromgan._triton import dot
from nystromgan.ops.spatiotemporal_attention import tuning

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(length, BLOCK: tl.constexpr, SLICES: tl.constexpr):
    """This program's batch and head, block of `length` tokens and slice of channels."""
    i_block = tl.program_id(0) // SLICES
    num_blocks = tl.cdiv(length, BLOCK)
    return (i_block // num_blocks).to(tl.int64), i_block % num_blocks, tl.program_id(0) % SLICES


@triton.jit
def _offsets(o_row, o_col, stride_row, stride_col, WIDE: tl.constexpr):
    """Where the elements of a (row, column) tile lie from its first; 64-bit ones take twice the registers."""
    if WIDE:
        o_row, o_col = o_row.to(tl.int64), o_col.to(tl.int64)
    return o_row[:, None] * stride_row + o_col[None, :] * stride_col


@triton.jit
def _load(p_tile, m_row, m_col, ALL_ROWS: tl.constexpr, ALL_COLS: tl.constexpr):
    """A tile with zeros beyond its bounds; a mask that is known to hold would only stand in the way of wide loads."""
    if ALL_ROWS and ALL_COLS:
        b_tile = tl.load(p_tile)
    elif ALL_ROWS:
        b_tile = tl.load(p_tile, mask=m_col[None, :], other=0.0)
    elif ALL_COLS:
        b_tile = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    else:
        b_tile = tl.load(p_tile, mask=m_row[:, None] & m_col[None, :], other=0.0)
    return b_tile


@triton.jit
def _product(
    p_a, p_b, o_a, o_b, m_a, m_b, a_row, a_col, b_row, b_col, ROWS: tl.constexpr, TILE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a^T b of matrices with ROWS channels, a tile at a time."""
    o_row = tl.arange(0, TILE)
    b_sum = tl.zeros([o_a.shape[0], o_b.shape[0]], tl.float32)
    step = tl.full([], TILE, tl.int64)
    for i_row in range(0, ROWS, TILE):
        m_row = i_row + o_row < ROWS
        b_a = _load(p_a + _offsets(o_row, o_a, a_row, a_col, WIDE), m_row, m_a, False, False)  # [TILE, BLOCK_A]
        b_b = _load(p_b + _offsets(o_row, o_b, b_row, b_col, WIDE), m_row, m_b, False, False)  # [TILE, BLOCK_B]
        b_sum = dot(tl.trans(b_a), b_b, b_sum, PRECISION)
        p_a += step * a_row
        p_b += step * b_row
    return b_sum


@triton.jit
def _kept(p_mask, o_s, stride_s, num_keys):
    """Which keys exist and are not padding."""
    m_s = o_s < num_keys
    if p_mask is not None:
        m_s &= tl.load(p_mask + o_s.to(tl.int64) * stride_s, mask=m_s, other=1) == 0
    return m_s


@triton.jit
def _forward_kernel(
    query, key, value, mask, gamma, residual, output, attended, logsumexp, scale, num_heads, num_tokens, num_keys,
    query_b, query_h, query_c, query_n, key_b, key_h, key_c, key_s, value_b, value_h, value_e, value_s, mask_b, mask_s,
    residual_b, residual_h, residual_e, residual_n,
    C: tl.constexpr, E: tl.constexpr, TILE_C: tl.constexpr, TILE_E: tl.constexpr, SLICES: tl.constexpr,
    ALL_C: tl.constexpr, ALL_E: tl.constexpr, ALL_N: tl.constexpr, ALL_S: tl.constexpr, PADDED: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    i_bh, i_n, i_slice = _place(num_tokens, BLOCK_N, SLICES)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    o_n, o_s = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    first = i_n.to(tl.int64) * BLOCK_N
    o_c, o_e = tl.arange(0, TILE_C), i_slice * TILE_E + tl.arange(0, TILE_E)
    m_n, m_c, m_e = first + o_n < num_tokens, o_c < C, o_e < E
    query += i_b * query_b + i_h * query_h + first * query_n
    key += i_b * key_b + i_h * key_h
    value += i_b * value_b + i_h * value_h
    o_key = _offsets(o_c, o_s, key_c, key_s, WIDE)
    o_value = _offsets(o_e, o_s, value_e, value_s, WIDE)
    p_mask = None if mask is None else mask + i_b * mask_b

    sign = tl.where(scale < 0, -1.0, 1.0)  # the maximum is taken before the scale, which must not turn it over
    scale_log2 = tl.abs(scale) * LOG2E
    if C <= TILE_C:
        p_query = query + _offsets(o_c, o_n, query_c, query_n, WIDE)
        b_query = _load(p_query, m_c, m_n, ALL_C, ALL_N)  # [TILE_C, BLOCK_N]
        b_query = tl.trans((b_query * sign).to(query.dtype.element_ty))
    step = tl.full([], BLOCK_S, tl.int64)
    b_max = tl.full([BLOCK_N], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_output = tl.zeros([BLOCK_N, TILE_E], tl.float32)
    for i_s in range(0, num_keys, BLOCK_S):
        m_bound = i_s + o_s < num_keys
        if C <= TILE_C:
            b_key = _load(key + o_key, m_c, m_bound, ALL_C, ALL_S or PADDED)  # [TILE_C, BLOCK_S]
            b_logits = dot(b_query, b_key, None, PRECISION)  # [BLOCK_N, BLOCK_S]
        else:
            b_logits = sign * _product(
                query, key, o_n, o_s, m_n, m_bound, query_c, query_n, key_c, key_s, C, TILE_C, WIDE, PRECISION
            )
        b_value = _load(value + o_value, m_e, m_bound, ALL_E, ALL_S or PADDED)  # [TILE_E, BLOCK_S]
        if ALL_S and mask is None:
            b_new = tl.maximum(b_max, tl.max(b_logits, 1) * scale_log2)
            b_shift = b_new
            b_weights = tl.exp2(b_logits * scale_log2 - b_shift[:, None])
        else:
            m_s = _kept(p_mask, i_s + o_s, mask_s, num_keys)
            b_logits = tl.where(m_s[None, :], b_logits * scale_log2, -float("inf"))
            b_value = tl.where(m_s[None, :], b_value, 0.0)  # what is masked may be NaN
            b_new = tl.maximum(b_max, tl.max(b_logits, 1))
            b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_weights = tl.exp2(b_logits - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_weights, 1)
        b_output = b_output * b_decay[:, None]
        b_output = dot(b_weights.to(b_value.dtype), tl.trans(b_value), b_output, PRECISION)
        b_max = b_new
        key += step * key_s
        value += step * value_s

    m_empty = b_sum == 0.0  # every key is masked
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_output = tl.trans(b_output / b_sum[:, None])  # [TILE_E, BLOCK_N]
    # Beside the output's own layout, (E, N) or (N, E), a head is contiguous.
    out_e, out_n = (1, E) if TOKEN_MAJOR else (num_tokens, 1)
    o_out = i_bh * E * num_tokens + first * out_n + _offsets(o_e, o_n, out_e, out_n, WIDE)
    m_out = m_e[:, None] & m_n[None, :]
    if logsumexp is not None:
        b_lse = tl.where(m_empty, float("inf"), (b_max + tl.log2(b_sum)) * LN2)  # inf gives weights of 0
        tl.store(logsumexp + i_bh * num_tokens + first + o_n, b_lse, mask=m_n & (i_slice == 0))
    if attended is not None:
        tl.store(attended + o_out, b_output.to(attended.dtype.element_ty), mask=m_out)
    if gamma is not None:
        b_output *= tl.load(gamma).to(tl.float32)
    if residual is not None:
        residual += i_b * residual_b + i_h * residual_h + first * residual_n
        b_output += tl.load(residual + _offsets(o_e, o_n, residual_e, residual_n, WIDE), mask=m_out, other=0.0)
    tl.store(output + o_out, b_output.to(output.dtype.element_ty), mask=m_out)


@triton.jit
def _grad_query_kernel(
    grad_output, query, key, value, mask, gamma, attended, logsumexp, rowdot, grad_query, scale, num_heads, num_tokens,
    num_keys, grad_b, grad_h, grad_e, grad_n, query_b, query_h, query_c, query_n, key_b, key_h, key_c, key_s,
    value_b, value_h, value_e, value_s, mask_b, mask_s, attended_b, attended_h, attended_e, attended_n,
    C: tl.constexpr, E: tl.constexpr, TILE_C: tl.constexpr, TILE_E: tl.constexpr, SLICES: tl.constexpr,
    ALL_C: tl.constexpr, ALL_E: tl.constexpr, ALL_N: tl.constexpr, ALL_S: tl.constexpr, PADDED: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    i_bh, i_n, i_slice = _place(num_tokens, BLOCK_N, SLICES)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    o_n, o_s = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    first = i_n.to(tl.int64) * BLOCK_N
    o_c, o_e = i_slice * TILE_C + tl.arange(0, TILE_C), tl.arange(0, TILE_E)
    m_n, m_c, m_e = first + o_n < num_tokens, o_c < C, o_e < E
    query += i_b * query_b + i_h * query_h + first * query_n
    key += i_b * key_b + i_h * key_h
    value += i_b * value_b + i_h * value_h
    o_key = _offsets(o_c, o_s, key_c, key_s, WIDE)
    o_value = _offsets(o_e, o_s, value_e, value_s, WIDE)
    grad_output += i_b * grad_b + i_h * grad_h + first * grad_n
    p_grad = grad_output + _offsets(o_e, o_n, grad_e, grad_n, WIDE)
    attended += i_b * attended_b + i_h * attended_h + first * attended_n
    p_attended = attended + _offsets(o_e, o_n, attended_e, attended_n, WIDE)
    p_mask = None if mask is None else mask + i_b * mask_b

    b_rowdot = tl.zeros([BLOCK_N], tl.float32)
    for i_e in tl.static_range(0, E, TILE_E):
        b_grad = _load(p_grad, i_e + o_e < E, m_n, ALL_E, ALL_N)  # [TILE_E, BLOCK_N]
        b_attended = _load(p_attended, i_e + o_e < E, m_n, ALL_E, ALL_N)
        b_rowdot += tl.sum(b_grad.to(tl.float32) * b_attended.to(tl.float32), 0)
        p_grad += tl.full([], TILE_E, tl.int64) * grad_e
        p_attended += tl.full([], TILE_E, tl.int64) * attended_e
    tl.store(rowdot + i_bh * num_tokens + first + o_n, b_rowdot, mask=m_n & (i_slice == 0))
    b_lse = tl.load(logsumexp + i_bh * num_tokens + first + o_n, mask=m_n, other=float("inf")) * LOG2E
    if E <= TILE_E:
        b_grad = tl.trans(b_grad)  # [BLOCK_N, TILE_E]
    if C <= TILE_C:
        p_query = query + _offsets(o_c, o_n, query_c, query_n, WIDE)
        b_query = tl.trans(_load(p_query, m_c, m_n, ALL_C, ALL_N))  # [BLOCK_N, TILE_C]
    b_grad_query = tl.zeros([BLOCK_N, TILE_C], tl.float32)
    step = tl.full([], BLOCK_S, tl.int64)
    for i_s in range(0, num_keys, BLOCK_S):
        m_bound = i_s + o_s < num_keys
        m_s = m_bound
        if mask is not None:
            m_s = _kept(p_mask, i_s + o_s, mask_s, num_keys)
        b_key = _load(key + o_key, m_c, m_bound, ALL_C, ALL_S or PADDED)  # [TILE_C, BLOCK_S]
        if mask is not None:
            b_key = tl.where(m_s[None, :], b_key, 0.0)  # what is masked may be NaN
        if C <= TILE_C:
            b_logits = dot(b_query, b_key, None, PRECISION)  # [BLOCK_N, BLOCK_S]
        else:
            b_logits = _product(
                query, key, o_n, o_s, m_n, m_s, query_c, query_n, key_c, key_s, C, TILE_C, WIDE, PRECISION
            )
        b_weights = tl.exp2(b_logits * (scale * LOG2E) - b_lse[:, None])
        if E <= TILE_E:
            b_value = _load(value + o_value, m_e, m_bound, ALL_E, ALL_S or PADDED)  # [TILE_E, BLOCK_S]
            b_grad_weights = dot(b_grad, b_value, None, PRECISION)
        else:
            b_grad_weights = _product(
                grad_output, value, o_n, o_s, m_n, m_s, grad_e, grad_n, value_e, value_s, E, TILE_E, WIDE, PRECISION
            )
        b_grad_logits = b_weights * (b_grad_weights - b_rowdot[:, None])
        if not (ALL_S and mask is None):
            b_grad_logits = tl.where(m_s[None, :], b_grad_logits, 0.0)
        b_grad_query = dot(b_grad_logits.to(b_key.dtype), tl.trans(b_key), b_grad_query, PRECISION)
        key += step * key_s
        value += step * value_s

    if gamma is not None:
        scale *= tl.load(gamma).to(tl.float32)
    out_c, out_n = (1, C) if TOKEN_MAJOR else (num_tokens, 1)
    p_grad_query = grad_query + i_bh * C * num_tokens + first * out_n + _offsets(o_c, o_n, out_c, out_n, WIDE)
    b_grad_query = tl.trans(b_grad_query * scale).to(grad_query.dtype.element_ty)
    tl.store(p_grad_query, b_grad_query, mask=m_c[:, None] & m_n[None, :])


@triton.jit
def _grad_key_value_kernel(
    grad_output, query, key, value, mask, gamma, logsumexp, rowdot, grad_key, grad_value, scale, num_heads, num_tokens,
    num_keys, grad_b, grad_h, grad_e, grad_n, query_b, query_h, query_c, query_n, key_b, key_h, key_c, key_s,
    value_b, value_h, value_e, value_s, mask_b, mask_s,
    C: tl.constexpr, E: tl.constexpr, TILE_C: tl.constexpr, TILE_E: tl.constexpr, SLICES: tl.constexpr,
    ALL_C: tl.constexpr, ALL_E: tl.constexpr, ALL_N: tl.constexpr, ALL_S: tl.constexpr, PADDED: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    i_bh, i_s, i_slice = _place(num_keys, BLOCK_S, SLICES)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    o_n, o_s = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    first = i_s.to(tl.int64) * BLOCK_S
    # One tile of channels serves all slices; one of several belongs to its slice.
    o_c = (i_slice if C > TILE_C else 0) * TILE_C + tl.arange(0, TILE_C)
    o_e = (i_slice if E > TILE_E else 0) * TILE_E + tl.arange(0, TILE_E)
    m_s, m_c, m_e = first + o_s < num_keys, o_c < C, o_e < E
    query += i_b * query_b + i_h * query_h
    key += i_b * key_b + i_h * key_h + first * key_s
    value += i_b * value_b + i_h * value_h + first * value_s
    grad_output += i_b * grad_b + i_h * grad_h
    o_query = _offsets(o_c, o_n, query_c, query_n, WIDE)
    o_grad = _offsets(o_e, o_n, grad_e, grad_n, WIDE)
    logsumexp += i_bh * num_tokens
    rowdot += i_bh * num_tokens

    # Each key's gradients come from its own row alone, so padding may stay until the end; but it may be NaN or huge.
    m_keep = m_s
    if mask is not None:
        m_keep = _kept(mask + i_b * mask_b, first + o_s, mask_s, num_keys)
    if C <= TILE_C:
        p_key = key + _offsets(o_c, o_s, key_c, key_s, WIDE)
        b_key = _load(p_key, m_c, m_keep, ALL_C, ALL_S and mask is None)
        b_key = tl.trans(b_key)  # [BLOCK_S, TILE_C]
    if E <= TILE_E:
        p_value = value + _offsets(o_e, o_s, value_e, value_s, WIDE)
        b_value = _load(p_value, m_e, m_keep, ALL_E, ALL_S and mask is None)
        b_value = tl.trans(b_value)  # [BLOCK_S, TILE_E]
    b_grad_key = tl.zeros([BLOCK_S, TILE_C], tl.float32)
    b_grad_value = tl.zeros([BLOCK_S, TILE_E], tl.float32)
    step = tl.full([], BLOCK_N, tl.int64)
    for i_n in range(0, num_tokens, BLOCK_N):
        m_n = i_n + o_n < num_tokens
        b_query = _load(query + o_query, m_c, m_n, ALL_C, ALL_N or PADDED)  # [TILE_C, BLOCK_N]
        b_grad = _load(grad_output + o_grad, m_e, m_n, ALL_E, ALL_N or PADDED)  # [TILE_E, BLOCK_N]
        b_lse = (
            tl.load(logsumexp + i_n + o_n, mask=m_n, other=float("inf")) * LOG2E
        )  # beyond the tokens: weights of zero
        b_rowdot = tl.load(rowdot + i_n + o_n, mask=m_n, other=0.0)
        if C <= TILE_C:
            b_logits = dot(b_key, b_query, None, PRECISION)  # [BLOCK_S, BLOCK_N]
        else:
            b_logits = _product(
                key, query, o_s, o_n, m_keep, m_n, key_c, key_s, query_c, query_n, C, TILE_C, WIDE, PRECISION
            )
        b_weights = tl.exp2(b_logits * (scale * LOG2E) - b_lse[None, :])
        b_grad_value = dot(b_weights.to(b_grad.dtype), tl.trans(b_grad), b_grad_value, PRECISION)
        if E <= TILE_E:
            b_grad_weights = dot(b_value, b_grad, None, PRECISION)
        else:
            b_grad_weights = _product(
                value, grad_output, o_s, o_n, m_keep, m_n, value_e, value_s, grad_e, grad_n, E, TILE_E, WIDE, PRECISION
            )
        b_grad_logits = b_weights * (b_grad_weights - b_rowdot[None, :])
        b_grad_key = dot(b_grad_logits.to(b_query.dtype), tl.trans(b_query), b_grad_key, PRECISION)
        query += step * query_n
        grad_output += step * grad_n

    if gamma is not None:
        b_gamma = tl.load(gamma).to(tl.float32)
        b_grad_key *= b_gamma
        b_grad_value *= b_gamma
    if mask is not None:
        b_grad_key = tl.where(m_keep[:, None], b_grad_key, 0.0)
        b_grad_value = tl.where(m_keep[:, None], b_grad_value, 0.0)
    if C <= TILE_C:
        m_c &= i_slice == 0
    if E <= TILE_E:
        m_e &= i_slice == 0
    key_row, key_col = (1, C) if TOKEN_MAJOR else (num_keys, 1)
    value_row, value_col = (1, E) if TOKEN_MAJOR else (num_keys, 1)
    p_grad_key = grad_key + i_bh * C * num_keys + first * key_col + _offsets(o_c, o_s, key_row, key_col, WIDE)
    p_grad_value = grad_value + i_bh * E * num_keys + first * value_col + _offsets(o_e, o_s, value_row, value_col, WIDE)
    b_grad_key = tl.trans(b_grad_key * scale).to(grad_key.dtype.element_ty)
    b_grad_value = tl.trans(b_grad_value).to(grad_value.dtype.element_ty)
    tl.store(p_grad_key, b_grad_key, mask=m_c[:, None] & m_s[None, :])
    tl.store(p_grad_value, b_grad_value, mask=m_e[:, None] & m_s[None, :])


def spatiotemporal_attention(
    query: Tensor,  # (B, H, C, N)
    key: Tensor,  # (B, H, C, S)
    value: Tensor,  # (B, H, E, S)
    key_padding_mask: Tensor | None,  # (B, S)
    gamma: Tensor | None,  # ()
    residual: Tensor | None,  # (B, H, E, N)
    scale: float,
    token_major: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, H, E, N); with `save` also the result before gamma where there is one, and the log-sum-exp."""
    batch, heads, _, tokens = query.shape
    output = _empty_maps(query, value.shape[2], tokens, token_major)
    attended = torch.empty_like(output) if save and gamma is not None else None
    logsumexp = query.new_empty((batch, heads, tokens), dtype=torch.float32) if save else None
    mask = _as_bytes(key_padding_mask)
    keys = key.shape[3]
    key, value, padded = _padded(key, value)
    strides = (*query.stride(), *key.stride(), *value.stride(), *_strides(mask, 2), *_strides(residual, 4))
    grid, constants = _configure("forward", query, key, value, keys, token_major, padded, residual, output)
    with _triton.launch_on(query):
        _forward_kernel[grid](
            query, key, value, mask, gamma, residual, output, attended, logsumexp, scale, heads, tokens,
            keys, *strides, **constants,
        )  # fmt: skip
    if attended is None:
        attended = query.new_empty(0)
    if logsumexp is None:
        logsumexp = query.new_empty(0, dtype=torch.float32)
    return output, attended, logsumexp


def spatiotemporal_attention_backward(
    grad_output: Tensor,  # (B, H, E, N)
    query: Tensor,  # (B, H, C, N)
    key: Tensor,  # (B, H, C, S)
    value: Tensor,  # (B, H, E, S)
    key_padding_mask: Tensor | None,  # (B, S)
    gamma: Tensor | None,  # ()
    attended: Tensor,  # (B, H, E, N)
    logsumexp: Tensor,  # (B, H, N)
    scale: float,
    token_major: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out as the output, and of gamma () where there is one."""
    _, heads, _, tokens = query.shape
    keys = key.shape[3]
    grads = [_empty_maps(x, x.shape[2], x.shape[3], token_major) for x in (query, key, value)]
    rowdot = torch.empty_like(logsumexp)
    mask = _as_bytes(key_padding_mask)
    with _triton.launch_on(query):
        read_key, read_value, padded = _padded(key, value)
        operands = (grad_output, query, read_key, read_value)
        grid, constants = _configure("grad_query", *operands[1:], keys, token_major, padded, grad_output, attended)
        _grad_query_kernel[grid](
            *operands, mask, gamma, attended, logsumexp, rowdot, grads[0], scale, heads, tokens, keys,
            *_all_strides(operands), *_strides(mask, 2), *attended.stride(), **constants,
        )  # fmt: skip
        read_query, read_grad, padded = _padded(query, grad_output)
        operands = (read_grad, read_query, key, value)
        grid, constants = _configure("grad_key_value", *operands[1:], keys, token_major, padded, read_grad)
        _grad_key_value_kernel[grid](
            *operands, mask, gamma, logsumexp, rowdot, *grads[1:], scale, heads, tokens, keys,
            *_all_strides(operands), *_strides(mask, 2), **constants,
        )  # fmt: skip
    grad_gamma = rowdot.sum() if gamma is not None else rowdot.new_empty(())
    return grads[0], grads[1], grads[2], grad_gamma


def _empty_maps(like: Tensor, channels: int, tokens: int, token_major: bool) -> Tensor:
    """(B, H, channels, tokens), contiguous as it reads or, token-major, as (B, H, tokens, channels)."""
    outer = like.shape[:2]
    if token_major:
        return like.new_empty(*outer, tokens, channels).mT
    return like.new_empty(*outer, channels, tokens)


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _padded(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both operands of a loop, copied where they cannot be read 16 bytes at once; then zeros fill the last block.

    Every program reads all of them: element by element it has no registers for the addresses (2 KB spilled at E = 256),
    and the copy is one reading more of the many.
    """
    if _reads_wide(first) and _reads_wide(second):
        return first, second, False
    tokens = first.shape[3]
    room = triton.cdiv(tokens, 128) * 128 - tokens
    first, second = (F.pad(x, (0, room))[..., :tokens] if room else x.contiguous() for x in (first, second))
    return first, second, True


def _reads_wide(tensor: Tensor) -> bool:
    """Whether Triton can read 16 bytes at once: it looks for multiples of 16, in strides and in the bound of a mask."""
    rest, rows, cols = (*tensor.stride()[:2],), tensor.stride(2), tensor.stride(3)
    contiguous = tensor.shape[3] if cols == 1 else tensor.shape[2] if rows == 1 else 1
    across = rows if cols == 1 else cols
    return all(x % 16 == 0 for x in (contiguous, across, *rest, tensor.data_ptr()))


def _reaches_far(tensor: Tensor | None) -> bool:
    """Whether a tile of (B, H, channels, tokens) may span more elements than 32 bits count."""
    return tensor is not None and 256 * max(tensor.stride(2), tensor.stride(3)) > 2**30


def _all_strides(tensors: tuple[Tensor, ...]) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()]


def _strides(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if tensor is None else tensor.stride()


def _configure(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: int,
    token_major: bool,
    padded: bool,
    *others: Tensor | None,
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a kernel for these operands, and its compile-time constants with the tuned configuration."""
    batch, heads, channels, tokens = query.shape
    value_channels = value.shape[2]
    # A float32 operand of a product lies in registers whole, in two parts: wide ones are taken in slices.
    most = 64 if query.dtype == torch.float32 else 256
    tile_c, tile_e = _triton.tile(channels, most), _triton.tile(value_channels, most)
    sliced = max(channels, value_channels) > most
    config = tuning.choose(kernel, _triton.architecture(query), tile_c, tile_e, query.element_size(), sliced)
    if kernel == "forward" and tokens % 16:  # results go out element by element, whose addresses fill the registers
        config = config._replace(BLOCK_N=min(config.BLOCK_N, 64 if tile_e <= 128 else 32), num_warps=8)
    slices_c, slices_e = triton.cdiv(channels, tile_c), triton.cdiv(value_channels, tile_e)
    slices = {"forward": slices_e, "grad_query": slices_c, "grad_key_value": max(slices_c, slices_e)}[kernel]
    blocks = triton.cdiv(keys, config.BLOCK_S) if kernel == "grad_key_value" else triton.cdiv(tokens, config.BLOCK_N)
    constants = {
        "C": channels,
        "E": value_channels,
        "TILE_C": tile_c,
        "TILE_E": tile_e,
        "SLICES": slices,
        # Whether every tile is full: then nothing is masked.
        "ALL_C": channels % tile_c == 0 and slices_c in (1, slices),
        "ALL_E": value_channels % tile_e == 0 and slices_e in (1, slices),
        "ALL_N": tokens % config.BLOCK_N == 0,
        "ALL_S": keys % config.BLOCK_S == 0,
        "PADDED": padded,
        "TOKEN_MAJOR": token_major,
        "WIDE": any(_reaches_far(x) for x in (query, key, value, *others)),
        "PRECISION": _triton.precision(query.dtype),
    }
    return (batch * heads * blocks * slices,), constants | config._asdict() | _triton.FUSED
