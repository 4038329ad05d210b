"""Results on disk: one file an op in a machine's folder, one row a line."""

import json
import pathlib
from typing import Any

from nystromgan.bench.case import MODES
from nystromgan.bench.cases import cases

Row = dict[str, Any]
Record = dict[str, Any]
RESULTS = pathlib.Path(__file__).parent / "results"
LANDMARKS = "landmarks"  # accuracy over landmarks
DISCRIMINATOR = "modules/discriminator"  # what spectral norm adds to a network, by bench_modules
GPU_TARGETS = "targets"  # what decides the promises on a GPU, by gpu_check
NO_CASES = (LANDMARKS, DISCRIMINATOR, GPU_TARGETS)  # the files whose rows are not an op's alone
OPS = ("nystrom_attention", "spatiotemporal_attention", "iterative_pinv", "power_iteration", "modules", "zoo")


def load(folder: pathlib.Path) -> dict[str, Record]:
    """The records of one machine by op."""
    paths = {name: folder / f"{name}.json" for name in (*OPS, *NO_CASES)}
    return {name: read(path) for name, path in paths.items() if path.exists()}


def read(path: pathlib.Path) -> Record:
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def rows_of(records: dict[str, Record]) -> list[Row]:
    return [row for name, record in records.items() if name not in NO_CASES for row in record["rows"]]


def write(path: pathlib.Path, record: Record) -> None:
    """One row a line, so that a change of results reads well in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    lines = ",\n".join("  " + json.dumps(_rounded(row), ensure_ascii=False) for row in record["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return {key: _rounded(x) for key, x in value.items()} if isinstance(value, dict) else value


def merged(rows: list[Row], new: list[Row], device: str, earlier: list[Row] | None = None) -> list[Row]:
    """The rows with those of one case and mode replaced, in the registry's order; other cases leave with the registry.

    A form that is timed again keeps its memory until that is measured again, and at the same commit the ratio of the
    run before, so that a report can tell what two runs disagree on. `earlier` are that run's rows, if not `rows`.
    """
    before = {(row["case"], row["mode"], row["form"]): row for row in (rows if earlier is None else earlier)}
    for row in new:
        old = before.get((row["case"], row["mode"], row["form"]), {})
        if "median_ms" in row and "median_ms" in old:
            row |= {"peak_bytes": old["peak_bytes"]} if "peak_bytes" in old and "peak_bytes" not in row else {}
            row |= {"ratio_before": old["ratio"]} if old.get("commit") == row.get("commit") and "ratio" in old else {}
    order = {case.name: i for i, case in enumerate(cases(device))}
    places = {(row["case"], row["mode"]) for row in new}
    kept = [row for row in rows if (row["case"], row["mode"]) not in places and row["case"] in order]
    return sorted(kept + new, key=lambda row: (order.get(row["case"], len(order)), MODES.index(row["mode"])))
