"""The cuda stage: compute-sanitizer over the C++ kernels, and their time beside the other backends', launch by launch.

Times are of CUDA graphs that are replayed, so that what Python takes does not enter. On cuda, nystrom_attention of few
tokens is one launch, iterative_pinv of 33 to 256 rows runs in clusters, and attention of half precision has products of
groups of warps; SWITCHES make the same calls the other way.
"""

import contextlib
import ctypes
import functools
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import nystromgan
from nystromgan import _backend, _native, testing
from nystromgan.bench import gpu_checks

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


def rows(device: str, tiny: bool, ops: list[str] | None, budget_s: float, folder: pathlib.Path) -> Iterator[Row]:
    """A row a sanitizer and op, `wrong` where it finds anything; then a row a case and backend with its median."""
    started = time.perf_counter()
    reasons = _backend.unsupported_reasons("iterative_pinv", "cuda", [])
    if reasons:
        yield {"left_out": "; ".join(reasons)}
        return
    for op in _backend.IMPLEMENTED:
        for tool in TOOLS:
            if ops is None or op in ops:
                yield _sanitized(op, tool, budget_s)
    for op in SWITCHES:
        if ops is None or op in ops:
            yield from _switched_rows(op)
    for op, name, function, inputs in _cases():
        for backend in _forms(op, BACKENDS):
            for mode in ("forward", "both"):
                if (ops is None or op in ops) and time.perf_counter() - started < budget_s:
                    row = {"op": op, "case": name, "backend": backend, "mode": mode}
                    yield gpu_checks._guarded(
                        op, backend, name, lambda r=row, i=inputs, f=function: {**r, **_timed(f, i, r)}
                    )


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


def _switched_rows(op: str) -> Iterator[Row]:
    """The correctness stage's rows of `op` with each of its switches."""
    for check in gpu_checks.checks(tiny=False):
        for dtype in _backend.NATIVE_DTYPES if check.op == op else ():
            for form in _forms(op, ()):
                with _running(form) as backend:
                    errors = functools.partial(gpu_checks._errors, check, dtype, backend, "cuda")
                    yield gpu_checks._guarded(op, form, f"{check.name} {dtype}", errors)


def _sanitized(op: str, tool: str, budget_s: float) -> Row:
    """Runs the op's checks in float32 and bfloat16 under compute-sanitizer."""
    row: Row = {"op": op, "tool": tool}
    command = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if command is None:
        return {**row, "left_out": "compute-sanitizer is not installed"}
    call = [command, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "nystromgan.bench.gpu_cuda", op]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=budget_s)
    except subprocess.TimeoutExpired:
        return {**row, "wrong": True, "summary": f"not done after {budget_s:.0f} s"}
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return {**row, "wrong": done.returncode != 0, "summary": " ".join(last)}


def _cases() -> Iterator[tuple[str, str, Callable[..., torch.Tensor], dict[str, torch.Tensor]]]:
    for size in (64, 128, 256, 512):
        for batch in (1, 64):
            matrix = testing.normal(batch, size, size, device="cuda").softmax(-1)
            yield "iterative_pinv", f"M={size} batch={batch}", nystromgan.iterative_pinv, {"matrix": matrix}
    for tokens in (1024, 2048, 4096, 8192, 16384, 65536):
        inputs = testing.attention_inputs(1, 8, tokens, head_dim=64, dtype=torch.bfloat16, device="cuda")
        yield "nystrom_attention", f"H=8 N={tokens} D=64 M=64", nystromgan.nystrom_attention, inputs
    for channels, values, side in ((32, 128, 64), (8, 64, 64), (32, 128, 128)):
        inputs = testing.map_inputs(2, channels, (side, side), None, values, dtype=torch.bfloat16, device="cuda")
        name = f"B=2 C={channels} E={values} N={side * side}"
        yield "spatiotemporal_attention", name, nystromgan.spatiotemporal_attention, inputs


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
