"""Which samples are in which batch: a function of the seed and the batch's number alone."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from nystromgan.zoo.training.contract import Data


class Pieces:
    """An endless sampler: for every batch from `start` on, the indices of each of this process's pieces.

    Each pass over the data is a permutation of its own; a batch may reach over its end.
    """

    def __init__(self, length: int, batch: int, seed: int, pieces: int, mine: Sequence[int], start: int) -> None:
        if length < 1:
            raise ValueError("the data are empty")
        self.length, self.batch, self.seed = length, batch, seed
        self.pieces, self.mine, self.start = pieces, mine, start

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch // self.pieces
        for number in itertools.count(self.start):
            for piece in self.mine:
                first = number * self.batch + piece * size
                yield [self._index(position) for position in range(first, first + size)]

    def _index(self, position: int) -> int:
        epoch, within = divmod(position, self.length)
        return int(_permutation(self.length, self.seed, epoch)[within])


@functools.lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    """(length,) int64."""
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    return torch.randperm(length, generator=generator)


def mix(*numbers: int) -> int:
    """A seed of 63 bits from several numbers, each of which changes all of it (SplitMix64's finaliser)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def loader(data: Data, sampler: Pieces, workers: int, device: torch.device) -> Iterator[Any]:
    """The pieces in order, in memory of the CPU; worker processes keep it full where there are any."""
    pinned = device.type == "cuda"
    dataset: Any = data
    return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, pin_memory=pinned))


def to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    return {name: to_device(value, device) for name, value in batch.items()}
