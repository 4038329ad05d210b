"""What the numbers say, in words; every sentence is made from the run's own results."""

from typing import Any

from nystromgan.zoo.demo import measure, scene

EXACT_FORMS = ("exact", measure.TORCH)
FORWARD, TRAINING = measure.MODES


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(value_ms: float) -> str:
    return f"{number(value_ms / 1e3)} s" if value_ms >= 1e3 else f"{number(value_ms)} ms"


def headlines(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The page's tiles: (value, meaning)."""
    tokens = _largest_common(results, TRAINING)
    exact, clustered = _best_exact(results, TRAINING, tokens), _find(results, TRAINING, scene.CLUSTERED.name, tokens)
    largest = max(row["tokens"] for row in results["measurements"] if row["form"] == scene.CLUSTERED.name)
    far = _find(results, TRAINING, scene.CLUSTERED.name, largest)
    return [
        (f"{number(exact['median_ms'] / clustered['median_ms'])} ×", f"less time for forward + backward at {tokens:,} "
         f"tokens: clustered landmarks {duration(clustered['median_ms'])}, the faster exact form "
         f"{duration(exact['median_ms'])}"),
        (duration(far["median_ms"]), f"for forward + backward of {largest:,} tokens with clustered landmarks, in "
         f"{number(far['peak_bytes'] / 2**20)} MiB"),
        (f"{_error_at(results, scene.CLUSTERED.name, 1.0):.2f}", "error of 64 clustered landmarks on the cells below "
         "(0 is exact, 1 no better than a plain mean)"),
        (f"{_error_at(results, scene.GRID.name, 1.0):.2f}", "error of 64 grid landmarks, the usual choice: clustering "
         "is what makes landmarks faithful here"),
    ]  # fmt: skip


def attention_sentence(results: dict[str, Any]) -> str:
    grid, clustered = (results["rows"][form.name]["correlation"] for form in (scene.GRID, scene.CLUSTERED))
    comparison = "comes closer" if clustered > grid else "comes no closer here"
    return (
        "In the fourth frame a nucleus has drawn itself into a bright plate; in the fifth it has split in two. We ask "
        "one voxel of the plate how much weight it gives to every voxel of all eight frames. Exact attention looks for "
        "voxels like it, wherever and whenever they are. A landmark that is the mean of a block mixes nucleus and "
        f"background, and detail is lost: the map correlates {grid:.2f} with the exact one. After two steps of "
        "clustering, a landmark gathers voxels that are alike, from anywhere in the video: the map "
        f"{comparison}, with {clustered:.2f}."
    )


def generated_sentence(found: dict[str, Any]) -> str:
    trained, exact = found["times_ms"].values()
    blocks = " and ".join(
        f"{count} of {tokens:,} tokens" for count, tokens in zip(found["landmarks"], found["tokens"], strict=True)
    )
    gammas = " and ".join(f"{gamma:.3f}" for gamma in found["gammas"])
    return (
        f"The checkpoint {found['checkpoint']} ({found['parameters']:,} parameters), which this repository trained "
        f"with landmarks ({blocks}), turns the same four latents into clips twice: as it was trained, and with exact "
        f"attention on the same weights. The clips differ by {found['change']:.2g} (root mean square; the standard "
        f"deviation of the pixels is {found['contrast']:.2g}), while leaving attention out changes them by "
        f"{found['attention']:.2g}: its weights gamma came to {gammas} in training. Sampling took {duration(trained)} "
        f"with landmarks and {duration(exact)} exactly."
    )


def row_caption(form: str, results: dict[str, Any]) -> str:
    row = results["rows"][form]
    if form == "exact":
        return "the weights sum to 1"
    lowest = f"{row['least']:.0e}".replace("-", "−")
    return f"correlation with exact {row['correlation']:.2f}, sum {row['sum']:.3f}, lowest weight {lowest}"


def error_sentence(results: dict[str, Any]) -> str:
    grid, clustered = (_error_at(results, form.name, 1.0) for form in (scene.GRID, scene.CLUSTERED))
    widest = _widest(results)
    return (
        f"At the sharpness of the maps above, 64 clustered landmarks are {grid / clustered:.1f} times closer to exact "
        f"attention than 64 block means ({clustered:.2f} against {grid:.2f}). When logits spread wider, a voxel "
        f"attends to fewer others, and landmarks have more to describe: at {widest:g}, the widest here, the error of "
        f"64 clustered landmarks is {_error_at(results, scene.CLUSTERED.name, widest):.2f}, of 256 "
        f"{_error_at(results, '256 clustered landmarks', widest):.2f}."
    )


def growth_sentence(results: dict[str, Any]) -> str:
    tokens = _largest_common(results, FORWARD)
    exact = _best_exact(results, FORWARD, tokens)
    grid, clustered = (_find(results, FORWARD, form.name, tokens) for form in (scene.GRID, scene.CLUSTERED))
    return (
        "Twice the tokens cost exact attention four times the time, and landmarks about twice. At "
        f"{tokens:,} tokens, the most that exact attention was run with, a forward takes "
        f"{duration(exact['median_ms'])} in the faster exact form, "
        f"{duration(clustered['median_ms'])} with clustered landmarks and {duration(grid['median_ms'])} with grid "
        "landmarks. Exact attention that never stores the N × N weights (torch's fused one, and ours on the cpu "
        "backend) needs as little memory as landmarks or less: what it costs is time."
    )


def advice(results: dict[str, Any]) -> list[str]:
    """The cases for exact attention."""
    widest = _widest(results)
    grid, clustered = (_error_at(results, form.name, widest) for form in (scene.GRID, scene.CLUSTERED))
    return [
        f"<b>Small inputs.</b> {_crossover(results, FORWARD)} {_crossover(results, TRAINING)}",
        "<b>Sharp attention.</b> The fewer voxels one attends to, the more landmarks lose. At sharpness "
        f"{widest:g}, 64 clustered landmarks are off by {clustered:.2f} and 64 grid landmarks by {grid:.2f}: there, "
        "use exact attention or more landmarks, and check.",
        "<b>When the weights themselves matter,</b> for example as an explanation: landmark weights can be below 0 "
        "and need not sum to 1.",
        "The block takes the same weights either way: <code>num_landmarks=None</code> is exact, so one can train with "
        "landmarks and check a checkpoint against exact attention in one call.",
    ]


def _crossover(results: dict[str, Any], mode: str) -> str:
    """Up to how many tokens the faster exact form is as fast as clustered landmarks."""
    faster = [
        tokens
        for tokens in sorted({row["tokens"] for row in results["measurements"]})
        if (exact := _best_exact(results, mode, tokens))
        and exact["median_ms"] <= _find(results, mode, scene.CLUSTERED.name, tokens)["median_ms"]
    ]
    if faster:
        return (
            f"For {mode}, exact attention was as fast as clustered landmarks, or faster, up to {max(faster):,} tokens."
        )
    smallest = min(row["tokens"] for row in results["measurements"])
    return f"For {mode}, clustered landmarks were the faster at every size measured, from {smallest:,} tokens on."


def _widest(results: dict[str, Any]) -> float:
    """The largest sharpness that was tried."""
    return max(point["sharpness"] for point in results["error"][0]["points"])


def _find(results: dict[str, Any], mode: str, form: str, tokens: int) -> dict[str, Any]:
    (row,) = [r for r in results["measurements"] if (r["mode"], r["form"], r["tokens"]) == (mode, form, tokens)]
    return row


def _best_exact(results: dict[str, Any], mode: str, tokens: int) -> dict[str, Any]:
    """The faster exact form's row; empty where neither was run."""
    rows = [_find(results, mode, form, tokens) for form in EXACT_FORMS]
    return min((row for row in rows if "not_run" not in row), key=lambda row: row["median_ms"], default={})


def _largest_common(results: dict[str, Any], mode: str) -> int:
    """The most tokens at which an exact form was run."""
    return max(
        row["tokens"]
        for row in results["measurements"]
        if row["mode"] == mode and row["form"] in EXACT_FORMS and "not_run" not in row
    )


def _error_at(results: dict[str, Any], form: str, sharpness: float) -> float:
    (curve,) = [curve for curve in results["error"] if curve["form"] == form]
    (point,) = [point for point in curve["points"] if point["sharpness"] == sharpness]
    return point["error"]
