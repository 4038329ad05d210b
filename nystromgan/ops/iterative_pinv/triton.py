"""`iterative_pinv` in Triton: one program a matrix with every operand on chip up to M = 128, tiled products above.

A step is evaluated from the left, so that its three chained products share one right operand P = A Z:

    V1 = 7 Z - Z P    V2 = 15 Z - V1 P    Z <- (13 Z - V2 P) / 4

On chip a float32 product is three float16 ones: x = hi + lo / 2^11 keeps 22 bits of every operand, tf32's trick at
twice its rate and half its shared memory. Operands are brought to [1, 2) by a power of two first. Measured against
the float64 recurrence, the error is that of eager float32 (3e-6 on random tokens): the steps' own rounding rules it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nystromgan import _triton
from nystromgan.ops.iterative_pinv import tuning

ON_CHIP = 128  # the largest M whose matrices one program holds
ITERATES = 4  # Z, P, V1 and V2 of each step, which the backward reads


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
    tl.store(p + o[:, None] * M + o[None, :], tile, mask=(o[:, None] < M) & (o[None, :] < M))


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
def tile_product(
    p_a, a_r, a_c, p_b, b_r, b_c, i, j, M, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr
):  # fmt: skip
    """Tile (i, j) of A B, float32, where p + row stride_r + column stride_c are (M, M) matrices."""
    o_r = i * BLOCK + tl.arange(0, BLOCK)
    o_c = j * BLOCK + tl.arange(0, BLOCK)
    o_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in tl.range(0, K_STEPS):
        k = step * BLOCK_K + o_k
        a_inside = (o_r[:, None] < M) & (k[None, :] < M)
        b_inside = (k[:, None] < M) & (o_c[None, :] < M)
        a = tl.load(p_a + o_r[:, None] * a_r + k[None, :] * a_c, mask=a_inside, other=0.0)  # (BLOCK, BLOCK_K)
        b = tl.load(p_b + k[:, None] * b_r + o_c[None, :] * b_c, mask=b_inside, other=0.0)  # (BLOCK_K, BLOCK)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    return acc


@triton.jit
def tile_of(p, i, j, M, BLOCK: tl.constexpr):
    """Pointers to tile (i, j) of a contiguous (M, M) matrix, and which of them lie inside."""
    o_r = i * BLOCK + tl.arange(0, BLOCK)
    o_c = j * BLOCK + tl.arange(0, BLOCK)
    return p + o_r[:, None] * M + o_c[None, :], (o_r[:, None] < M) & (o_c[None, :] < M)


@triton.jit
def tiled_steps(
    p_a, a_r, a_c, p_iterates, M,
    ITERATIONS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The steps of one program from the Z that p_iterates begins with, tile by tile; the last Z ends p_iterates."""
    size = M * M
    K_STEPS: tl.constexpr = TILES * BLOCK // BLOCK_K
    for step in tl.range(0, ITERATIONS, num_stages=1):
        z = p_iterates + step * (4 * size)
        p, v1, v2 = z + size, z + 2 * size, z + 3 * size
        tl.debug_barrier()
        for tile in tl.range(0, TILES * TILES, num_stages=1):
            i, j = tile // TILES, tile % TILES
            acc = tile_product(p_a, a_r, a_c, z, M, 1, i, j, M, BLOCK, BLOCK_K, K_STEPS)
            p_tile, inside = tile_of(p, i, j, M, BLOCK)
            tl.store(p_tile, acc, mask=inside)
        for v in tl.static_range(3):
            tl.debug_barrier()
            for tile in tl.range(0, TILES * TILES, num_stages=1):
                i, j = tile // TILES, tile % TILES
                left = z if v == 0 else v1 if v == 1 else v2
                acc = tile_product(left, M, 1, p, M, 1, i, j, M, BLOCK, BLOCK_K, K_STEPS)
                p_tile, inside = tile_of(z, i, j, M, BLOCK)
                b_z = tl.load(p_tile, mask=inside, other=0.0)
                acc = 7.0 * b_z - acc if v == 0 else 15.0 * b_z - acc if v == 1 else 3.25 * b_z - 0.25 * acc
                p_tile = tile_of(z + (v + 2) * size, i, j, M, BLOCK)[0]
                tl.store(p_tile, acc, mask=inside)
    tl.debug_barrier()


