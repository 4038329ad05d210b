"""Peak memory of calls: of the allocator on a GPU; on the CPU of resident pages, each call in a process of its own.

The child of every call is forked from a parent that has computed nothing, runs the form at a small shape (what a first
call loads is no case's memory) and then once at the case's own. What a form keeps between calls so counts as its own.
"""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from nystromgan.bench import forms, measure
from nystromgan.bench.case import COMPILED, OURS, TUNED, Case
from nystromgan.bench.cases import cases
from nystromgan.testing import MEMORY_ENVIRONMENT, extra_peak_bytes

Key = tuple[str, str, str]  # case, form, mode


def add(
    rows: Iterable[measure.Row],
    device: str,
    every_form: bool,
    progress: Callable[[str], None],
    deadline: float = math.inf,
) -> None:
    """Adds peak_bytes to the rows that have a time, or to ours and the fastest peer's of each case and mode.

    Those that decide come first, because nothing is measured after the deadline, on time.perf_counter's clock.
    """
    timed = [row for row in rows if "median_ms" in row]
    chosen = sorted(_chosen(timed, every_form), key=lambda row: not _decides(row, timed))
    keys = [(row["case"], row["form"], row["mode"]) for row in chosen]
    for row, peak in zip(chosen, on_gpu(keys) if device == "cuda" else on_cpu(keys), strict=True):
        row["peak_bytes"] = peak
        progress(f"memory  {row['case']}, {row['mode']}, {row['form']}")
        if time.perf_counter() > deadline:
            return


def steps(rows: Iterable[measure.Row], every_form: bool) -> int:
    """How often `add` reports progress."""
    timed = [row for row in rows if "median_ms" in row]
    return len(_chosen(timed, every_form))


def _chosen(timed: Sequence[measure.Row], every_form: bool) -> list[measure.Row]:
    """Rows to measure; of compiled forms, which compile again for it, only the fastest peers."""
    return [
        row for row in timed if _decides(row, timed) or (every_form and not row["form"].endswith((COMPILED, TUNED)))
    ]


def _decides(row: measure.Row, timed: Sequence[measure.Row]) -> bool:
    rivals = [
        other
        for other in timed
        if (other["case"], other["mode"]) == (row["case"], row["mode"])
        and other["form"] != OURS
        and "other" not in other
    ]
    return row["form"] == OURS or row is min(rivals, key=lambda rival: rival["median_ms"], default=None)


def on_gpu(keys: Sequence[Key]) -> Iterator[int]:
    """The most bytes that each call has allocated beyond those before it."""
    found = {case.name: case for case in cases("cuda")}
    for name, form, mode in keys:
        call = forms.prepared(found[name], form, mode, "cuda")
        call()
        yield measure.allocated_bytes(call)


def on_cpu(keys: Sequence[Key]) -> Iterator[int | None]:
    """The most resident bytes of each call beyond those before it; None where a child died."""
    environment = {**os.environ, **MEMORY_ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        [sys.executable, "-m", "nystromgan.bench.memory"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(keys))
        child.stdin.close()
        for line in child.stdout:
            yield json.loads(line)


def _peak(case: Case, form: str, mode: str) -> int:
    if form.endswith((COMPILED, TUNED)):  # compiled for one shape: its first call is compilation
        call = forms.prepared(case, form, mode, "cpu")
        call()
        return extra_peak_bytes(call)
    forms.prepared(case, form, mode, "cpu", case.small)()
    call = forms.prepared(case, form, mode, "cpu")
    return extra_peak_bytes(call)


def _in_child(function: Callable[[], Any]) -> Any:
    """The result of a function run in a forked process; None where it died."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, json.dumps(function()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else None


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who asks may stop listening when its time is over
    import torch.fx.experimental.symbolic_shapes  # noqa: F401  (a first backward imports it; once for all children)

    found = {case.name: case for case in cases("cpu")}
    for name, form, mode in json.load(sys.stdin):
        print(json.dumps(_in_child(functools.partial(_peak, found[name], form, mode))), flush=True)


if __name__ == "__main__":
    main()
