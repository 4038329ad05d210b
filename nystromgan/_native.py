"""Finding and loading the native libraries, once, at first use."""

import ctypes
import functools
import pathlib

import torch

from nystromgan import _env

CPU_LIBRARY = "libnystromgan_cpu.so"
CUDA_LIBRARY = "libnystromgan_cuda.so"
CPU_ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")


def library_path(name: str) -> pathlib.Path:
    """Where the library `name` is, or would be if it were built."""
    directory = _env.native_library_dir()
    return pathlib.Path(directory or pathlib.Path(__file__).parent / "lib") / name


@functools.lru_cache(maxsize=1)
def cpu_reasons() -> list[str]:
    """Loads the native CPU library; the reasons why it cannot be used, none when it can."""
    path = library_path(CPU_LIBRARY)
    if not path.exists():
        return [f"the native CPU library is not built ({path} is missing; reinstall with g++ >= 11 or clang++ >= 12)"]
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return [f"the native CPU library does not load: {error}"]
    return []


def cpu_isa() -> str | None:
    """The instruction set that the native CPU library chose for this machine; None without the library."""
    if cpu_reasons():
        return None
    function = ctypes.CDLL(str(library_path(CPU_LIBRARY))).nystromgan_cpu_isa
    function.restype = ctypes.c_char_p
    name = function().decode()
    if not name:
        raise ValueError(f"NYSTROMGAN_CPU_ISA must be one of {CPU_ISAS}, got {_env.cpu_isa()!r}")
    return name


@functools.lru_cache(maxsize=1)
def cuda_reasons() -> list[str]:
    """Loads the CUDA library, which registers its kernels; the reasons why no GPU can run them, none when one can."""
    path = library_path(CUDA_LIBRARY)
    if not path.exists():
        build = "reinstall with nvcc >= 13.0 and NYSTROMGAN_BUILD=cuda"
        return [f"the CUDA library is not built ({path} is missing; {build})"]
    try:
        torch.ops.load_library(str(path))
        function = ctypes.CDLL(str(path)).nystromgan_cuda_reason
    except OSError as error:
        return [f"the CUDA library does not load: {error}"]
    function.restype = ctypes.c_char_p
    reason = function().decode()
    if not reason and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    return [reason] if reason else []
