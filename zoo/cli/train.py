"""`nystromgan train RECIPE`: trains by a recipe, or goes on with a run."""

import argparse
import dataclasses
import json
import os
import pathlib

import torch

from nystromgan.zoo import config as tables
from nystromgan.zoo import recipes
from nystromgan.zoo.training import run as training
from nystromgan.zoo.training import run_folder
from nystromgan.zoo.training.estimate import Estimate, estimate
from nystromgan.zoo.training.loop import Loop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe's name, a .toml file, or a run's folder, which is continued")
    parser.add_argument("--data", type=pathlib.Path, help="folder of TIFF stacks or videos to train on instead")
    parser.add_argument("--output", type=pathlib.Path, help="the run's folder (runs/RECIPE)")
    parser.add_argument("--steps", type=int, help="the same as --set train.steps=STEPS")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="changes the recipe: train.batch=4"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--threads", type=int, help="of torch on the CPU: --set train.threads=THREADS")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe, memory and time, and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    path = pathlib.Path(args.recipe)
    resume = run_folder.holds_a_run(path)
    if resume and args.output:
        raise ValueError(f"{path} is a run, which goes on in its own folder; leave --output out")
    recipe = _recipe(args)
    output = path if resume else args.output or pathlib.Path("runs") / path.stem
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    objective, data = recipe.problem()
    loop = Loop(objective, data, recipe.train, recipe.players, args.device)
    resolved = recipe.resolved(loop.settings())
    if args.dry_run:
        if args.json:
            print(_as_json(resolved, estimate(loop)))
        else:
            print(resolved.to_toml(), flush=True)  # before what takes its time
            print(_as_text(estimate(loop)))
        return 0
    outcome = training.run(loop, output, resolved.to_toml(), resume=resume, quiet=args.quiet)
    if loop.processes.main:
        report = {"output": str(output), **dataclasses.asdict(outcome)}
        print(json.dumps(report) if args.json else _told(output, outcome))
    return 130 if outcome.stopped else 0


def _recipe(args: argparse.Namespace) -> recipes.Recipe:
    overrides = list(args.set)
    given = {name: getattr(args, name) for name in ("steps", "threads")}
    overrides += [f"train.{name}={value}" for name, value in given.items() if value is not None]
    recipe = recipes.load(args.recipe, overrides)
    if args.data:
        return dataclasses.replace(recipe, data=recipes.folder_data(args.data, recipe.data))
    if "folder" not in recipe.data and hasattr(recipes.source(recipe.data), "suffixes"):
        raise ValueError(f"{args.recipe} trains on data of yours: give --data FOLDER")
    return recipe


def _told(output: pathlib.Path, outcome: training.Outcome) -> str:
    after = f"after step {outcome.steps}"
    if outcome.stopped:
        return f"Stopped and saved {after}; go on with `nystromgan train {output}`."
    return f"Trained; {after} the model is in {output / 'model'}: `nystromgan sample {output}`."


def _as_json(recipe: recipes.Recipe, found: Estimate) -> str:
    tables_of = {name: getattr(recipe, name) for name in recipes.TABLES} | {"train": tables.table(recipe.train)}
    return json.dumps({"recipe": tables_of, "estimate": dataclasses.asdict(found)}, indent=2, default=str)


def _as_text(found: Estimate) -> str:
    counts = "\n".join(f"# {name}: {count:,} parameters" for name, count in found.parameters.items())
    memory = (
        f"# weights {found.weights_bytes / 2**20:.1f} MiB, optimizers {found.optimizer_bytes / 2**20:.1f} MiB, "
        f"peak {found.peak_bytes / 2**20:,.0f} MiB"
    )
    time = f"# {found.step_s:.3g} s a step (one measured), {found.total_s / 3600:.3g} h for all steps"
    return f"{counts}\n{memory}\n{time}"
