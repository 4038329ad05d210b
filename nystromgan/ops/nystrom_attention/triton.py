"""`nystrom_attention` in Triton: what each pass is launched with. The kernels are in the files beside this one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nystromgan import _triton
from nystromgan.ops.iterative_pinv import triton as pinv
from nystromgan.ops.iterative_pinv import tuning as pinv_tuning
from nystromgan.ops.nystrom_attention import triton_backward as backward
from nystromgan.ops.nystrom_attention import triton_call as call
from nystromgan.ops.nystrom_attention import triton_epilogue as epilogue
from nystromgan.ops.nystrom_attention import triton_forward as forward
from nystromgan.ops.nystrom_attention import tuning
from nystromgan.ops.nystrom_attention.landmarks import Layout, Plan
from nystromgan.ops.nystrom_attention.triton_cluster import cluster_landmarks
from nystromgan.ops.nystrom_attention.triton_index import Side, index_means
from nystromgan.ops.nystrom_attention.triton_mask import masked_landmarks
from nystromgan.ops.nystrom_attention.triton_pool import access, block_means

__all__ = ["cluster_landmarks", "masked_landmarks", "nystrom_attention", "nystrom_attention_backward"]

Outputs = tuple[Tensor, ...]


def _means(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, layout: Layout | None, num_landmarks: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The landmarks (B, H, M, D) float32, as given or the means over the layout or the index; the means of the values
    (B, H, M, E), in the exact rows only."""
    if layout is not None:
        return *block_means(query, key, layout, num_landmarks), None
    sides = [
        Side(tokens, index)
        for tokens, given, index in (
            (query, plan.query_landmarks, plan.query_index),
            (key, plan.key_landmarks, plan.key_index),
        )
        if given is None and index is not None
    ]
    values = None
    if plan.exact_rows is not None:
        assert plan.key_index is not None
        values = Side(value, plan.key_index)
    pooled = iter(index_means(sides, num_landmarks, values, plan.exact_rows))
    query_means, key_means = (
        next(pooled) if given is None else given.float().contiguous()
        for given in (plan.query_landmarks, plan.key_landmarks)
    )
    return query_means, key_means, next(pooled, None)


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_landmarks: Tensor | None,
    key_landmarks: Tensor | None,
    query_index: Tensor | None,
    key_index: Tensor | None,
    key_padding_mask: Tensor | None,
    query_landmark_mask: Tensor | None,
    key_landmark_mask: Tensor | None,
    exact_rows: Tensor | None,
    conv_weight: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    query_grid: Sequence[int],
    key_grid: Sequence[int],
    landmark_grid: Sequence[int],
    num_landmarks: int,
    scale: float,
    pinv_iterations: int,
    global_init: bool,
    token_major: bool,
    keep_iterates: bool,
) -> Outputs:
    """(output, query_means, key_means, context, mixed, logsumexp, iterates); see the schema of the op."""
    plan = Plan(
        query_landmarks, key_landmarks, query_index, key_index, key_padding_mask,
        query_landmark_mask, key_landmark_mask, exact_rows,
    )  # fmt: skip
    plan, layout = call.laid_out(call.both_masks(plan), Layout(query_grid, key_grid, landmark_grid), query.device)
    sizes = call.Sizes.of(query, value, num_landmarks)
    with _triton.launch_on(query):
        query_means, key_means, exact_mixed = _means(query, key, value, plan, layout, num_landmarks)
        context, mixed, logsumexp = _landmark_values(
            sizes, key, value, query_means, key_means, plan, exact_mixed, scale, pinv_iterations, global_init
        )
        output = call.empty_tokens(query, sizes.queries, sizes.value_dim, token_major)
        tiles = sizes.tiles("output")
        steps = tuning.steps(sizes.queries)
        blocks = triton.cdiv(sizes.queries, steps * tiles["BLOCK_N"])
        taps = call.taps(conv_weight)
        forward.output_kernel[(sizes.rows * blocks,)](
            query, *query.stride(), key_means, mixed, call.landmark_masks(plan, output)["p_key_absent"],
            call.given(gamma, output), call.given(conv_weight, output),
            call.convolved(value, key_padding_mask, output) if taps else (0,),
            (0,) if residual is None else (residual, *residual.stride()), output,
            taps, sizes.heads, sizes.queries, num_landmarks, sizes.head_dim, sizes.value_dim, blocks, scale,
            QUERY_ACCESS=access(query), VALUE_ACCESS=access(value), HAS_ABSENT=plan.key_landmark_mask is not None,
            RESIDUAL_ACCESS=None if residual is None else access(residual), HAS_RESIDUAL=residual is not None,
            HAS_GAMMA=gamma is not None, CONVOLVED=taps > 0, HAS_MASK=key_padding_mask is not None,
            TOKEN_MAJOR=token_major, STEPS=steps, MANY=num_landmarks > tiles["BLOCK_M"],
            # of wide heads two blocks of landmarks at once are more shared memory than sm_86 has
            LANDMARK_STAGES=1 if sizes.widest > 128 else tiles["num_stages"],
            BLOCK_K=tuning.CONVOLVED[sizes.dtype.itemsize], **tiles,
        )  # fmt: skip
    return output, query_means, key_means, context, mixed, logsumexp, query_means.new_empty(0)


