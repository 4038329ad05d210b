"""`nystromgan info NAME`: what a model or a checkpoint is."""

import argparse
import json
import pathlib
from typing import Any

from nystromgan.zoo import checkpoints, registry
from nystromgan.zoo import config as tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a checkpoint's name, folder or file, a run's folder, or a model's name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report = _model(args.name) if _only_a_model(args.name) else _checkpoint(args.name)
    print(json.dumps(report, indent=2) if args.json else _as_text(report))
    return 0


def _only_a_model(name: str) -> bool:
    taken = name in checkpoints.list_checkpoints() or pathlib.Path(name).exists()
    return name in registry.list_models() and not taken


def _model(name: str) -> dict[str, Any]:
    module = registry.paper_of_preset(name)
    model = registry.create_model(name)
    return {
        "kind": "model",
        "name": name,
        "task": module.TASK,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": tables.table(module.PRESETS[name]),
        "about": (module.__doc__ or "").strip(),
    }


def _checkpoint(name: str) -> dict[str, Any]:
    try:
        report = checkpoints.describe(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; models are: {', '.join(registry.list_models())}") from None
    card = pathlib.Path(report["path"]).with_name("README.md")
    return {"kind": "checkpoint", **report, "about": card.read_text(encoding="utf-8") if card.exists() else ""}


def _as_text(report: dict[str, Any]) -> str:
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name} = {item}" for name, item in value.items())]
        elif key == "about":
            lines += ["", str(value).strip()]
        else:
            lines.append(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
    return "\n".join(lines)
