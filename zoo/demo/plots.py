"""Pictures of the report: heat maps as PNG, plots as SVG in the page's own text colour."""

import io
import re
from typing import Any

import matplotlib
import numpy
from matplotlib import colormaps, image, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nystromgan.zoo.demo import experiment, measure

# Legible on white and on black; exact forms are cold, landmark forms warm.
COLORS = dict(zip(measure.FORMS, ("#3b82f6", "#0d9488", "#e08a00", "#d6409f"), strict=True))
MARKERS = dict(zip(measure.FORMS, "osD^", strict=True))
INK = "#010203"  # replaced by the page's text colour
HEAT = "inferno"


def png(values: Tensor, vmax: float, cmap: str = "gray", zoom: int = 1) -> bytes:
    """An image (rows, columns) with 0 dark and `vmax` bright, each value `zoom` pixels wide."""
    pixels = colormaps[cmap]((values / vmax).clamp(0, 1).numpy())[..., :3]
    pixels = numpy.kron(pixels, numpy.ones((zoom, zoom, 1)))
    stream = io.BytesIO()
    image.imsave(stream, numpy.ascontiguousarray(pixels))
    return stream.getvalue()


def growth(ax: Axes, rows: list[dict[str, Any]], mode: str, field: str) -> None:
    """Time (field "median_ms", with least and most) or memory ("peak_bytes") over tokens, both axes logarithmic."""
    for form, color in COLORS.items():
        points = [row for row in rows if row["mode"] == mode and row["form"] == form and field in row]
        unit = 2**20 if field == "peak_bytes" else 1
        tokens = [row["tokens"] for row in points]
        values = [row[field] / unit for row in points]
        ax.plot(tokens, values, color=color, marker=MARKERS[form], markersize=4.5, linewidth=1.8, label=form)
        if field == "median_ms":
            ax.fill_between(
                tokens, [r["min_ms"] for r in points], [r["max_ms"] for r in points], color=color, alpha=0.2
            )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
    ax.set_xlabel("tokens (voxels of the feature map)")
    ax.set_ylabel("MiB" if field == "peak_bytes" else "ms")
    ax.yaxis.set_major_locator(ticker.LogLocator(10, subs=(1, 3), numticks=12))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    ax.yaxis.set_minor_locator(ticker.NullLocator())


def sharpness(ax: Axes, curves: list[dict[str, Any]]) -> None:
    """Error against exact attention over the logits' standard deviation; one curve a form."""
    styles = {64: "-", 256: (0, (4, 2))}
    colors = {0: COLORS["64 grid landmarks"], 2: COLORS["64 clustered landmarks"]}
    for curve in curves:
        ax.plot(
            [point["sharpness"] for point in curve["points"]],
            [point["error"] for point in curve["points"]],
            color=colors[curve["cluster_iterations"]],
            linestyle=styles[curve["num_landmarks"]],
            marker="o",
            markersize=4,
            linewidth=1.8,
            label=curve["form"],
        )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylim(0, None)
    ax.set_xlabel("sharpness (standard deviation of the logits)")
    ax.set_ylabel("error against exact")


def figure(draw: Any, *args: Any, legend: bool = False) -> str:
    """An SVG of one plot, its text and axes in the page's colour."""
    with matplotlib.rc_context(_style(INK)):
        fig = Figure(figsize=(4.6, 3.2), layout="constrained")
        ax = fig.subplots()
        draw(ax, *args)
        if legend:
            ax.legend(loc="upper left", frameon=False, fontsize=8.5)
        stream = io.StringIO()
        fig.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)


def _style(ink: str) -> Any:
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    return {
        **dict.fromkeys(names, ink),
        "font.size": 9.5,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "nystromgan",
    }


def picture(outcome: experiment.Outcome) -> bytes:
    """The README's picture: where one voxel attends, in each form, beside time and memory."""
    place, maps, rows = outcome.scene, outcome.maps, outcome.results["measurements"]
    frames, token = place.frames, place.token
    with matplotlib.rc_context(_style("#24292f")):
        fig = Figure(figsize=(13, 4.0), layout="constrained", facecolor="white")
        halves: Any = fig.subfigures(1, 2, width_ratios=(1.75, 1))
        left, right = halves
        shown = (0, 2, 3, 4, 5, 6)
        names = ("video", *maps)
        axes = left.subplots(len(names), len(shown), gridspec_kw={"wspace": 0.02, "hspace": 0.02})
        vmax = heat_scale(maps)
        for ax_row, name in zip(axes, names, strict=True):
            for ax, frame in zip(ax_row, shown, strict=True):
                values, top, cmap = (frames, 1.0, "gray") if name == "video" else (maps[name], vmax, HEAT)
                ax.imshow(values[frame].numpy(), vmin=0, vmax=top, cmap=cmap)
                ax.set_xticks([])
                ax.set_yticks([])
                ax.grid(visible=False)
                if frame == token[0]:
                    _ring(ax, token, values.shape[1] // maps["exact"].shape[1])
            ax_row[0].set_ylabel(name.replace(" landmarks", "\nlandmarks"), rotation=0, ha="right", va="center")
        left.suptitle("where the circled voxel of a dividing nucleus attends", fontsize=11)
        time_ax, memory_ax = right.subplots(2, 1)
        for ax, field, title in ((time_ax, "median_ms", "time"), (memory_ax, "peak_bytes", "peak memory")):
            growth(ax, rows, measure.MODES[1], field)
            ax.set_title(f"{title}, {measure.MODES[1]}", fontsize=10)
        time_ax.set_xlabel("")
        right.legend(
            *time_ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8
        )
        stream = io.BytesIO()
        fig.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def heat_scale(maps: dict[str, Tensor]) -> float:
    """The top of every heat map's scale: all but a thousandth of the exact weights."""
    return maps["exact"].flatten().quantile(0.999).item()


def _ring(ax: Axes, token: tuple[int, int, int], zoom: int) -> None:
    column, row = (token[2] + 0.5) * zoom - 0.5, (token[1] + 0.5) * zoom - 0.5
    ax.plot(column, row, "o", markersize=11, markerfacecolor="none", markeredgecolor="#22d3ee", markeredgewidth=1.6)
