"""The process that measures peak memory: reads cases from stdin, prints the extra bytes of each, one a line."""

import ctypes
import gc
import json
import pathlib
import sys

from nystromgan.zoo.demo import measure

STATUS = pathlib.Path("/proc/self/status")


def resident(field: str) -> int:
    """VmRSS, resident bytes now, or VmHWM, the most since the last reset."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def peak_of(case: measure.Case, seed: int) -> int:
    """The most resident bytes during one call, less those just before it."""
    call = measure.prepared(case, seed)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    call()
    return max(resident("VmHWM") - before, 0)


def main() -> None:
    request = json.load(sys.stdin)
    cases = [measure.Case(form, mode, tuple(grid)) for form, mode, grid in request["cases"]]
    for form in measure.FORMS:  # what a first call loads is no case's memory
        for mode in measure.MODES:
            measure.prepared(measure.Case(form, mode, measure.GRIDS[1]), request["seed"])()
    for case in cases:
        print(peak_of(case, request["seed"]), flush=True)


if __name__ == "__main__":
    main()