@triton.jit
def iterate(
    p_a, a_r, a_c, p_iterates, M,
    ITERATIONS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Fills p_iterates, 4 ITERATIONS + 1 contiguous (M, M) matrices, from A; the last is the inverse."""
    column_max, row_max, _, _ = norms(p_a, a_r, a_c, M, BLOCK)
    scale = tl.where(column_max * row_max == 0.0, 1.0, column_max * row_max)
    o_c = tl.arange(0, BLOCK)
    for step in tl.range(0, BLOCK // 16, num_stages=1):
        o_r = step * 16 + tl.arange(0, 16)
        b_z = load_rows(p_a, a_c, a_r, step, M, BLOCK) / scale  # (16, M)
        tl.store(p_iterates + o_r[:, None] * M + o_c[None, :], b_z, mask=(o_r[:, None] < M) & (o_c[None, :] < M))
    tiled_steps(p_a, a_r, a_c, p_iterates, M, ITERATIONS, TILE, TILE_K, BLOCK // TILE)


@triton.jit
def backward_steps(
    p_a, a_r, a_c, p_iterates, p_work, p_grad_a, M,
    ITERATIONS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """From the gradient of the last Z in p_work[0]: the start's gradient, there, and A's through every product.

    p_work holds 5 contiguous (M, M) matrices. One program does it all tile by tile, with a barrier where a product
    reads what other threads wrote.
    """
    size = M * M
    p_grad, p_next, p_v1, p_v2, p_p = p_work, p_work + size, p_work + 2 * size, p_work + 3 * size, p_work + 4 * size
    K_STEPS: tl.constexpr = TILES * BLOCK // BLOCK_K
    for tile in tl.range(0, TILES * TILES, num_stages=1):
        i, j = tile // TILES, tile % TILES
        p_tile, inside = tile_of(p_grad_a, i, j, M, BLOCK)
        tl.store(p_tile, tl.zeros((BLOCK, BLOCK), tl.float32), mask=inside)
    for step in tl.range(0, ITERATIONS, num_stages=1):
        z = p_iterates + (ITERATIONS - 1 - step) * (4 * size)
        p, v1, v2 = z + size, z + 2 * size, z + 3 * size
        tl.debug_barrier()
        for tile in tl.range(0, TILES * TILES, num_stages=1):
            i, j = tile // TILES, tile % TILES
            b_v2 = -0.25 * tile_product(p_grad, M, 1, p, 1, M, i, j, M, BLOCK, BLOCK_K, K_STEPS)
            b_p = -0.25 * tile_product(v2, 1, M, p_grad, M, 1, i, j, M, BLOCK, BLOCK_K, K_STEPS)
            p_tile, inside = tile_of(p_v2, i, j, M, BLOCK)
            tl.store(p_tile, b_v2, mask=inside)
            tl.store(tile_of(p_p, i, j, M, BLOCK)[0], b_p, mask=inside)
        tl.debug_barrier()
        for tile in tl.range(0, TILES * TILES, num_stages=1):
            i, j = tile // TILES, tile % TILES
            b_v1 = -tile_product(p_v2, M, 1, p, 1, M, i, j, M, BLOCK, BLOCK_K, K_STEPS)
            p_tile, inside = tile_of(p_v1, i, j, M, BLOCK)
            tl.store(p_tile, b_v1, mask=inside)
            b_next = 3.25 * tl.load(tile_of(p_grad, i, j, M, BLOCK)[0], mask=inside, other=0.0) + 7.0 * b_v1
            b_next += 15.0 * tl.load(tile_of(p_v2, i, j, M, BLOCK)[0], mask=inside, other=0.0)
            tl.store(tile_of(p_next, i, j, M, BLOCK)[0], b_next, mask=inside)
            b_p = tile_product(v1, 1, M, p_v2, M, 1, i, j, M, BLOCK, BLOCK_K, K_STEPS)
            p_tile = tile_of(p_p, i, j, M, BLOCK)[0]
            tl.store(p_tile, tl.load(p_tile, mask=inside, other=0.0) - b_p, mask=inside)
        tl.debug_barrier()
        for tile in tl.range(0, TILES * TILES, num_stages=1):
            i, j = tile // TILES, tile % TILES
            b_next = tile_product(p_v1, M, 1, p, 1, M, i, j, M, BLOCK, BLOCK_K, K_STEPS)
            p_tile, inside = tile_of(p_next, i, j, M, BLOCK)
            tl.store(p_tile, tl.load(p_tile, mask=inside, other=0.0) - b_next, mask=inside)
            b_p = tile_product(z, 1, M, p_v1, M, 1, i, j, M, BLOCK, BLOCK_K, K_STEPS)
            p_tile = tile_of(p_p, i, j, M, BLOCK)[0]
            tl.store(p_tile, tl.load(p_tile, mask=inside, other=0.0) - b_p, mask=inside)
        tl.debug_barrier()
        for tile in tl.range(0, TILES * TILES, num_stages=1):
            i, j = tile // TILES, tile % TILES
            b_grad = tile_product(p_a, a_c, a_r, p_p, M, 1, i, j, M, BLOCK, BLOCK_K, K_STEPS)
            p_tile, inside = tile_of(p_next, i, j, M, BLOCK)
            b_grad += tl.load(p_tile, mask=inside, other=0.0)
            tl.store(tile_of(p_grad, i, j, M, BLOCK)[0], b_grad, mask=inside)
            b_grad = tile_product(p_p, M, 1, z, 1, M, i, j, M, BLOCK, BLOCK_K, K_STEPS)
            p_tile = tile_of(p_grad_a, i, j, M, BLOCK)[0]
            tl.store(p_tile, tl.load(p_tile, mask=inside, other=0.0) + b_grad, mask=inside)
    tl.debug_barrier()


@triton.jit
def start_gradient(p_a, a_r, a_c, p_grad_start, p_grad_a, M, BLOCK: tl.constexpr):
    """Adds to A's gradient what comes through Z_0 = A^T / (|A|_1 |A|_inf), the maxima's to their first place."""
    column_max, row_max, i, j = norms(p_a, a_r, a_c, M, BLOCK)
    scale = column_max * row_max
    empty = scale == 0.0
    scale = tl.where(empty, 1.0, scale)
    total = 0.0
    for step in tl.range(0, BLOCK // 16, num_stages=1):
        b_a = load_rows(p_a, a_r, a_c, step, M, BLOCK)  # (16, M)
        total += tl.sum(tl.sum(load_rows(p_grad_start, 1, M, step, M, BLOCK) * b_a, 1), 0)
    grad_scale = tl.where(empty, 0.0, -total / (scale * scale))
    o_c = tl.arange(0, BLOCK)
    for step in tl.range(0, BLOCK // 16, num_stages=1):
        o_r = step * 16 + tl.arange(0, 16)
        b_a = load_rows(p_a, a_r, a_c, step, M, BLOCK)
        sign = tl.where(b_a > 0.0, 1.0, tl.where(b_a < 0.0, -1.0, 0.0))
        picked = tl.where(o_c[None, :] == j, grad_scale * row_max, 0.0)
        picked += tl.where(o_r[:, None] == i, grad_scale * column_max, 0.0)
        b_grad = load_rows(p_grad_a, M, 1, step, M, BLOCK) + sign * picked
        b_grad += load_rows(p_grad_start, 1, M, step, M, BLOCK) / scale
        tl.store(
            p_grad_a + o_r[:, None] * M + o_c[None, :], b_grad, mask=(o_r[:, None] < M) & (o_c[None, :] < M)
        )  # fmt: skip


@triton.jit
def chip_kernel(
    p_matrix, stride_b, stride_r, stride_c, p_pinv, M, ITERATIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_matrix = tl.program_id(0).to(tl.int64)
    b_a = load_matrix(p_matrix + i_matrix * stride_b, stride_r, stride_c, M, BLOCK)  # (M, M)
    b_z = chip_steps(b_a, tl.trans(b_a) / initial_scale(b_a), ITERATIONS)
    store_matrix(p_pinv + i_matrix * M * M, b_z, M, BLOCK)


@triton.jit
def iterate_kernel(
    p_matrix, stride_b, stride_r, stride_c, p_iterates, M,
    ITERATIONS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    i_matrix = tl.program_id(0).to(tl.int64)
    p_iterates += i_matrix * (4 * ITERATIONS + 1) * M * M
    iterate(p_matrix + i_matrix * stride_b, stride_r, stride_c, p_iterates, M, ITERATIONS, BLOCK, TILE, TILE_K)


@triton.jit
def backward_kernel(
    p_matrix, stride_b, stride_r, stride_c, p_work, p_iterates, p_grad_matrix, M,
    ITERATIONS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the last Z arrives in the first of the program's 5 matrices of p_work."""
    i_matrix = tl.program_id(0).to(tl.int64)
    p_iterates += i_matrix * (4 * ITERATIONS + 1) * M * M
    p_work += i_matrix * 5 * M * M
    p_grad_matrix += i_matrix * M * M
    p_matrix += i_matrix * stride_b
    iterate(p_matrix, stride_r, stride_c, p_iterates, M, ITERATIONS, BLOCK, TILE, TILE_K)
    backward_steps(
        p_matrix, stride_r, stride_c, p_iterates, p_work, p_grad_matrix, M, ITERATIONS, TILE, TILE_K, BLOCK // TILE
    )
    start_gradient(p_matrix, stride_r, stride_c, p_work, p_grad_matrix, M, BLOCK)


@triton.jit
def product_kernel(
    p_out, p_a, p_b, p_add, stride_ab, stride_ar, stride_ac, stride_bb, stride_br, stride_bc,
    M, tiles, alpha, beta,
    ADD: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr, K_STEPS: tl.constexpr,
):  # fmt: skip
    """out = alpha A B + beta add, one tile a program; out and add are contiguous and may be the same."""
    i_matrix = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    i_tile = tl.program_id(0) % (tiles * tiles)
    i, j = i_tile // tiles, i_tile % tiles
    p_a += i_matrix * stride_ab
    p_b += i_matrix * stride_bb
    acc = alpha * tile_product(
        p_a, stride_ar, stride_ac, p_b, stride_br, stride_bc, i, j, M, TILE, TILE_K, K_STEPS
    )  # fmt: skip
    p_tile, inside = tile_of(p_out + i_matrix * M * M, i, j, M, TILE)
    if ADD:
        acc += beta * tl.load(tile_of(p_add + i_matrix * M * M, i, j, M, TILE)[0], mask=inside, other=0.0)
    tl.store(p_tile, acc, mask=inside)


def multiply(out: Tensor, alpha: float, a: Tensor, b: Tensor, beta: float = 0.0, add: Tensor | None = None) -> Tensor:
    """out = alpha a b + beta add for (count, M, M) float32; a and b may be transposed views, out may be add."""
    count, size, _ = out.shape
    config = tuning.choose("product", _triton.architecture(out), _triton.tile(size))
    tiles = triton.cdiv(size, config["TILE"])
    product_kernel[(count * tiles * tiles,)](
        out, a, b, out if add is None else add, *a.stride(), *b.stride(),
        size, tiles, alpha, beta, ADD=add is not None,
        K_STEPS=triton.cdiv(_triton.tile(size), config["TILE_K"]), **config, **_triton.FUSED,
    )  # fmt: skip
    return out


def _tiled_steps(matrix: Tensor, start: Tensor, iterations: int) -> list[tuple[Tensor, ...]]:
    """(Z, P, V1, V2) of every step; the last holds only the final Z."""
    steps: list[tuple[Tensor, ...]] = []
    z = start
    for _ in range(iterations):
        p = multiply(torch.empty_like(z), 1.0, matrix, z)
        v1 = multiply(torch.empty_like(z), -1.0, z, p, 7.0, z)
        v2 = multiply(torch.empty_like(z), -1.0, v1, p, 15.0, z)
        steps.append((z, p, v1, v2))
        z = multiply(torch.empty_like(z), -0.25, v2, p, 3.25, z)
    return [*steps, (z,)]


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


def _tiled_backward(grad: Tensor, matrix: Tensor, iterations: int, global_init: bool) -> Tensor:
    column, row, scale = _norms(matrix, global_init)
    start = (matrix.mT / scale).contiguous()
    grad_matrix = torch.zeros_like(start)
    grad = grad.contiguous()
    for z, p, v1, v2 in reversed(_tiled_steps(matrix, start, iterations)[:-1]):
        grad_v2 = multiply(torch.empty_like(z), -0.25, grad, p.mT)
        grad_v1 = multiply(torch.empty_like(z), -1.0, grad_v2, p.mT)
        grad_p = multiply(torch.empty_like(z), -0.25, v2.mT, grad)
        multiply(grad_p, -1.0, v1.mT, grad_v2, 1.0, grad_p)
        multiply(grad_p, -1.0, z.mT, grad_v1, 1.0, grad_p)
        grad = 3.25 * grad + 15.0 * grad_v2 + 7.0 * grad_v1
        multiply(grad, -1.0, grad_v1, p.mT, 1.0, grad)
        multiply(grad, 1.0, matrix.mT, grad_p, 1.0, grad)
        multiply(grad_matrix, 1.0, grad_p, z.mT, 1.0, grad_matrix)
    column_max, row_max = column.amax(-1), row.amax(-1)
    if global_init:
        column_max, row_max = column_max.amax(), row_max.amax()
    grad_scale = -(grad * start).sum((-1, -2)) / scale[:, 0, 0]
    grad_scale = torch.where(column_max * row_max == 0, 0.0, grad_scale)
    picked = _maximum_gradient(column, grad_scale * row_max, global_init)[:, None, :]
    picked = picked + _maximum_gradient(row, grad_scale * column_max, global_init)[:, :, None]
    return grad_matrix + grad.mT / scale + matrix.sign() * picked


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
    count, block = len(matrices), _triton.tile(size)
    with _triton.launch_on(matrix):
        if global_init or size > ON_CHIP:
            start = (matrices.mT / _norms(matrices, global_init)[2]).contiguous()
            return _tiled_steps(matrices, start, iterations)[-1][0].view(matrix.shape)
        architecture = _triton.architecture(matrix)
        if block > tuning.CHIP_MOST[architecture]:
            iterates = matrix.new_empty(count, ITERATES * iterations + 1, size, size)
            iterate_kernel[(count,)](
                matrices,
                *matrices.stride(),
                iterates,
                size,
                ITERATIONS=iterations,
                BLOCK=block,
                **tuning.choose("iterate", architecture, block),
                **_triton.FUSED,
            )
            return iterates[:, -1].reshape(matrix.shape)
        pinv = matrix.new_empty(matrix.shape)
        chip_kernel[(count,)](
            matrices, *matrices.stride(), pinv, size, ITERATIONS=iterations, BLOCK=block,
            **tuning.choose("chip", architecture, block), **_triton.FUSED,
        )  # fmt: skip
    return pinv


def iterative_pinv_backward(grad_output: Tensor, matrix: Tensor, iterations: int, global_init: bool) -> Tensor:
    """Gradient of `matrix`, exact for the steps as they ran, which are computed again."""
    size = matrix.shape[-1]
    if matrix.numel() == 0:
        return matrix.new_empty(matrix.shape)
    matrices = within_32_bits(matrix)
    grads = grad_output.reshape(-1, size, size)
    count, block = len(matrices), _triton.tile(size)
    with _triton.launch_on(matrix):
        if global_init or size > ON_CHIP:
            return _tiled_backward(grads, matrices, iterations, global_init).view(matrix.shape)
        grad_matrix = matrix.new_empty(matrix.shape)
        iterates = matrix.new_empty(count, ITERATES * iterations + 1, size, size)
        work = matrix.new_empty(count, 5, size, size)
        work[:, 0] = grads
        backward_kernel[(count,)](
            matrices, *matrices.stride(), work, iterates, grad_matrix, size,
            ITERATIONS=iterations, BLOCK=block,
            **tuning.choose("backward", _triton.architecture(matrix), block), **_triton.FUSED,
        )  # fmt: skip
    return grad_matrix
