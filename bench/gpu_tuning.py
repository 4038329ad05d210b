"""The tuning stage: the time of every candidate for every entry of the Triton kernels' tables, and who wins.

A candidate stands in the table itself while the op, called as it is by users, is held to float64 and timed.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nystromgan import _backend
from nystromgan.bench import clock, forms, gate, gpu_parts, machine
from nystromgan.bench.case import OURS, Case
from nystromgan.bench.gpu_tuning_entries import Measurement, measurements
from nystromgan.bench.plan import Stage

Row = dict[str, Any]
COMPILING, SHARES = 0.4, 20  # of the time left, until candidates must be compiled; processes that compile them
TIME_S = 0.05  # of one measurement
PLACE = ("op", "table", "key", "column", "case", "mode")


def rows(stage: Stage) -> Iterator[Row]:
    """A row an entry and case: the time of every candidate, or why it has none, and the fastest.

    Entries without a row of this commit come first, so that a run goes on where the one before was cut short.
    """
    chosen = wanted(stage.ops, stage.device, stage.tiny)
    known = _measured(stage)
    chosen.sort(key=lambda one: _place(one.place) in known)
    if stage.device == "cuda":  # candidates are compiled by many processes, and timed by this one
        until = time.perf_counter() + COMPILING * stage.left_s()
        parts = [{"ops": stage.ops, "known": sorted(known), "share": share} for share in range(SHARES)]
        yield from gpu_parts.ahead(stage._replace(deadline=until), "gpu_tuning", parts)
    groups = itertools.groupby(chosen, key=lambda one: (one.case.name, one.mode))
    for _, group in groups:
        for row in _of_one_case(list(group), stage):
            if "own" not in row and _place(row) in known:
                continue  # the row of the run before stands
            yield row
            if "device_lost" in row:
                yield {"unfinished": "a kernel's fault has left this process no device: run again for the rest"}
                return


def wanted(ops: Sequence[str] | None, device: str, tiny: bool) -> list[Measurement]:
    """The measurements of these ops, or of all, that this machine can run; of the interpreter's two candidates each."""
    able = [op for op in _backend.IMPLEMENTED if not _backend.unsupported_reasons(op, "triton", [])]
    found = [one for one in measurements(device, tiny) if one.entry.op in able and (not ops or one.entry.op in ops)]
    return [one._replace(candidates=one.names[:2]) for one in found] if tiny else found


def _place(row: Row) -> str:
    return json.dumps([row.get(name) for name in PLACE])


def _measured(stage: Stage) -> set[str]:
    """The places that have a row of this commit; none at one whose files have changed since."""
    path, commit = stage.folder / "tuning.json", machine.commit()
    if commit is None or commit.endswith("+") or not path.exists():
        return set()
    rows = json.loads(path.read_text())["rows"]
    return {
        _place(row) for row in rows if row.get("commit") == commit and "times_ms" in row and "unfinished" not in row
    }


def part_rows(ops: Sequence[str] | None, known: Sequence[str], share: int, device: str, tiny: bool) -> Iterator[Row]:
    """Runs one of SHARES parts of the candidates once, which leaves their kernels in Triton's cache."""
    start = time.perf_counter()
    new = [one for one in wanted(ops, device, tiny) if _place(one.place) not in known]
    for one in new[share::SHARES]:
        inputs = one.case.make(device, one.case.shape, 0)
        for name in one.names:
            with contextlib.suppress(Exception), one.entry.using(name):  # what fails here fails where it is timed
                gate.results(one.case.ours("triton"), inputs, one.mode)
    yield {"share": share, "compiled_s": time.perf_counter() - start}


def _of_one_case(group: Sequence[Measurement], stage: Stage) -> Iterator[Row]:
    """The rows of entries that are measured on one case in one mode, whose inputs they share."""
    case, mode = group[0].case, group[0].mode
    exact: gate.Exact | None = None
    for one in group:
        if stage.left_s() < 0:
            yield {**one.place, "unfinished": gpu_parts.UNFINISHED}
            continue
        try:
            if exact is None:
                exact = gate.Exact(case, case.make(stage.device, case.shape, 0), mode)
            exact.of(OURS)
        except Exception as error:  # out of memory, for float64's products
            yield {**one.place, "unfinished": f"no reference: {_told(error)}"}
            continue
        yield {**one.place, **_timed(one, exact, stage)}


def _timed(one: Measurement, exact: gate.Exact, stage: Stage) -> Row:
    """Times every candidate; what the table holds comes first and last, and its better time counts: clocks drift."""
    own = one.entry.own
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    lost = None
    for name in [*one.names, own]:
        if stage.left_s() < 0 or lost:
            if name not in times:
                refused.setdefault(name, "no device" if lost else gpu_parts.UNFINISHED)
            continue
        try:
            with one.entry.using(name):
                times[name] = min(times.get(name, float("inf")), _right_ms(one.case, exact, stage))
        except Exception as error:  # out of shared memory, mostly
            refused[name] = _told(error)
            lost = None if _alive(stage.device) else name
    best = min(times, key=lambda name: times[name]) if times else None
    row: Row = {"own": own, "own_ms": times.get(own), "best": best, "best_ms": times.get(best or "")}
    row |= {"times_ms": times, "refused": refused} | ({"device_lost": lost} if lost else {})
    if gpu_parts.UNFINISHED in refused.values():
        return row | {"unfinished": gpu_parts.UNFINISHED}
    return row | ({"wrong": True} if own in refused else {})


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def _right_ms(case: Case, exact: gate.Exact, stage: Stage) -> float:
    """The time of a call; ArithmeticError where its result is wrong."""
    with _poisoned_memory():
        errors = gate.errors(case, OURS, case.ours("triton"), exact.whole, exact)
    if gate.wrong(case, errors):
        raise ArithmeticError("wrong: " + ", ".join(f"{name} off by {error:.2e}" for name, error in errors.items()))
    call = forms.call_of(case, case.ours("triton"), exact.whole, exact.mode)
    if stage.device == "cpu":
        return clock.median_ms(call, "cpu", 0.0 if stage.tiny else TIME_S)
    call()
    graph = clock.graphed([call])  # without what Python takes, which is longer than most kernels
    try:
        return clock.median_ms(graph or call, "cuda", TIME_S)
    finally:
        del graph
        torch.cuda.empty_cache()  # of what the graph kept to itself


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New memory is filled with NaN: what a kernel leaves out must not be what another has left there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _alive(device: str) -> bool:
    """Whether the device still takes work, which it does not after a fault in memory."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
