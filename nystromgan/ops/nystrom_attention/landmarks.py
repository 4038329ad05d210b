"""Which token belongs to which landmark: segments of a sequence, blocks of a grid, both over the valid tokens only."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nystromgan import _check, _library


class Layout(NamedTuple):
    """Block means over a grid of tokens; a plain sequence is a grid of one axis."""

    query_grid: Sequence[int]
    key_grid: Sequence[int]
    landmark_grid: Sequence[int]  # blocks along each axis


class Plan(NamedTuple):
    """The landmarks of one call.

    An index (B|1, H|1, tokens) int32 gives each token's landmark, -1 for none; where it is absent and so are the
    landmarks, the layout gives it. Landmarks given together with an index are the means over it.
    """

    query_landmarks: Tensor | None = None  # (B, H, M, D)
    key_landmarks: Tensor | None = None  # (B, H, M, D)
    query_index: Tensor | None = None  # (B|1, H|1, N)
    key_index: Tensor | None = None  # (B|1, H|1, S)
    key_padding_mask: Tensor | None = None  # (B, S), True = ignore
    query_landmark_mask: Tensor | None = None  # (B, M), True = there is no such landmark
    key_landmark_mask: Tensor | None = None  # (B, M)
    exact_rows: Tensor | None = None  # (B,), True = every valid key is its own landmark: O = F pool(V)


def landmark_grid(num_landmarks: int | Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    """Landmarks along each axis of `grid`: as given, or chosen for a total of `num_landmarks`."""
    if isinstance(num_landmarks, Sequence):
        counts = tuple(num_landmarks)
        if len(counts) != len(grid):
            raise ValueError(f"num_landmarks must give one count per axis of grid {tuple(grid)}, got {counts}")
        for axis, count in enumerate(counts):
            _check.at_least(f"num_landmarks[{axis}]", count, 1)
        return tuple(min(count, size) for count, size in zip(counts, grid, strict=True))
    _check.at_least("num_landmarks", num_landmarks, 1)
    if num_landmarks >= math.prod(grid):
        return tuple(grid)
    return (num_landmarks,) if len(grid) == 1 else near_cubic_counts(num_landmarks, tuple(grid))


@_library.constant_when_compiled
def near_cubic_counts(num_landmarks: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Counts per axis with product `num_landmarks`, or up to an eighth less where that keeps blocks nearer to cubes.

    Minimises log(longest / shortest block side) + 32 log(num_landmarks / product): one landmark in fifty is worth
    a block nearly twice as close to a cube.
    """
    return _near_cubic_counts(num_landmarks, grid)


@functools.lru_cache(maxsize=256)
def _near_cubic_counts(num_landmarks: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    def cost(counts: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        sides = [size / count for size, count in zip(grid, counts, strict=True)]
        total = math.prod(counts)
        return round(math.log(max(sides) / min(sides)) + 32 * math.log(num_landmarks / total), 9), counts[1:]

    fewest = num_landmarks - num_landmarks // 8
    candidates = itertools.chain.from_iterable(_factorizations(m, grid) for m in range(num_landmarks, fewest - 1, -1))
    best = min(candidates, key=cost, default=None)
    return best or _near_cubic_counts(num_landmarks - 1, grid)


def _factorizations(total: int, grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every way to write `total` as a product of one factor per axis, none above the axis."""
    if not grid:
        return [()] if total == 1 else []
    return [
        (factor, *rest)
        for factor in range(1, min(total, grid[0]) + 1)
        if total % factor == 0
        for rest in _factorizations(total // factor, grid[1:])
    ]


def grid_index(grid: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """(1, 1, tokens) int32: each token's block, row-major; the first size mod count blocks of an axis are longer."""
    index = torch.zeros((), dtype=torch.int32, device=device)
    for size, count in zip(grid, counts, strict=True):
        position = torch.arange(size, dtype=torch.int32, device=device)
        index = index[..., None] * count + segment_of(position, size // count, size % count)
    return index.reshape(1, 1, -1)


def segment_of(position: Tensor, short: int | Tensor, longer: int | Tensor) -> Tensor:
    """The segment of each position, where the first `longer` segments have short + 1 tokens and the others `short`."""
    return torch.where(position < longer * (short + 1), position // (short + 1), (position - longer) // short)


def indexed(plan: Plan, layout: Layout, device: torch.device) -> Plan:
    """The plan with the layout's index on a side that has neither landmarks nor index."""
    if plan.query_landmarks is None and plan.query_index is None:
        plan = plan._replace(query_index=grid_index(layout.query_grid, layout.landmark_grid, device))
    if plan.key_landmarks is None and plan.key_index is None:
        plan = plan._replace(key_index=grid_index(layout.key_grid, layout.landmark_grid, device))
    return plan


def masked_segments(padding_mask: Tensor, num_landmarks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Segments over the valid tokens by rank: (index (B, 1, S), landmark_mask (B, M), exact_rows (B,)).

    A row with no more valid tokens than landmarks has one landmark for each, and is exact.
    """
    valid = ~padding_mask
    total = valid.sum(-1, keepdim=True)  # (B, 1)
    count = total.clamp(1, num_landmarks)
    segment = segment_of(valid.cumsum(-1) - 1, (total // count).clamp(min=1), total % count)  # (B, S)
    index = torch.where(valid, segment, -1).to(torch.int32)[:, None]
    landmark_mask = torch.arange(num_landmarks, device=valid.device) >= total.clamp(max=num_landmarks)
    return index, landmark_mask, total[:, 0] <= num_landmarks


def masked_blocks(padding_mask: Tensor, grid: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Blocks of a grid over their valid tokens: (index (B, 1, S), landmark_mask (B, M)); an empty block is masked."""
    block = grid_index(grid, counts, padding_mask.device)[0]  # (1, S)
    index = torch.where(padding_mask, -1, block)  # (B, S)
    valid = (~padding_mask).to(torch.int32)
    total = valid.new_zeros(valid.shape[0], math.prod(counts)).scatter_add(1, block.expand_as(index).long(), valid)
    return index[:, None], total == 0


def masked_landmarks(
    padding_mask: Tensor | None, grid: Sequence[int], counts: Sequence[int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(index, landmark_mask, exact_rows) of tokens under a mask; all None without one."""
    if padding_mask is None:
        return None, None, None
    if len(grid) == 1:
        return masked_segments(padding_mask, counts[0])
    return *masked_blocks(padding_mask, grid, counts), None
