"""The forward passes of `nystrom_attention` in Triton; docs of the passes in the design of the op's README.

Letters: B batch, H heads, N queries, S keys, M landmarks, D and E head dims, F, A, G, Z, W as in `docs/notation.md`.
Logits are taken to base 2, so that exp2 serves; what is stored (logsumexp) is natural.
"""

import triton
import triton.language as tl

from nystromgan._triton import dot, dot_rows
from nystromgan.ops.iterative_pinv.triton import chip_steps, initial_scale, iterate, store_matrix
from nystromgan.ops.nystrom_attention.triton_epilogue import convolve, factor
from nystromgan.ops.nystrom_attention.triton_tokens import absent, head_of, load_landmarks, load_tokens, store_tokens

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def core_rows(
    p_query_means, p_key_means, query_absent, key_absent, i_bh, o_r, o_c, M, D: tl.constexpr, scale,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows o_r of A over all columns o_c."""
    o_d = tl.arange(0, BLOCK_D)
    p_query_means += i_bh.to(tl.int64) * M * D
    p_key_means += i_bh.to(tl.int64) * M * D
    logits = tl.zeros((o_r.shape[0], o_c.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + o_d
        b_query = tl.load(
            p_query_means + o_r[:, None] * D + d[None, :], mask=(o_r[:, None] < M) & (d[None, :] < D), other=0.0
        )  # (rows, BLOCK_D)
        b_key = tl.load(
            p_key_means + o_c[None, :] * D + d[:, None], mask=(o_c[None, :] < M) & (d[:, None] < D), other=0.0
        )  # (BLOCK_D, M)
        logits = tl.dot(b_query, b_key, logits, input_precision="tf32x3")
    logits = tl.where(key_absent[None, :], float("-inf"), logits * (scale * LOG2E))
    largest = tl.max(logits, 1)
    weights = tl.exp2(logits - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
    total = tl.sum(weights, 1)
    b_core = weights / tl.where(total == 0.0, 1.0, total)[:, None]
    return tl.where(query_absent[:, None], 0.0, b_core)  # (rows, M)


@triton.jit
def store_core_rows(
    p_query_means, p_key_means, p_query_absent, p_key_absent, p_core, side, start, i_bh, H, M, D: tl.constexpr, scale,
    HAS_ABSENT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows start to start + 16 of A to a head's (side, side) matrix, which is zero beyond M."""
    o_r, o_c = start + tl.arange(0, 16), tl.arange(0, BLOCK_C)
    b_core = core_rows(
        p_query_means, p_key_means, absent(p_query_absent, i_bh // H, o_r, M, HAS_ABSENT),
        absent(p_key_absent, i_bh // H, o_c, M, HAS_ABSENT), i_bh, o_r, o_c, M, D, scale, BLOCK_D,
    )  # fmt: skip
    inside = (o_r[:, None] < side) & (o_c[None, :] < side)
    tl.store(p_core + o_r[:, None] * side + o_c[None, :], b_core, mask=inside)


@triton.jit
def core_kernel(
    p_query_means, p_key_means, p_query_absent, p_key_absent, p_core, side, H, M, D: tl.constexpr, scale, row_blocks,
    HAS_ABSENT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A alone, 16 rows a program: where its inverse takes launches of its own."""
    i_bh = tl.program_id(0) // row_blocks
    store_core_rows(
        p_query_means, p_key_means, p_query_absent, p_key_absent, p_core + i_bh.to(tl.int64) * side * side,
        side, (tl.program_id(0) % row_blocks) * 16, i_bh, H, M, D, scale, HAS_ABSENT, BLOCK_C, BLOCK_D,
    )  # fmt: skip


@triton.jit
def core_inverse(
    p_query_means, p_key_means, p_query_absent, p_key_absent, p_work, side, i_bh, H, M, D: tl.constexpr, scale,
    HAS_ABSENT: tl.constexpr, ITERATIONS: tl.constexpr, CHIP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Z in one program: with CHIP p_work is its place, else the 5 matrices of `iterate`, of which it is the second."""
    if CHIP:
        o_c = tl.arange(0, BLOCK_C)
        b_core = core_rows(
            p_query_means, p_key_means, absent(p_query_absent, i_bh // H, o_c, M, HAS_ABSENT),
            absent(p_key_absent, i_bh // H, o_c, M, HAS_ABSENT), i_bh, o_c, o_c, M, D, scale, BLOCK_D,
        )  # fmt: skip
        b_pinv = chip_steps(b_core, tl.trans(b_core) / initial_scale(b_core), ITERATIONS)
        store_matrix(p_work + i_bh.to(tl.int64) * side * side, b_pinv, side, BLOCK_C)
    else:
        p_work += i_bh.to(tl.int64) * 5 * side * side
        for start in range(0, M, 16):
            store_core_rows(
                p_query_means, p_key_means, p_query_absent, p_key_absent, p_work, side, start, i_bh, H, M, D, scale,
                HAS_ABSENT, BLOCK_C, BLOCK_D,
            )  # fmt: skip
        iterate(p_work, side, ITERATIONS, False, False, BLOCK_C, TILE, TILE_K)


@triton.jit
def landmark_kernel(
    p_key, s_kb, s_kh, s_kn, s_kd, p_value, s_vb, s_vh, s_vn, s_vd, p_mask, s_mb, s_mn,
    p_query_means, p_key_means, p_query_absent, p_key_absent, p_work, side,
    p_sums, p_largest, p_totals, H, S, M, D: tl.constexpr, E: tl.constexpr, splits, m_blocks, scale,
    KEY_ACCESS: tl.constexpr, VALUE_ACCESS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ABSENT: tl.constexpr, CORE: tl.constexpr, ITERATIONS: tl.constexpr,
    CHIP: tl.constexpr, BLOCK_C: tl.constexpr, CORE_D: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """G V of BLOCK_M landmarks over one split of the keys, unnormalised; with CORE, a head's first program is Z.

    The inverse is long and narrow and depends on the landmarks alone: it runs beside the pass over the keys.
    """
    per_head = splits * m_blocks + CORE
    i_bh = tl.program_id(0) // per_head
    i = tl.program_id(0) % per_head - CORE
    if i < 0:
        core_inverse(
            p_query_means, p_key_means, p_query_absent, p_key_absent, p_work, side, i_bh, H, M, D, scale,
            HAS_ABSENT, ITERATIONS, CHIP, BLOCK_C, CORE_D, TILE, TILE_K,
        )  # fmt: skip
    else:
        i_split = i // m_blocks
        o_m = (i % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
        p_keys, s_keys = head_of(p_key, s_kb, s_kh, s_kn, i_b, i_h, KEY_ACCESS)
        p_values, s_values = head_of(p_value, s_vb, s_vh, s_vn, i_b, i_h, VALUE_ACCESS)
        b_query = load_landmarks(p_query_means, i_bh, o_m, M, D, BLOCK_D).to(p_key.dtype.element_ty)  # (M, D)
        b_largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        b_total = tl.zeros((BLOCK_M,), tl.float32)
        b_sum = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for start in tl.range(0, SPLIT, BLOCK_N):
            first = i_split * SPLIT + start
            o_n = first + tl.arange(0, BLOCK_N)
            valid = o_n < S
            if HAS_MASK:
                valid &= tl.load(p_mask + i_b * s_mb + o_n.to(tl.int64) * s_mn, mask=valid, other=1) == 0
            b_key = load_tokens(p_keys, s_keys, s_kd, first, valid, D, KEY_ACCESS, BLOCK_N, BLOCK_D)
            b_value = load_tokens(p_values, s_values, s_vd, first, valid, E, VALUE_ACCESS, BLOCK_N, BLOCK_E)
            logits = dot_rows(b_query, b_key, PRECISION)
            logits = tl.where(valid[None, :], logits * (scale * LOG2E), float("-inf"))
            largest = tl.maximum(b_largest, tl.max(logits, 1))
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            weights = tl.exp2(logits - shift[:, None])  # (M, BLOCK_N)
            decay = tl.exp2(b_largest - shift)
            b_total = b_total * decay + tl.sum(weights, 1)
            b_sum = dot(weights.to(b_value.dtype), b_value, b_sum * decay[:, None], PRECISION)
            b_largest = largest
        o_e = tl.arange(0, BLOCK_E)
        row = (i_bh * splits + i_split).to(tl.int64) * M + o_m
        tl.store(p_largest + row, b_largest, mask=o_m < M)
        tl.store(p_totals + row, b_total, mask=o_m < M)
        tl.store(p_sums + row[:, None] * E + o_e[None, :], b_sum, mask=(o_m[:, None] < M) & (o_e[None, :] < E))


@triton.jit
def mix_kernel(
    p_sums, p_largest, p_totals, p_pinv, s_pinv, side, p_query_absent, p_exact, p_exact_mixed,
    p_context, p_mixed, p_lse, H, M, E: tl.constexpr, splits, row_blocks, e_blocks,
    HAS_ABSENT: tl.constexpr, HAS_EXACT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """G V from its splits, in their order, and ROWS rows of W = Z G V for BLOCK_E columns."""
    pid = tl.program_id(0)
    i_bh = pid // (row_blocks * e_blocks)
    i_row = (pid // e_blocks) % row_blocks
    o_r = i_row * ROWS + tl.arange(0, ROWS)
    o_e = (pid % e_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    p_pinv += i_bh.to(tl.int64) * s_pinv
    base = i_bh.to(tl.int64) * M
    b_mixed = tl.zeros((ROWS, BLOCK_E), tl.float32)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        b_total = tl.zeros((BLOCK_M,), tl.float32)
        b_sum = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        inside = (o_m[:, None] < M) & (o_e[None, :] < E)
        for i in range(0, splits):
            row = (i_bh * splits + i).to(tl.int64) * M + o_m
            largest = tl.load(p_largest + row, mask=o_m < M, other=float("-inf"))
            shift = tl.maximum(b_largest, largest)
            finite = tl.where(shift == float("-inf"), 0.0, shift)
            old, new = tl.exp2(b_largest - finite), tl.exp2(largest - finite)
            b_total = b_total * old + tl.load(p_totals + row, mask=o_m < M, other=0.0) * new
            part = tl.load(p_sums + row[:, None] * E + o_e[None, :], mask=inside, other=0.0)  # (BLOCK_M, BLOCK_E)
            b_sum = b_sum * old[:, None] + part * new[:, None]
            b_largest = shift
        empty = (b_total == 0.0) | absent(p_query_absent, i_bh // H, o_m, M, HAS_ABSENT)
        b_sum = tl.where(empty[:, None], 0.0, b_sum / tl.where(empty, 1.0, b_total)[:, None])
        if i_row == 0:
            tl.store(p_context + (base + o_m)[:, None] * E + o_e[None, :], b_sum, mask=inside)
            if pid % e_blocks == 0:
                lse = tl.where(empty, float("inf"), (b_largest + tl.log2(tl.where(empty, 1.0, b_total))) * LN2)
                tl.store(p_lse + base + o_m, lse, mask=o_m < M)  # an empty row's weights are exp(-inf) later
        b_pinv = tl.load(
            p_pinv + o_r[:, None] * side + o_m[None, :], mask=(o_r[:, None] < side) & (o_m[None, :] < side), other=0.0
        )  # (ROWS, BLOCK_M)
        b_mixed = tl.dot(b_pinv, b_sum, b_mixed, input_precision="tf32x3")
    offsets = (base + o_r)[:, None] * E + o_e[None, :]
    inside = (o_r[:, None] < M) & (o_e[None, :] < E)
    if HAS_EXACT:  # noqa: SIM102 (known when compiled; the other is not)
        if tl.load(p_exact + i_bh // H) != 0:
            b_mixed = tl.load(p_exact_mixed + offsets, mask=inside, other=0.0)
    tl.store(p_mixed + offsets, b_mixed, mask=inside)


@triton.jit
def output_kernel(
    p_query, s_qb, s_qh, s_qn, s_qd, p_key_means, p_mixed, p_key_absent, p_gamma, p_weight, value, residual, p_output,
    taps, H, N, M, D: tl.constexpr, E: tl.constexpr, blocks, scale,
    QUERY_ACCESS: tl.constexpr, VALUE_ACCESS: tl.constexpr, RESIDUAL_ACCESS: tl.constexpr,
    HAS_ABSENT: tl.constexpr, HAS_GAMMA: tl.constexpr, CONVOLVED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, TOKEN_MAJOR: tl.constexpr, STEPS: tl.constexpr, MANY: tl.constexpr,
    LANDMARK_STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """O = gamma (F W + convolution) + residual, STEPS tiles of BLOCK_N queries a program.

    With MANY, landmarks come in blocks. `residual` is its pointer and strides, `value` as `load_convolved` takes it.
    """
    i_bh = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * (STEPS * BLOCK_N)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_queries, s_queries = head_of(p_query, s_qb, s_qh, s_qn, i_b, i_h, QUERY_ACCESS)
    p_output += i_bh.to(tl.int64) * N * E
    dtype: tl.constexpr = p_query.dtype.element_ty
    o_m = tl.arange(0, BLOCK_M)
    b_key = load_landmarks(p_key_means, i_bh, o_m, M, D, BLOCK_D).to(dtype)  # (M, D)
    gamma = factor(p_gamma, HAS_GAMMA)
    b_mixed = (load_landmarks(p_mixed, i_bh, o_m, M, E, BLOCK_E) * gamma).to(dtype)  # (M, E)
    beyond = absent(p_key_absent, i_bh // H, o_m, M, HAS_ABSENT)
    for step in tl.range(0, STEPS):
        start_n = first + step * BLOCK_N
        valid = start_n + tl.arange(0, BLOCK_N) < N
        b_query = load_tokens(p_queries, s_queries, s_qd, start_n, valid, D, QUERY_ACCESS, BLOCK_N, BLOCK_D)
        logits = dot_rows(b_query, b_key, PRECISION)
        logits = tl.where(beyond[None, :], float("-inf"), logits * (scale * LOG2E))
        largest = tl.max(logits, 1)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(logits - shift[:, None])  # (BLOCK_N, M)
        total = tl.sum(weights, 1)
        b_output = dot(weights.to(dtype), b_mixed, tl.zeros((BLOCK_N, BLOCK_E), tl.float32), PRECISION)
        if MANY:
            for start in tl.range(BLOCK_M, M, BLOCK_M, num_stages=LANDMARK_STAGES):
                rest = start + o_m
                b_more = load_landmarks(p_key_means, i_bh, rest, M, D, BLOCK_D).to(dtype)
                logits = dot_rows(b_query, b_more, PRECISION)
                missing = absent(p_key_absent, i_bh // H, rest, M, HAS_ABSENT)
                logits = tl.where(missing[None, :], float("-inf"), logits * (scale * LOG2E))
                larger = tl.maximum(largest, tl.max(logits, 1))
                shift = tl.where(larger == float("-inf"), 0.0, larger)
                weights = tl.exp2(logits - shift[:, None])
                decay = tl.exp2(largest - shift)
                total = total * decay + tl.sum(weights, 1)
                b_more = (load_landmarks(p_mixed, i_bh, rest, M, E, BLOCK_E) * gamma).to(dtype)
                b_output = dot(weights.to(dtype), b_more, b_output * decay[:, None], PRECISION)
                largest = larger
        b_output /= tl.where(total == 0.0, 1.0, total)[:, None]
        if CONVOLVED:
            b_output = convolve(
                b_output, value, p_weight, taps, gamma, i_b, i_h, start_n, N, E, False, VALUE_ACCESS, HAS_MASK,
                BLOCK_N, BLOCK_K, BLOCK_E, PRECISION,
            )  # fmt: skip
        if HAS_RESIDUAL:
            p_sums, s_sums = head_of(residual[0], residual[1], residual[2], residual[3], i_b, i_h, RESIDUAL_ACCESS)
            b_output += load_tokens(
                p_sums, s_sums, residual[4], start_n, valid, E, RESIDUAL_ACCESS, BLOCK_N, BLOCK_E
            ).to(tl.float32)  # fmt: skip
        store_tokens(p_output, start_n, b_output, N, E, BLOCK_N, BLOCK_E, TOKEN_MAJOR)