def _core_options(sizes: call.Sizes, iterations: int, global_init: bool) -> tuple[dict[str, object], int]:
    """Options of the pass over the keys, which may hold the program of A's inverse, and the warps that this wants."""
    block = _triton.tile(sizes.landmarks)
    fused = not global_init and sizes.landmarks <= pinv.ON_CHIP
    tiled = pinv_tuning.choose("beside", sizes.architecture, block)
    return {
        "CORE": int(fused),
        "ITERATIONS": iterations,
        "CHIP": block <= pinv_tuning.CHIP_MOST_BESIDE[sizes.architecture],
        "BLOCK_C": min(block, 128),
        "CORE_D": min(sizes.block_d, 32),
        "TILE": tiled["TILE"],
        "TILE_K": tiled["TILE_K"],
    }, tiled["num_warps"]


def _core(sizes: call.Sizes, query_means: Tensor, key_means: Tensor, plan: Plan, scale: float) -> Tensor:
    """A (B H, side, side) in a launch of its own, zero beyond M."""
    side = pinv.padded(sizes.landmarks)
    core = query_means.new_empty(sizes.rows, side, side)
    block = _triton.tile(sizes.landmarks)
    row_blocks = triton.cdiv(sizes.landmarks, 16)
    forward.core_kernel[(sizes.rows * row_blocks,)](
        query_means, key_means, *call.landmark_masks(plan, core).values(), core, side, sizes.heads, sizes.landmarks,
        sizes.head_dim, scale, row_blocks, HAS_ABSENT=plan.key_landmark_mask is not None, BLOCK_C=block,
        BLOCK_D=16, num_warps=8 if block > 128 else 4, num_stages=2, **_triton.FUSED,
    )  # fmt: skip
    return core


