"""The speed stage: every case on every GPU backend beside its peers, in one run, in fractions of the floor."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _SpectralNorm

import nystromgan
from nystromgan import _backend, testing
from nystromgan.bench import gpu_cases, gpu_timing
from nystromgan.bench.gpu_checks import GPU_BACKENDS
from nystromgan.ops.power_iteration import spectral_normalize

Row = dict[str, Any]
TIME_S = 0.3  # of one measurement


def rows(device: str, tiny: bool, ops: list[str] | None, budget_s: float) -> Iterator[Row]:
    """The device's rates, then one row for every implementation of every case; slow compilations come last."""
    started = time.perf_counter()
    rates = gpu_timing.rates(device, tiny)
    yield {"copy_tb_per_s": rates.bytes_per_s / 1e12, "gemm_tflops": rates.flops_per_s / 1e12}
    found = [case for case in gpu_cases.cases(device, tiny) if ops is None or case.op in ops]
    if ops is None or "power_iteration" in ops:
        yield from _power_rows(rates, device, tiny)
    for compiled in (False,) if tiny else (False, True):
        for case in found:
            for name, form in _forms(case, compiled).items():
                if time.perf_counter() - started > budget_s:
                    yield {"op": case.op, "case": case.name, "form": name, "left_out": "beyond the budget"}
                    continue
                yield from _measured(case, name, form, rates, device, tiny)


def _forms(case: gpu_cases.Case, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """Ours and the peers' forms of a case, either those that torch.compile makes or all others."""

    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda **inputs: case.function(**inputs, **case.options, backend=backend)

    able = [name for name in GPU_BACKENDS if not _backend.unsupported_reasons(case.op, name, [])]
    every = {**{name: ours(name) for name in able}, **case.peers}
    return {name: form for name, form in every.items() if (name == "compiled") == compiled}


def _measured(
    case: gpu_cases.Case, name: str, form: Callable[..., Tensor], rates: gpu_timing.Rates, device: str, tiny: bool
) -> Iterator[Row]:
    """Two rows, forward and both passes; none of them with a time where the result is wrong."""
    row: Row = {"op": case.op, "case": case.name, "form": name}
    try:
        inputs = case.make(device, 0)
        same = not name.startswith("sdpa") or case.op == "spatiotemporal_attention"
        errors = _errors(case, form, inputs) if same else {}  # exact attention is another function than Nyström's
        if any(not error <= limit for error, limit in errors.values()):
            yield {**row, "wrong": name in GPU_BACKENDS, "errors": {key: error for key, (error, _) in errors.items()}}
            return
        count = gpu_timing.number_of_sets(gpu_timing.in_bytes(inputs), device)
        sets = [case.make(device, seed) for seed in range(count)]
        leaves = [{key: x.requires_grad_() for key, x in tensors.items()} for tensors in sets]
        for both in (False, True):
            call = _both(form) if both else _forward(form)
            timing = gpu_timing.measure(call, leaves, device, 0.0 if tiny else TIME_S)
            floor_ms = rates.floor_ms(
                case.both_bytes if both else case.forward_bytes, case.both_flops if both else case.forward_flops
            )
            graph = gpu_timing.graphed(call, leaves[0]) if device == "cuda" else None
            graph_ms = None if graph is None else gpu_timing.measure(graph, [None], device, TIME_S).median_ms
            extra = gpu_timing.peak_bytes(lambda c=call: c(leaves[0]), device)
            yield {
                **row, "pass": "forward+backward" if both else "forward", **timing._asdict(), "floor_ms": floor_ms,
                "of_floor": timing.median_ms / floor_ms, "graph_ms": graph_ms,
                "extra_mib": None if extra is None else extra / 2**20,
            }  # fmt: skip
    except Exception as error:  # a peer that refuses this shape is a row of the report
        yield {**row, "wrong": name in GPU_BACKENDS, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def _forward(form: Callable[..., Tensor]) -> Callable[[gpu_cases.Inputs], None]:
    def call(inputs: gpu_cases.Inputs) -> None:
        with torch.no_grad():
            form(**inputs)

    return call


def _both(form: Callable[..., Tensor]) -> Callable[[gpu_cases.Inputs], None]:
    def call(inputs: gpu_cases.Inputs) -> None:
        output = form(**inputs)
        torch.autograd.grad(output, list(inputs.values()), output.detach())

    return call


def _errors(
    case: gpu_cases.Case, form: Callable[..., Tensor], inputs: gpu_cases.Inputs
) -> dict[str, tuple[float, float]]:
    """Errors and their limits of the first sample's output and gradients, which float64 can hold."""

    def first(tensor: Tensor) -> Tensor:
        return tensor[:1, :1] if case.op == "nystrom_attention" else tensor[:1]

    def run(function: Callable[..., Tensor], tensors: gpu_cases.Inputs, direction: Tensor) -> list[Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        output = function(**leaves)
        return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), direction)]

    shape = (*inputs["query"].shape[:1], inputs["value"].shape[1], *inputs["query"].shape[2:])
    shape = inputs["query"].shape[:3] + inputs["value"].shape[3:] if case.op == "nystrom_attention" else shape
    direction = testing.normal(*shape, dtype=torch.bfloat16, device=inputs["query"].device.type, seed=77)
    results = run(form, inputs, direction)
    wide = {name: first(x).double() for name, x in inputs.items()}
    exact = run(lambda **x: case.function(**x, **case.options, backend="reference"), wide, first(direction).double())
    tolerance = testing.TOLERANCES[torch.bfloat16]
    return {
        name: (testing.relative_error(first(x), y), tolerance.output if name == "output" else tolerance.gradient)
        for name, x, y in zip(("output", *inputs), results, exact, strict=True)
    }


