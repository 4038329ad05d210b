"""The correctness stage: every GPU backend against the definition in float64, and what a launch must keep."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nystromgan
from nystromgan import _backend, testing
from nystromgan.bench import gpu_parts
from nystromgan.bench.case import DTYPES, Inputs
from nystromgan.bench.plan import Stage
from nystromgan.ops.power_iteration import spectral_normalize

GPU_BACKENDS = ("triton", "cuda")  # what has run on GPUs comes first
DTYPE_NAMES = {**DTYPES, "fp16": torch.float16}
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
    found += [Check("iterative_pinv", f"M={m}", nystromgan.iterative_pinv, _matrices(m), {}) for m in sides]
    return found


def _maps(grid: tuple[int, ...], key_grid: tuple[int, ...], channels: int, values: int) -> Callable[..., Inputs]:
    return lambda dtype, device: testing.map_inputs(2, channels, grid, key_grid, values, dtype=dtype, device=device)


def _tokens(queries: int, keys: int, head_dim: int, value_dim: int) -> Callable[..., Inputs]:
    return lambda dtype, device: testing.attention_inputs(
        2, 2, queries, keys, head_dim, value_dim, dtype=dtype, device=device
    )


def _matrices(side: int) -> Callable[..., Inputs]:
    """Softmax matrices, but for their row sums: equal ones would leave the gradient of |A|_inf to rounding."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        sums = torch.linspace(0.9, 1.0, side, dtype=torch.float64)[:, None]
        return {"matrix": (testing.normal(3, side, side, dtype=torch.float64).softmax(-1) * sums).to(device, dtype)}

    return make


def rows(stage: Stage) -> Iterator[Row]:
    """One row a check: its errors against float64 and the dtype's tolerances; `wrong` where one is above."""
    able = [
        (backend, op)
        for backend in GPU_BACKENDS
        for op in _backend.IMPLEMENTED
        if stage.wants(op) and not _backend.unsupported_reasons(op, backend, [])
    ]
    dtypes = ("fp32",) if stage.tiny else DTYPE_NAMES
    parts: list[Row] = [{"backend": b, "op": op, "dtype": dtype} for b, op in able for dtype in dtypes]
    yield from gpu_parts.rows(stage, "gpu_checks", parts)
    if stage.device == "cuda":
        promised = [{"backend": b, "op": op} for b, op in able if op != "power_iteration"]
        for names, cold in ((PROMISES.keys() - COLD, False), (COLD, True)):
            parts = [{**part, "promise": name} for part in promised for name in sorted(names)]
            yield from gpu_parts.rows(stage, "gpu_checks", parts, cold)


def part_rows(
    backend: str, op: str, device: str, tiny: bool, dtype: str | None = None, promise: str | None = None
) -> Iterator[Row]:
    """The checks of an op on a backend in one dtype, or one of its promises."""
    if promise is not None:
        check = next(check for check in checks(False) if check.op == op)
        yield _guarded(op, backend, promise, functools.partial(PROMISES[promise], check, backend, device))
    if dtype is None:
        return
    kind = DTYPE_NAMES[dtype]
    for check in checks(tiny):
        if check.op == op:
            errors = functools.partial(_errors, check, kind, backend, device)
            yield _guarded(op, backend, f"{check.name} {kind}", errors)
    if op == "power_iteration":
        yield _guarded(op, backend, str(kind), functools.partial(_power_errors, kind, backend, device, tiny))


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
    """A CUDA graph of both passes, replayed on other inputs, gives what an ordinary call gives."""
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


def _reduced_overhead(check: Check, backend: str, device: str) -> Row:
    """torch.compile's own CUDA graphs, where the first call of the process is theirs, give the same bits in every call.

    What a first call builds and keeps is then built while they warm up or record, in memory that they use again.
    """
    calls = 4  # the first warms up, the second records, the rest replay

    def call(**tensors: Tensor) -> Tensor:
        return check.function(**tensors, **check.options, backend=backend)

    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    inputs = [_leaves(check, device, 1 / (i + 1)) for i in range(calls)]
    found = []
    for x in inputs:
        torch.compiler.cudagraph_mark_step_begin()
        output = compiled(**x)
        gradients = torch.autograd.grad(output.float().square().sum(), list(x.values()))
        found.append([result.detach().clone() for result in (output, *gradients)])
    expected = [_gradients(check, x, backend) for x in inputs]
    pairs = [pair for mine, theirs in zip(found, expected, strict=True) for pair in zip(mine, theirs, strict=True)]
    return {"wrong": not all(torch.equal(x, y) for x, y in pairs)}


def _streams(check: Check, backend: str, device: str) -> Row:
    """Calls on several streams at once, the first of the process among them, give what they give alone.

    The first stream is busy for seconds: what its call builds and keeps is not there yet when the others run.
    """
    inputs = [_leaves(check, device, 1 / (i + 1)) for i in range(4)]
    streams = [torch.cuda.Stream() for _ in inputs]
    together = []
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(BUSY_CYCLES)
    for stream, x in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            together.append(_gradients(check, x, backend))
    torch.cuda.synchronize()
    alone = [_gradients(check, x, backend) for x in inputs]
    torch.cuda.synchronize()
    pairs = [pair for mine, theirs in zip(together, alone, strict=True) for pair in zip(mine, theirs, strict=True)]
    return {"wrong": not all(torch.equal(x, y) for x, y in pairs)}


BUSY_CYCLES = 10_000_000_000  # about 5 s
# Each runs in a process of its own, in which nothing has been called before; those in COLD find no compiled kernels.
PROMISES = {
    "same bits": _same_bits,
    "CUDA graph": _graph,
    "torch.compile": _compiled,
    "torch.compile's CUDA graphs, cold": _reduced_overhead,
    "streams, cold": _streams,
}
COLD = {"torch.compile's CUDA graphs, cold"}