def _landmark_values(
    sizes: call.Sizes, key: Tensor, value: Tensor, query_means: Tensor, key_means: Tensor, plan: Plan,
    exact_mixed: Tensor | None, scale: float, iterations: int, global_init: bool,
) -> Outputs:  # fmt: skip
    """(G V, W, logsumexp of G): the pass over the keys with the inverse beside it, then the product of both."""
    count, dim = sizes.landmarks, sizes.value_dim
    core_options, core_warps = _core_options(sizes, iterations, global_init)
    matrices = 1 if core_options["CHIP"] else pinv.MATRICES
    side = pinv.padded(count)
    work = query_means.new_empty(sizes.rows, matrices, side, side) if core_options["CORE"] else query_means
    split = tuning.split_tokens(sizes.keys, sizes.architecture)
    splits = triton.cdiv(sizes.keys, split)
    sums = query_means.new_empty(sizes.rows, splits, count, dim)
    largest, totals = query_means.new_empty(2, sizes.rows, splits, count)
    masks = call.landmark_masks(plan, sums)
    mask = plan.key_padding_mask
    tiles = sizes.tiles("landmarks")
    block = _triton.tile(count)
    tiles |= tuning.with_core(tiles["num_warps"], core_warps, block, sizes.keys, sizes.architecture)
    m_blocks = triton.cdiv(count, tiles["BLOCK_M"])
    forward.landmark_kernel[(sizes.rows * (splits * m_blocks + int(core_options["CORE"])),)](  # type: ignore[call-overload]
        key, *key.stride(), value, *value.stride(), _triton.as_bytes(mask, sums), *call.mask_strides(mask),
        query_means, key_means, *masks.values(), work, side, sums, largest, totals,
        sizes.heads, sizes.keys, count, sizes.head_dim, dim, splits, m_blocks, scale,
        KEY_ACCESS=access(key), VALUE_ACCESS=access(value),
        HAS_MASK=mask is not None, HAS_ABSENT=plan.key_landmark_mask is not None, SPLIT=split, **core_options, **tiles,
    )  # fmt: skip
    if core_options["CORE"]:
        inverse = work[:, 0 if core_options["CHIP"] else 1]
    else:
        inverse = pinv.iterative_pinv(_core(sizes, query_means, key_means, plan, scale), iterations, global_init)
    context, mixed = query_means.new_empty(2, sizes.batch, sizes.heads, count, dim)
    logsumexp = query_means.new_empty(sizes.batch, sizes.heads, count)
    rows, block_e = _triton.tile(count, 64), _triton.tile(dim, 16)
    row_blocks, e_blocks = triton.cdiv(count, rows), triton.cdiv(dim, block_e)
    forward.mix_kernel[(sizes.rows * row_blocks * e_blocks,)](
        sums, largest, totals, inverse, inverse.stride(0), side, masks["p_query_absent"],
        _triton.as_bytes(plan.exact_rows, sums), mixed if exact_mixed is None else exact_mixed,
        context, mixed, logsumexp, sizes.heads, count, dim, splits, row_blocks, e_blocks,
        HAS_ABSENT=plan.query_landmark_mask is not None, HAS_EXACT=exact_mixed is not None,
        ROWS=rows, BLOCK_M=rows, BLOCK_E=block_e, num_warps=4, num_stages=2, **_triton.FUSED,
    )  # fmt: skip
    return context, mixed, logsumexp


def nystrom_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_means: Tensor,
    key_means: Tensor,
    context: Tensor,
    mixed: Tensor,
    logsumexp: Tensor,
    iterates: Tensor,
    query_landmarks: Tensor | None,
    key_landmarks: Tensor | None,
    query_index: Tensor | None,
    key_index: Tensor | None,
    key_padding_mask: Tensor | None,
    query_landmark_mask: Tensor | None,
    key_landmark_mask: Tensor | None,
    exact_rows: Tensor | None,
    conv_weight: Tensor | None,
    gamma: Tensor | None,
    query_grid: Sequence[int],
    key_grid: Sequence[int],
    landmark_grid: Sequence[int],
    num_landmarks: int,
    scale: float,
    pinv_iterations: int,
    global_init: bool,
    token_major: bool,
    keep_iterates: bool,
) -> Outputs:
    """Gradients of query, key, value, of the landmarks where the caller gave them, of conv_weight and of gamma.

    What is not differentiated is empty.
    """
    plan = Plan(
        query_landmarks, key_landmarks, query_index, key_index, key_padding_mask,
        query_landmark_mask, key_landmark_mask, exact_rows,
    )  # fmt: skip
    plan, layout = call.laid_out(call.both_masks(plan), Layout(query_grid, key_grid, landmark_grid), query.device)
    sizes = call.Sizes.of(query, value, num_landmarks)
    pass_ = Backward(
        sizes, grad_output, query, key, value, query_means, key_means, context, mixed, logsumexp, plan,
        conv_weight, gamma, scale, pinv_iterations, global_init, token_major,
    )  # fmt: skip
    with _triton.launch_on(query):
        grids = layout or Layout((), (), ())
        query_members = call.members(plan.query_index, grids.query_grid, grids.landmark_grid, num_landmarks)
        key_members = query_members
        if not call.same(plan.query_index, plan.key_index):
            key_members = call.members(plan.key_index, grids.key_grid, grids.landmark_grid, num_landmarks)
        stats = pass_.query_stats()
        sums, core = pass_.query_sums(stats)
        grad_context, delta, grad_query_means, grad_gamma = pass_.core(sums, core)
        grad_key, grad_value, grad_query_means = pass_.keys(sums, grad_context, delta, grad_query_means, key_members)
        grad_query = pass_.query(stats, grad_query_means, query_members)
        grad_weight = pass_.conv_weight_gradient()
    empty = query_means.new_empty(0)
    width = num_landmarks * sizes.value_dim
    return (
        grad_query,
        grad_key,
        grad_value,
        grad_query_means if query_members.kind == "none" else empty,
        sums[:, width:].reshape(key_means.shape) if key_members.kind == "none" else empty,
        *_scaled_by_gamma(conv_weight, gamma, grad_weight, grad_gamma),
    )


