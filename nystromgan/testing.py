"""Inputs, tolerances and comparisons for tests of the ops: for ours, and for those of code that calls them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nystromgan import _backend, _env
from nystromgan._memory import MEMORY_ENVIRONMENT as MEMORY_ENVIRONMENT
from nystromgan._memory import extra_peak_bytes as extra_peak_bytes


class Tolerance(NamedTuple):
    """The largest relative error (Frobenius norms) of outputs and of gradients."""

    output: float
    gradient: float


# On N(0, 1) inputs, against float64. Half precision rounds what is N long; sums, A, Z and G V are float32 everywhere.
TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-11),
    torch.float32: Tolerance(1e-5, 5e-5),
    torch.bfloat16: Tolerance(2e-2, 5e-2),
    torch.float16: Tolerance(3e-3, 8e-3),
}
NO_TOLERANCE = Tolerance(math.inf, math.inf)  # for inputs on which the dtype itself is far off: eager is the bound

# "No worse than eager": its error times EAGER_FACTOR, and what the order of sums alone moves an error by.
EAGER_FACTOR = 1.05
EAGER_NOISE = {torch.float32: 1e-6, torch.bfloat16: 5e-4, torch.float16: 1e-4}


NATIVE_DTYPES = _backend.NATIVE_DTYPES


FINISHING = ("conv_weight", "gamma", "residual")  # what nystrom_attention may do to F Z (G V)


def backends_of(op: str) -> tuple[str, ...]:
    """The backends that can run `op` on this machine now: parametrise tests with it, and they grow with the machine."""
    return tuple(name for name in _backend.IMPLEMENTED[op] if not _backend.unsupported_reasons(op, name, []))


def native_backends_of(op: str) -> tuple[str, ...]:
    """`backends_of` without `reference`: those that go through the torch.library ops."""
    return tuple(name for name in backends_of(op) if name != "reference")


def device_of(backend: str) -> str:
    """The device on which `backend` takes its tensors."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not _env.triton_interpret()) else "cpu"


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """N(0, 1); the same numbers, up to rounding, in every dtype and on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def smooth(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Tokens (..., N, D) that resemble their neighbours, as a video's do: a random walk of unit variance in all."""
    walk = normal(*shape, dtype=torch.float64, seed=seed).cumsum(-2)
    walk = walk - walk.mean(-2, keepdim=True)
    return (walk / walk.square().mean().sqrt().clamp(min=1e-6)).to(device, dtype)


