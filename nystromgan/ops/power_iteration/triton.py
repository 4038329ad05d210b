"""Power iteration in Triton: one launch a step for all weights of a network.

A program takes some rows of one weight: their t = W v and then, with the rows still in cache, their share of W^T t. The
program that is last to finish a weight adds the shares in the order of the rows, whoever made them, and divides:
u = t / |t|, s = W^T t / |t|, v = s / |s|, sigma = |s|. A weight is read once from memory and once from cache, and the
result is the same from run to run.

Pointers travel as the launch's arguments, and shapes as constants of the kernel: no table that may be stale, nothing to
copy, and a CUDA graph holds all of it.

Source: Miyato et al., "Spectral normalization for generative adversarial networks", 2018, algorithm 1.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nystromgan import _triton
from nystromgan.ops.power_iteration import tuning

MOST_WEIGHTS = 64  # of a launch: 24 bytes each of its 4 KiB of arguments, and as many selections in every program
MOST_PROGRAMS = 128  # of a weight, since one of them adds all their shares
ELEMENTS = 4096  # of a program that divides
PARTS = 1024  # of a dot product that are added at once


class Weight(NamedTuple):
    """What a kernel knows of a weight (O, I), all constant; strides and offsets in elements."""

    first: int  # its first program
    rows: int
    columns: int
    stride_row: int
    stride_column: int
    stride_u: int
    stride_v: int
    tiles: int  # of BLOCK_O rows, of one program
    offset_u: int  # in uv
    offset_v: int
    offset_share: int  # in shares
    place: int  # in sigma
    wide: int  # 1 where eight elements of a row can be read at once


# Where a plan, a tuple of such tuples, has each field.
FIRST, ROWS, COLUMNS, STRIDE_ROW, STRIDE_COLUMN, STRIDE_U, STRIDE_V = (tl.constexpr(i) for i in range(7))
TILES, OFFSET_U, OFFSET_V, OFFSET_SHARE, PLACE, WIDE = (tl.constexpr(i) for i in range(7, 13))


@triton.jit
def _mine(PLAN: tl.constexpr, FIELD: tl.constexpr):
    """A field of the weight that this program works on."""
    value = tl.full([], PLAN[0][FIELD], tl.int64)
    for i in tl.static_range(1, len(PLAN)):
        value = tl.where(tl.program_id(0) >= PLAN[i][FIRST], PLAN[i][FIELD], value)
    return value


@triton.jit
def _my_pointer(pointers, PLAN: tl.constexpr):
    pointer = pointers[0]
    for i in tl.static_range(1, len(PLAN)):
        pointer = tl.where(tl.program_id(0) >= PLAN[i][FIRST], pointers[i], pointer)
    return pointer


@triton.jit
def _tile(p_weight, o_o, o_i, stride_row, stride_column, rows, columns):
    """A float32 tile (rows, columns) of the weight, with zeros beyond it."""
    p_tile = p_weight + o_o[:, None].to(tl.int64) * stride_row + o_i[None, :].to(tl.int64) * stride_column
    return tl.load(p_tile, mask=(o_o < rows)[:, None] & (o_i < columns)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _multiply(
    p_weight, p_u, p_v, p_t, p_share, p_square, i_program, rows, columns, stride_row, stride_column, stride_u, stride_v,
    tiles, ITERATE: tl.constexpr, WIDE_ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """This program's rows of t = W v, and its shares of W^T t and |t|^2; or of u^T t, where nothing is iterated."""
    if WIDE_ROWS:  # tells the compiler what it needs to read eight elements at once
        columns = columns // 8 * 8
        stride_row = stride_row // 8 * 8
        stride_column = 1
    o_i = tl.arange(0, BLOCK_I)
    o_first = i_program * tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    square = 0.0
    for i_tile in range(0, tiles):
        o_o = o_first + i_tile * BLOCK_O
        b_sum = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for i_i in range(0, columns, BLOCK_I):
            b_v = tl.load(p_v + (i_i + o_i).to(tl.int64) * stride_v, mask=i_i + o_i < columns, other=0.0)
            b_sum += _tile(p_weight, o_o, i_i + o_i, stride_row, stride_column, rows, columns) * b_v[None, :]
        b_t = tl.sum(b_sum, 1)  # [BLOCK_O]
        if ITERATE:
            square += tl.sum(b_t * b_t)
            tl.store(p_t + o_o, b_t, mask=o_o < rows)
        else:
            square += tl.sum(b_t * tl.load(p_u + o_o.to(tl.int64) * stride_u, mask=o_o < rows, other=0.0))
    tl.store(p_square + i_program, square)
    if ITERATE:
        tl.debug_barrier()  # b_t is read in another layout than it was written in
        for i_i in range(0, columns, BLOCK_I):
            b_sum = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
            for i_tile in range(0, tiles):
                o_o = o_first + i_tile * BLOCK_O
                b_t = tl.load(p_t + o_o, mask=o_o < rows, other=0.0)
                b_sum += _tile(p_weight, o_o, i_i + o_i, stride_row, stride_column, rows, columns) * b_t[:, None]
            tl.store(p_share + i_program * columns + i_i + o_i, tl.sum(b_sum, 0), mask=i_i + o_i < columns)


