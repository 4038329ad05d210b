"""Plots of the report as SVG in the page's own text colour."""

import html
import io
import re
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure

from nystromgan.bench.cases import COMPILED, FULL, OURS

INK = "#010203"  # replaced by the page's text colour
# Legible on white and on black; ours is warm, exact attention grey-blue.
COLORS = {
    OURS: "#d6409f",
    FULL: "#6b7f99",
    "two SDPA calls": "#3b82f6",
    "eager, F (Z (G V))": "#0d9488",
    "eager, (F Z) (G V)": "#7c9a00",
    "nystrom-attention": "#e08a00",
}


def growth(rows: list[dict[str, Any]], mode: str, dtype: str, field: str) -> str:
    """Time or memory over tokens, both axes logarithmic, one line a form; nothing where there is nothing to draw."""
    rows = [row for row in rows if (row["group"], row["mode"], row["dtype"]) == ("landmarks", mode, dtype)]
    if not any(row.get(field) for row in rows):
        return ""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 10}):
        figure = Figure(figsize=(4.6, 3.3), layout="constrained")
        ax = figure.subplots()
        for form, color in COLORS.items():
            for suffix, style in (("", "-"), (COMPILED, "--")):
                points = [row for row in rows if row["form"] == form + suffix and row.get(field)]
                values = [row[field] / (2**20 if field == "peak_bytes" else 1) for row in points]
                ax.plot([row["N"] for row in points], values, style, color=color, marker="o", markersize=4)
        _decorate(ax, "MiB" if field == "peak_bytes" else "ms")
        return _svg(figure)


def _decorate(ax: Any, unit: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.set_xlabel("tokens")
    ax.set_ylabel(unit)
    ax.grid(alpha=0.25, color=INK)
    ax.tick_params(colors=INK)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(INK)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def _svg(figure: Figure) -> str:
    figure.patch.set_alpha(0)
    for ax in figure.axes:
        ax.patch.set_alpha(0)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return re.sub(INK, "currentColor", text[text.index("<svg") :], flags=re.IGNORECASE)


def legend(rows: list[dict[str, Any]]) -> str:
    shown = {row["form"] for row in rows if row["group"] == "landmarks"}
    items = [(form, color) for form, color in COLORS.items() if form in shown]
    compiled = " Dashed: the same under torch.compile." if any(form.endswith(COMPILED) for form in shown) else ""
    spans = "".join(f'<span><i style="background:{color}"></i>{html.escape(form)}</span>' for form, color in items)
    return f"<div class=legend>{spans}<span>{compiled}</span></div>"
