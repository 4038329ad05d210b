"""The correctness stage: every GPU backend against the definition in float64, and what a launch must keep."""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nystromgan
from nystromgan import _backend, testing
from nystromgan.bench.case import Inputs
from nystromgan.ops.power_iteration import spectral_normalize

GPU_BACKENDS = ("cuda", "triton")
Row = dict[str, Any]


class Check(NamedTuple):
    """A call of a public function on small inputs, and what of it is compared: all gradients, against float64."""

    op: str
    name: str
    function: Callable[..., Tensor]
    make: Callable[[torch.dtype, str], Inputs]
    options: dict[str, Any]


def checks(tiny: bool) -> list[Check]:
    """The cases of the correctness stage."""
    attend, attend_maps = nystromgan.nystrom_attention, nystromgan.spatiotemporal_attention
    maps = [((3, 5), (3, 5), 4, 32), ((4, 4, 4), (2, 2, 2), 8, 64), ((67,), (33,), 32, 128), ((40,), (40,), 256, 256)]
    found = [
        Check(
            "spatiotemporal_attention",
            f"{grid} from {key_grid}, C={c}, E={e}",
            attend_maps,
            _maps(grid, key_grid, c, e),
            {},
        )
        for grid, key_grid, c, e in (maps[:1] if tiny else maps)
    ]
    tokens = [(67, 67, 16, 16, 8), (300, 211, 8, 64, 16), (1000, 1000, 64, 64, 64), (700, 700, 4, 32, 128)]
    found += [
        Check(
            "nystrom_attention", f"N={n}, S={s}, D={d}, E={e}, M={m}", attend, _tokens(n, s, d, e), {"num_landmarks": m}
        )
        for n, s, d, e, m in (tokens[:1] if tiny else tokens)
    ]
    sides = (9,) if tiny else (9, 64, 128, 200)
    found += [Check("iterative_pinv", f"M={m}", _pinv_of_softmax, _matrices(m), {}) for m in sides]
    return found


def _pinv_of_softmax(matrix: Tensor, **options: Any) -> Tensor:
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    return nystromgan.iterative_pinv(wide.softmax(-1), **options)


def _maps(grid: tuple[int, ...], key_grid: tuple[int, ...], channels: int, values: int) -> Callable[..., Inputs]:
    return lambda dtype, device: testing.map_inputs(2, channels, grid, key_grid, values, dtype=dtype, device=device)


def _tokens(queries: int, keys: int, head_dim: int, value_dim: int) -> Callable[..., Inputs]:
    return lambda dtype, device: testing.attention_inputs(
        2, 2, queries, keys, head_dim, value_dim, dtype=dtype, device=device
    )


def _matrices(side: int) -> Callable[..., Inputs]:
    return lambda dtype, device: {"matrix": testing.normal(3, side, side, dtype=dtype, device=device)}


def rows(device: str, tiny: bool, ops: list[str] | None, budget_s: float, folder: pathlib.Path) -> Iterator[Row]:
    """One row a check: its errors against float64 and the dtype's tolerances; `wrong` where one is above."""
    for backend in GPU_BACKENDS:
        for op in _backend.IMPLEMENTED:
            if (ops is None or op in ops) and not _backend.unsupported_reasons(op, backend, []):
                yield from _op_rows(op, backend, device, tiny)


def _op_rows(op: str, backend: str, device: str, tiny: bool) -> Iterator[Row]:
    for check in checks(tiny):
        if check.op == op:
            for dtype in (torch.float32,) if tiny else _backend.NATIVE_DTYPES:
                errors = functools.partial(_errors, check, dtype, backend, device)
                yield _guarded(op, backend, f"{check.name} {dtype}", errors)
    if op == "power_iteration":
        for dtype in (torch.float32,) if tiny else _backend.NATIVE_DTYPES:
            yield _guarded(op, backend, str(dtype), functools.partial(_power_errors, dtype, backend, device, tiny))
    elif device == "cuda":
        case = next(check for check in checks(False) if check.op == op)
        for name, promise in PROMISES.items():
            yield _guarded(op, backend, name, functools.partial(promise, case, backend, device))


def _guarded(op: str, backend: str, name: str, check: Callable[[], Row]) -> Row:
    """A check's row; an exception is a wrong result that the other checks outlive."""
    row: Row = {"op": op, "backend": backend, "check": name}
    try:
        return {**row, **check()}
    except Exception as error:
        return {**row, "wrong": True, "error": f"{type(error).__name__}: {str(error)[:500]}"}


