"""Clips of the checkpoint that ships, with exact attention and with landmarks: the same weights, the same latents."""

import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nystromgan.zoo import checkpoints, registry

CHECKPOINT = "savgan-mmnist"
CLIPS = 4
REPEATS = 3
FORMS: dict[str, dict[str, Any]] = {"landmarks, as trained": {}, "exact": {"attention": "exact"}}


class Comparison(NamedTuple):
    """What the forms gave.

    Attributes:
        clips: form: (CLIPS, C, T, H, W) in [-1, 1].
        results: "times_ms" of each form; "change", the root mean square of landmarks' clips less the exact ones';
            "attention", of the exact ones less those without attention (gamma 0); "gammas"; "landmarks"; "tokens".
    """

    clips: dict[str, Tensor]
    results: dict[str, Any]


def shipped() -> bool:
    return CHECKPOINT in checkpoints.list_checkpoints()


def compare(seed: int, name: str = CHECKPOINT) -> Comparison:
    """Samples a SAVGAN's clips in each form and says how far apart they are."""
    clips, times = {}, {}
    for form, changes in FORMS.items():
        model: Any = checkpoints.load_checkpoint(name, **changes)
        clips[form], times[form] = _timed(model, seed)
    gammas = [gamma.item() for gamma in model.gammas()]
    with torch.no_grad():
        for gamma in model.gammas():
            gamma.zero_()
    without = model.sample(CLIPS, seed=seed)
    trained, exact = clips.values()
    config = checkpoints.describe(name)["config"]
    positions = config["frames"] * config["size"] ** 2
    results = {
        "checkpoint": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "paper": registry.name_of_paper(model),
        "times_ms": times,
        "change": _rms(trained - exact),
        "attention": _rms(exact - without),
        "contrast": exact.std().item(),
        "gammas": gammas,
        "landmarks": config["num_landmarks"],
        "tokens": [positions // 64, positions // 8],
    }
    return Comparison(clips, results)


def _timed(model: Any, seed: int) -> tuple[Tensor, float]:
    """The clips, and the median milliseconds of a few calls after a first."""
    clips = model.sample(CLIPS, seed=seed)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        model.sample(CLIPS, seed=seed)
        times.append(1e3 * (time.perf_counter() - start))
    return clips, statistics.median(times)


def _rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()
