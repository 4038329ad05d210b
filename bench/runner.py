"""Measures cases one after another, and keeps each as soon as it is measured."""

import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nystromgan.bench import measure, store
from nystromgan.bench.case import Case

Pair = tuple[Case, str]  # a case and a mode


def timed(
    pairs: Iterable[Pair],
    plan: measure.Plan,
    where: dict[str, Any],
    folder: pathlib.Path,
    progress: Callable[[str], None],
) -> Iterator[tuple[Case, str, list[store.Row]]]:
    """Every case with its rows, which are then in its op's file; `where` describes the machine."""
    for case, mode in pairs:
        progress(f"time    {case.name}, {mode}")
        path = folder / f"{case.op}.json"
        new = [row | {"commit": where["commit"]} for row in measure.rows(case, mode, plan)]
        rows = store.merged(store.read(path)["rows"], new, plan.device)
        store.write(path, {"machine": where, "rates": plan.rates, "rows": rows})
        yield case, mode, new