@triton.jit
def _divide(
    p_u, p_v, p_t, p_s, p_share, p_square, p_sigma, eps, programs, rows, columns, stride_u, stride_v,
    PROGRAMS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Adds the shares in the order of the rows, and divides: u, v and sigma. Reads what others wrote past L1 (.cg)."""
    o_i, o_p = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_O)
    o_all = tl.arange(0, PROGRAMS)
    b_squares = tl.load(p_square + o_all, mask=o_all < programs, other=0.0, cache_modifier=".cg")
    norm_t = tl.maximum(tl.sqrt(tl.sum(b_squares)), eps)
    square = 0.0
    for i_i in range(0, columns, BLOCK_I):
        m_i = i_i + o_i < columns
        b_sum = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for i_p in range(0, programs, BLOCK_O):
            p_tile = p_share + (i_p + o_p).to(tl.int64)[:, None] * columns + (i_i + o_i)[None, :]
            m_tile = (i_p + o_p < programs)[:, None] & m_i[None, :]
            b_sum += tl.load(p_tile, mask=m_tile, other=0.0, cache_modifier=".cg")
        b_s = tl.sum(b_sum, 0) / norm_t
        square += tl.sum(b_s * b_s)
        tl.store(p_s + i_i + o_i, b_s, mask=m_i)
    norm_s = tl.maximum(tl.sqrt(square), eps)
    tl.store(p_sigma, square / norm_s)
    tl.debug_barrier()  # b_s is read in another layout than it was written in
    for i_i in range(0, columns, BLOCK_I):
        m_i = i_i + o_i < columns
        b_v = tl.load(p_s + i_i + o_i, mask=m_i) / norm_s
        tl.store(p_s + i_i + o_i, b_v, mask=m_i)
        tl.store(p_v + (i_i + o_i).to(tl.int64) * stride_v, b_v.to(p_v.dtype.element_ty), mask=m_i)
    for i_o in range(0, rows, BLOCK_I):
        m_o = i_o + o_i < rows
        b_u = tl.load(p_t + i_o + o_i, mask=m_o, cache_modifier=".cg") / norm_t
        tl.store(p_t + i_o + o_i, b_u, mask=m_o)
        tl.store(p_u + (i_o + o_i).to(tl.int64) * stride_u, b_u.to(p_u.dtype.element_ty), mask=m_o)


@triton.jit
def _copy(p_from, p_to, length, stride, BLOCK: tl.constexpr):
    for i in range(0, length, BLOCK):
        o = i + tl.arange(0, BLOCK)
        tl.store(p_to + o, tl.load(p_from + o.to(tl.int64) * stride, mask=o < length).to(tl.float32), mask=o < length)


@triton.jit
def _power_iteration_kernel(
    weights, us, vs, sigma, uv, shares, counters, eps, PLAN: tl.constexpr, ITERATE: tl.constexpr,
    FIRST_STEP: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    p_weight, p_u, p_v = _my_pointer(weights, PLAN), _my_pointer(us, PLAN), _my_pointer(vs, PLAN)
    rows, columns = _mine(PLAN, ROWS).to(tl.int32), _mine(PLAN, COLUMNS).to(tl.int32)
    stride_row, stride_column = _mine(PLAN, STRIDE_ROW), _mine(PLAN, STRIDE_COLUMN)
    stride_u, stride_v = _mine(PLAN, STRIDE_U), _mine(PLAN, STRIDE_V)
    tiles = _mine(PLAN, TILES).to(tl.int32)
    programs = tl.cdiv(rows, tiles * BLOCK_O)
    i_program = tl.program_id(0) - _mine(PLAN, FIRST).to(tl.int32)
    p_t, p_s = uv + _mine(PLAN, OFFSET_U), uv + _mine(PLAN, OFFSET_V)
    p_square = shares + _mine(PLAN, OFFSET_SHARE)
    p_share = p_square + PROGRAMS
    # Later steps start from the float32 v of the one before.
    p_start, stride_start = (p_v, stride_v) if FIRST_STEP else (p_s, 1)
    if _mine(PLAN, WIDE) == 1:
        _multiply(
            p_weight, p_u, p_start, p_t, p_share, p_square, i_program, rows, columns, stride_row, stride_column,
            stride_u, stride_start, tiles, ITERATE, True, BLOCK_O, BLOCK_I,
        )  # fmt: skip
    else:
        _multiply(
            p_weight, p_u, p_start, p_t, p_share, p_square, i_program, rows, columns, stride_row, stride_column,
            stride_u, stride_start, tiles, ITERATE, False, BLOCK_O, BLOCK_I,
        )  # fmt: skip

    tl.debug_barrier()  # every thread's shares are written before one of them counts this program as done
    place = _mine(PLAN, PLACE)
    if tl.atomic_add(counters + place, 1, sem="acq_rel") == programs - 1:
        tl.store(counters + place, 0)  # for the next step
        if ITERATE:
            _divide(
                p_u, p_v, p_t, p_s, p_share, p_square, sigma + place, eps, programs, rows, columns, stride_u, stride_v,
                PROGRAMS, BLOCK_O, BLOCK_I,
            )  # fmt: skip
        else:
            o_all = tl.arange(0, PROGRAMS)
            b_shares = tl.load(p_square + o_all, mask=o_all < programs, other=0.0, cache_modifier=".cg")
            tl.store(sigma + place, tl.sum(b_shares))
            _copy(p_u, p_t, rows, stride_u, BLOCK_I)
            _copy(p_v, p_s, columns, stride_v, BLOCK_I)


@triton.jit
def _spectral_normalize_kernel(weights, outputs, sigma, PLAN: tl.constexpr, ELEMENTS: tl.constexpr):
    p_weight, p_output = _my_pointer(weights, PLAN), _my_pointer(outputs, PLAN)
    columns = _mine(PLAN, COLUMNS)
    size = _mine(PLAN, ROWS) * columns
    o = (tl.program_id(0) - _mine(PLAN, FIRST)) * ELEMENTS + tl.arange(0, ELEMENTS)
    m = o < size
    scale = tl.load(sigma + _mine(PLAN, PLACE))
    if _mine(PLAN, WIDE) == 1:
        b_weight = tl.load(p_weight + o, mask=m)
        tl.store(p_output + o, (b_weight.to(tl.float32) / scale).to(p_output.dtype.element_ty), mask=m)
    else:
        p_element = p_weight + o // columns * _mine(PLAN, STRIDE_ROW) + o % columns * _mine(PLAN, STRIDE_COLUMN)
        b_weight = tl.load(p_element, mask=m)
        tl.store(p_output + o, (b_weight.to(tl.float32) / scale).to(p_output.dtype.element_ty), mask=m)


@triton.jit
def _normalize_dots_kernel(grads, outputs, dots, PLAN: tl.constexpr, ELEMENTS: tl.constexpr):
    """This program's part of <dW_sn, W_sn>."""
    p_grad, p_output = _my_pointer(grads, PLAN), _my_pointer(outputs, PLAN)
    o = (tl.program_id(0) - _mine(PLAN, FIRST)) * ELEMENTS + tl.arange(0, ELEMENTS)
    m = o < _mine(PLAN, ROWS) * _mine(PLAN, COLUMNS)
    b_grad, b_output = tl.load(p_grad + o, mask=m, other=0.0), tl.load(p_output + o, mask=m, other=0.0)
    tl.store(dots + tl.program_id(0), tl.sum(b_grad.to(tl.float32) * b_output.to(tl.float32)))


@triton.jit
def _normalize_gradient_kernel(
    grads, targets, dots, sigma, uv, PLAN: tl.constexpr, ELEMENTS: tl.constexpr, PARTS: tl.constexpr
):
    p_grad, p_target = _my_pointer(grads, PLAN), _my_pointer(targets, PLAN)
    columns, first = _mine(PLAN, COLUMNS), _mine(PLAN, FIRST)
    size = _mine(PLAN, ROWS) * columns
    b_sum = tl.zeros([PARTS], tl.float32)  # in the order of the programs, whoever made them
    for i in range(0, tl.cdiv(size, ELEMENTS).to(tl.int32), PARTS):
        o_part = i + tl.arange(0, PARTS)
        b_sum += tl.load(dots + first + o_part, mask=o_part < tl.cdiv(size, ELEMENTS), other=0.0)
    along = tl.sum(b_sum)
    scale = 1.0 / tl.load(sigma + _mine(PLAN, PLACE))
    o = (tl.program_id(0) - first) * ELEMENTS + tl.arange(0, ELEMENTS)
    m = o < size
    b_u = tl.load(uv + _mine(PLAN, OFFSET_U) + o // columns, mask=m)
    b_v = tl.load(uv + _mine(PLAN, OFFSET_V) + o % columns, mask=m)
    b_grad = tl.load(p_grad + o, mask=m).to(tl.float32)
    tl.store(p_target + o, ((b_grad - along * b_u * b_v) * scale).to(p_target.dtype.element_ty), mask=m)


def power_iteration(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], iterations: int, eps: float
) -> tuple[Tensor, Tensor]:
    """sigma (len,), and uv: a flat float32 copy of every u and then every v as used; u and v are updated in place."""
    config = tuning.choose(_triton.architecture(weights[0]))
    lengths = [vector.shape[0] for vector in (*u, *v)]
    sigma = weights[0].new_empty(len(weights), dtype=torch.float32)
    uv = weights[0].new_empty(sum(lengths), dtype=torch.float32)
    counters = torch.zeros_like(sigma, dtype=torch.int32)
    for group in _groups(weights, u, v):
        plan, programs, scratch = _plan(tuple(_described(i, weights, u, v, lengths) for i in group), config.BLOCK_O)
        shares = uv.new_empty(scratch)
        pointers = [tuple(x[i] for i in group) for x in (weights, u, v)]
        with _triton.launch_on(uv):
            for step in range(max(iterations, 1)):
                _power_iteration_kernel[(programs,)](
                    *pointers, sigma, uv, shares, counters, eps, plan, iterations > 0, step == 0, MOST_PROGRAMS,
                    **config._asdict(), **_triton.FUSED,
                )  # fmt: skip
    return sigma, uv


def spectral_normalize(weights: Sequence[Tensor], sigma: Tensor, outputs: Sequence[Tensor]) -> None:
    """outputs_i = W_i / sigma_i, contiguous and in the weights' dtypes."""
    for group in _groups(weights):
        plan, programs = _elementwise_plan(tuple((*weights[i].shape, *weights[i].stride(), i) for i in group))
        pointers = [tuple(x[i] for i in group) for x in (weights, outputs)]
        with _triton.launch_on(sigma):
            _spectral_normalize_kernel[(programs,)](*pointers, sigma, plan, ELEMENTS, **_triton.FUSED)


def spectral_normalize_backward(
    grad_outputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    grad_weights: Sequence[Tensor],
) -> None:
    """grad_weights_i = (dW_sn - <dW_sn, W_sn> u v^T) / sigma_i; all matrices are contiguous. Two launches."""
    lengths = [output.shape[axis] for axis in range(2) for output in outputs]
    for group in _groups(grad_outputs, outputs):
        described = tuple((*outputs[i].shape, sum(lengths[:i]), sum(lengths[: len(outputs) + i]), i) for i in group)
        plan, programs = _gradient_plan(described)
        grads, made, targets = (tuple(x[i] for i in group) for x in (grad_outputs, outputs, grad_weights))
        dots = uv.new_empty(programs)
        with _triton.launch_on(sigma):
            _normalize_dots_kernel[(programs,)](grads, made, dots, plan, ELEMENTS, **_triton.FUSED)
            _normalize_gradient_kernel[(programs,)](
                grads, targets, dots, sigma, uv, plan, ELEMENTS, PARTS, **_triton.FUSED
            )


def _groups(*tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the weights that share a launch: of the same dtypes, and no more than fit.

    The longest rows come first, so that no program starts late with much to do.
    """
    by_dtype: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i in sorted(range(len(tensors[0])), key=lambda i: -tensors[0][i].shape[1]):
        by_dtype.setdefault(tuple(x[i].dtype for x in tensors), []).append(i)
    return [
        group[start : start + MOST_WEIGHTS]
        for group in by_dtype.values()
        for start in range(0, len(group), MOST_WEIGHTS)
    ]


def _described(
    i: int, weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], lengths: list[int]
) -> tuple[int, ...]:
    """Shape, strides, offsets in uv and index of one weight: what its kernel is compiled for."""
    offset_u, offset_v = sum(lengths[:i]), sum(lengths[: len(weights) + i])
    return *weights[i].shape, *weights[i].stride(), *u[i].stride(), *v[i].stride(), offset_u, offset_v, i


@functools.lru_cache(maxsize=64)
def _plan(described: tuple[tuple[int, ...], ...], block_o: int) -> tuple[tuple[Weight, ...], int, int]:
    """The kernel's plan, its number of programs, and the elements of its scratch memory."""
    plan = []
    programs = scratch = 0
    for rows, columns, stride_row, stride_column, stride_u, stride_v, offset_u, offset_v, i in described:
        tiles = triton.cdiv(rows, block_o * MOST_PROGRAMS)
        wide = stride_column == 1 and stride_row % 8 == 0 and columns % 8 == 0
        strides = (stride_row, stride_column, stride_u, stride_v)
        plan.append(Weight(programs, rows, columns, *strides, tiles, offset_u, offset_v, scratch, i, int(wide)))
        count = triton.cdiv(rows, tiles * block_o)
        programs += count
        scratch += MOST_PROGRAMS + triton.cdiv(count * columns, 16) * 16
    return tuple(plan), programs, scratch


@functools.lru_cache(maxsize=64)
def _elementwise_plan(described: tuple[tuple[int, ...], ...]) -> tuple[tuple[Weight, ...], int]:
    """The plan of `_spectral_normalize_kernel`, where `wide` means contiguous, and its number of programs."""
    plan = []
    programs = 0
    for rows, columns, stride_row, stride_column, i in described:
        contiguous = stride_column == 1 and stride_row == columns
        plan.append(Weight(programs, rows, columns, stride_row, stride_column, 0, 0, 0, 0, 0, 0, i, int(contiguous)))
        programs += triton.cdiv(rows * columns, ELEMENTS)
    return tuple(plan), programs


@functools.lru_cache(maxsize=64)
def _gradient_plan(described: tuple[tuple[int, ...], ...]) -> tuple[tuple[Weight, ...], int]:
    """The plan of the gradient's kernels, and their number of programs."""
    plan = []
    programs = 0
    for rows, columns, offset_u, offset_v, i in described:
        plan.append(Weight(programs, rows, columns, columns, 1, 0, 0, 0, offset_u, offset_v, 0, i, 1))
        programs += triton.cdiv(rows * columns, ELEMENTS)
    return tuple(plan), programs
