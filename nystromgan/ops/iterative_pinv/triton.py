"""`iterative_pinv` in Triton: one program a matrix with every operand on chip up to M = 128, tiled products above.

A step is evaluated from the left, so that its three chained products share one right operand P = A Z:

    V1 = 7 Z - Z P    V2 = 15 Z - V1 P    Z <- (13 Z - V2 P) / 4

On chip a float32 product is three float16 ones: x = hi + lo / 2^11 keeps 22 bits of every operand, tf32's trick at
twice its rate and half its shared memory. Operands are brought to [1, 2) by a power of two first. Measured against
the float64 recurrence, the error is that of eager float32 (3e-6 on random tokens): the steps' own rounding rules it.

The backward goes forward: while c of Z_0 = A^T / c stays, Z^T is a gradient in A of a number, so its derivative is its
own adjoint: dA = (Z')^T, where every matrix has its derivative beside it as A moves along A' = G^T, G the gradient of
Z. No step is kept. P' is symmetric, as are T2' and T3' of the native library, which would save 2 to 4 of 12 products:
but T3 written out leaves 1.2 to 2.1 times the error of the gradient that goes back, products from the left 0.9 to 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nystromgan import _triton
from nystromgan.ops.iterative_pinv import tuning

ON_CHIP = 128  # the largest M whose matrices one program holds
MATRICES = 5  # A, Z, P, V1 and V2, through which a program works in memory; the backward holds their derivatives too


@triton.jit
def power_of_two(x):
    """The power of two at or below the largest magnitude of x; 1 for zeros."""
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power == 0.0, 1.0, power)


@triton.jit
def split(x):
    """(hi, lo) float16 with x = hi + lo / 2^11."""
    hi = x.to(tl.float16)
    return hi, ((x - hi.to(tl.float32)) * 2048.0).to(tl.float16)


@triton.jit
def product(a_hi, a_lo, b_hi, b_lo):
    """a b of split operands, float32."""
    acc = tl.dot(a_hi, b_lo, tl.dot(a_lo, b_hi))
    return tl.dot(a_hi, b_hi, acc * (1.0 / 2048.0))


@triton.jit
def load_matrix(p, stride_r, stride_c, M, BLOCK: tl.constexpr):
    """An (M, M) matrix as one tile, zero outside."""
    o = tl.arange(0, BLOCK)
    inside = (o[:, None] < M) & (o[None, :] < M)
    return tl.load(p + o[:, None].to(tl.int64) * stride_r + o[None, :].to(tl.int64) * stride_c, mask=inside, other=0.0)


@triton.jit
def store_matrix(p, tile, M, BLOCK: tl.constexpr):
    """Writes one tile as a contiguous (M, M) matrix."""
    o = tl.arange(0, BLOCK)
    tl.store(p + (o[:, None] * M + o[None, :]), tile, mask=(o[:, None] < M) & (o[None, :] < M))


@triton.jit
def load_rows(p, stride_r, stride_c, step, M, BLOCK: tl.constexpr):
    """Rows 16 step and on, 16 of them, of an (M, M) matrix, zero outside."""
    o_r = step * 16 + tl.arange(0, 16)
    o_c = tl.arange(0, BLOCK)
    inside = (o_r[:, None] < M) & (o_c[None, :] < M)
    return tl.load(p + o_r[:, None] * stride_r + o_c[None, :] * stride_c, mask=inside, other=0.0)


@triton.jit
def norms(p, stride_r, stride_c, M, BLOCK: tl.constexpr):
    """The largest column sum and row sum of magnitudes, and the first row and column that have them."""
    column = tl.zeros((BLOCK,), tl.float32)
    row_max = -1.0
    i = 0
    for step in tl.range(0, BLOCK // 16, num_stages=1):
        magnitude = tl.abs(load_rows(p, stride_r, stride_c, step, M, BLOCK))  # (16, M)
        column += tl.sum(magnitude, 0)
        row = tl.sum(magnitude, 1)
        largest = tl.max(row, 0)
        first = tl.min(tl.where(row == largest, step * 16 + tl.arange(0, 16), BLOCK), 0)
        i = tl.where(largest > row_max, first, i)
        row_max = tl.maximum(largest, row_max)
    column_max = tl.max(column, 0)
    return column_max, row_max, i, tl.min(tl.where(column == column_max, tl.arange(0, BLOCK), BLOCK), 0)


@triton.jit
def initial_scale(a):
    """|A|_1 |A|_inf, and 1 for a zero matrix."""
    magnitude = tl.abs(a)
    scale = tl.max(tl.sum(magnitude, 0), 0) * tl.max(tl.sum(magnitude, 1), 0)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def chip_steps(b_a, b_start, ITERATIONS: tl.constexpr):
    """Z after ITERATIONS steps from b_start, every operand on chip."""
    a_scale = power_of_two(b_a)
    a_hi, a_lo = split(b_a / a_scale)
    b_z = b_start
    for _ in tl.range(0, ITERATIONS, num_stages=1):
        z_scale = power_of_two(b_z)
        b_z = b_z / z_scale
        z_hi, z_lo = split(b_z)
        p_hi, p_lo = split(product(a_hi, a_lo, z_hi, z_lo) * (a_scale * z_scale))  # (M, M)
        v_hi, v_lo = split(7.0 * b_z - product(z_hi, z_lo, p_hi, p_lo))
        v_hi, v_lo = split(15.0 * b_z - product(v_hi, v_lo, p_hi, p_lo))
        b_z = (13.0 * b_z - product(v_hi, v_lo, p_hi, p_lo)) * (0.25 * z_scale)
    return b_z


@triton.jit
def chip_steps_moved(b_a, b_moved_a, b_z, b_moved_z, ITERATIONS: tl.constexpr):
    """(Z, Z') after ITERATIONS steps from both starts, as A moves along A', every operand on chip."""
    a_scale, moved_a_scale = power_of_two(b_a), power_of_two(b_moved_a)
    a_hi, a_lo = split(b_a / a_scale)
    moved_a_hi, moved_a_lo = split(b_moved_a / moved_a_scale)
    for _ in tl.range(0, ITERATIONS, num_stages=1):
        z_scale, moved_z_scale = power_of_two(b_z), power_of_two(b_moved_z)
        b_z = b_z / z_scale
        z_hi, z_lo = split(b_z)
        w_hi, w_lo = split(b_moved_z / moved_z_scale)
        b_p = product(a_hi, a_lo, w_hi, w_lo) * (a_scale * moved_z_scale)
        b_p += product(moved_a_hi, moved_a_lo, z_hi, z_lo) * (moved_a_scale * z_scale)
        moved_p_scale = power_of_two(b_p)
        moved_p_hi, moved_p_lo = split(b_p / moved_p_scale)  # (M, M)
        p_hi, p_lo = split(product(a_hi, a_lo, z_hi, z_lo) * (a_scale * z_scale))  # (M, M)
        unit = tl.maximum(moved_z_scale, z_scale * moved_p_scale)  # of Z', V1' and V2'
        factor = z_scale * moved_p_scale / unit
        b_moved_z = b_moved_z / unit
        w_hi, w_lo = split(b_moved_z)
        b_w = 7.0 * b_moved_z - product(w_hi, w_lo, p_hi, p_lo)
        b_w -= product(z_hi, z_lo, moved_p_hi, moved_p_lo) * factor
        v_hi, v_lo = split(7.0 * b_z - product(z_hi, z_lo, p_hi, p_lo))
        w_hi, w_lo = split(b_w)
        b_w = 15.0 * b_moved_z - product(w_hi, w_lo, p_hi, p_lo)
        b_w -= product(v_hi, v_lo, moved_p_hi, moved_p_lo) * factor
        v_hi, v_lo = split(15.0 * b_z - product(v_hi, v_lo, p_hi, p_lo))
        w_hi, w_lo = split(b_w)
        b_w = 13.0 * b_moved_z - product(w_hi, w_lo, p_hi, p_lo)
        b_w -= product(v_hi, v_lo, moved_p_hi, moved_p_lo) * factor
        b_z = (13.0 * b_z - product(v_hi, v_lo, p_hi, p_lo)) * (0.25 * z_scale)
        b_moved_z = b_w * (0.25 * unit)
    return b_z, b_moved_z


@triton.jit
def tile_of(p, i, j, M, BLOCK: tl.constexpr):
    """Pointers to tile (i, j) of a contiguous (M, M) matrix, and which of them lie inside."""
    o_r = i * BLOCK + tl.arange(0, BLOCK)
    o_c = j * BLOCK + tl.arange(0, BLOCK)
    return p + o_r[:, None] * M + o_c[None, :], (o_r[:, None] < M) & (o_c[None, :] < M)


@triton.jit
def tile_products(
    p_a, p_b, moved, i, j, M,
    DERIVATIVE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of A B of contiguous (M, M) matrices, float32, and with DERIVATIVE of A' B + A B', else zero.

    The derivative of a matrix lies `moved` elements behind it. Its products share the loads of A and B.
    """
    o_r = i * BLOCK + tl.arange(0, BLOCK)
    o_c = j * BLOCK + tl.arange(0, BLOCK)
    o_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    acc_moved = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in tl.range(0, K_STEPS):
        k = step * BLOCK_K + o_k
        left, right = o_r[:, None] * M + k[None, :], k[:, None] * M + o_c[None, :]
        a_inside = (o_r[:, None] < M) & (k[None, :] < M)
        b_inside = (k[:, None] < M) & (o_c[None, :] < M)
        a = tl.load(p_a + left, mask=a_inside, other=0.0)  # (BLOCK, BLOCK_K)
        b = tl.load(p_b + right, mask=b_inside, other=0.0)  # (BLOCK_K, BLOCK)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
        if DERIVATIVE:
            a_moved = tl.load(p_a + moved + left, mask=a_inside, other=0.0)
            acc_moved = tl.dot(a_moved, b, acc_moved, input_precision="tf32x3")
            b_moved = tl.load(p_b + moved + right, mask=b_inside, other=0.0)
            acc_moved = tl.dot(a, b_moved, acc_moved, input_precision="tf32x3")
    return acc, acc_moved


@triton.jit
def step_tile(
    p_work, size, v, i, j, M,
    DERIVATIVE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of product v of a step: P, V1, V2 or the next Z, in the place of Z.

    p_work holds the contiguous (M, M) matrices A, Z, P, V1, V2, and with DERIVATIVE their derivatives after them.
    `size` is M M, in the bits that an offset takes.
    """
    moved = 5 * size
    left = p_work + tl.where(v < 2, v, v + 1) * size  # A, Z, V1, V2
    right = p_work + tl.where(v == 0, 1, 2) * size  # Z, P, P, P
    acc, acc_moved = tile_products(left, right, moved, i, j, M, DERIVATIVE, BLOCK, BLOCK_K, K_STEPS)
    alpha = tl.where(v == 0, 1.0, tl.where(v == 3, -0.25, -1.0))
    beta = tl.where(v == 1, 7.0, tl.where(v == 2, 15.0, 3.25))
    p_z, inside = tile_of(p_work + size, i, j, M, BLOCK)
    p_out, _ = tile_of(p_work + tl.where(v == 3, 1, v + 2) * size, i, j, M, BLOCK)
    added = inside & (v > 0)
    tl.store(p_out, alpha * acc + beta * tl.load(p_z, mask=added, other=0.0), mask=inside)
    if DERIVATIVE:
        acc_moved = alpha * acc_moved + beta * tl.load(p_z + moved, mask=added, other=0.0)
        tl.store(p_out + moved, acc_moved, mask=inside)


@triton.jit
def copy_matrix(p, stride_r, stride_c, divisor, M, p_out, side, BLOCK: tl.constexpr):
    """Writes an (M, M) matrix, divided, as a contiguous one of (side, side): cropped, or padded with zeros."""
    o_c = tl.arange(0, BLOCK)
    for step in tl.range(0, BLOCK // 16, num_stages=1):
        o_r = step * 16 + tl.arange(0, 16)
        rows = load_rows(p, stride_r, stride_c, step, M, BLOCK) / divisor  # (16, M)
        tl.store(p_out + o_r[:, None] * side + o_c[None, :], rows, mask=(o_r[:, None] < side) & (o_c[None, :] < side))


@triton.jit
def iterate(
    p_work, M, ITERATIONS: tl.constexpr, DERIVATIVE: tl.constexpr, CHIP: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """All steps of one program, with CHIP on chip; else tile by tile, with a barrier where a product reads what other
    threads wrote.

    p_work as in `step_tile`: A is there, and with DERIVATIVE A'; Z and Z' are then the last.
    """
    size = M * M
    tl.debug_barrier()
    column_max, row_max, _, _ = norms(p_work, M, 1, M, BLOCK)
    scale = tl.where(column_max * row_max == 0.0, 1.0, column_max * row_max)
    copy_matrix(p_work, 1, M, scale, M, p_work + size, M, BLOCK)
    if DERIVATIVE:
        copy_matrix(p_work + 5 * size, 1, M, scale, M, p_work + 6 * size, M, BLOCK)
    if CHIP:
        tl.debug_barrier()
        b_z, b_moved_z = chip_steps_moved(
            load_matrix(p_work, M, 1, M, BLOCK), load_matrix(p_work + 5 * size, M, 1, M, BLOCK),
            load_matrix(p_work + size, M, 1, M, BLOCK), load_matrix(p_work + 6 * size, M, 1, M, BLOCK), ITERATIONS,
        )  # fmt: skip
        store_matrix(p_work + size, b_z, M, BLOCK)
        store_matrix(p_work + 6 * size, b_moved_z, M, BLOCK)
    else:
        TILES: tl.constexpr = BLOCK // TILE
        for step in tl.range(0, 4 * ITERATIONS, num_stages=1):
            tl.debug_barrier()
            for tile in tl.range(0, TILES * TILES, num_stages=1):
                step_tile(
                    p_work, size, step % 4, tile // TILES, tile % TILES, M, DERIVATIVE, TILE, TILE_K, BLOCK // TILE_K
                )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def finish_gradient(p_work, side, p_grad_a, M, BLOCK: tl.constexpr):
    """dA = (Z')^T and what comes through Z_0 = A^T / c of the c = |A|_1 |A|_inf, the maxima's to their first place.

    p_work holds matrices of (side, side), zero beyond M, and dA gets (M, M).

    From Z(t A, t^2 c) = Z(A, c) / t, dc = -(<A', Z^T> + <A, (Z')^T>) / 2c.
    """
    size = side * side
    column_max, row_max, i, j = norms(p_work, side, 1, side, BLOCK)
    scale = column_max * row_max
    empty = scale == 0.0
    total = 0.0
    for step in tl.range(0, BLOCK // 16, num_stages=1):
        b_z = load_rows(p_work + size, 1, side, step, side, BLOCK)  # (16, side), a derivative's 5 matrices further
        total += tl.sum(tl.sum(load_rows(p_work + 5 * size, side, 1, step, side, BLOCK) * b_z, 1), 0)
        b_a = load_rows(p_work, side, 1, step, side, BLOCK)
        total += tl.sum(tl.sum(load_rows(p_work + 6 * size, 1, side, step, side, BLOCK) * b_a, 1), 0)
    grad_scale = tl.where(empty, 0.0, -0.5 * total / tl.where(empty, 1.0, scale))
    o_c = tl.arange(0, BLOCK)
    for step in tl.range(0, BLOCK // 16, num_stages=1):
        o_r = step * 16 + tl.arange(0, 16)
        b_a = load_rows(p_work, side, 1, step, side, BLOCK)
        sign = tl.where(b_a > 0.0, 1.0, tl.where(b_a < 0.0, -1.0, 0.0))
        picked = tl.where(o_c[None, :] == j, grad_scale * row_max, 0.0)
        picked += tl.where(o_r[:, None] == i, grad_scale * column_max, 0.0)
        b_grad = load_rows(p_work + 6 * size, 1, side, step, side, BLOCK) + sign * picked
        tl.store(p_grad_a + o_r[:, None] * M + o_c[None, :], b_grad, mask=(o_r[:, None] < M) & (o_c[None, :] < M))


@triton.jit
def iterate_backward(
    p_a, a_r, a_c, p_grad, grad_r, grad_c, p_grad_a, M, p_work, side,
    ITERATIONS: tl.constexpr, CHIP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """The gradient of A from that of the last Z, which is the second matrix of p_work then; p_grad may be p_grad_a."""
    copy_matrix(p_a, a_r, a_c, 1.0, M, p_work, side, BLOCK)
    copy_matrix(p_grad, grad_c, grad_r, 1.0, M, p_work + 5 * side * side, side, BLOCK)
    iterate(p_work, side, ITERATIONS, True, CHIP, BLOCK, TILE, TILE_K)
    finish_gradient(p_work, side, p_grad_a, M, BLOCK)


@triton.jit
def chip_kernel(
    p_matrix, stride_b, stride_r, stride_c, p_work, side, p_pinv, M,
    ITERATIONS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Z of one matrix; with PADDED both go through p_work, as (side, side)."""
    i_matrix = tl.program_id(0).to(tl.int64)
    p_matrix += i_matrix * stride_b
    p_pinv += i_matrix * M * M
    if PADDED:
        p_work += i_matrix * side * side
        copy_matrix(p_matrix, stride_r, stride_c, 1.0, M, p_work, side, BLOCK)
        tl.debug_barrier()
        b_a = load_matrix(p_work, side, 1, side, BLOCK)  # (M, M)
    else:
        b_a = load_matrix(p_matrix, stride_r, stride_c, M, BLOCK)
    b_z = chip_steps(b_a, tl.trans(b_a) / initial_scale(b_a), ITERATIONS)
    if PADDED:
        store_matrix(p_work, b_z, side, BLOCK)
        tl.debug_barrier()
        copy_matrix(p_work, side, 1, 1.0, side, p_pinv, M, BLOCK)
    else:
        store_matrix(p_pinv, b_z, M, BLOCK)


@triton.jit
def iterate_kernel(
    p_matrix, stride_b, stride_r, stride_c, p_work, side, p_pinv, M,
    ITERATIONS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    i_matrix = tl.program_id(0).to(tl.int64)
    p_work += i_matrix * 5 * side * side
    copy_matrix(p_matrix + i_matrix * stride_b, stride_r, stride_c, 1.0, M, p_work, side, BLOCK)
    iterate(p_work, side, ITERATIONS, False, False, BLOCK, TILE, TILE_K)
    copy_matrix(p_work + side * side, side, 1, 1.0, side, p_pinv + i_matrix * M * M, M, BLOCK)


@triton.jit
def backward_kernel(
    p_matrix, stride_b, stride_r, stride_c, p_grad, grad_b, grad_r, grad_c, p_work, side, p_grad_matrix, M,
    ITERATIONS: tl.constexpr, CHIP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    i_matrix = tl.program_id(0).to(tl.int64)
    iterate_backward(
        p_matrix + i_matrix * stride_b, stride_r, stride_c, p_grad + i_matrix * grad_b, grad_r, grad_c,
        p_grad_matrix + i_matrix * M * M, M, p_work + i_matrix * 10 * side * side, side,
        ITERATIONS, CHIP, BLOCK, TILE, TILE_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["v"])
def product_kernel(
    p_work, v, M, tiles,
    DERIVATIVE: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr, K_STEPS: tl.constexpr,
):  # fmt: skip
    """Product v of a step, one tile of one matrix a program."""
    i_matrix = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    i_tile = tl.program_id(0) % (tiles * tiles)
    size = tl.cast(M, tl.int64) * M
    p_work += i_matrix * (10 if DERIVATIVE else 5) * size
    step_tile(p_work, size, v, i_tile // tiles, i_tile % tiles, M, DERIVATIVE, TILE, TILE_K, K_STEPS)


def padded(size: int) -> int:
    """The side of the matrices that a program works in: their rows begin at multiples of 16 elements.

    Loads of one element at a time, as odd rows ask for, make the backward of 33 rows spill.
    """
    return triton.cdiv(size, 16) * 16


def _tiled_steps(work: Tensor, iterations: int) -> None:
    """All steps on the (count, 5 or 10, M, M) matrices of `step_tile`, a launch for each product."""
    count, matrices, size, _ = work.shape
    config = tuning.choose("product", _triton.architecture(work), _triton.tile(size))
    tiles = triton.cdiv(size, config["TILE"])
    for product in range(4 * iterations):
        product_kernel[(count * tiles * tiles,)](
            work, product % 4, size, tiles, DERIVATIVE=matrices > MATRICES,
            K_STEPS=triton.cdiv(size, config["TILE_K"]), **config, **_triton.FUSED,
        )  # fmt: skip


def _norms(matrix: Tensor, global_init: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Column sums and row sums (count, M), and the start's scale (count, 1, 1)."""
    magnitude = matrix.abs()
    column, row = magnitude.sum(-2), magnitude.sum(-1)
    column_max, row_max = column.amax(-1), row.amax(-1)
    if global_init:
        column_max, row_max = column_max.amax().expand_as(column_max), row_max.amax().expand_as(row_max)
    scale = (column_max * row_max)[:, None, None]
    return column, row, torch.where(scale == 0, 1.0, scale)


def _maximum_gradient(sums: Tensor, grad: Tensor, global_init: bool) -> Tensor:
    """Gradient (count, M) of a maximum over each row's first largest; globally, shared by the rows that tie."""
    first = torch.nn.functional.one_hot(sums.argmax(-1), sums.shape[-1]).to(sums.dtype)
    if not global_init:
        return first * grad[:, None]
    largest = sums.amax(-1)
    ties = (largest == largest.amax()).to(sums.dtype)
    return first * (ties / ties.sum() * grad.sum())[:, None]


def _tiled(matrix: Tensor, iterations: int, global_init: bool) -> Tensor:
    work = matrix.new_empty(len(matrix), MATRICES, *matrix.shape[1:])
    work[:, 0] = matrix
    torch.div(matrix.mT, _norms(matrix, global_init)[2], out=work[:, 1])
    _tiled_steps(work, iterations)
    return work[:, 1].clone()


def tiled_backward(grad: Tensor, matrix: Tensor, iterations: int, global_init: bool) -> tuple[Tensor, Tensor]:
    """(A's gradient, Z); see `finish_gradient`."""
    column, row, scale = _norms(matrix, global_init)
    work = matrix.new_empty(len(matrix), 2 * MATRICES, *matrix.shape[1:])
    inverse, moved_inverse = work[:, 1], work[:, MATRICES + 1]
    work[:, 0], work[:, MATRICES] = matrix, grad.mT
    torch.div(matrix.mT, scale, out=inverse)
    torch.div(grad, scale, out=moved_inverse)
    _tiled_steps(work, iterations)
    column_max, row_max = column.amax(-1), row.amax(-1)
    if global_init:
        column_max, row_max = column_max.amax(), row_max.amax()
    total = (grad * inverse).sum((-1, -2)) + (matrix.mT * moved_inverse).sum((-1, -2))
    grad_scale = torch.where(column_max * row_max == 0, 0.0, -0.5 * total / scale[:, 0, 0])
    picked = _maximum_gradient(column, grad_scale * row_max, global_init)[:, None, :]
    picked = picked + _maximum_gradient(row, grad_scale * column_max, global_init)[:, :, None]
    return picked.mul_(matrix.sign()).add_(moved_inverse.mT), inverse


def within_32_bits(matrix: Tensor) -> Tensor:
    """(..., M, M) as (count, M, M), copied where 32 bits do not count the elements that a matrix spans."""
    matrices = matrix.reshape(-1, *matrix.shape[-2:])
    return matrices.contiguous() if matrix.shape[-1] * max(matrices.stride()[1:]) > 2**30 else matrices


def iterative_pinv(matrix: Tensor, iterations: int, global_init: bool) -> Tensor:
    """The iterate after `iterations` steps of (..., M, M) float32; see the public function."""
    size = matrix.shape[-1]
    if matrix.numel() == 0:
        return matrix.new_empty(matrix.shape)
    matrices = within_32_bits(matrix)
    count, block, side = len(matrices), _triton.tile(size), padded(size)
    with _triton.launch_on(matrix):
        if global_init or size > ON_CHIP:
            return _tiled(matrices, iterations, global_init).view(matrix.shape)
        architecture = _triton.architecture(matrix)
        pinv = matrix.new_empty(matrix.shape)
        if block > tuning.CHIP_MOST[architecture]:
            iterate_kernel[(count,)](
                matrices, *matrices.stride(), matrix.new_empty(count, MATRICES, side, side), side, pinv, size,
                ITERATIONS=iterations, BLOCK=block,
                **tuning.choose("iterate", architecture, block), **_triton.FUSED,
            )  # fmt: skip
            return pinv
        pads = block == ON_CHIP and side != size  # odd rows, loaded one element at a time, spill 64 bytes on sm_90
        work = matrix.new_empty(count, side, side) if pads else pinv
        chip_kernel[(count,)](
            matrices, *matrices.stride(), work, side, pinv, size, ITERATIONS=iterations, PADDED=pads, BLOCK=block,
            **tuning.choose("chip", architecture, block), **_triton.FUSED,
        )  # fmt: skip
    return pinv


def iterative_pinv_backward(grad_output: Tensor, matrix: Tensor, iterations: int, global_init: bool) -> Tensor:
    """Gradient of `matrix`, exact for the steps as they ran, which are computed again."""
    size = matrix.shape[-1]
    if matrix.numel() == 0:
        return matrix.new_empty(matrix.shape)
    matrices, grads = within_32_bits(matrix), within_32_bits(grad_output)
    with _triton.launch_on(matrix):
        if global_init or size > ON_CHIP:
            return tiled_backward(grads, matrices, iterations, global_init)[0].view(matrix.shape)
        grad_matrix = matrix.new_empty(matrix.shape)
        count, block, side = len(matrices), _triton.tile(size), padded(size)
        backward_kernel[(count,)](
            matrices, *matrices.stride(), grads, *grads.stride(),
            matrix.new_empty(count, 2 * MATRICES, side, side), side, grad_matrix, size,
            ITERATIONS=iterations, BLOCK=block,
            CHIP=block <= tuning.CHIP_MOST_BACKWARD[_triton.architecture(matrix)],
            **tuning.choose("backward", _triton.architecture(matrix), block, side == size), **_triton.FUSED,
        )  # fmt: skip
    return grad_matrix
