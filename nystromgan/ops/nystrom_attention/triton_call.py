"""A call of `nystrom_attention` as its Triton kernels take it: sizes, tiles, masks, layouts and members of means."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nystromgan import _triton
from nystromgan.ops.nystrom_attention import tuning
from nystromgan.ops.nystrom_attention.landmarks import Layout, Plan, indexed
from nystromgan.ops.nystrom_attention.triton_index import index_counts, index_strides
from nystromgan.ops.nystrom_attention.triton_pool import three_axes


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
    architecture: int

    @classmethod
    def of(cls, query: Tensor, value: Tensor, landmarks: int) -> "Sizes":
        batch, heads, queries, head_dim = query.shape
        keys, value_dim = value.shape[2:]
        widest = max(_triton.tile(head_dim), _triton.tile(value_dim))
        # With one head dim's tile over 64, the other's is at least 64. Every warp takes all columns of a product that
        # has fewer of them than rows, and then of the next product, too, whose columns are the other head dim's: heads
        # of 16 and 256 so spilled 5 KB in float32 and 304 bytes in bfloat16.
        least = 64 if widest > 64 else _triton.TILE_MIN
        block_d, block_e = (max(_triton.tile(dim), least) for dim in (head_dim, value_dim))
        return cls(
            batch, heads, queries, keys, landmarks, head_dim, value_dim, block_d, block_e, widest, query.dtype,
            _triton.architecture(query),
        )  # fmt: skip

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    def tiles(self, name: str, smaller: bool = False) -> dict[str, Any]:
        """Tile sizes, precision and launch options of pass `name`; `smaller` ones are those of wider heads."""
        widest = min(2 * max(self.widest, tuning.COLUMNS[0]), tuning.COLUMNS[-1]) if smaller else self.widest
        config = tuning.choose(name, self.architecture, widest, self.dtype.itemsize)
        return {
            "BLOCK_M": _triton.tile(self.landmarks, config.landmarks),
            "BLOCK_N": config.tokens,
            "BLOCK_D": self.block_d,
            "BLOCK_E": self.block_e,
            "PRECISION": _triton.precision(self.dtype),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **_triton.FUSED,
        }

    def uneven(self, name: str, tokens: int) -> dict[str, int]:
        """Options of pass `name` over so many tokens that replace those of `tiles`."""
        dim = max(self.head_dim, self.value_dim)
        return tuning.uneven(name, self.architecture, dim, self.dtype.itemsize, tokens, self.landmarks)


def given(tensor: Tensor | None, absent: Tensor) -> Tensor:
    """A tensor, contiguous; `absent` in place of None, never read."""
    return absent if tensor is None else tensor.contiguous()


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.shape[1], 1)


def convolved(tokens: Tensor, mask: Tensor | None, absent: Tensor) -> tuple[Any, ...]:
    """Tokens and their mask as `load_convolved` takes them."""
    return tokens, *tokens.stride(), _triton.as_bytes(mask, absent), *mask_strides(mask)


def taps(conv_weight: Tensor | None) -> int:
    return 0 if conv_weight is None else conv_weight.shape[1]


def empty_tokens(like: Tensor, count: int, dim: int, token_major: bool) -> Tensor:
    """(B, H, count, dim); laid out as (B, H, dim, count) where not token_major."""
    batch, heads = like.shape[:2]
    if token_major:
        return like.new_empty(batch, heads, count, dim)
    return like.new_empty(batch, heads, dim, count).mT


def empty_like(tokens: Tensor, token_major: bool) -> Tensor:
    return empty_tokens(tokens, tokens.shape[2], tokens.shape[3], token_major)


def landmark_masks(plan: Plan, absent: Tensor) -> dict[str, object]:
    return {
        "p_query_absent": _triton.as_bytes(plan.query_landmark_mask, absent),
        "p_key_absent": _triton.as_bytes(plan.key_landmark_mask, absent),
    }


def both_masks(plan: Plan) -> Plan:
    """The plan with both landmark masks or none, as the kernels take them."""
    query, key = plan.query_landmark_mask, plan.key_landmark_mask
    if (query is None) == (key is None):
        return plan
    present = query if key is None else key
    assert present is not None
    none = torch.zeros_like(present)
    return plan._replace(
        query_landmark_mask=none if query is None else query, key_landmark_mask=none if key is None else key
    )


def laid_out(plan: Plan, layout: Layout, device: torch.device) -> tuple[Plan, Layout | None]:
    """The layout where both sides' landmarks are its means; otherwise none, and an index for the side that it gives."""
    given = (plan.query_landmarks, plan.key_landmarks, plan.query_index, plan.key_index)
    return (plan, layout) if all(x is None for x in given) else (indexed(plan, layout, device), None)


class Members(NamedTuple):
    """Which landmark each token is in the mean of, and how many share it: `membership`'s arguments and their kind."""

    kind: str
    arguments: tuple


def same(index: Tensor | None, other: Tensor | None) -> bool:
    """Whether two indices are one tensor, as those of self-attention under a mask are."""
    if index is None or other is None or index.data_ptr() != other.data_ptr():
        return False
    return index.shape == other.shape and index.stride() == other.stride()


def members(index: Tensor | None, grid: Sequence[int], counts: Sequence[int], num_landmarks: int) -> Members:
    """The tokens of an index or of a grid's blocks; of neither where the caller gave the landmarks."""
    if index is not None:
        sizes = index_counts(index, num_landmarks)
        return Members("index", (index, *index_strides(index), sizes, *index_strides(sizes)[:2]))
    if len(grid) <= 1:
        return Members("segments", (*grid, *counts)) if grid else Members("none", (0,))
    return Members("blocks", (*three_axes(grid), *three_axes(counts)))
