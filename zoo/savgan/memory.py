"""Peak memory of a training step by attention and clip: python -m nystromgan.zoo.savgan.memory.

Each case is a fresh process that takes one turn: the generator's, forward and backward through generator and critics,
or with `--player discriminators` the critics', with their penalties. It reports the most resident memory during it less
what was resident before. "written out" is exact attention as PyTorch writes it, with the N x N matrix; the others never
have one. Linux, CPU.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import torch

from nystromgan.nn import SelfAttention3d
from nystromgan.zoo import cli
from nystromgan.zoo.savgan.model import SAVGAN, SAVGANConfig
from nystromgan.zoo.savgan.objective import SAVGANObjective
from nystromgan.zoo.training.contract import Stage, Step

KINDS = ("none", "nystrom", "exact", "written out")
STATUS = pathlib.Path("/proc/self/status")
GIB = 2**30
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # large blocks go back to the system when they are freed


class Case(NamedTuple):
    """A kind of attention, clips of (frames, size, size), and whose turn it is."""

    kind: str
    frames: int
    size: int
    batch: int
    player: str = "generator"


def turn(case: Case) -> None:
    """One turn of the case's player."""
    attention = "exact" if case.kind == "written out" else case.kind
    config = SAVGANConfig(frames=case.frames, size=case.size, attention=attention)  # type: ignore[arg-type]
    objective = SAVGANObjective(SAVGAN(config))
    if case.kind == "written out":
        for module in objective.model.modules():
            if isinstance(module, SelfAttention3d):
                module.backend = "reference"
    for name, player in objective.players.items():
        for parameter in player.parameters():
            parameter.requires_grad_(name == case.player)
    batch = torch.zeros(case.batch, 1, case.frames, case.size, case.size)
    objective.loss(case.player, batch, Step(0, Stage(), torch.Generator().manual_seed(0)))[0].backward()


def resident(field: str) -> int:
    """VmRSS, resident bytes now, or VmHWM, the most since the last reset."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def peak_bytes(case: Case) -> int:
    """Of one turn, in this process, after a small one that loads what a first turn loads."""
    turn(case._replace(frames=16, size=32, batch=1))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    turn(case)
    return resident("VmHWM") - before


def measured(case: Case) -> int | None:
    """`peak_bytes` in a fresh process; None where the process ends early, as it does without memory."""
    command = [sys.executable, "-m", "nystromgan.zoo.savgan.memory", "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    if done.returncode > 0 and "allocate memory" not in done.stderr:
        raise RuntimeError(f"{case} failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nystromgan.zoo.savgan.memory", description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="H and W of clips of 32 frames")
    parser.add_argument("--player", default="generator", choices=("generator", "discriminators"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(peak_bytes(Case(*json.loads(options.case))))
        return
    print("| attention | clip | batch | peak |\n|---|---|---|---|")
    for size in options.sizes:
        for kind in options.kinds:
            found = measured(Case(kind, 32, size, options.batch, options.player))
            peak = "does not fit" if found is None else f"{found / GIB:.2f} GiB"
            print(f"| {kind} | 32 x {size} x {size} | {options.batch} | {peak} |", flush=True)


if __name__ == "__main__":
    cli.run_module("nystromgan.zoo.savgan.memory", main)
