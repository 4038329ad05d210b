"""Measures cases one after another, and keeps each as soon as it is measured."""

import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nystromgan.bench import measure, store
from nystromgan.bench.case import OURS, Case
from nystromgan.bench.plan import Plan

Pair = tuple[Case, str]  # a case and a mode


def timed(
    pairs: Iterable[Pair],
    plan: Plan,
    where: dict[str, Any],
    folder: pathlib.Path,
    progress: Callable[[str], None],
    deadline: float = math.inf,
) -> Iterator[tuple[Case, str, list[store.Row]]]:
    """Visits every case, then every case again as often as the plan's effort asks; `where` describes the machine.

    After each visit gives the case with its rows, which are then in its op's file. A case that raises has one row, of
    ours, that says so; one that comes after the deadline, on time.perf_counter's clock, keeps the rows that it has.
    """
    measurements = [measure.Measurement(case, mode, plan) for case, mode in pairs]
    earlier = {one.case.op: store.read(folder / f"{one.case.op}.json")["rows"] for one in measurements}
    for visit in range(plan.effort.visits):
        for measurement in measurements:
            case, mode = measurement.case, measurement.mode
            late = time.perf_counter() > deadline
            progress(f"{'LEFT OUT, no time' if late else 'again  ' if visit else 'time   '} {case.name}, {mode}")
            if late:
                continue
            path = folder / f"{case.op}.json"
            new = [row | {"commit": where["commit"]} for row in _rows(measurement)]
            rows = store.merged(store.read(path)["rows"], new, plan.device, earlier[case.op])
            store.write(path, {"machine": where, "rates": plan.rates, "rows": rows})
            yield case, mode, new


def _rows(measurement: measure.Measurement) -> list[store.Row]:
    try:
        return measurement.visit()
    except Exception as error:  # one case must not end a run of forty minutes
        return [measure.failed_row(measurement.case, OURS, measurement.mode, error)]
