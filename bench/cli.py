"""`nystromgan bench`: measures the cases, one results file an op, kept in bench/results/<machine>/."""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from nystromgan import _native
from nystromgan.bench import compare, landmarks, machine, memory, runner, store
from nystromgan.bench.case import DEVICES, MODES, OURS, PASSES, Case
from nystromgan.bench.cases import cases
from nystromgan.bench.plan import QUICK, THOROUGH, Allowance, Plan

PARTS = ("time", "landmarks", "memory")
# From the start; --full ends within 40 minutes, of which no part starts anything after its own limit.
COMPILING_S, TIMES_UNTIL_S, MEMORY_UNTIL_S = 600.0, 1800.0, 2300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument(
        "--quick", action="store_true", help="fewer cases and rounds, no backward alone, nothing compiled (default)"
    )
    effort.add_argument("--full", action="store_true", help="every case, also beside torch.compile")
    parser.add_argument("--op", action="append", choices=store.OPS, help="only this op; may be repeated")
    parser.add_argument("--case", default="", help="only cases whose name has this in it, others keep their record")
    parser.add_argument(
        "--compare", metavar="REV", help="this tree beside the commit REV, interleaved; keeps no results"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--mode", action="append", choices=MODES, help="only this one; may be repeated")
    parser.add_argument("--part", action="append", choices=PARTS, help="only time, memory or landmarks' accuracy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=DEVICES)
    parser.add_argument("--output", type=pathlib.Path, default=store.RESULTS, help="folder of machines' folders")


def run(args: argparse.Namespace) -> int:
    chosen = selected(args)
    if args.compare:
        return compare.run(args.compare, chosen, args.mode or MODES, args.device, args.full)
    folder, start = args.output / machine.name(args.device), time.perf_counter()
    if args.device == "cpu" and (reasons := _native.cpu_reasons()):
        # standard error, beside the progress: the numbers are true, but not of what the reader came for
        print(f"No native kernels: 'nystromgan' below is its reference in PyTorch ({reasons[0]})", file=sys.stderr)
    parts = args.part or PARTS
    if "time" in parts:
        _times(chosen, folder, args, start + TIMES_UNTIL_S)
    if "landmarks" in parts and not args.case and not args.op:
        _landmarks(folder, args)
    if "memory" in parts:
        _memory(chosen, folder, args, start + MEMORY_UNTIL_S)
    print(f"\nResults are in {folder}; `nystromgan report` makes a page of them.")
    return int(_told_wrong(chosen, folder))


def selected(args: argparse.Namespace) -> list[Case]:
    """The cases that the options name; ValueError where there is none."""
    every = cases(args.device, args.full or bool(args.case))
    chosen = [case for case in every if (not args.op or case.op in args.op) and args.case in case.name]
    if not chosen:
        ops = ", ".join(args.op) if args.op else "any op"
        raise ValueError(f"no case of {ops} has {args.case!r} in its name; one is {every[0].name!r}")
    return chosen


def _times(chosen: list[Case], folder: pathlib.Path, args: argparse.Namespace, deadline: float) -> None:
    """Measures every case in every mode, and updates its op's file after each visit."""
    where, rates = machine.describe(args.device), machine.rates(args.device)
    effort = THOROUGH if args.full else QUICK
    compiling = Allowance(COMPILING_S) if args.full and not args.no_compile else None
    plan = Plan(args.device, rates, effort, compiling, too_long=set())
    modes = args.mode or (MODES if args.full else PASSES)
    pairs = [(case, mode) for case in chosen for mode in modes if mode in case.modes]
    for _ in runner.timed(pairs, plan, where, folder, steps(effort.visits * len(pairs)), deadline):
        pass


def _memory(chosen: list[Case], folder: pathlib.Path, args: argparse.Namespace, deadline: float) -> None:
    """Adds the memory of what was timed: of every form, or without --full of ours and the fastest other."""
    names = {case.name for case in chosen}
    records = {op: store.read(folder / f"{op}.json") for op in dict.fromkeys(case.op for case in chosen)}
    rows = [row for record in records.values() for row in record["rows"] if row["case"] in names]
    try:
        memory.add(rows, args.device, args.full, steps(memory.steps(rows, args.full)), deadline)
    finally:  # what was measured is kept, whatever ended it
        for op, record in records.items():
            if record["rows"]:
                store.write(folder / f"{op}.json", record)


def _landmarks(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Accuracy and time over the number and kind of landmarks, where the video is installed."""
    try:
        rows = landmarks.rows(args.full, args.device, steps(landmarks.count(args.full)))
    except (FileNotFoundError, ModuleNotFoundError) as error:
        print(f"landmarks on a video left out: {error}", file=sys.stderr)
        return
    store.write(folder / f"{store.LANDMARKS}.json", {"machine": machine.describe(args.device), "rows": rows})


def _told_wrong(chosen: list[Case], folder: pathlib.Path) -> bool:
    """Whether ours was wrong anywhere; says where."""
    names = {case.name for case in chosen}
    rows = [row for row in store.rows_of(store.load(folder)) if row["case"] in names]
    wrong = [row for row in rows if row["form"] == OURS and row.get("wrong")]
    for row in wrong:
        print(f"WRONG   {row['case']}, {row['mode']}: {row.get('errors', row['wrong'])}", file=sys.stderr)
    return bool(wrong)


def steps(total: int) -> Callable[[Any], None]:
    """A function that tells one step more of `total`, with the seconds since the first and about how many are left."""
    start, done = time.perf_counter(), 0

    def advance(message: Any) -> None:
        nonlocal done
        done += 1
        spent = time.perf_counter() - start
        left = f", about {spent / (done - 1) * (total - done + 1):.0f} s left" if done > 1 else ""
        print(f"{spent:5.0f} s{left}  {done}/{total}  {message}", file=sys.stderr, flush=True)

    return advance
