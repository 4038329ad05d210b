"""One command for a machine with a GPU: the op tests, correctness against float64, tuning, and speed beside the peers.

    python -m nystromgan.bench.gpu_check [--stage NAME ...] [--op NAME ...] [--budget-s 540]

Writes bench/results/<device>/<stage>.json after every row, so that a run that is cut short keeps what it has, and the
speeds into the files of `nystromgan bench`, of which `nystromgan report` makes a page. A wrong result prints no speed.
"""

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any

import torch

from nystromgan import _env
from nystromgan.bench import gpu_checks, gpu_cuda, gpu_stages, gpu_tuning, machine
from nystromgan.bench.case import BY, OURS

STAGES: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "tests": gpu_stages.op_test_rows,
    "correctness": gpu_checks.rows,
    "cuda": gpu_cuda.rows,
    "tuning": gpu_tuning.rows,
    "speed": gpu_stages.speed_rows,
}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device", file=sys.stderr)
        return 1
    if options.device == "cpu" and not _env.triton_interpret():
        print("gpu_check: --device cpu needs TRITON_INTERPRET=1", file=sys.stderr)
        return 1
    failures = 0
    for stage in options.stage or STAGES:
        print(f"\n{stage}", flush=True)
        folder = options.output / device_name(options.device)
        rows = STAGES[stage](options.device, options.tiny, options.op, options.budget_s, folder)
        failures += _record(stage, rows, folder, environment(options.device))
    print(f"\n{failures} wrong" if failures else "\nall right")
    return min(failures, 1)


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


def _record(stage: str, rows: Iterable[dict[str, Any]], folder: pathlib.Path, where: dict[str, Any]) -> int:
    """Prints and writes every row as it comes; returns how many are wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**where, "rows": []}
    for row in rows:
        report["rows"].append(row)
        print(_line(row), flush=True)
        (folder / f"{stage}.json").write_text(json.dumps(report, indent=1) + "\n")
    if stage == "speed":
        print("\n".join(gpu_stages.summary(report["rows"])))
    return sum(bool(row.get("wrong")) and row.get("form", OURS).startswith((OURS, BY)) for row in report["rows"])


def _line(row: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{name}={text(value)}" for name, value in row.items() if value is not None)


def device_name(device: str) -> str:
    """The device's name, fit for a folder."""
    return machine.name("cuda") if device == "cuda" else f"interpreter-{platform.machine()}"


def environment(device: str) -> dict[str, Any]:
    """Where and with what a report was made."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
    )
    return {
        "device": device_name(device),
        "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": metadata.version("triton"),
    }


if __name__ == "__main__":
    sys.exit(main())
