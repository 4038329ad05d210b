"""`nystromgan evaluate NAME`: metrics of a model's first 10 frames, with the real data's own values beside them."""

import argparse
import json
import pathlib
from typing import Any

import torch
from torch import Tensor

from nystromgan.zoo import checkpoints, recipes, storage
from nystromgan.zoo import config as tables
from nystromgan.zoo.metrics import fid, i3d
from nystromgan.zoo.metrics.flips import WINDOW
from nystromgan.zoo.metrics.report import Row, video_metrics
from nystromgan.zoo.progress import Progress
from nystromgan.zoo.training.contract import Data

BATCH = 16
LEAST = 10  # clips: the intervals leave out one of ten splits at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a checkpoint's name, folder or file, or a run's folder")
    parser.add_argument("--recipe", help="whose [data] are the real ones (the one beside the checkpoint)")
    parser.add_argument("--data", type=pathlib.Path, help="folder of TIFF stacks or videos that are the real ones")
    parser.add_argument("-n", type=int, default=256, help="clips of the model and of the data (256); at least 10")
    parser.add_argument("--seed", type=int, default=0, help="of the latents (0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--i3d-weights", type=pathlib.Path, help="I3D as safetensors: adds FVD")
    parser.add_argument("--inception-weights", type=pathlib.Path, help="Inception, torch-fidelity's: adds FID and KID")
    parser.add_argument("--output", type=pathlib.Path, help="also write the JSON object to this file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="changes the configuration: attention=exact"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.n < LEAST:
        raise ValueError(f"n must be at least {LEAST}, got {args.n}")
    tables.seed(args.seed + args.n)
    if args.i3d_weights:
        i3d.load_i3d(args.i3d_weights)  # an unfit file is better known now than after all sampling
    if args.inception_weights:
        fid.inception(args.inception_weights)
    overrides = {keys[0]: value for keys, value in map(tables.parse_override, args.set)}
    model: Any = checkpoints.load_checkpoint(args.name, tables.device(args.device), **overrides)
    source = _source(args)
    data = recipes.open_data(source)
    recipes.check_shape(data, model.config)
    if len(data) < 2 * args.n:
        raise ValueError(
            f"the data must have 2 n clips, half of them beside the other half, got {len(data)} and n {args.n}"
        )
    real, other = _clips(data, 0, args.n), _clips(data, args.n, args.n)
    fake = _samples(model, args.n, args.seed)
    digits = source["source"] == "moving_mnist" and source.get("num_digits", 1) == 1
    weights = {"i3d_weights": args.i3d_weights, "inception_weights": args.inception_weights}
    rows = video_metrics(fake, real, other, digits=digits, **weights)
    frames = min(WINDOW, fake.shape[2])
    report = {
        "checkpoint": args.name, "n": args.n, "frames": frames, "seed": args.seed, "data": source,
        "metrics": _tables(rows),
    }  # fmt: skip
    if args.output:
        storage.write(args.output, (json.dumps(report, indent=1, default=str) + "\n").encode())
    print(json.dumps(report, indent=2, default=str) if args.json else _as_text(rows, args.n, frames))
    return 0


def _source(args: argparse.Namespace) -> dict[str, Any]:
    """The [data] table of 2 n real clips, of the test split, where the source has these options."""
    table = recipes.load(args.recipe or _beside(args.name)).data
    if args.data:
        table = recipes.folder_data(args.data, table)
    known, wanted = tables.defaults(recipes.source(table)), {"split": "test", "length": 2 * args.n}
    return {**table, **{name: value for name, value in wanted.items() if name in known}}


def _beside(name: str) -> pathlib.Path:
    """The folder of a checkpoint, where its recipe is."""
    folder = pathlib.Path(checkpoints.describe(name)["path"]).parent
    if not (folder / "recipe.toml").is_file():
        raise FileNotFoundError(f"there is no recipe beside {name}: give --recipe, whose [data] are the real clips")
    return folder


def _clips(data: Data, start: int, n: int) -> Tensor:
    """(n, C, T, H, W): the data's clips from `start` on."""
    progress = Progress(n)
    clips = []
    for index in range(n):
        clips.append(data[start + index])
        progress.update(index + 1, "real clips")
    return torch.stack(clips)


def _samples(model: Any, n: int, seed: int) -> Tensor:
    """(n, C, T, H, W) on the CPU, in batches."""
    progress = Progress(n)
    parts = []
    for start in range(0, n, BATCH):
        with torch.no_grad():
            parts.append(model.sample(min(BATCH, n - start), seed=seed + start).float().cpu())
        progress.update(min(start + BATCH, n), "samples")
    return torch.cat(parts)


def _tables(rows: list[Row]) -> list[dict[str, Any]]:
    return [
        {"metric": row.metric, "better": row.better, "model": row.model._asdict(), "real": row.real._asdict()}
        for row in rows
    ]


def _as_text(rows: list[Row], n: int, frames: int) -> str:
    lines = [f"the first {frames} frames of {n} clips", f"{'metric':<14}{'better':<8}{'model':<24}{'real data':<24}"]
    lines += [f"{row.metric:<14}{row.better:<8}{row.model!s:<24}{row.real!s:<24}" for row in rows]
    return "\n".join(lines)