def large(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """N(0, 16): products of two have 16 times the usual logits, and softmax rows come near one-hot."""
    return (4 * normal(*shape, dtype=torch.float64, seed=seed)).to(device, dtype)


def attention_inputs(
    batch: int = 2,
    heads: int = 2,
    queries: int = 67,
    keys: int | None = None,
    head_dim: int = 16,
    value_dim: int | None = None,
    *,
    tokens: Callable[..., Tensor] = normal,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """query (B, H, N, D), key (B, H, S, D) and value (B, H, S, E), drawn by `tokens` (normal, smooth or large)."""
    keys = queries if keys is None else keys
    value_dim = head_dim if value_dim is None else value_dim
    return {
        "query": tokens(batch, heads, queries, head_dim, dtype=dtype, device=device, seed=3 * seed),
        "key": tokens(batch, heads, keys, head_dim, dtype=dtype, device=device, seed=3 * seed + 1),
        "value": normal(batch, heads, keys, value_dim, dtype=dtype, device=device, seed=3 * seed + 2),
    }


def finishing(inputs: Mapping[str, Tensor], names: Sequence[str] = FINISHING, taps: int = 5) -> dict[str, Tensor]:
    """Those of conv_weight, gamma and residual that `names` has, for attention_inputs of as many queries as keys."""
    batch, heads, tokens, value_dim = inputs["value"].shape
    shapes = {"conv_weight": (heads, taps), "gamma": (), "residual": (batch, heads, tokens, value_dim)}
    value = inputs["value"]
    drawn = {
        name: normal(*shapes[name], dtype=value.dtype, device=value.device.type, seed=100 + i)
        for i, name in enumerate(FINISHING)
        if name in names
    }
    if "conv_weight" in drawn:
        drawn["conv_weight"] /= taps**0.5
    return drawn


def map_inputs(
    batch: int = 2,
    channels: int = 8,
    grid: Sequence[int] = (3, 4, 5),
    key_grid: Sequence[int] | None = None,
    value_channels: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """query (B, C, *grid), key (B, C, *key_grid) and value (B, E, *key_grid), N(0, 1)."""
    key_grid = grid if key_grid is None else key_grid
    value_channels = channels if value_channels is None else value_channels
    return {
        "query": normal(batch, channels, *grid, dtype=dtype, device=device, seed=3 * seed),
        "key": normal(batch, channels, *key_grid, dtype=dtype, device=device, seed=3 * seed + 1),
        "value": normal(batch, value_channels, *key_grid, dtype=dtype, device=device, seed=3 * seed + 2),
    }


def padding_mask(lengths: Sequence[int], tokens: int, *, scattered: bool = False, device: str = "cpu") -> Tensor:
    """(B, tokens) bool, True = ignore: row i keeps its first lengths[i] tokens, or as many anywhere if `scattered`."""
    rank = torch.arange(tokens).expand(len(lengths), tokens)
    if scattered:
        rank = normal(len(lengths), tokens, seed=len(lengths)).argsort(-1)
    return (rank >= torch.tensor(lengths)[:, None]).to(device)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, Frobenius norms in float64; 0 for two zeros, NaN where either has one."""
    value, expected = value.detach().cpu().double(), expected.detach().cpu().double()
    if value.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(value.shape)} and {tuple(expected.shape)}")
    difference, norm = (value - expected).norm(), expected.norm()
    return 0.0 if difference == 0 else (difference / norm).item()


def assert_same(value: Tensor, expected: Tensor, backend: str) -> None:
    """Asserts equal bits from `backend`; from `reference` equality up to rounding, and NaN in the same places.

    Torch's own products, which are the reference, choose their order of sums by batch size, strides and threads.
    """
    rtol = TOLERANCES[value.dtype].output if backend == "reference" else 0.0
    torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol, equal_nan=True)


class Errors(NamedTuple):
    """Relative errors against float64: of the output, and of the gradient of each differentiated input."""

    output: float
    gradients: dict[str, float]


def errors_of(function: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Errors:
    """How far `function(**inputs)` and its gradients are from `exact` of the same inputs in float64.

    Every floating-point input is differentiated, against one random direction of the output. A gradient that vanishes
    is measured against the largest of its siblings.
    """
    output, grads = _value_and_grads(function, inputs)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected, expected_grads = _value_and_grads(exact, wide)
    largest = max(grad.norm().item() for grad in expected_grads.values())
    errors = {}
    for name, grad in grads.items():
        norm = expected_grads[name].norm().item()
        difference = (grad.double() - expected_grads[name]).norm().item()
        errors[name] = difference / (norm if norm > 1e-9 * largest else largest or 1.0)
    return Errors(relative_error(output, expected), errors)


def _value_and_grads(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and its derivative along a fixed random direction for every floating-point input."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    differentiated = [name for name, x in leaves.items() if x.requires_grad]
    output = function(**leaves)
    # Rounded to bfloat16, the direction is the same number in every dtype.
    direction = normal(*output.shape, dtype=torch.bfloat16, device=output.device.type, seed=1234).to(output.dtype)
    grads = torch.autograd.grad(output, [leaves[name] for name in differentiated], direction)
    return output.detach(), dict(zip(differentiated, grads, strict=True))


def assert_matches_reference(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    backend: str,
    *,
    tolerance: Tolerance | None = None,
    eager: Callable[..., Tensor] | None = None,
    **options: object,
) -> Errors:
    """Asserts that an op and its gradients on `backend` agree with `reference` in float64; returns the errors.

    Args:
        function: a public op, called as function(**inputs, **options, backend=...).
        inputs: its tensors by argument name; floating-point ones are differentiated.
        backend: the one under test.
        tolerance: TOLERANCES of the query's dtype unless given.
        eager: the same in plain PyTorch, called as eager(**inputs); when given, the backend must be no worse.
        options: the op's other arguments.
    """
    dtype = next(iter(inputs.values())).dtype
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance

    def on(name: str) -> Callable[..., Tensor]:
        return lambda **tensors: function(**tensors, **options, backend=name)

    errors = errors_of(on(backend), on("reference"), inputs)
    _assert_within("tolerance", errors, tolerance.output, dict.fromkeys(errors.gradients, tolerance.gradient))
    if eager is not None:
        bound = errors_of(eager, on("reference"), inputs)
        noise = EAGER_NOISE[dtype]
        limits = {name: EAGER_FACTOR * error + noise for name, error in bound.gradients.items()}
        _assert_within("eager's error", errors, EAGER_FACTOR * bound.output + noise, limits)
    return errors


def _assert_within(rule: str, errors: Errors, output: float, gradients: Mapping[str, float]) -> None:
    measured = {"output": errors.output, **{f"grad_{name}": error for name, error in errors.gradients.items()}}
    limits = {"output": output, **{f"grad_{name}": limit for name, limit in gradients.items()}}
    wrong = [
        f"{name} {measured[name]:.2e} > {limits[name]:.2e}" for name in measured if not measured[name] <= limits[name]
    ]
    if wrong:
        raise AssertionError(f"relative error above {rule}: " + ", ".join(wrong))


def eager_nystrom_attention(
    query: Tensor, key: Tensor, value: Tensor, *, num_landmarks: int, pinv_iterations: int = 6
) -> Tensor:
    """Nyström attention as one writes it in PyTorch: all in the inputs' dtype but the pseudo-inverse, in float32."""
    scale = query.shape[-1] ** -0.5
    query_landmarks, key_landmarks = (
        torch.stack([segment.mean(2) for segment in tokens.tensor_split(num_landmarks, dim=2)], dim=2)
        for tokens in (query, key)
    )  # (B, H, M, D)
    query_factor = (scale * query @ key_landmarks.mT).softmax(-1)  # (B, H, N, M)
    core = (scale * query_landmarks @ key_landmarks.mT).softmax(-1).float()  # (B, H, M, M)
    key_factor = (scale * query_landmarks @ key.mT).softmax(-1)  # (B, H, M, S)
    inverse = core.mT / (core.sum(-2).amax(-1) * core.sum(-1).amax(-1))[..., None, None]
    eye = torch.eye(num_landmarks, device=query.device)
    for _ in range(pinv_iterations):
        product = core @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return query_factor @ (inverse.to(query.dtype) @ (key_factor @ value))


def eager_spatiotemporal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head of exact attention over maps as one writes it in PyTorch, all in the inputs' dtype."""
    weights = (query.shape[1] ** -0.5 * query.flatten(2).mT @ key.flatten(2)).softmax(-1)  # (B, N, S)
    return (value.flatten(2) @ weights.mT).unflatten(2, query.shape[2:])
