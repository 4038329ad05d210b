"""`nystrom_attention` in Triton: what each pass is launched with. The kernels are in the files beside this one."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nystromgan import _triton
from nystromgan.ops.iterative_pinv import triton as pinv
from nystromgan.ops.iterative_pinv import tuning as pinv_tuning
from nystromgan.ops.nystrom_attention import triton_forward as forward
from nystromgan.ops.nystrom_attention import tuning
from nystromgan.ops.nystrom_attention.landmarks import Plan, cached_grid_index
from nystromgan.ops.nystrom_attention.triton_pool import block_means, index_means, index_strides

Outputs = tuple[Tensor, ...]


class Sizes(NamedTuple):
    """Sizes of a call, and the tiles that hold its head dims."""

    batch: int
    heads: int
    queries: int
    keys: int
    landmarks: int
    head_dim: int
    value_dim: int
    block_d: int
    block_e: int
    widest: int
    dtype: torch.dtype

    @classmethod
    def of(cls, query: Tensor, value: Tensor, landmarks: int) -> "Sizes":
        batch, heads, queries, head_dim = query.shape
        keys, value_dim = value.shape[2:]
        block_d, block_e = _triton.tile(head_dim), _triton.tile(value_dim)
        widest = max(block_d, block_e)
        return cls(
            batch, heads, queries, keys, landmarks, head_dim, value_dim, block_d, block_e, widest, query.dtype
        )  # fmt: skip

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    def tiles(self, name: str, most: int) -> dict[str, int | str]:
        """Tile sizes, precision and launch options of pass `name`, with at most `most` landmarks a tile."""
        block_m = _triton.tile(self.landmarks, most)
        return {
            "BLOCK_M": block_m,
            "BLOCK_N": tuning.tokens_of(name, self.dtype, self.widest),
            "BLOCK_D": self.block_d,
            "BLOCK_E": self.block_e,
            "PRECISION": _triton.precision(self.dtype),
            **tuning.launch(name, self.dtype, block_m, self.widest),
        }


def _as_bytes(mask: Tensor | None, absent: Tensor) -> Tensor:
    """A boolean mask as bytes; `absent` in place of None, never read."""
    return absent if mask is None else mask.contiguous().view(torch.uint8)


def _landmark_masks(plan: Plan, absent: Tensor) -> dict[str, object]:
    return {
        "p_query_absent": _as_bytes(plan.query_landmark_mask, absent),
        "p_key_absent": _as_bytes(plan.key_landmark_mask, absent),
    }


def _both_masks(plan: Plan) -> Plan:
    """The plan with both landmark masks or none, as the kernels take them."""
    query, key = plan.query_landmark_mask, plan.key_landmark_mask
    if (query is None) == (key is None):
        return plan
    present = query if key is None else key
    none = torch.zeros_like(present)
    return plan._replace(
        query_landmark_mask=none if query is None else query, key_landmark_mask=none if key is None else key
    )


def _means(query: Tensor, key: Tensor, plan: Plan, layout: tuple | None, num_landmarks: int) -> tuple[Tensor, Tensor]:
    """The landmarks (B, H, M, D) float32: as given, or the means over the layout or the index."""
    if layout is not None:
        return block_means(query, key, layout, num_landmarks)
    sides = (query, plan.query_landmarks, plan.query_index), (key, plan.key_landmarks, plan.key_index)
    query_means, key_means = (
        index_means(tokens, index, num_landmarks) if given is None else given.float().contiguous()
        for tokens, given, index in sides
    )
    return query_means, key_means


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
    num_landmarks: int,
    scale: float,
    pinv_iterations: int,
    global_init: bool,
    layout: tuple | None = None,
) -> Outputs:
    """(output, query_means, key_means, context, mixed, logsumexp); see the schema of the native op.

    layout: (query_grid, key_grid, landmark_grid) of at most three axes, where both sides' landmarks are its means.
    """
    plan = _both_masks(
        Plan(
            query_landmarks, key_landmarks, query_index, key_index, key_padding_mask,
            query_landmark_mask, key_landmark_mask, exact_rows,
        )  # fmt: skip
    )
    sizes = Sizes.of(query, value, num_landmarks)
    with _triton.launch_on(query):
        query_means, key_means = _means(query, key, plan, layout, num_landmarks)
        exact_mixed = None
        if exact_rows is not None:
            assert key_index is not None
            exact_mixed = index_means(value, key_index, num_landmarks)
        context, mixed, logsumexp = _landmark_values(
            sizes, key, value, query_means, key_means, plan, exact_mixed, scale, pinv_iterations, global_init
        )
        output = query.new_empty(*query.shape[:3], sizes.value_dim)
        tiles = sizes.tiles("output", 128 if sizes.widest <= 128 else 64)
        steps = tuning.steps(sizes.queries)
        blocks = triton.cdiv(sizes.queries, steps * int(tiles["BLOCK_N"]))
        forward.output_kernel[(sizes.rows * blocks,)](
            query, *query.stride(), key_means, mixed, _landmark_masks(plan, output)["p_key_absent"], output,
            sizes.heads, sizes.queries, num_landmarks, sizes.head_dim, sizes.value_dim, blocks, scale,
            HAS_ABSENT=plan.key_landmark_mask is not None, STEPS=steps,
            MANY=num_landmarks > int(tiles["BLOCK_M"]), **tiles,
        )  # fmt: skip
    return output, query_means, key_means, context, mixed, logsumexp


def _core_options(sizes: Sizes, iterations: int, global_init: bool, architecture: int, save: bool) -> dict[str, object]:
    """Options of a launch that may hold the program of A and its inverse."""
    block = _triton.tile(sizes.landmarks)
    fused = not global_init and sizes.landmarks <= pinv.ON_CHIP
    tiled = pinv_tuning.tiled(min(block, 128))
    return {
        "CORE": int(fused),
        "ITERATIONS": iterations,
        "CHIP": not save and block <= pinv_tuning.CHIP_MOST[architecture],
        "BLOCK_C": min(block, 128),
        "CORE_D": min(sizes.block_d, 32),
        "TILE": tiled["TILE"],
        "TILE_K": tiled["TILE_K"],
    }


def _core(sizes: Sizes, query_means: Tensor, key_means: Tensor, plan: Plan, scale: float) -> Tensor:
    """A (B, H, M, M) in a launch of its own."""
    core = query_means.new_empty(sizes.batch, sizes.heads, sizes.landmarks, sizes.landmarks)
    block = _triton.tile(sizes.landmarks)
    row_blocks = triton.cdiv(sizes.landmarks, 16)
    forward.core_kernel[(sizes.rows * row_blocks,)](
        query_means, key_means, *_landmark_masks(plan, core).values(), core, sizes.heads, sizes.landmarks,
        sizes.head_dim, scale, row_blocks, HAS_ABSENT=plan.key_landmark_mask is not None, ROWS=16, BLOCK_C=block,
        BLOCK_D=16, num_warps=4, num_stages=2,
    )  # fmt: skip
    return core


def _landmark_values(
    sizes: Sizes, key: Tensor, value: Tensor, query_means: Tensor, key_means: Tensor, plan: Plan,
    exact_mixed: Tensor | None, scale: float, iterations: int, global_init: bool,
) -> Outputs:  # fmt: skip
    """(G V, W, logsumexp of G): the pass over the keys with the inverse beside it, then the product of both."""
    count, dim = sizes.landmarks, sizes.value_dim
    core_options = _core_options(sizes, iterations, global_init, _triton.architecture(key), save=False)
    matrices = 1 if core_options["CHIP"] else pinv.ITERATES * iterations + 1
    iterates = query_means.new_empty(sizes.rows, matrices, count, count) if core_options["CORE"] else query_means
    core = query_means.new_empty(sizes.rows, count, count) if core_options["CORE"] else query_means
    split = tuning.split_tokens(sizes.keys)
    splits = triton.cdiv(sizes.keys, split)
    sums = query_means.new_empty(sizes.rows, splits, count, dim)
    largest, totals = query_means.new_empty(2, sizes.rows, splits, count)
    masks = _landmark_masks(plan, sums)
    mask = plan.key_padding_mask
    tiles = sizes.tiles("landmarks", 128 if sizes.widest <= 64 else 64)
    tiles["num_warps"] = max(int(tiles["num_warps"]), pinv_tuning.WARPS[int(core_options["BLOCK_C"])])  # type: ignore[call-overload]
    m_blocks = triton.cdiv(count, int(tiles["BLOCK_M"]))
    forward.landmark_kernel[(sizes.rows * (splits * m_blocks + int(core_options["CORE"])),)](  # type: ignore[call-overload]
        key, *key.stride(), value, *value.stride(), _as_bytes(mask, sums), *((0, 0) if mask is None else (mask.shape[1], 1)),
        query_means, key_means, *masks.values(), core, iterates, sums, largest, totals,
        sizes.heads, sizes.keys, count, sizes.head_dim, dim, splits, m_blocks, scale,
        HAS_MASK=mask is not None, HAS_ABSENT=plan.key_landmark_mask is not None, SPLIT=split, **core_options, **tiles,
    )  # fmt: skip
    if core_options["CORE"]:
        inverse = iterates[:, -1]
    else:
        inverse = pinv.iterative_pinv(_core(sizes, query_means, key_means, plan, scale), iterations, global_init)
        inverse = inverse.view(sizes.rows, count, count)
    context, mixed = query_means.new_empty(2, sizes.batch, sizes.heads, count, dim)
    logsumexp = query_means.new_empty(sizes.batch, sizes.heads, count)
    rows, block_e = _triton.tile(count, 64), _triton.tile(dim, 16)
    row_blocks, e_blocks = triton.cdiv(count, rows), triton.cdiv(dim, block_e)
    forward.mix_kernel[(sizes.rows * row_blocks * e_blocks,)](
        sums, largest, totals, inverse, inverse.stride(0), masks["p_query_absent"],
        _as_bytes(plan.exact_rows, sums), mixed if exact_mixed is None else exact_mixed, context, mixed, logsumexp,
        sizes.heads, count, dim, splits, row_blocks, e_blocks,
        HAS_ABSENT=plan.query_landmark_mask is not None, HAS_EXACT=exact_mixed is not None,
        ROWS=rows, BLOCK_M=rows, BLOCK_E=block_e, num_warps=4, num_stages=2,
    )  # fmt: skip
    return context, mixed, logsumexp
