"""One command for a machine with a GPU: the project's targets, correctness against float64, tests, tuning and speed.

    python -m nystromgan.bench.gpu_check [--stage NAME ...] [--op NAME ...] [--budget-s 540]

Without --stage every stage runs, each in a process of its own. A stage ends within its budget: it starts nothing after
it, and what then still runs is stopped. Rows go to <output>/<device>/<stage>.json, each as soon as it is there, beside
those of earlier runs that it does not replace; speeds go to the files of `nystromgan bench`, of which `nystromgan
report` makes a page. A wrong result has no speed. The targets stage ends with a verdict a line, also in its file.

Exit status: 1 where something is wrong or a target is missed; else 2 where a target was not measured, or the budget
ended before a stage; else 0.
"""

import argparse
import contextlib
import json
import pathlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nystromgan import _doctor, _env
from nystromgan.bench import (
    gpu_checks,
    gpu_cuda,
    gpu_stages,
    gpu_target_rows,
    gpu_targets,
    gpu_tests,
    gpu_tuning,
    gpu_tuning_findings,
    machine,
)
from nystromgan.bench.case import BY, OURS
from nystromgan.bench.plan import Stage

Row = dict[str, Any]
STAGES: dict[str, Callable[[Stage], Iterator[Row]]] = {
    "targets": gpu_target_rows.rows,
    "correctness": gpu_checks.rows,
    "tests": gpu_tests.rows,
    "cuda": gpu_cuda.rows,
    "tuning": gpu_tuning.rows,
    "speed": gpu_stages.speed_rows,
}
# What tells one row of a file from another.
IDENTITY = ("tests", "op", "backend", "check", "tool", "case", "mode", "form", "table", "key", "column", "share")
GRACE_S = 15  # after its budget, in which a stage may end by itself
GOOD, WRONG, UNFINISHED = 0, 1, 2  # exit statuses


class OutOfTime(BaseException):
    """The budget has ended: no `except Exception` of a measurement may take it."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device", file=sys.stderr)
        return WRONG
    if options.device == "cpu" and not _env.triton_interpret():
        print("gpu_check: --device cpu needs TRITON_INTERPRET=1", file=sys.stderr)
        return WRONG
    stages = options.stage or list(STAGES)
    if len(stages) == 1:
        return _stage(stages[0], options)
    return _worst([_in_process(stage, options) for stage in stages])


def _worst(statuses: list[int]) -> int:
    return WRONG if any(status not in (GOOD, UNFINISHED) for status in statuses) else max(statuses)


def _in_process(stage: str, options: argparse.Namespace) -> int:
    """A stage's exit status; a kernel that takes the process down ends no other stage."""
    command = [sys.executable, "-m", "nystromgan.bench.gpu_check", "--stage", stage, "--device", options.device]
    command += ["--budget-s", str(options.budget_s), "--output", str(options.output)]
    command += [argument for op in options.op or () for argument in ("--op", op)] + ["--tiny"] * options.tiny
    return subprocess.run(command).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", action="append", choices=STAGES, help="one or more; default: all")
    parser.add_argument("--op", action="append", help="only these ops")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the interpreter, to try this command"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--budget-s", type=float, default=540, help="of each stage: what is not reached is left out")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    return parser


def _stage(name: str, options: argparse.Namespace) -> int:
    """Runs one stage, prints and writes its rows as they come, then what they amount to."""
    folder = options.output / device_name(options.device)
    stage = Stage(options.device, options.tiny, options.op, time.perf_counter() + options.budget_s, folder)
    record = Record(folder / f"{name}.json", environment(options.device))
    print(f"\n{name}", flush=True)
    try:
        with _ending_after(options.budget_s + GRACE_S):
            for row in STAGES[name](stage):
                record.add(row)
    except OutOfTime:
        record.add({"unfinished": f"stopped {GRACE_S} s after the budget"})
    return _summary(name, stage, record)


def _summary(name: str, stage: Stage, record: "Record") -> int:
    wrong = sum(bool(row.get("wrong")) and row.get("form", OURS).startswith((OURS, BY)) for row in record.rows)
    open_ends = sum("unfinished" in row for row in record.rows)
    if name == "speed":
        print("\n".join(gpu_stages.summary(record.rows)))
    if name == "tuning":
        tuned = gpu_tuning_findings.findings(
            row for row in record.all_rows() if row["commit"] == record.where["commit"]
        )
        record.write(findings=[finding.record() for finding in tuned])
        print("\n".join(gpu_tuning_findings.summary(tuned)))
    if name == "targets":
        found = gpu_targets.verdicts(record.rows, gpu_target_rows.chosen(stage), gpu_target_rows.lines(stage))
        record.write(verdicts=[verdict.record() for verdict in found])
        print("\n".join(["", gpu_targets.HEAD, *map(str, found)]))
        words = [verdict.word for verdict in found]
        wrong += words.count(gpu_targets.FAIL)
        open_ends += words.count(gpu_targets.NOT_MEASURED)
        print("; ".join(f"{words.count(word)} {word}" for word in gpu_targets.WORDS))
    print(f"\n{name}: " + (f"{wrong} wrong or missed, {open_ends} not measured" if wrong + open_ends else "all right"))
    return WRONG if wrong else UNFINISHED if open_ends else GOOD


@contextlib.contextmanager
def _ending_after(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in what still runs then, say in a compiler that nobody else would stop."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Record:
    """A stage's file: the rows of this run, and of earlier ones those that it does not replace."""

    def __init__(self, path: pathlib.Path, where: Row) -> None:
        self.path, self.where, self.rows, self.start = path, where, list[Row](), time.perf_counter()
        self.earlier: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        self.rows.append(row | {"commit": self.where["commit"]})
        print(f"{time.perf_counter() - self.start:5.0f} s  {_line(row)}", flush=True)
        self.write()

    def all_rows(self) -> list[Row]:
        """What a run did not finish replaces nothing."""
        new = {_identity(row) for row in self.rows if "unfinished" not in row}
        kept = [row for row in self.earlier if _identity(row) not in new and "unfinished" not in row]
        return kept + self.rows

    def write(self, **more: Any) -> None:
        """Whole or not at all, whatever ends the process."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({**self.where, **more, "rows": self.all_rows()}, indent=1) + "\n")
        partial.replace(self.path)


def _identity(row: Row) -> str:
    return json.dumps([row.get(name) for name in IDENTITY])


def _line(row: Row) -> str:
    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{name}={text(value)}" for name, value in row.items() if value is not None)


def device_name(device: str) -> str:
    """The device's name, fit for a folder."""
    return machine.name("cuda") if device == "cuda" else f"interpreter-{platform.machine()}"


def environment(device: str) -> Row:
    """Where and with what a report was made."""
    versions = _doctor.inspect_machine()["versions"]
    return {
        "device": device_name(device), "commit": machine.commit(), "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cuda": torch.version.cuda, **{name: versions[name] for name in ("python", "torch", "triton")},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
