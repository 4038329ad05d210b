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
    """Every case with its rows, which are then in its op's file; `where` describes the machine.

    A case that raises has one row, of ours, that says so; one that comes after the deadline, on time.perf_counter's
    clock, keeps the rows of an earlier run.
    """
    for case, mode in pairs:
        late = time.perf_counter() > deadline
        progress(f"{'LEFT OUT, no time' if late else 'time   '} {case.name}, {mode}")
        if late:
            continue
        path = folder / f"{case.op}.json"
        new = [row | {"commit": where["commit"]} for row in _rows(case, mode, plan)]
        rows = store.merged(store.read(path)["rows"], new, plan.device)
        store.write(path, {"machine": where, "rates": plan.rates, "rows": rows})
        yield case, mode, new


def _rows(case: Case, mode: str, plan: Plan) -> list[store.Row]:
    try:
        return measure.rows(case, mode, plan)
    except Exception as error:  # one case must not end a run of forty minutes
        return [measure.failed_row(case, OURS, mode, error)]
