"""Accuracy and time over the number and kind of landmarks, on features of a real video.

The video, its random features and the block are the demo's (`zoo/demo/scene.py`): N = 12,288 tokens, D = 8, E = 64,
keys made as queries are. Error: |landmark - exact| / |exact - mean of values|, the median and range of three random
networks.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nystromgan.bench import clock, measure
from nystromgan.bench.plan import Effort
from nystromgan.nn import SelfAttention3d

KINDS = {"segment": ("segment", 0), "grid": ("grid", 0), "random": ("random", 0), "clustered": ("grid", 2)}
EXACT = "exact"
SHARPNESS = (1.0, 2.0)  # the standard deviation of the logits
SEEDS = (0, 1, 2)


def counts(full: bool) -> tuple[int, ...]:
    return (16, 64, 256, 512) if full else (16, 64)


def count(full: bool) -> int:
    """How often `rows` reports progress."""
    return len(SEEDS) * len(SHARPNESS) + 1


def rows(full: bool, device: str, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a kind and number of landmarks: errors by sharpness, and the time of the block's forward."""
    from nystromgan.zoo.demo import scene  # here, because it wants the video's reader

    found: dict[tuple[str, int], dict[float, list[float]]] = {}
    features = {seed: scene.load(seed).features.to(device) for seed in SEEDS}
    for sharpness in SHARPNESS:
        for seed in SEEDS:
            block = scene.block(scene.EXACT, seed, sharpness, features[seed].cpu()).to(device)
            exact, value = scene.attended(block, features[seed]), block.value(features[seed])
            for key, module in _modules(block, full):
                error = scene.error(scene.attended(module, features[seed]), exact, value)
                found.setdefault(key, {}).setdefault(sharpness, []).append(error)
            progress(f"landmarks, sharpness {sharpness:g}, network {seed}")
    progress("landmarks, time")
    times = _times(scene.block(scene.EXACT, 0).to(device), features[0], full)
    return [
        {"kind": kind, "landmarks": number, "errors": _spread(found.get((kind, number), {})), **times[kind, number]}
        for kind, number in times
    ]


def _modules(exact: SelfAttention3d, full: bool) -> Iterator[tuple[tuple[str, int], SelfAttention3d]]:
    """The block with every kind and number of landmarks, with the exact block's weights."""
    for kind, (landmarks, iterations) in KINDS.items():
        for number in counts(full):
            torch.manual_seed(number)  # random landmarks' draw
            module = SelfAttention3d(
                exact.channels, num_landmarks=number, landmarks=landmarks, cluster_iterations=iterations,
                scale=exact.scale, bias=False, device=exact.gamma.device,
            )  # fmt: skip
            module.load_state_dict(exact.state_dict(), strict=False)
            yield (kind, number), module.requires_grad_(False).eval()


def _times(exact: SelfAttention3d, features: Tensor, full: bool) -> dict[tuple[str, int], dict[str, Any]]:
    """Median and quartiles of each block's forward, interleaved."""
    modules = {(EXACT, 0): exact, **dict(_modules(exact, full))}
    calls = {" ".join(map(str, key)): [lambda module=module: module(features)] for key, module in modules.items()}
    effort, timer, repeats = Effort(4.0 if full else 1.0, 3, 9), clock.CLOCKS[features.device.type], {}
    with torch.no_grad():
        for name, several in calls.items():
            clock.warm(several)
            repeats[name] = clock.repeats(timer, several)
        samples = measure.interleaved(calls, repeats, timer, effort, every=True)
    return {key: measure.summary([samples[" ".join(map(str, key))]]) for key in modules}


def _spread(errors: dict[float, list[float]]) -> dict[str, dict[str, float]]:
    """Median, least and most by sharpness."""
    return {
        f"{sharpness:g}": {"median": statistics.median(values), "low": min(values), "high": max(values)}
        for sharpness, values in errors.items()
    }
