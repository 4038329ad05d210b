"""A value with an interval: how far it would move with other samples."""

from collections.abc import Callable
from typing import NamedTuple

import numpy
from scipy import stats
from torch import Tensor


class Estimate(NamedTuple):
    """A value and the half width of its 95 % interval."""

    value: float
    half_width: float

    def __str__(self) -> str:
        digits = max(2 - int(numpy.floor(numpy.log10(abs(self.value)))), 0) if self.value else 2
        return f"{self.value:.{digits}f} ± {self.half_width:.{digits}f}"


def jackknife(statistic: Callable[..., float], *samples: Tensor, splits: int = 10) -> Estimate:
    """statistic(*samples), with a 95 % interval from leaving out one split at a time.

        half width = t_{K-1, 0.975} sqrt((K - 1) / K sum_k (s_k - mean s)^2),  s_k without the k-th of K splits

    Every one of `samples` (N_i, ...) is cut along its first axis into K parts of nearly equal size. Leaving out, rather
    than computing on each part alone, keeps N nearly the same, on which the bias of Fréchet distances depends.

    Raises:
        ValueError: fewer samples than splits, or fewer than 2 splits.

    Source: Efron and Stein, "The jackknife estimate of variance", 1981, for groups.
    """
    if splits < 2:
        raise ValueError(f"splits must be at least 2, got {splits}")
    for sample in samples:
        if len(sample) < splits:
            raise ValueError(f"samples must be at least as many as the {splits} splits, got {len(sample)}")
    left_out = []
    for k in range(splits):
        kept = [sample[numpy.arange(len(sample)) * splits // len(sample) != k] for sample in samples]
        left_out.append(statistic(*kept))
    spread = (splits - 1) / splits * numpy.square(numpy.array(left_out) - numpy.mean(left_out)).sum()
    return Estimate(statistic(*samples), float(stats.t.ppf(0.975, splits - 1) * numpy.sqrt(spread)))


def mean(values: Tensor, splits: int = 10) -> Estimate:
    """The mean of one value a sample (N,)."""
    return jackknife(lambda kept: kept.double().mean().item(), values, splits=splits)
