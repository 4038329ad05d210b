"""`nystromgan sample NAME`: draws from a trained model and writes a GIF, an MP4 or a sheet."""

import argparse
import json
import pathlib
from typing import Any

import torch

from nystromgan.zoo import checkpoints, media
from nystromgan.zoo import config as tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a checkpoint's name, folder or file, a run's folder, or hf://owner/name")
    parser.add_argument("--output", type=pathlib.Path, help=f"ends in {', '.join(media.WRITERS)} (out/NAME.gif)")
    parser.add_argument("-n", type=int, default=4, help="how many samples (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents (0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second of a GIF or MP4 (8)")
    parser.add_argument("--scale", type=int, default=2, help="enlarges every pixel (2)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="changes the configuration: attention=exact"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    for name in ("n", "scale", "fps"):
        if getattr(args, name) <= 0:
            raise ValueError(f"{name} must be above 0, got {getattr(args, name)}")
    tables.seed(args.seed)
    overrides = {keys[0]: value for keys, value in map(tables.parse_override, args.set)}
    model: Any = checkpoints.load_checkpoint(args.name, tables.device(args.device), **overrides)
    with torch.no_grad():
        samples = model.sample(args.n, seed=args.seed)
    still = samples.ndim == 4
    output = args.output or pathlib.Path("out") / f"{_stem(args.name)}{'.png' if still else '.gif'}"
    media.save(samples, output, args.fps, args.scale)
    report = {"output": str(output), "shape": list(samples.shape), "seed": args.seed}
    print(json.dumps(report) if args.json else f"{args.n} samples of {tuple(samples.shape[1:])} are in {output}")
    return 0


def _stem(name: str) -> str:
    """A file's name for what was sampled from a checkpoint, a path or an address."""
    return pathlib.PurePath(name.removeprefix(checkpoints.HUB)).name.removesuffix(".safetensors") or "samples"
