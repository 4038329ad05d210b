"""Everything that the report shows, as numbers and images."""

import pathlib
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nystromgan
from nystromgan.zoo.demo import generated, measure, scene

SHARPNESS = (0.5, 1.0, 2.0, 4.0, 8.0)
MORE = (scene.Form("256 grid landmarks", 256), scene.Form("256 clustered landmarks", 256, 2))


class Outcome(NamedTuple):
    """What a run found."""

    scene: scene.Scene
    maps: dict[str, Tensor]  # form: the chosen voxel's weights, (T, H, W)
    results: dict[str, Any]  # what results.json holds
    comparison: generated.Comparison | None = None  # of the checkpoint that ships, where one does


def run(seed: int, quick: bool, progress: Callable[[str], None]) -> Outcome:
    place = scene.load(seed)
    progress("video read, features made")
    maps = {}
    for form in scene.FORMS:
        maps[form.name] = scene.attention_row(scene.block(form, seed, over=place.features), place.features, place.token)
        progress(f"where one voxel attends: {form.name}")
    curves = error_curves(place, SHARPNESS[:2] if quick else SHARPNESS, progress)
    rows = measure.times(measure.cases(quick), seed, progress)
    measure.add_memory(rows, seed, progress)
    comparison = None
    if generated.shipped():
        comparison = generated.compare(seed)
        progress(f"clips sampled from {generated.CHECKPOINT}, with exact attention and with landmarks")
    results = {
        "machine": machine(),
        "seed": seed,
        "quick": quick,
        "scene": {"grid": list(place.features.shape[2:]), "tokens": place.features[0, 0].numel(), "token": place.token},
        "rows": {name: _row_summary(row, maps["exact"]) for name, row in maps.items()},
        "error": curves,
        "measurements": rows,
        "generated": comparison.results if comparison else None,
    }
    return Outcome(place, maps, results, comparison)


def steps(quick: bool) -> int:
    """How often `run` reports progress, at most."""
    return 1 + generated.shipped() + len(scene.FORMS) + (2 if quick else len(SHARPNESS)) + 2 * len(measure.cases(quick))


def error_curves(
    place: scene.Scene, sharpnesses: tuple[float, ...], progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The error of every landmark form against exact attention, as attention gets sharper."""
    forms = (scene.GRID, scene.CLUSTERED, *MORE)
    points: dict[str, list[dict[str, float]]] = {form.name: [] for form in forms}
    for sharpness in sharpnesses:
        exact_block = scene.block(scene.EXACT, place.seed, sharpness, place.features)
        exact, value = scene.attended(exact_block, place.features), exact_block.value(place.features)
        for form in forms:
            module = scene.block(form, place.seed, sharpness, place.features)
            error = scene.error(scene.attended(module, place.features), exact, value)
            points[form.name].append({"sharpness": sharpness, "error": error})
        progress(f"error at sharpness {sharpness:g}")
    return [{"form": form.name, **form._asdict(), "points": points[form.name]} for form in forms]


def _row_summary(row: Tensor, exact: Tensor) -> dict[str, float]:
    """The sum of a voxel's weights, the least of them, and their correlation with the exact ones."""
    correlation = torch.corrcoef(torch.stack((row.flatten(), exact.flatten())))[0, 1]
    return {"sum": row.sum().item(), "least": row.min().item(), "correlation": correlation.item()}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    backends = nystromgan.available_backends()
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": "reference" if backends["cpu"] else "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: metadata.version(name) for name in ("nystromgan", "numpy", "matplotlib", "trackastra")},
        },
    }


def _cpu() -> str:
    """The processor's name as Linux gives it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
