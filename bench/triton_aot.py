"""Compiles the Triton kernels for a GPU that is not here, and reads back what they need of it."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nystromgan import _triton

# Bytes of shared memory that one program may take.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Resources(NamedTuple):
    """What one compiled kernel needs: registers a thread, spilled and shared bytes; and whether it uses wgmma."""

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    wgmma: bool


class _AbsentGpu:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiled_for(architecture: int) -> Iterator[list[Any]]:
    """Inside, every launch of a Triton kernel compiles it for `architecture` and runs nothing; yields what it compiled.

    The launchers run as they are, on CPU or meta tensors, so a kernel is compiled for exactly the arguments, alignments
    and constants that they give it.
    """
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    active = driver.active if driver._active is not None else None
    driver.set_active(_AbsentGpu(architecture))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(_triton, "architecture", return_value=architecture),
        ):
            yield kernels
    finally:
        driver._active = active


def resources(kernel: Any) -> Resources:
    """Reads a compiled kernel's needs from its binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    meta = kernel.metadata
    return Resources(meta.name, registers, stack + local, meta.shared, meta.num_warps, "wgmma" in kernel.asm["ptx"])