def _ignoring(call: Callable[[], Any], _: None) -> None:
    call()


def _power_rows(rates: gpu_timing.Rates, device: str, tiny: bool) -> Iterator[Row]:
    """A network of 40 layers: the power iteration alone and with the division, beside torch's parametrization."""
    widths = (16,) if tiny else (64, 128, 256, 512)
    shapes = [(width, 9 * width) for width in widths for _ in range(2 if tiny else 10)]
    weights = [testing.normal(*shape, device=device, seed=i) for i, shape in enumerate(shapes)]
    modules = [_SpectralNorm(weight).train() for weight in weights]
    u, v = ([getattr(m, name).clone() for m in modules] for name in ("_u", "_v"))
    moved = gpu_timing.in_bytes(weights)
    expected = [module(weight) for module, weight in zip(modules, weights, strict=True)]
    row: Row = {"op": "power_iteration", "case": f"{len(shapes)} layers, {moved / 2**20:.0f} MiB"}

    def torchs(_: None) -> None:
        for module, weight in zip(modules, weights, strict=True):
            module(weight)

    forms = {"torch": (torchs, 4 * moved)}
    for backend in GPU_BACKENDS:
        if _backend.unsupported_reasons("power_iteration", backend, []):
            continue
        results = spectral_normalize(weights, u, v, backend=backend)
        error = max(testing.relative_error(x, y) for x, y in zip(results, expected, strict=True))
        if not error <= testing.TOLERANCES[torch.float32].output:
            yield {**row, "form": backend, "wrong": True, "output_error": error}
            continue
        for name, function, passes in (("sigma", nystromgan.power_iteration, 2), ("normalized", spectral_normalize, 4)):
            form = functools.partial(function, weights, u, v, backend=backend)
            forms[f"{backend} {name}"] = (functools.partial(_ignoring, form), passes * moved)
    with torch.no_grad():
        for name, (call, floor_bytes) in forms.items():
            timing = gpu_timing.measure(call, [None], device, 0.0 if tiny else TIME_S)
            floor_ms = rates.floor_ms(floor_bytes, 0)
            yield {
                **row,
                "form": name,
                **timing._asdict(),
                "floor_ms": floor_ms,
                "of_floor": timing.median_ms / floor_ms,
            }
