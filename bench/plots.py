"""Plots of the report: SVG in the page's own text colour, and PNG files for the Markdown."""

import hashlib
import html
import io
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nystromgan.bench.case import BOTH, COMPILED, FULL, OURS, TUNED
from nystromgan.bench.landmarks import EXACT, KINDS

Draw = Callable[[Any], None]
INK = "#010203"  # replaced by the page's text colour
GREY = "#6b7f99"
# Legible on white and on black; ours is warm, exact attention grey-blue.
COLORS = {
    OURS: "#d6409f",
    FULL: GREY,
    "two SDPA calls": "#3b82f6",
    "eager, F (Z (G V))": "#0d9488",
    "eager, (F Z) (G V)": "#7c9a00",
    "nystrom-attention": "#e08a00",
    "transformers": "#9b6bdf",
}
KIND_COLORS = dict(zip(KINDS, ("#7c9a00", "#3b82f6", "#e08a00", "#d6409f"), strict=True))


def family(form: str) -> str | None:
    """The colour's name of a form; None for forms that the plots leave out."""
    return next(
        (name for name in COLORS if form == name or form.startswith((name + ",", name + "'", name + " "))), None
    )


def growth(rows: Sequence[dict[str, Any]], mode: str, dtype: str, field: str) -> Draw | None:
    """Time or memory over tokens, both axes logarithmic, a line for the best of each family; None without values."""
    rows = [r for r in rows if (r["group"], r["mode"], r["dtype"]) == ("landmarks", mode, dtype) and r.get(field)]
    if not rows:
        return None

    def draw(ax: Any) -> None:
        for name, color in COLORS.items():
            for compiled in (False, True):
                best: dict[int, float] = {}
                for row in rows:
                    if family(row["form"]) == name and row["form"].endswith((COMPILED, TUNED)) == compiled:
                        best[row["N"]] = min(row[field], best.get(row["N"], math.inf))
                values = [value / (2**20 if field == "peak_bytes" else 1) for _, value in sorted(best.items())]
                ax.plot(sorted(best), values, "--" if compiled else "-", color=color, marker="o", markersize=4)
        _logarithmic(ax, "tokens", "MiB" if field == "peak_bytes" else "ms")

    return draw


def accuracy(rows: Sequence[dict[str, Any]], sharpness: str) -> Draw:
    """Error over the number of landmarks, a line and a range for each kind."""

    def draw(ax: Any) -> None:
        for kind, color in KIND_COLORS.items():
            points = [(row["landmarks"], row["errors"][sharpness]) for row in rows if row["kind"] == kind]
            counts = [count for count, _ in points]
            ax.plot(counts, [e["median"] for _, e in points], "-", color=color, marker="o", markersize=4)
            lows, highs = ([e[name] for _, e in points] for name in ("low", "high"))
            ax.fill_between(counts, lows, highs, color=color, alpha=0.15, linewidth=0)
        _logarithmic(ax, "landmarks", "error")

    return draw


def price(rows: Sequence[dict[str, Any]], sharpness: str) -> Draw:
    """Error over time, a line for each kind; the dashed line is the time of exact attention."""

    def draw(ax: Any) -> None:
        for kind, color in KIND_COLORS.items():
            points = [(r["median_ms"], r["errors"][sharpness]["median"]) for r in rows if r["kind"] == kind]
            ax.plot(*zip(*points, strict=True), "-", color=color, marker="o", markersize=4)
        for row in rows:
            if row["kind"] == EXACT:
                ax.axvline(row["median_ms"], color=GREY, linestyle="--")
        _logarithmic(ax, "ms, forward of the block", "error")

    return draw


def _logarithmic(ax: Any, across: str, up: str) -> None:
    tokens = across in ("tokens", "landmarks")
    ax.set_xscale("log", base=2 if tokens else 10)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 and tokens else f"{value:g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if tokens:
        ax.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        ax.xaxis.set_minor_formatter(_twos_and_fives)
    if ax.get_ylim()[1] > 30 * ax.get_ylim()[0]:
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    else:  # within one decade ten's powers alone would leave the axis bare
        ax.yaxis.set_minor_formatter(_twos_and_fives)
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    ax.grid(alpha=0.25, color=INK)
    ax.tick_params(which="both", colors=INK)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(INK)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def _twos_and_fives(value: float, _: int) -> str:
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _figure(draw: Draw) -> Figure:
    figure = Figure(figsize=(4.6, 3.3), layout="constrained")
    draw(figure.subplots())
    return figure


def svg(draw: Draw) -> str:
    """The drawing as an element of a page."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 10}):
        figure = _figure(draw)
        figure.patch.set_alpha(0)
        for ax in figure.axes:
            ax.patch.set_alpha(0)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return re.sub(INK, "currentColor", text[text.index("<svg") :], flags=re.IGNORECASE)


def png(draw: Draw, path: pathlib.Path) -> None:
    """The drawing as a file, on white."""
    with matplotlib.rc_context({"font.size": 10}):
        _figure(draw).savefig(path, dpi=160)


def headline(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """The README's plot: time and memory of both passes over tokens in float32; the file carries `fingerprint`."""
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(9.2, 3.8), layout="constrained")
        for ax, field in zip(figure.subplots(1, 2), ("median_ms", "peak_bytes"), strict=True):
            draw = growth(rows, BOTH, "fp32", field)
            if draw is not None:
                draw(ax)
        shown = {family(row["form"]) for row in _drawn(rows)}
        colors = {name: color for name, color in COLORS.items() if name in shown}
        lines = [Line2D([], [], color=color, marker="o", markersize=4) for color in colors.values()]
        figure.legend(lines, list(colors), loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=110, metadata={"Description": fingerprint(rows)})


def fingerprint(rows: Sequence[dict[str, Any]]) -> str:
    """A hash of what `headline` draws."""
    drawn = [[row["case"], row["form"], row["median_ms"], row.get("peak_bytes")] for row in _drawn(rows)]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def _drawn(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    wanted = [row for row in rows if (row["group"], row["mode"], row["dtype"]) == ("landmarks", BOTH, "fp32")]
    return [row for row in wanted if "median_ms" in row and family(row["form"])]


def legend(colors: dict[str, str], shown: set[str], note: str = "") -> str:
    spans = "".join(
        f'<span><i style="background:{color}"></i>{html.escape(name)}</span>'
        for name, color in colors.items()
        if name in shown
    )
    return f"<div class=legend>{spans}<span>{note}</span></div>"
