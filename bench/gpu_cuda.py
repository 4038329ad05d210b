"""The cuda stage: compute-sanitizer over the C++ kernels, and their time beside the other backends', launch by launch.

Times are of CUDA graphs that are replayed, so that what Python takes does not enter. On cuda, nystrom_attention of few
tokens is one launch, iterative_pinv of 33 to 256 rows runs in clusters, and attention of half precision has products of
groups of warps; SWITCHES make the same calls the other way.
"""

import contextlib
import ctypes
import functools
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import nystromgan
from nystromgan import _backend, _native
from nystromgan.bench import draw, gpu_checks, gpu_parts
from nystromgan.bench.plan import Stage

Row = dict[str, Any]
TOOLS = ("memcheck", "racecheck")
BACKENDS = ("cuda", "triton", "reference")
# What an op may take: 0 never, 2 also where it does not by itself.
SWITCHES = {
    "nystrom_attention": ("single_launch=0", "single_launch=2", "groups=0"),
    "iterative_pinv": ("clusters=0",),
    "spatiotemporal_attention": ("groups=0", "groups=2"),
}
REPLAYS, REPEATS = 20, 9


def rows(stage: Stage) -> Iterator[Row]:
    """A row a switched check; a row a case and backend with its median; last a row an op and sanitizer.

    The sanitizers run side by side in what is left of the budget; a row is `wrong` where one finds anything.
    """
    reasons = _backend.unsupported_reasons("iterative_pinv", "cuda", [])
    if reasons:
        yield {"left_out": "; ".join(reasons)}
        return
    wanted = [op for op in _backend.IMPLEMENTED if stage.wants(op)]
    switched = [{"op": op, "switch": switch} for op in wanted for switch in SWITCHES.get(op, ())]
    yield from gpu_parts.rows(stage, "gpu_cuda", switched)
    yield from _timed_rows(stage)
    yield from gpu_parts.rows(stage, "gpu_cuda", [{"op": op, "tool": tool} for op in wanted for tool in TOOLS])


def part_rows(op: str, device: str, tiny: bool, switch: str | None = None, tool: str | None = None) -> Iterator[Row]:
    """The checks of an op with one of its switches, or under one sanitizer."""
    if switch is not None:
        yield from _switched_rows(op, switch)
    if tool is not None:
        yield _sanitized(op, tool)


def _timed_rows(stage: Stage) -> Iterator[Row]:
    for op, name, function, make in _cases():
        if not stage.wants(op):
            continue
        if stage.left_s() < 0:
            yield {"op": op, "case": name, "unfinished": gpu_parts.UNFINISHED}
            continue
        inputs = make()
        for backend in _forms(op, BACKENDS):
            for mode in ("forward", "both"):
                row = {"op": op, "case": name, "backend": backend, "mode": mode}
                yield row | gpu_checks._guarded(op, backend, name, functools.partial(_timed, function, inputs, row))


def _forms(op: str, backends: tuple[str, ...]) -> list[str]:
    """The backends, and cuda with each switch of `op`."""
    return [*backends, *(f"cuda {switch}" for switch in SWITCHES.get(op, ()))]


@contextlib.contextmanager
def _running(form: str) -> Iterator[str]:
    """The backend of a form, whose switch is set within."""
    backend, _, switch = form.partition(" ")
    if not switch:
        yield backend
        return
    path, value = switch.split("=")
    allow = getattr(ctypes.CDLL(str(_native.library_path(_native.CUDA_LIBRARY))), f"nystromgan_cuda_allow_{path}")
    allow(int(value))
    try:
        yield backend
    finally:
        allow(1)


def _switched_rows(op: str, switch: str) -> Iterator[Row]:
    """The correctness stage's rows of `op` with one of its switches."""
    form = f"cuda {switch}"
    for check in gpu_checks.checks(tiny=False):
        for dtype in _backend.NATIVE_DTYPES if check.op == op else ():
            with _running(form) as backend:
                errors = functools.partial(gpu_checks._errors, check, dtype, backend, "cuda")
                yield gpu_checks._guarded(op, form, f"{check.name} {dtype}", errors)


def _sanitized(op: str, tool: str) -> Row:
    """Runs the op's checks in float32 and bfloat16 under compute-sanitizer, which some virtual machines refuse."""
    row: Row = {"op": op, "tool": tool}
    command = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if command is None:
        return {**row, "left_out": "compute-sanitizer is not installed"}
    call = [command, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "nystromgan.bench.gpu_cuda", op]
    code, printed, complaint = gpu_parts.run(call)
    if "Device not supported" in printed + complaint:
        return {**row, "left_out": "compute-sanitizer does not support this device"}
    return {**row, "wrong": code != 0, "summary": " ".join((printed + complaint).strip().splitlines()[-1:])}


Make = Callable[[], dict[str, torch.Tensor]]


def _cases() -> Iterator[tuple[str, str, Callable[..., torch.Tensor], Make]]:
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    for size in (64, 128, 256, 512):
        for batch in (1, 64):
            yield (
                "iterative_pinv",
                f"M={size} batch={batch}",
                nystromgan.iterative_pinv,
                functools.partial(_matrices, batch, size),
            )
    for tokens in (1024, 2048, 4096, 8192, 16384, 65536):
        make = functools.partial(draw.tokens, 1, 8, tokens, 64, 64, **half)
        yield "nystrom_attention", f"H=8 N={tokens} D=64 M=64", nystromgan.nystrom_attention, make
    for channels, values, side in ((32, 128, 64), (8, 64, 64), (32, 128, 128)):
        make = functools.partial(draw.maps, 2, channels, (side, side), values, **half)
        name = f"B=2 C={channels} E={values} N={side * side}"
        yield "spatiotemporal_attention", name, nystromgan.spatiotemporal_attention, make


def _matrices(batch: int, size: int) -> dict[str, torch.Tensor]:
    return {"matrix": draw.normal(batch, size, size, device="cuda").softmax(-1)}


def _timed(function: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], row: Row) -> Row:
    with _running(row["backend"]) as backend:
        return _times(function, inputs, backend, row["mode"] == "both")


def _times(function: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], backend: str, backward: bool) -> Row:
    leaves = {name: x.detach().requires_grad_(backward) for name, x in inputs.items()}

    def call() -> None:
        output = function(**leaves, backend=backend)
        if backward:
            torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYS):
            call()
    times = []
    for _ in range(REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / REPLAYS)
    return {"median_us": 1000 * statistics.median(times), "least_us": 1000 * min(times)}


def main(op: str) -> int:
    """What compute-sanitizer runs: the op's correctness checks on `cuda`."""
    wrong = 0
    for check in gpu_checks.checks(tiny=False):
        for dtype in (torch.float32, torch.bfloat16):
            for form in _forms(op, ("cuda",)):
                if check.op == op:
                    with _running(form) as backend:
                        errors = functools.partial(gpu_checks._errors, check, dtype, backend, "cuda")
                        wrong += bool(gpu_checks._guarded(op, form, check.name, errors)["wrong"])
    if op == "power_iteration":
        wrong += bool(gpu_checks._power_errors(torch.float32, "cuda", "cuda", False)["wrong"])
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
