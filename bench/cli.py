"""`nystromgan bench`: measures the cases, one results file an op, kept in bench/results/<machine>/."""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from nystromgan.bench import cases, machine, measure, memory

RESULTS = pathlib.Path(__file__).parent / "results"
PARTS = ("time", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="fewer cases, fewer rounds, nothing compiled (default)")
    effort.add_argument("--full", action="store_true", help="every case, also beside torch.compile")
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--case", default="", help="only cases whose name has this in it, others keep their record")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--mode", action="append", choices=cases.MODES, help="only forward or only forward+backward")
    parser.add_argument("--part", action="append", choices=PARTS, help="only time or only memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="folder of machines' folders")


def run(args: argparse.Namespace) -> int:
    found = cases.cases(args.full)
    args.no_compile |= not args.full
    selected = [c for c in found if (not args.op or c.op in args.op) and args.case in c.name]
    if not selected:
        names = ", ".join(sorted({case.op for case in found}))
        raise ValueError(f"no case of op {args.op} has {args.case!r} in its name; ops are {names}")
    folder = args.output / machine.name(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for op in dict.fromkeys(case.op for case in selected):
        failed |= _run_op(op, [c for c in selected if c.op == op], folder / f"{op}.json", args)
    print(f"\nResults are in {folder}; `nystromgan report` makes a page of them.")
    return int(failed)


def _run_op(op: str, selected: list[cases.Case], path: pathlib.Path, args: argparse.Namespace) -> bool:
    """Measures the cases of one op and updates its file after each; tells whether ours was wrong anywhere."""
    record = json.loads(path.read_text()) if path.exists() else {"rows": []}
    parts = args.part or PARTS
    effort = measure.THOROUGH if args.full else measure.QUICK
    progress = _progress()
    rows = record["rows"]
    if "time" in parts:
        record["machine"], record["rates"] = machine.describe(args.device), machine.rates(args.device)
        for case in selected:
            for mode in args.mode or cases.MODES:
                progress(f"time    {case.name}, {mode}")
                new = measure.rows(case, mode, args.device, effort, not args.no_compile, record["rates"])
                _keep_memory(new, rows)
                for row in new:
                    row["commit"] = record["machine"]["commit"]  # cases may be measured at different times
                rows = [row for row in rows if (row["case"], row["mode"]) != (case.name, mode)] + new
                _write(path, record, rows)
    if "memory" in parts:
        names = {case.name for case in selected}
        memory.add([row for row in rows if row["case"] in names], args.device, progress)
        _write(path, record, rows)
    ours = [row for row in rows if row["form"] == cases.OURS and row.get("wrong")]
    for row in ours:
        print(f"WRONG   {row['case']}, {row['mode']}: {row['errors']}", file=sys.stderr)
    return bool(ours)


def _keep_memory(new: list[dict[str, Any]], old: list[dict[str, Any]]) -> None:
    """A form that is timed again keeps its memory until that is measured again."""
    peaks = {(r["case"], r["mode"], r["form"]): r["peak_bytes"] for r in old if "peak_bytes" in r}
    for row in new:
        peak = peaks.get((row["case"], row["mode"], row["form"]))
        if peak is not None and "median_ms" in row:
            row["peak_bytes"] = peak


def _write(path: pathlib.Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One row a line, in the registry's order, so that a change of results reads well in a diff."""
    order = {case.name: i for i, case in enumerate(cases.cases())}
    record["rows"] = sorted(rows, key=lambda row: (order.get(row["case"], len(order)), cases.MODES.index(row["mode"])))
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    lines = ",\n".join("  " + json.dumps(_rounded(row), ensure_ascii=False) for row in record["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {key: _rounded(x) for key, x in value.items()} if isinstance(value, dict) else value


def _progress() -> Callable[[str], None]:
    start = time.perf_counter()

    def advance(message: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {message}", file=sys.stderr, flush=True)

    return advance
