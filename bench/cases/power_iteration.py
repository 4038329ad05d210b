"""Spectral normalisation of all weights of a discriminator, in training and in eval, beside torch's parametrization."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _SpectralNorm

from nystromgan import power_iteration, testing
from nystromgan.bench import draw
from nystromgan.bench.case import DTYPES, FORWARD, PASSES, Case, Form, Inputs, Peer, Shape, by_mode
from nystromgan.nn.spectral_norm import SpectralNorm
from nystromgan.ops.power_iteration import spectral_normalize

CHANNELS = {20: [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5, 40: [64] * 10 + [128] * 10 + [256] * 10 + [512] * 10}
CHANNELS[4] = CHANNELS[20][::5]


def cases(device: str) -> list[Case]:
    depths = (20, 40) if device == "cuda" else (20,)
    found = [power_case(layers, training, "fp32") for layers in depths for training in (True, False)]
    return [*found, sigma_case(depths[-1], "fp32")]


def sizes_of(layers: int) -> list[tuple[int, int]]:
    """(O, I) of 3 x 3 convolutions."""
    widths = CHANNELS[layers]
    return [(out, 9 * into) for into, out in zip([64, *widths], widths, strict=False)]


def power_case(layers: int, training: bool, dtype: str) -> Case:
    """One forward of every weight: a step and the division in training; in eval nothing changes between forwards."""
    elements = _elements(layers)
    # W / sigma, which the graph holds until W's gradient is there
    held = by_mode(4.0 * elements, 8.0 * elements) if training else {}
    return Case(
        "power_iteration", "spectral norm" if training else "spectral norm, eval", {"layers": layers}, dtype,
        _weights_of(dtype), _ours if training else (lambda backend: _per_layer(SpectralNorm, training=False)),
        {"torch's parametrization": Peer(lambda: _per_layer(_SpectralNorm, training), compiled=True)},
        by_mode(4.0 * elements, 8.0 * elements), by_mode(8.0 * elements, 20.0 * elements), {"layers": 4},
        testing.TOLERANCES[DTYPES[dtype]], quick=True, compiled_in_full=True, training=training, held_bytes=held,
        modes=PASSES if training else (FORWARD,),
    )  # fmt: skip


def sigma_case(layers: int, dtype: str) -> Case:
    """A step of every weight's vectors and its singular value alone, for which each weight is read twice."""
    elements = _elements(layers)
    return Case(
        "power_iteration", "power iteration", {"layers": layers}, dtype, _weights_of(dtype), _our_sigmas,
        {"torch's parametrization, sigma alone": Peer(_torch_sigmas)},
        by_mode(4.0 * elements, 4.0 * elements), by_mode(8.0 * elements, 8.0 * elements), {"layers": 4},
        testing.TOLERANCES[DTYPES[dtype]], modes=(FORWARD,),
    )  # fmt: skip


def _elements(layers: int) -> int:
    return sum(rows * columns for rows, columns in sizes_of(layers))


def _weights_of(dtype: str) -> Callable[[str, Shape, int], Inputs]:
    def make(device: str, shape: Shape, seed: int) -> Inputs:
        sizes = enumerate(sizes_of(shape["layers"]))
        drawn = [draw.normal(*size, dtype=DTYPES[dtype], device=device, seed=100 * seed + i) for i, size in sizes]
        return {f"w{i}": weight for i, weight in enumerate(drawn)}

    return make


def _our_sigmas(backend: str) -> Form:
    """All singular values in one call."""
    state: list[list[Tensor]] = []

    def form(**weights: Tensor) -> Tensor:
        matrices = list(weights.values())
        if not state:
            state.extend(_vectors(matrices, axis) for axis in range(2))
        return power_iteration(matrices, *state, backend=backend)

    return form


def _torch_sigmas() -> Form:
    """What torch's parametrization does in training before it divides, layer by layer."""
    modules: list[_SpectralNorm] = []

    def form(**weights: Tensor) -> Tensor:
        matrices = list(weights.values())
        if not modules:
            modules.extend(_started(_SpectralNorm, matrices, True))
        for module, matrix in zip(modules, matrices, strict=True):
            module._power_method(matrix, module.n_power_iterations)
        return torch.stack([m._u @ (w @ m._v) for m, w in zip(modules, matrices, strict=True)])

    return form


def _vectors(weights: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Unit vectors to start from, the same for every form."""
    drawn = [draw.normal(w.shape[axis], device=w.device.type, seed=100 + axis) for w in weights]
    return [(x / x.norm()).to(w.dtype) for x, w in zip(drawn, weights, strict=True)]


def _ours(backend: str) -> Form:
    """All weights in one call, as `fuse_spectral_norm` makes it."""
    state: list[list[Tensor]] = []

    def form(**weights: Tensor) -> list[Tensor]:
        matrices = list(weights.values())
        if not state:
            state.extend(_vectors(matrices, axis) for axis in range(2))
        return spectral_normalize(matrices, *state, backend=backend)

    return form


def _per_layer(parametrization: Callable[..., Any], training: bool) -> Form:
    """A parametrization of every weight, called as an access of the weight calls it."""
    modules: list[Any] = []

    def form(**weights: Tensor) -> list[Tensor]:
        matrices = list(weights.values())
        if not modules:
            modules.extend(_started(parametrization, matrices, training))
        return [module(matrix) for module, matrix in zip(modules, matrices, strict=True)]

    return form


def _started(parametrization: Callable[..., Any], weights: Sequence[Tensor], training: bool) -> list[Any]:
    modules = [parametrization(weight.detach()).train(training) for weight in weights]
    for module, u, v in zip(modules, _vectors(weights, 0), _vectors(weights, 1), strict=True):
        module._u.copy_(u)
        module._v.copy_(v)
    return modules
