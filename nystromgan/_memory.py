"""Peak memory of a call on the CPU, as the kernel counts it."""

import ctypes
import gc
import pathlib
from collections.abc import Callable

from nystromgan._recycled import empty_cache

STATUS = pathlib.Path("/proc/self/status")
# The environment of a process that measures: large blocks go back to the system when freed, so that each call starts
# from the same base.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def resident(field: str) -> int:
    """VmRSS, resident bytes now, or VmHWM, the most since the last reset."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def extra_peak_bytes(call: Callable[[], object]) -> int:
    """The most resident bytes during one call, less those just before it; Linux only."""
    gc.collect()
    empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    call()
    return max(resident("VmHWM") - before, 0)