def _scaled_by_gamma(
    conv_weight: Tensor | None, gamma: Tensor | None, grad_weight: Tensor, grad_gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """(d weight, d gamma), from d weight without gamma and what each head's F W adds to d gamma."""
    if gamma is None:
        return grad_weight, grad_gamma
    total = grad_gamma.sum()
    if conv_weight is None:
        return grad_weight, total
    return grad_weight * gamma, total + (grad_weight * conv_weight).sum()


class Backward(NamedTuple):
    """One backward call: its tensors, and a method a pass."""

    sizes: call.Sizes
    grad_output: Tensor
    query_: Tensor
    key: Tensor
    value: Tensor
    query_means: Tensor
    key_means: Tensor
    context: Tensor
    mixed: Tensor
    logsumexp: Tensor
    plan: Plan
    weight: Tensor | None
    gamma: Tensor | None
    scale: float
    iterations: int
    global_init: bool
    token_major: bool

    @property
    def present(self) -> dict[str, bool]:
        """What a pass over F may find or not."""
        return {"HAS_ABSENT": self.plan.key_landmark_mask is not None, "HAS_GAMMA": self.gamma is not None}

    @property
    def factor(self) -> Tensor:
        """gamma, or what stands in its place and is never read."""
        return call.given(self.gamma, self.mixed)

    @property
    def query_access(self) -> dict[str, tuple[int, bool]]:
        return {"QUERY_ACCESS": access(self.query_), "GRAD_ACCESS": access(self.grad_output)}

    def query_stats(self) -> tuple[Tensor, Tensor] | None:
        """Row scales and deltas of F (B H, N), where landmarks take several tiles."""
        sizes = self.sizes
        if all(sizes.landmarks <= sizes.tiles(name)["BLOCK_M"] for name in ("query_sums", "query")):
            return None
        row_scale, delta = self.query_means.new_empty(2, sizes.rows, sizes.queries)
        tiles = sizes.tiles("query_stats")
        blocks = triton.cdiv(sizes.queries, tiles["BLOCK_N"])
        backward.query_stats_kernel[(sizes.rows * blocks,)](
            self.query_, *self.query_.stride(), self.grad_output, *self.grad_output.stride(),
            self.key_means, self.mixed,
            call.landmark_masks(self.plan, delta)["p_key_absent"], self.factor, row_scale, delta,
            sizes.heads, sizes.queries, sizes.landmarks, sizes.head_dim, sizes.value_dim, blocks, self.scale,
            **self.query_access, **self.present, **tiles,
        )  # fmt: skip
        return row_scale, delta

    def query_sums(self, stats: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """F^T dO and d K~ through F as rows (B H, M (E + D)), and A (B H, side, side), zero beyond M."""
        sizes, count = self.sizes, self.sizes.landmarks
        core_blocks = triton.cdiv(count, 16) if count <= pinv.ON_CHIP else 0
        side = pinv.padded(count)
        core = self.query_means.new_empty(sizes.rows, side, side)
        split = tuning.split_tokens(sizes.queries, sizes.architecture)
        splits = triton.cdiv(sizes.queries, split)
        width = count * (sizes.head_dim + sizes.value_dim)
        parts = self.query_means.new_empty(sizes.rows, splits, width)
        tiles = sizes.tiles("query_sums")
        m_blocks = triton.cdiv(count, tiles["BLOCK_M"])
        row_scale, delta = (parts, parts) if stats is None else stats
        backward.query_sums_kernel[(sizes.rows * (splits * m_blocks + core_blocks),)](
            self.query_, *self.query_.stride(), self.grad_output, *self.grad_output.stride(),
            self.query_means, self.key_means, self.mixed, *call.landmark_masks(self.plan, parts).values(),
            self.factor, row_scale, delta, core, side, parts,
            sizes.heads, sizes.queries, count, sizes.head_dim, sizes.value_dim, splits, m_blocks, self.scale,
            **self.query_access, **self.present, MANY=stats is not None, SPLIT=split,
            CORE=core_blocks, BLOCK_C=_triton.tile(count, pinv.ON_CHIP), CORE_D=min(sizes.block_d, 32), **tiles,
        )  # fmt: skip
        if not core_blocks:
            core = _core(sizes, self.query_means, self.key_means, self.plan, self.scale)
        return _reduced(parts), core

    def core(self, sums: Tensor, core: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d(G V), its row sums against G V, d Q~ through A, and d gamma (B H,); d K~ is completed in `sums`."""
        sizes, count = self.sizes, self.sizes.landmarks
        fused = not self.global_init and count <= pinv.ON_CHIP
        grad_context, grad_query_means = torch.empty_like(self.context), torch.empty_like(self.query_means)
        delta = torch.empty_like(self.logsumexp)
        grad_core = torch.empty_like(core)
        grad_gamma = core.new_empty(0 if self.gamma is None else sizes.rows)

        def launch(work: Tensor, inverse: Tensor, grad_core: Tensor, **parts: bool) -> None:
            block = _triton.tile(count)
            backward.core_backward_kernel[(sizes.rows,)](
                sums, self.context, self.mixed, core, work, inverse, inverse.stride(0), core.shape[1],
                self.query_means, self.key_means,
                call.landmark_masks(self.plan, sums)["p_query_absent"], _triton.as_bytes(self.plan.exact_rows, sums),
                self.factor, grad_context, delta, grad_core, grad_query_means, grad_gamma,
                sizes.heads, count, sizes.head_dim, sizes.value_dim, self.scale,
                **self.present, HAS_EXACT=self.plan.exact_rows is not None, **parts,
                ITERATIONS=self.iterations, BLOCK_C=block,
                CHIP=block <= pinv_tuning.CHIP_MOST_BACKWARD[sizes.architecture],
                **pinv_tuning.choose("core_backward", sizes.architecture, block), **_triton.FUSED,
            )  # fmt: skip

        if fused:
            work = core.new_empty(sizes.rows, 2 * pinv.MATRICES, *core.shape[1:])
            launch(work, work[:, 1], grad_core, FIRST=True, PINV=True, LAST=True)
        else:
            launch(core, core, grad_core, FIRST=True, PINV=False, LAST=False)
            grad_core, inverse = pinv.tiled_backward(grad_core, core, self.iterations, self.global_init)
            launch(core, inverse, grad_core, FIRST=False, PINV=False, LAST=True)
        return grad_context, delta, grad_query_means, grad_gamma

    def keys(
        self, sums: Tensor, grad_context: Tensor, delta: Tensor, grad_query_means: Tensor, members: call.Members
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dK, dV, and d Q~ complete."""
        sizes, count, mask = self.sizes, self.sizes.landmarks, self.plan.key_padding_mask
        grad_key, grad_value = (call.empty_like(x, self.token_major) for x in (self.key, self.value))
        split = tuning.split_tokens(sizes.keys, sizes.architecture)
        splits = triton.cdiv(sizes.keys, split)
        parts = grad_context.new_empty(sizes.rows, splits, count * sizes.head_dim)
        taps = call.taps(self.weight)
        tiles = sizes.tiles("keys", smaller=taps > 0 and sizes.dtype.itemsize == 4)  # else it spills on sm_80
        m_blocks = triton.cdiv(count, tiles["BLOCK_M"])
        lift = (sizes.keys.bit_length() - 1) // 2 if sizes.dtype == torch.float16 else 0

        def launch(blocks: int, **options: int) -> None:
            backward.keys_kernel[(sizes.rows * splits * blocks,)](
                self.key, *self.key.stride(), self.value, *self.value.stride(),
                _triton.as_bytes(mask, parts), *call.mask_strides(mask),
                self.query_means, grad_context, self.logsumexp, delta, sums, members.arguments,
                _triton.as_bytes(self.plan.exact_rows, parts), self.factor, call.given(self.weight, parts),
                call.convolved(self.grad_output, None, parts) if taps else (0,), grad_key, grad_value, parts,
                taps, sizes.heads, sizes.keys, count, sizes.head_dim, sizes.value_dim, splits, blocks,
                self.scale, float(lift),
                KEY_ACCESS=access(self.key), VALUE_ACCESS=access(self.value), GRAD_ACCESS=access(self.grad_output),
                HAS_MASK=mask is not None, MEMBERS=members.kind, HAS_EXACT=self.plan.exact_rows is not None,
                HAS_GAMMA=self.gamma is not None, CONVOLVED=taps > 0, TOKEN_MAJOR=self.token_major,
                SPLIT=split, BLOCK_K=tuning.convolved_keys(sizes.architecture, sizes.widest, sizes.dtype.itemsize),
                **tiles | options,
            )  # fmt: skip

        if m_blocks == 1:
            launch(1, WRITE=True, SUM=True)
        else:
            # a loop over 64 landmarks a turn spills 336 bytes on sm_80 and 96 on sm_90 in heads of 128
            block_m = min(tiles["BLOCK_M"], 4096 // sizes.widest)
            launch(1, WRITE=True, SUM=False, BLOCK_M=block_m, **sizes.uneven("keys_write", sizes.keys))
            launch(m_blocks, WRITE=False, SUM=True, **({} if taps else sizes.uneven("keys_sum", sizes.keys)))
        total = _reduced(parts, grad_query_means.view(sizes.rows, -1))
        return grad_key, grad_value, total.view(grad_query_means.shape)

    def query(self, stats: tuple[Tensor, Tensor] | None, grad_query_means: Tensor, members: call.Members) -> Tensor:
        sizes = self.sizes
        grad_query = call.empty_like(self.query_, self.token_major)
        tiles = sizes.tiles("query") | sizes.uneven("query", sizes.queries)
        # where the landmarks are not at hand, several tiles save no loads, and bfloat16 heads of 256 laid out as (D, N)
        # spill 16 to 32 bytes in that loop
        alone = stats is not None and sizes.widest > 128 and sizes.dtype.itemsize == 2 and not self.token_major
        steps = 1 if alone else tuning.steps(sizes.queries)
        blocks = triton.cdiv(sizes.queries, steps * tiles["BLOCK_N"])
        row_scale, delta = (grad_query_means, grad_query_means) if stats is None else stats
        backward.query_kernel[(sizes.rows * blocks,)](
            self.query_, *self.query_.stride(), self.grad_output, *self.grad_output.stride(),
            self.key_means, self.mixed,
            call.landmark_masks(self.plan, delta)["p_key_absent"], self.factor, row_scale, delta, grad_query_means,
            members.arguments, grad_query,
            sizes.heads, sizes.queries, sizes.landmarks, sizes.head_dim, sizes.value_dim, blocks, self.scale,
            **self.query_access, **self.present, MEMBERS=members.kind,
            MANY=stats is not None, TOKEN_MAJOR=self.token_major, STEPS=steps, **tiles,
        )  # fmt: skip
        return grad_query

    def conv_weight_gradient(self) -> Tensor:
        """d weight (H, taps) without gamma, in two launches; empty without a convolution."""
        sizes, taps, mask = self.sizes, call.taps(self.weight), self.plan.key_padding_mask
        if not taps:
            return self.mixed.new_empty(0)
        config = tuning.choose("weight_gradient", sizes.architecture, sizes.block_e, sizes.dtype.itemsize)
        split = tuning.split_tokens(sizes.keys, sizes.architecture)
        splits = triton.cdiv(sizes.keys, split)
        chunks = triton.cdiv(config.tokens + taps - 1, config.landmarks)
        parts = self.mixed.new_empty(sizes.rows, splits * chunks, taps)
        epilogue.weight_gradient_kernel[(sizes.rows * splits * chunks,)](
            call.convolved(self.grad_output, None, parts), call.convolved(self.value, mask, parts), parts,
            sizes.heads, sizes.keys, sizes.value_dim, splits, chunks, taps,
            GRAD_ACCESS=access(self.grad_output), VALUE_ACCESS=access(self.value), HAS_MASK=mask is not None,
            SPLIT=split, BLOCK_N=config.tokens, BLOCK_K=config.landmarks, BLOCK_E=sizes.block_e,
            PRECISION=_triton.precision(sizes.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
            **_triton.FUSED,
        )  # fmt: skip
        return _reduced(parts).view(sizes.batch, sizes.heads, taps).sum(0)


def _reduced(parts: Tensor, base: Tensor | None = None) -> Tensor:
    """base + the sum over the splits of parts (B H, splits, size), in their order."""
    rows, splits, size = parts.shape
    total = parts.new_empty(rows, size)
    blocks = triton.cdiv(size, 512)
    backward.reduce_kernel[(rows * blocks,)](
        parts, parts if base is None else base, total, size, splits, blocks,
        HAS_BASE=base is not None, BLOCK=512, num_warps=4, **_triton.FUSED,
    )  # fmt: skip
    return total
