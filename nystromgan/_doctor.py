"""`nystromgan doctor`: what this machine can run, and why not the rest."""

import argparse
import json
import pathlib
import platform
from importlib import metadata
from typing import Any

import torch

from nystromgan import _backend, _native


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report = inspect_machine()
    print(json.dumps(report, indent=2) if args.json else _as_text(report))
    return 0


def inspect_machine() -> dict[str, Any]:
    """Versions, hardware, the reasons of every backend for every op (none: it runs), and advice."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("nystromgan", "torch", "triton", "numpy")},
        },
        "cpu": {"model": _cpu_model(), "threads": torch.get_num_threads(), "isa": _native.cpu_isa()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {
            op: {backend: _backend.unsupported_reasons(op, backend, []) for backend in _backend.BACKENDS}
            for op in _backend.IMPLEMENTED
        },
        "advice": _advice(),
    }


def _version(package: str) -> str | None:
    """The version of an installed package, read without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _advice() -> str | None:
    """One line on what to do when the native library is missing."""
    if not _native.cpu_reasons():
        return None
    return (
        "the CPU runs on `reference`, which is slower: install g++ >= 11 (or set CXX) and reinstall with "
        "NYSTROMGAN_BUILD=cpu pip install --no-build-isolation, which says what is missing"
    )


def _as_text(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    cpu = report["cpu"]
    lines = [
        ", ".join(f"{name} {version or '(not installed)'}" for name, version in report["versions"].items()),
        f"CPU: {cpu['model']}, {cpu['threads']} threads, native library: {cpu['isa'] or 'none'}",
        f"GPU: {', '.join(report['gpus']) or 'none'}",
    ]
    for op, backends in report["backends"].items():
        lines += ["", op, *(f"  {name:<10} {_verdict(reasons)}" for name, reasons in backends.items())]
    if report["advice"]:
        lines += ["", f"Advice: {report['advice']}"]
    return "\n".join(lines)


def _verdict(reasons: list[str]) -> str:
    return "no: " + "; ".join(reasons) if reasons else "yes"
