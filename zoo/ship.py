"""Makes a run's model a checkpoint that ships: python -m nystromgan.zoo.ship RUN NAME --notes FILE.

The folder zoo/checkpoints/NAME gets the model, the recipe that trained it, its curves, samples, metrics and a card.
"""

import argparse
import io
import itertools
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy
from matplotlib.figure import Figure

from nystromgan.zoo import checkpoints, cli, media, recipes, storage
from nystromgan.zoo.cli import evaluate
from nystromgan.zoo.metrics.estimate import Estimate

Log = Sequence[Mapping[str, float]]

MOST_BYTES = 16 * 10**6  # of a file
PAUSE = 10  # times the usual distance of two lines of the log: nothing was trained meanwhile
SHOWN = 6  # samples on the card
COLUMNS = 4


def ship(
    run: pathlib.Path, name: str, notes: str, n: int = 256, to: pathlib.Path = checkpoints.SHIPPED
) -> pathlib.Path:
    """Fills `to`/`name` from a run's folder and returns it; `notes` is the card's last section.

    Raises:
        FileNotFoundError: the run has no model or no log.
        ValueError: the weights take more than 16 MB.
    """
    model: Any = checkpoints.load_checkpoint(run)
    size = checkpoints.describe(run)["bytes"]
    if size > MOST_BYTES:
        raise ValueError(f"weights that ship must take at most {MOST_BYTES} bytes, got {size}")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    folder = checkpoints.save_checkpoint(model, to / name)
    storage.write(folder / "recipe.toml", recipes.find(run).read_bytes())
    storage.write(folder / "curves.png", curves(log))
    samples = model.sample(SHOWN, seed=0)
    media.save(samples, folder / "samples.png", scale=2)
    if samples.ndim == 5:
        media.save(samples, folder / "samples.gif", scale=3)
    metrics = _metrics(folder, n)
    storage.write(folder / "README.md", card(name, recipes.load(run), log, metrics, notes).encode())
    return folder


def card(name: str, recipe: recipes.Recipe, log: Log, metrics: dict[str, Any], notes: str) -> str:
    """The README of a checkpoint, in Markdown."""
    steps, batch = int(log[-1]["step"]), recipe.train.batch
    rows = [
        f"| {row['metric']} ({row['better']} is better) | {Estimate(**row['model'])} | {Estimate(**row['real'])} |"
        for row in metrics["metrics"]
    ]
    lines = [
        f"# {name}", "",
        f"`{recipe.model['preset']}`, trained for {steps:,} steps of {batch} samples, {hours(log):.1f} hours, with the "
        "recipe beside this card:", "",
        f"    nystromgan train recipe.toml --output runs/{name}",
        f"    nystromgan sample {name} -n {SHOWN} --seed 0 --output samples.gif", "",
        "![samples](samples.png)", "", "## Curves", "",
        "![curves](curves.png)", "", "## Metrics", "",
        f"`nystromgan evaluate {name} -n {metrics['n']}`: {metrics['n']} samples, {metrics['n']} real ones of the test "
        "split, with 95 % intervals.", "",
        "| metric | model | real data |", "|---|---|---|", *rows, "", "## Limits", "", notes.strip(), "",
    ]  # fmt: skip
    return "\n".join(lines)


def hours(log: Log) -> float:
    """How long a run trained, without its pauses."""
    distances = [later["time"] - sooner["time"] for sooner, later in itertools.pairwise(log)]
    usual = statistics.median(distances) if distances else 0.0
    trained = [distance for distance in distances if distance <= PAUSE * usual]
    return (sum(trained) + usual) / 3600


def curves(log: Log) -> bytes:
    """A PNG of every value in the log against the step."""
    names = [name for name in log[0] if name not in ("step", "time")]
    count = -(-len(names) // COLUMNS)
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(2.6 * COLUMNS, 1.9 * count), layout="constrained")
        axes = list(figure.subplots(count, COLUMNS, squeeze=False).flat)
        for name, ax in zip(names, axes, strict=False):
            values = [row[name] for row in log]
            ax.plot([row["step"] for row in log], values, linewidth=0.7)
            low, high = numpy.quantile(values, (0.02, 0.98))  # the first steps are far outside
            ax.set_ylim(low - 0.1 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9)
            ax.set_title(name)
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=100, metadata={"Software": None})
    return stream.getvalue()


def _metrics(folder: pathlib.Path, n: int) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    path = folder / "metrics.json"
    evaluate.run(parser.parse_args([str(folder), "-n", str(n), "--output", str(path)]))
    found = json.loads(path.read_text()) | {"checkpoint": folder.name}
    storage.write(path, (json.dumps(found, indent=1) + "\n").encode())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nystromgan.zoo.ship", description=__doc__)
    parser.add_argument("run", type=pathlib.Path, help="a run's folder")
    parser.add_argument("name", help="the checkpoint's")
    parser.add_argument("--notes", type=pathlib.Path, required=True, help="Markdown: what the model does not do")
    parser.add_argument("-n", type=int, default=256, help="samples for the metrics (256)")
    options = parser.parse_args(arguments)
    print(ship(options.run, options.name, options.notes.read_text(encoding="utf-8"), options.n))


if __name__ == "__main__":
    cli.run_module("nystromgan.zoo.ship", main)
