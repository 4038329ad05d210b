"""The backward passes of `nystrom_attention` in Triton.

Letters as in `triton_forward`. F and G are computed again from landmarks, and nothing N x M is stored:

    query_sums   dW = F^T dO and d K~ through F, over splits of the queries; beside it A
    core         dZ = dW (G V)^T; Z and dA beside each other; d(G V) = Z^T dW, and back through A's softmax
    keys         dK and dV through G, and d Q~ over splits of the keys
    query        dQ through F

A landmark's own gradient reaches the tokens it is the mean of in the last two.
"""

import triton
import triton.language as tl

from nystromgan._triton import dot, dot_rows
from nystromgan.ops.iterative_pinv.triton import iterate_backward
from nystromgan.ops.nystrom_attention.triton_epilogue import convolve, factor
from nystromgan.ops.nystrom_attention.triton_forward import LOG2E, store_core_rows
from nystromgan.ops.nystrom_attention.triton_pool import membership
from nystromgan.ops.nystrom_attention.triton_tokens import absent, head_of, load_landmarks, load_tokens, store_tokens


@triton.jit
def factor_logits(b_query, b_key, missing, scale, PRECISION: tl.constexpr):
    """s Q K~^T to base 2, minus infinity where there is no landmark."""
    logits = dot_rows(b_query, b_key, PRECISION)
    return tl.where(missing[None, :], float("-inf"), logits * (scale * LOG2E))


@triton.jit
def factor_gradient(b_grad, b_mixed, PRECISION: tl.constexpr):
    """dF = dO W^T."""
    return dot_rows(b_grad, b_mixed, PRECISION)


@triton.jit
def row_scale(logits):
    """The base-2 logarithm of each row's sum of powers, infinite for an empty row."""
    largest = tl.max(logits, 1)
    empty = largest == float("-inf")
    total = tl.sum(tl.exp2(logits - tl.where(empty, 0.0, largest)[:, None]), 1)
    return tl.where(empty, float("inf"), largest + tl.log2(tl.where(empty, 1.0, total)))