def _errors(check: Check, dtype: torch.dtype, backend: str, device: str) -> Row:
    inputs = check.make(dtype, device)

    def on(name: str) -> Callable[..., Tensor]:
        return lambda **tensors: check.function(**tensors, **check.options, backend=name)

    errors = testing.errors_of(on(backend), on("reference"), inputs)
    tolerance = testing.TOLERANCES[dtype]
    worst = max(errors.gradients.values())
    right = errors.output <= tolerance.output and worst <= tolerance.gradient
    return {"wrong": not right, "output_error": errors.output, "gradient_error": worst}


def _power_errors(dtype: torch.dtype, backend: str, device: str, tiny: bool) -> Row:
    shapes = [(9, 27), (16, 40)] if tiny else [(64, 27), (64, 576), (512, 4608), (37, 100), (1, 1), (2048, 64)]
    weights = [testing.normal(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]
    u = [testing.normal(shape[0], device=device, seed=50 + i) for i, shape in enumerate(shapes)]
    v = [testing.normal(shape[1], device=device, seed=90 + i) for i, shape in enumerate(shapes)]
    v = [x / x.norm() for x in v]
    wide = [[x.double() for x in tensors] for tensors in (weights, u, v)]
    sigma = nystromgan.power_iteration(weights, u, v, iterations=2, backend=backend)
    exact = nystromgan.power_iteration(*wide, iterations=2, backend="reference")
    errors = [testing.relative_error(sigma, exact)]
    errors += [testing.relative_error(x, y) for x, y in zip((*u, *v), (*wide[1], *wide[2]), strict=True)]
    normalized = spectral_normalize(weights, u, v, iterations=0, backend=backend)
    expected = spectral_normalize(*wide, iterations=0, backend="reference")
    outputs = [testing.relative_error(x, y) for x, y in zip(normalized, expected, strict=True)]
    tolerance = testing.TOLERANCES[dtype].output
    right = max(errors) <= testing.TOLERANCES[torch.float32].output and max(outputs) <= tolerance
    return {"wrong": not right, "output_error": max(outputs), "vector_error": max(errors)}


def _gradients(check: Check, inputs: Inputs, backend: str) -> list[Tensor]:
    """The output and all gradients of its sum of squares."""
    output = check.function(**inputs, **check.options, backend=backend)
    return [output, *torch.autograd.grad(output.float().square().sum(), list(inputs.values()))]


def _leaves(check: Check, device: str, seed: float = 1.0) -> Inputs:
    made = check.make(torch.bfloat16, device)
    return {name: (seed * x).detach().requires_grad_() for name, x in made.items()}


def _same_bits(check: Check, backend: str, device: str) -> Row:
    """Two runs give the same bits."""
    inputs = _leaves(check, device)
    first, second = _gradients(check, inputs, backend), _gradients(check, inputs, backend)
    return {"wrong": not all(torch.equal(x, y) for x, y in zip(first, second, strict=True))}


def _graph(check: Check, backend: str, device: str) -> Row:
    """A CUDA graph of forward and backward, replayed on other inputs, gives what an ordinary call gives."""
    inputs = _leaves(check, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _gradients(check, inputs, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _gradients(check, inputs, backend)
    others = _leaves(check, device, 0.5)
    with torch.no_grad():
        for x, y in zip(inputs.values(), others.values(), strict=True):
            x.copy_(y)
    graph.replay()
    expected = _gradients(check, others, backend)
    return {"wrong": not all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))}


def _compiled(check: Check, backend: str, device: str) -> Row:
    """torch.compile takes the call in one graph, and gives the same bits."""
    inputs = _leaves(check, device)

    def call(**tensors: Tensor) -> Tensor:
        return check.function(**tensors, **check.options, backend=backend)

    output = torch.compile(call, fullgraph=True)(**inputs)
    return {"wrong": not torch.equal(output, call(**inputs))}


def _streams(check: Check, backend: str, device: str) -> Row:
    """Calls on several streams at once give what they give alone."""
    inputs = [_leaves(check, device, 1 / (i + 1)) for i in range(4)]
    alone = [check.function(**x, **check.options, backend=backend) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    together = []
    torch.cuda.synchronize()
    for stream, x in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            together.append(check.function(**x, **check.options, backend=backend))
    torch.cuda.synchronize()
    return {"wrong": not all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))}


PROMISES = {"same bits": _same_bits, "CUDA graph": _graph, "torch.compile": _compiled, "streams": _streams}
