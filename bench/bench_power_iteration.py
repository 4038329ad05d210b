"""Spectral norm of a 20-layer discriminator's weights, one training forward: torch's parametrization and ours.

OMP_NUM_THREADS=2 python -m pytest bench/bench_power_iteration.py --benchmark-columns=median,iqr,rounds
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _SpectralNorm

from nystromgan import power_iteration
from nystromgan.ops.power_iteration import spectral_normalize
from nystromgan.testing import backends_of, relative_error

CHANNELS = [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5
SHAPES = [(o, 9 * i) for i, o in zip([64, *CHANNELS], CHANNELS, strict=False)]
WEIGHTS = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]  # 56.5 MB


def peer(weights: list[torch.nn.Parameter]) -> tuple[Callable[[], list[Tensor]], list[Tensor], list[Tensor]]:
    """torch's parametrization of every weight, and its vectors."""
    modules = [_SpectralNorm(weight.detach()).train() for weight in weights]
    run = lambda: [module(weight) for module, weight in zip(modules, weights, strict=True)]  # noqa: E731
    return run, [module._u for module in modules], [module._v for module in modules]


def gate(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Two steps of ours equal torch's, or the benchmark fails; returns our vectors."""
    run, peer_u, peer_v = peer(WEIGHTS)
    u, v = [x.clone() for x in peer_u], [x.clone() for x in peer_v]
    for _ in range(2):
        pairs = zip(spectral_normalize(WEIGHTS, u, v, backend=backend), run(), strict=True)
        assert all(relative_error(ours, theirs) < 1e-5 for ours, theirs in pairs)
    return u, v


@pytest.mark.benchmark(group="weights / sigma, with autograd")
@pytest.mark.parametrize("implementation", ["torch", *backends_of("power_iteration")])
def test_spectral_norm(benchmark: Callable, implementation: str) -> None:
    if implementation == "torch":
        benchmark(peer(WEIGHTS)[0])
    else:
        u, v = gate(implementation)
        benchmark(lambda: spectral_normalize(WEIGHTS, u, v, backend=implementation))


@pytest.mark.benchmark(group="sigma alone")
@pytest.mark.parametrize("implementation", ["one read", *backends_of("power_iteration")])
def test_power_iteration(benchmark: Callable, implementation: str) -> None:
    if implementation == "one read":
        everything = torch.cat([weight.detach().flatten() for weight in WEIGHTS])
        benchmark(lambda: everything.sum())
    else:
        u, v = gate(implementation)
        benchmark(lambda: power_iteration(WEIGHTS, u, v, backend=implementation))