@triton.jit
def query_stats_kernel(
    p_query, s_qb, s_qh, s_qn, s_qd, p_grad, s_gb, s_gh, s_gn, s_gd, p_key_means, p_mixed, p_key_absent, p_gamma,
    p_row_scale, p_delta, H, N, M, D: tl.constexpr, E: tl.constexpr, blocks, scale,
    QUERY_ACCESS: tl.constexpr, GRAD_ACCESS: tl.constexpr, HAS_ABSENT: tl.constexpr, HAS_GAMMA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For M in several blocks: each query's logarithm of F's row sum, and delta = F . dF."""
    i_bh = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK_N
    o_n = first + tl.arange(0, BLOCK_N)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_queries, s_queries = head_of(p_query, s_qb, s_qh, s_qn, i_b, i_h, QUERY_ACCESS)
    p_grads, s_grads = head_of(p_grad, s_gb, s_gh, s_gn, i_b, i_h, GRAD_ACCESS)
    b_query = load_tokens(p_queries, s_queries, s_qd, first, o_n < N, D, QUERY_ACCESS, BLOCK_N, BLOCK_D)
    b_grad = load_tokens(p_grads, s_grads, s_gd, first, o_n < N, E, GRAD_ACCESS, BLOCK_N, BLOCK_E)
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    delta = tl.zeros((BLOCK_N,), tl.float32)
    gamma = factor(p_gamma, HAS_GAMMA)
    for start in tl.range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_key = load_landmarks(p_key_means, i_bh, o_m, M, D, BLOCK_D).to(b_query.dtype)  # (M, D)
        missing = absent(p_key_absent, i_bh // H, o_m, M, HAS_ABSENT)
        logits = factor_logits(b_query, b_key, missing, scale, PRECISION)
        b_mixed = (load_landmarks(p_mixed, i_bh, o_m, M, E, BLOCK_E) * gamma).to(b_grad.dtype)  # (M, E)
        grad_f = factor_gradient(b_grad, b_mixed, PRECISION)
        larger = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(weights, 1)
        delta = delta * decay + tl.sum(weights * grad_f, 1)
        largest = larger
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    row = i_bh.to(tl.int64) * N + o_n
    tl.store(p_row_scale + row, tl.where(empty, float("inf"), largest + tl.log2(total)), mask=o_n < N)
    tl.store(p_delta + row, delta / total, mask=o_n < N)


@triton.jit
def query_sums_kernel(
    p_query, s_qb, s_qh, s_qn, s_qd, p_grad, s_gb, s_gh, s_gn, s_gd, p_query_means, p_key_means, p_mixed,
    p_query_absent, p_key_absent, p_gamma, p_row_scale, p_delta, p_core, side, p_sums,
    H, N, M, D: tl.constexpr, E: tl.constexpr, splits, m_blocks, scale,
    QUERY_ACCESS: tl.constexpr, GRAD_ACCESS: tl.constexpr,
    HAS_ABSENT: tl.constexpr, HAS_GAMMA: tl.constexpr, CORE: tl.constexpr, BLOCK_C: tl.constexpr,
    CORE_D: tl.constexpr, MANY: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F^T dO (M, E) and then d K~ (M, D) of BLOCK_M landmarks over one split of the queries.

    F^T dO is dW without gamma. A head's first CORE programs are A, 16 rows each.
    """
    per_head = splits * m_blocks + CORE
    i_bh = tl.program_id(0) // per_head
    i = tl.program_id(0) % per_head - CORE
    if i < 0:
        store_core_rows(
            p_query_means, p_key_means, p_query_absent, p_key_absent, p_core + i_bh.to(tl.int64) * side * side,
            side, (i + CORE) * 16, i_bh, H, M, D, scale, HAS_ABSENT, BLOCK_C, CORE_D,
        )  # fmt: skip
    else:
        i_split = i // m_blocks
        o_m = (i % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
        p_queries, s_queries = head_of(p_query, s_qb, s_qh, s_qn, i_b, i_h, QUERY_ACCESS)
        p_grads, s_grads = head_of(p_grad, s_gb, s_gh, s_gn, i_b, i_h, GRAD_ACCESS)
        dtype: tl.constexpr = p_query.dtype.element_ty
        b_key = load_landmarks(p_key_means, i_bh, o_m, M, D, BLOCK_D).to(dtype)  # (M, D)
        b_mixed = load_landmarks(p_mixed, i_bh, o_m, M, E, BLOCK_E) * factor(p_gamma, HAS_GAMMA)
        b_mixed = b_mixed.to(dtype)  # (M, E)
        missing = absent(p_key_absent, i_bh // H, o_m, M, HAS_ABSENT)
        b_grad_mixed = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        b_grad_key = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in tl.range(0, SPLIT, BLOCK_N):
            first = i_split * SPLIT + start
            o_n = first + tl.arange(0, BLOCK_N)
            b_query = load_tokens(p_queries, s_queries, s_qd, first, o_n < N, D, QUERY_ACCESS, BLOCK_N, BLOCK_D)
            b_grad = load_tokens(p_grads, s_grads, s_gd, first, o_n < N, E, GRAD_ACCESS, BLOCK_N, BLOCK_E)
            logits = factor_logits(b_query, b_key, missing, scale, PRECISION)
            grad_f = factor_gradient(b_grad, b_mixed, PRECISION)
            if MANY:
                row = i_bh.to(tl.int64) * N + o_n
                weights = tl.exp2(logits - tl.load(p_row_scale + row, mask=o_n < N, other=float("inf"))[:, None])
                delta = tl.load(p_delta + row, mask=o_n < N, other=0.0)
            else:
                weights = tl.exp2(logits - row_scale(logits)[:, None])  # (BLOCK_N, M)
                delta = tl.sum(weights * grad_f, 1)
            b_grad_mixed = dot(tl.trans(weights.to(dtype)), b_grad, b_grad_mixed, PRECISION)
            grad_logits = weights * (grad_f - delta[:, None])
            b_grad_key = dot(tl.trans(grad_logits.to(dtype)), b_query, b_grad_key, PRECISION)
        o_d, o_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
        p_sums += (i_bh * splits + i_split).to(tl.int64) * M * (D + E)
        inside = o_m[:, None] < M
        tl.store(p_sums + o_m[:, None] * E + o_e[None, :], b_grad_mixed, mask=inside & (o_e[None, :] < E))
        p_sums += M * E
        tl.store(p_sums + o_m[:, None] * D + o_d[None, :], b_grad_key * scale, mask=inside & (o_d[None, :] < D))


@triton.jit
def reduce_kernel(p_parts, p_base, p_out, size, splits, blocks, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr):
    """out = base + the sum of the splits' parts, in their order."""
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    if HAS_BASE:
        b_sum += tl.load(p_base + i_bh * size + o, mask=o < size, other=0.0)
    for i in range(0, splits):
        b_sum += tl.load(p_parts + (i_bh * splits + i) * size + o, mask=o < size, other=0.0)
    tl.store(p_out + i_bh * size + o, b_sum, mask=o < size)


@triton.jit
def panel_product(
    p_a, a_r, a_c, p_b, b_r, b_c, o_r, o_c, rows, columns, depth, b_depth,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of A B at rows o_r and columns o_c, float32, where A is (rows, depth) and B (b_depth, columns).

    Of a padded A, depth is more than b_depth.
    """
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=1):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            p_a + o_r[:, None] * a_r + k[None, :] * a_c, mask=(o_r[:, None] < rows) & (k[None, :] < depth), other=0.0
        )  # (BLOCK_R, BLOCK_K)
        b = tl.load(
            p_b + k[:, None] * b_r + o_c[None, :] * b_c,
            mask=(k[:, None] < b_depth) & (o_c[None, :] < columns),
            other=0.0,
        )  # (BLOCK_K, BLOCK_C)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _kept(p_exact, i_b, HAS_EXACT: tl.constexpr):
    """0 in an exact row, whose W is not Z G V, else 1."""
    keep = 1.0
    if HAS_EXACT:
        keep = tl.where(tl.load(p_exact + i_b) != 0, 0.0, 1.0)
    return keep


@triton.jit
def _gamma_gradient(p_grad_mixed, p_mixed, p_grad_gamma, M, E, TILE: tl.constexpr):
    """d gamma of a head, F^T dO . W."""
    total = tl.zeros((TILE, TILE), tl.float32)
    for row in tl.range(0, M, TILE, num_stages=1):
        o_r = row + tl.arange(0, TILE)
        for column in tl.range(0, E, TILE, num_stages=1):
            o_c = column + tl.arange(0, TILE)
            inside = (o_r[:, None] < M) & (o_c[None, :] < E)
            offsets = o_r[:, None] * E + o_c[None, :]
            b_grad = tl.load(p_grad_mixed + offsets, mask=inside, other=0.0)
            total += b_grad * tl.load(p_mixed + offsets, mask=inside, other=0.0)
    tl.store(p_grad_gamma, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _pinv_gradient(p_grad_mixed, p_context, p_grad_pinv, side, keep, M, E, TILE: tl.constexpr, TILE_K: tl.constexpr):
    """dZ = dW (G V)^T, zero beyond M."""
    for row in tl.range(0, M, TILE, num_stages=1):
        o_r = row + tl.arange(0, TILE)
        for column in tl.range(0, M, TILE, num_stages=1):
            o_c = column + tl.arange(0, TILE)
            b_grad = panel_product(p_grad_mixed, E, 1, p_context, 1, E, o_r, o_c, M, M, E, E, TILE, TILE, TILE_K)
            inside = (o_r[:, None] < side) & (o_c[None, :] < side)
            tl.store(p_grad_pinv + o_r[:, None] * side + o_c[None, :], b_grad * keep, mask=inside)


@triton.jit
def _context_gradient(
    p_grad_mixed, p_context, p_pinv, side, p_query_absent, p_grad_context, p_delta, keep, i_b, M, E,
    HAS_ABSENT: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """d(G V) = Z^T dW and its row sums against G V."""
    for row in tl.range(0, M, TILE, num_stages=1):
        o_r = row + tl.arange(0, TILE)
        b_keep = tl.where(absent(p_query_absent, i_b, o_r, M, HAS_ABSENT), 0.0, keep)
        b_delta = tl.zeros((TILE,), tl.float32)
        for column in tl.range(0, E, TILE, num_stages=1):
            o_c = column + tl.arange(0, TILE)
            b_grad = panel_product(
                p_pinv, 1, side, p_grad_mixed, E, 1, o_r, o_c, side, E, side, M, TILE, TILE, TILE_K
            )  # fmt: skip
            b_grad *= b_keep[:, None]
            inside = (o_r[:, None] < M) & (o_c[None, :] < E)
            offsets = o_r[:, None] * E + o_c[None, :]
            tl.store(p_grad_context + offsets, b_grad, mask=inside)
            b_delta += tl.sum(b_grad * tl.load(p_context + offsets, mask=inside, other=0.0), 1)
        tl.store(p_delta + o_r, b_delta, mask=o_r < M)


@triton.jit
def _landmark_gradients(
    p_core, p_grad_core, side, p_query_means, p_key_means, p_grad_query_means, p_grad_key_means, M, D, scale,
    BLOCK_C: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Through A's softmax: d Q~ of A alone, and d K~ added to what came through F. Overwrites dA."""
    o_c = tl.arange(0, BLOCK_C)
    for row in tl.range(0, M, 16, num_stages=1):
        o_r = row + tl.arange(0, 16)
        inside = (o_r[:, None] < side) & (o_c[None, :] < side)
        offsets = o_r[:, None] * side + o_c[None, :]
        b_core = tl.load(p_core + offsets, mask=inside, other=0.0)  # (16, M)
        b_grad = tl.load(p_grad_core + offsets, mask=inside, other=0.0)
        b_grad = b_core * (b_grad - tl.sum(b_core * b_grad, 1)[:, None]) * scale
        tl.store(p_grad_core + offsets, b_grad, mask=inside)
    tl.debug_barrier()
    for row in tl.range(0, M, TILE, num_stages=1):
        o_r = row + tl.arange(0, TILE)
        for column in tl.range(0, D, TILE, num_stages=1):
            o_d = column + tl.arange(0, TILE)
            inside = (o_r[:, None] < M) & (o_d[None, :] < D)
            offsets = o_r[:, None] * D + o_d[None, :]
            b_grad = panel_product(
                p_grad_core, side, 1, p_key_means, D, 1, o_r, o_d, side, D, side, M, TILE, TILE, TILE_K
            )  # fmt: skip
            tl.store(p_grad_query_means + offsets, b_grad, mask=inside)
            b_grad = panel_product(
                p_grad_core, 1, side, p_query_means, D, 1, o_r, o_d, side, D, side, M, TILE, TILE, TILE_K
            )  # fmt: skip
            b_grad += tl.load(p_grad_key_means + offsets, mask=inside, other=0.0)
            tl.store(p_grad_key_means + offsets, b_grad, mask=inside)


@triton.jit
def core_backward_kernel(
    p_sums, p_context, p_mixed, p_core, p_work, p_pinv, s_pinv, side, p_query_means, p_key_means, p_query_absent,
    p_exact, p_gamma, p_grad_context, p_delta, p_grad_core, p_grad_query_means, p_grad_gamma, H, M, D, E, scale,
    HAS_ABSENT: tl.constexpr, HAS_EXACT: tl.constexpr, HAS_GAMMA: tl.constexpr,
    FIRST: tl.constexpr, PINV: tl.constexpr, LAST: tl.constexpr,
    ITERATIONS: tl.constexpr, CHIP: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """From dW and G V to the landmarks, one program a head; FIRST, PINV and LAST are its three parts.

    p_sums holds dW without gamma and d K~, and gets d K~ complete; p_grad_core gets dZ and then dA. Z is read by LAST
    from p_pinv. A, Z and their gradients are (side, side), zero beyond M. D and E are no constants here: a loop that is
    known to turn once is unrolled, and sm_100 spills.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    p_sums += i_bh * M * (D + E)
    p_context += i_bh * M * E
    p_core += i_bh * side * side
    p_grad_core += i_bh * side * side
    keep = _kept(p_exact, i_bh // H, HAS_EXACT) * factor(p_gamma, HAS_GAMMA)
    if FIRST:
        if HAS_GAMMA:
            _gamma_gradient(p_sums, p_mixed + i_bh * M * E, p_grad_gamma + i_bh, M, E, TILE)
        _pinv_gradient(p_sums, p_context, p_grad_core, side, keep, M, E, TILE, TILE_K)
    if PINV:
        tl.debug_barrier()
        iterate_backward(
            p_core, side, 1, p_grad_core, side, 1, p_grad_core, side, p_work + i_bh * 10 * side * side, side,
            ITERATIONS, CHIP, BLOCK_C, TILE, TILE_K,
        )  # fmt: skip
        tl.debug_barrier()
    if LAST:
        _context_gradient(
            p_sums, p_context, p_pinv + i_bh * s_pinv, side, p_query_absent, p_grad_context + i_bh * M * E,
            p_delta + i_bh * M, keep, i_bh // H, M, E, HAS_ABSENT, TILE, TILE_K,
        )  # fmt: skip
        _landmark_gradients(
            p_core, p_grad_core, side, p_query_means + i_bh * M * D, p_key_means + i_bh * M * D,
            p_grad_query_means + i_bh * M * D, p_sums + M * E, M, D, scale, BLOCK_C, TILE, TILE_K,
        )  # fmt: skip


@triton.jit
def spread(p_grad_means, s_means, members, i_bh, H, o_n, valid, D: tl.constexpr, BLOCK_D: tl.constexpr,
           MEMBERS: tl.constexpr):  # fmt: skip
    """What each token of o_n gets of the gradient of the landmark that it is in the mean of."""
    o_d = tl.arange(0, BLOCK_D)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    b_index, b_count = membership(members, i_b, i_h, o_n, valid, MEMBERS)
    p_grad_means += i_bh.to(tl.int64) * s_means
    inside = (b_index[:, None] >= 0) & (o_d[None, :] < D)
    b_grad = tl.load(p_grad_means + b_index[:, None] * D + o_d[None, :], mask=inside, other=0.0)
    return b_grad / b_count.to(tl.float32)[:, None]


@triton.jit
def load_rows_of_g(
    p_query_means, p_grad_context, p_lse, p_delta, i_bh, o_m, M, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Q~ (M, D) and d(G V) (M, E) in dtype, the logarithm of G's row sums to base 2, and delta, of landmarks o_m."""
    row = i_bh.to(tl.int64) * M + o_m
    lse = tl.load(p_lse + row, mask=o_m < M, other=float("inf")) * LOG2E
    delta = tl.load(p_delta + row, mask=o_m < M, other=0.0)
    b_query = load_landmarks(p_query_means, i_bh, o_m, M, D, BLOCK_D).to(dtype)
    return b_query, load_landmarks(p_grad_context, i_bh, o_m, M, E, BLOCK_E).to(dtype), lse, delta


@triton.jit
def key_gradients(b_query, b_context, lse, delta, b_key, b_value, valid, scale, PRECISION: tl.constexpr):
    """G and the gradient of its logits (M, BLOCK_N), in the tokens' dtype."""
    logits = dot_rows(b_query, b_key, PRECISION)
    weights = tl.where(valid[None, :], tl.exp2(logits * (scale * LOG2E) - lse[:, None]), 0.0)
    grad_g = dot_rows(b_context, b_value, PRECISION)
    return weights.to(b_key.dtype), (weights * (grad_g - delta[:, None]) * scale).to(b_key.dtype)


@triton.jit
def keys_kernel(
    p_key, s_kb, s_kh, s_kn, s_kd, p_value, s_vb, s_vh, s_vn, s_vd, p_mask, s_mb, s_mn,
    p_query_means, p_grad_context, p_lse, p_delta, p_sums, members, p_exact, p_gamma, p_weight, grad,
    p_grad_key, p_grad_value, p_parts, taps, H, S, M, D: tl.constexpr, E: tl.constexpr, splits, m_blocks, scale, lift,
    KEY_ACCESS: tl.constexpr, VALUE_ACCESS: tl.constexpr, GRAD_ACCESS: tl.constexpr,
    HAS_MASK: tl.constexpr, MEMBERS: tl.constexpr, HAS_EXACT: tl.constexpr, HAS_GAMMA: tl.constexpr,
    CONVOLVED: tl.constexpr,
    WRITE: tl.constexpr, SUM: tl.constexpr, TOKEN_MAJOR: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """With WRITE dK and dV of one split of the keys, over all landmarks; with SUM d Q~ of BLOCK_M landmarks over it.

    G is multiplied by 2^lift: among many keys its entries are below what float16 holds. `grad` is dO as
    `load_convolved` takes it.
    """
    i_bh = tl.program_id(0) // (splits * m_blocks)
    i_split = (tl.program_id(0) // m_blocks) % splits
    i_m = (tl.program_id(0) % m_blocks) * BLOCK_M
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_keys, s_keys = head_of(p_key, s_kb, s_kh, s_kn, i_b, i_h, KEY_ACCESS)
    p_values, s_values = head_of(p_value, s_vb, s_vh, s_vn, i_b, i_h, VALUE_ACCESS)
    dtype: tl.constexpr = p_key.dtype.element_ty
    p_grad_key += i_bh.to(tl.int64) * S * D
    p_grad_value += i_bh.to(tl.int64) * S * E
    drop = tl.exp2(-lift)
    p_sums += i_bh.to(tl.int64) * M * (D + E)
    b_grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if SUM:  # the program's own landmarks, at hand for every tile of keys
        b_own_query, b_own_context, own_lse, own_delta = load_rows_of_g(
            p_query_means, p_grad_context, p_lse, p_delta, i_bh, i_m + tl.arange(0, BLOCK_M), M, D, E,
            BLOCK_D, BLOCK_E, dtype,
        )  # fmt: skip
        own_lse -= lift
    # Out of the loop, the addresses of a convolution in heads of 256 spill 112 bytes on sm_80 and 32 on sm_90.
    for start in tl.range(0, SPLIT, BLOCK_N, disable_licm=CONVOLVED and BLOCK_E > 128):
        begin = i_split * SPLIT + start
        o_n = begin + tl.arange(0, BLOCK_N)
        valid = o_n < S
        if HAS_MASK:
            valid &= tl.load(p_mask + i_b * s_mb + o_n.to(tl.int64) * s_mn, mask=valid, other=1) == 0
        b_grad_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        b_grad_value = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        if WRITE and CONVOLVED:  # first, while nothing else takes registers
            b_grad_value = convolve(
                b_grad_value, grad, p_weight, taps, factor(p_gamma, HAS_GAMMA), i_b, i_h,
                begin, S, E, True, GRAD_ACCESS, False, BLOCK_N, BLOCK_K, BLOCK_E, PRECISION,
            )  # fmt: skip
            b_grad_value = tl.where(valid[:, None], b_grad_value * tl.exp2(lift), 0.0)
        b_key = load_tokens(p_keys, s_keys, s_kd, begin, valid, D, KEY_ACCESS, BLOCK_N, BLOCK_D)
        b_value = load_tokens(p_values, s_values, s_vd, begin, valid, E, VALUE_ACCESS, BLOCK_N, BLOCK_E)
        if WRITE and not SUM:
            for other in tl.range(0, M, BLOCK_M, num_stages=1):
                b_query, b_context, lse, delta = load_rows_of_g(
                    p_query_means, p_grad_context, p_lse, p_delta, i_bh, other + tl.arange(0, BLOCK_M), M, D, E,
                    BLOCK_D, BLOCK_E, dtype,
                )  # fmt: skip
                weights, grad_logits = key_gradients(
                    b_query, b_context, lse - lift, delta, b_key, b_value, valid, scale, PRECISION
                )
                b_grad_value = dot(tl.trans(weights), b_context, b_grad_value, PRECISION)
                b_grad_key = dot(tl.trans(grad_logits), b_query, b_grad_key, PRECISION)
        else:
            weights, grad_logits = key_gradients(
                b_own_query, b_own_context, own_lse, own_delta, b_key, b_value, valid, scale, PRECISION
            )
            b_grad_query = dot(grad_logits, b_key, b_grad_query, PRECISION)
            if WRITE:
                b_grad_value = dot(tl.trans(weights), b_own_context, b_grad_value, PRECISION)
                b_grad_key = dot(tl.trans(grad_logits), b_own_query, b_grad_key, PRECISION)
        if WRITE:
            b_grad_key *= drop
            b_grad_value *= drop
            if MEMBERS != "none":
                b_grad_key += spread(p_sums + M * E, 0, members, i_bh, H, o_n, valid, D, BLOCK_D, MEMBERS)
            if HAS_EXACT:  # noqa: SIM102 (known when compiled; the other is not)
                if tl.load(p_exact + i_b) != 0:
                    b_spread = spread(p_sums, 0, members, i_bh, H, o_n, valid, E, BLOCK_E, MEMBERS)
                    b_grad_value += b_spread * factor(p_gamma, HAS_GAMMA)
            store_tokens(p_grad_key, begin, b_grad_key, S, D, BLOCK_N, BLOCK_D, TOKEN_MAJOR)
            store_tokens(p_grad_value, begin, b_grad_value, S, E, BLOCK_N, BLOCK_E, TOKEN_MAJOR)
    if SUM:
        o_m, o_d = i_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        p_parts += (i_bh * splits + i_split).to(tl.int64) * M * D
        tl.store(
            p_parts + o_m[:, None] * D + o_d[None, :], b_grad_query * drop,
            mask=(o_m[:, None] < M) & (o_d[None, :] < D),
        )  # fmt: skip


@triton.jit
def query_kernel(
    p_query, s_qb, s_qh, s_qn, s_qd, p_grad, s_gb, s_gh, s_gn, s_gd, p_key_means, p_mixed, p_key_absent, p_gamma,
    p_row_scale, p_delta, p_grad_query_means, members, p_grad_query,
    H, N, M, D: tl.constexpr, E: tl.constexpr, blocks, scale,
    QUERY_ACCESS: tl.constexpr, GRAD_ACCESS: tl.constexpr,
    HAS_ABSENT: tl.constexpr, HAS_GAMMA: tl.constexpr, MEMBERS: tl.constexpr, MANY: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ through F, and what the queries get of d Q~."""
    i_bh = tl.program_id(0) // blocks
    begin = (tl.program_id(0) % blocks) * (STEPS * BLOCK_N)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_queries, s_queries = head_of(p_query, s_qb, s_qh, s_qn, i_b, i_h, QUERY_ACCESS)
    p_grads, s_grads = head_of(p_grad, s_gb, s_gh, s_gn, i_b, i_h, GRAD_ACCESS)
    dtype: tl.constexpr = p_query.dtype.element_ty
    p_grad_query += i_bh.to(tl.int64) * N * D
    gamma = factor(p_gamma, HAS_GAMMA)
    if not MANY:  # one tile of landmarks, at hand for every tile of queries
        o_m = tl.arange(0, BLOCK_M)
        b_key = load_landmarks(p_key_means, i_bh, o_m, M, D, BLOCK_D).to(dtype)  # (M, D)
        b_mixed = (load_landmarks(p_mixed, i_bh, o_m, M, E, BLOCK_E) * gamma).to(dtype)  # (M, E)
        missing = absent(p_key_absent, i_bh // H, o_m, M, HAS_ABSENT)
    for step in tl.range(0, STEPS):
        first = begin + step * BLOCK_N
        o_n = first + tl.arange(0, BLOCK_N)
        b_query = load_tokens(p_queries, s_queries, s_qd, first, o_n < N, D, QUERY_ACCESS, BLOCK_N, BLOCK_D)
        b_grad = load_tokens(p_grads, s_grads, s_gd, first, o_n < N, E, GRAD_ACCESS, BLOCK_N, BLOCK_E)
        b_grad_query = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if MANY:
            row = i_bh.to(tl.int64) * N + o_n
            scales = tl.load(p_row_scale + row, mask=o_n < N, other=float("inf"))
            delta = tl.load(p_delta + row, mask=o_n < N, other=0.0)
            for start in tl.range(0, M, BLOCK_M, num_stages=1):
                o_m = start + tl.arange(0, BLOCK_M)
                b_key = load_landmarks(p_key_means, i_bh, o_m, M, D, BLOCK_D).to(dtype)  # (M, D)
                missing = absent(p_key_absent, i_bh // H, o_m, M, HAS_ABSENT)
                weights = tl.exp2(factor_logits(b_query, b_key, missing, scale, PRECISION) - scales[:, None])
                b_mixed = (load_landmarks(p_mixed, i_bh, o_m, M, E, BLOCK_E) * gamma).to(dtype)  # (M, E)
                grad_logits = weights * (factor_gradient(b_grad, b_mixed, PRECISION) - delta[:, None])
                b_grad_query = dot(grad_logits.to(dtype), b_key, b_grad_query, PRECISION)
        else:
            logits = factor_logits(b_query, b_key, missing, scale, PRECISION)
            weights = tl.exp2(logits - row_scale(logits)[:, None])  # (BLOCK_N, M)
            grad_f = factor_gradient(b_grad, b_mixed, PRECISION)
            grad_logits = weights * (grad_f - tl.sum(weights * grad_f, 1)[:, None])
            b_grad_query = dot(grad_logits.to(dtype), b_key, b_grad_query, PRECISION)
        b_grad_query *= scale
        if MEMBERS != "none":
            b_grad_query += spread(p_grad_query_means, M * D, members, i_bh, H, o_n, o_n < N, D, BLOCK_D, MEMBERS)
        store_tokens(p_grad_query, first, b_grad_query, N, D, BLOCK_N, BLOCK_D, TOKEN_MAJOR)
