"""One command for a machine with a GPU: correctness against float64, tuning, and speed beside the peers, in one run.

    python -m nystromgan.bench.gpu_check [--stage correctness|tuning|speed ...] [--op NAME ...] [--budget-s 540]

Writes bench/results/<device>/<stage>.json after every row, so that a run that is cut short keeps what it has. A wrong
result prints no speed.
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
from nystromgan.bench import gpu_checks, gpu_speed, gpu_tuning
from nystromgan.bench.gpu_checks import GPU_BACKENDS

STAGES: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "correctness": gpu_checks.rows,
    "tuning": gpu_tuning.rows,
    "speed": gpu_speed.rows,
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
        rows = STAGES[stage](options.device, options.tiny, options.op, options.budget_s)
        failures += _record(stage, rows, options)
        if stage == "speed":
            print("\n".join(summary(options.output / device_name(options.device) / "speed.json")))
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


def _record(stage: str, rows: Iterable[dict[str, Any]], options: argparse.Namespace) -> int:
    """Prints and writes every row as it comes; returns how many are wrong."""
    folder = options.output / device_name(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**environment(options.device), "rows": []}
    for row in rows:
        report["rows"].append(row)
        print(_line(row), flush=True)
        (folder / f"{stage}.json").write_text(json.dumps(report, indent=1) + "\n")
    return sum(row.get("wrong", False) for row in report["rows"])


def summary(report: pathlib.Path) -> list[str]:
    """One line a case and pass: our time, in floors, and how many times longer each peer takes."""
    timed = [row for row in json.loads(report.read_text())["rows"] if "median_ms" in row]
    lines = []
    for ours in (row for row in timed if row["form"].split()[0] in GPU_BACKENDS):
        peers = [
            f"{row['form']} {row['median_ms'] / ours['median_ms']:.2f}x"
            for row in timed
            if all(row.get(name) == ours.get(name) for name in ("op", "case", "pass"))
            and row["form"].split()[0] not in GPU_BACKENDS
        ]
        title = " ".join(filter(None, (ours["op"], ours["case"], ours.get("pass"), ours["form"])))
        lines.append(f"{title}: {ours['median_ms']:.3f} ms, {ours['of_floor']:.2f} floors; " + ", ".join(peers))
    return lines


def _line(row: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{name}={text(value)}" for name, value in row.items() if value is not None)


def device_name(device: str) -> str:
    """The device's name, fit for a folder."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"interpreter-{platform.machine()}"
    return name.replace(" ", "-").lower()


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
