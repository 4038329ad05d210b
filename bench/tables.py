"""What the results say: ratios against the best peer, crossovers, targets, and the README's table."""

import json
import pathlib
from typing import Any, NamedTuple

from nystromgan.bench.cases import FULL, MODES, OURS, PLAIN

Row = dict[str, Any]
LABELS = {  # rows of the README's table, by group
    "landmarks": "{N:,} tokens of 8 heads of 64, 64 landmarks",
    "maps": "exact attention of {side} x {side} maps, {C} and {E} channels",
    "spectral norm": "spectral norm of {layers} layers",
}
NOISY = 0.1  # a ratio whose quartiles are further apart than this share of it


class Result(NamedTuple):
    """Ours and the best other form of one case in one mode."""

    ours: Row
    peer: Row

    @property
    def ratio(self) -> float:
        return self.peer["ratio"]

    @property
    def noisy(self) -> bool:
        return self.peer["ratio_high"] - self.peer["ratio_low"] > NOISY * self.ratio


class Target(NamedTuple):
    """A promise: the least ratio of the best peer's time to ours, or the most of ours to the floor."""

    group: str
    dtype: str | None
    mode: str | None
    least: float
    tokens: int | None = None
    against: str | None = None  # a form by name; the best peer without one


TARGETS = [
    *(
        Target("landmarks", dtype, mode, least, tokens)
        for tokens in (16384, 65536)
        for dtype, mode, least in (
            ("fp32", MODES[0], 1.8),
            ("bf16", MODES[0], 1.5),
            ("fp32", MODES[1], 2.0),
            ("bf16", MODES[1], 1.5),
        )
    ),
    *(Target("landmarks", dtype, MODES[1], 1.0, tokens, FULL) for tokens in (512, 1024) for dtype in ("fp32", "bf16")),
    Target("savgan", None, None, 2.0),
    Target("clustered", None, MODES[0], 1 / 2.5, against=PLAIN),
    Target("clustered", None, MODES[1], 1 / 1.6, against=PLAIN),
    Target("maps", None, None, 1.3),
    Target("spectral norm", None, None, 2.5),
]


def load(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The records of one machine by op."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def rows_of(records: dict[str, dict[str, Any]]) -> list[Row]:
    return [row for record in records.values() for row in record["rows"]]


def results(rows: list[Row], against: str | None = None) -> list[Result]:
    """One result a case and mode: ours beside the fastest peer that computes the same, or beside the form named."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["case"], row["mode"]), []).append(row)
    pairs = []
    for group in found.values():
        timed = [row for row in group if "ratio" in row]
        ours = [row for row in timed if row["form"] == OURS]
        allowed = [
            row for row in timed if row["form"] == against or (against is None and row["form"] not in (OURS, FULL))
        ]
        if ours and allowed:
            pairs.append(Result(ours[0], min(allowed, key=lambda row: row["ratio"])))
    return pairs


def crossovers(rows: list[Row]) -> list[tuple[str, str, int | None]]:
    """(dtype, mode, fewest tokens from which on ours is faster than torch's fused full attention)."""
    found = []
    for dtype in ("fp32", "bf16"):
        for mode in MODES:
            ratios = {
                pair.ours["N"]: pair.ratio
                for pair in results([r for r in rows if r["group"] == "landmarks"], FULL)
                if (pair.ours["dtype"], pair.ours["mode"]) == (dtype, mode)
            }
            losing = [tokens for tokens, ratio in ratios.items() if ratio <= 1]
            winning = [tokens for tokens in sorted(ratios) if tokens > max(losing, default=0)]
            found.append((dtype, mode, winning[0] if winning else None))
    return found


def held(target: Target, rows: list[Row]) -> list[tuple[Result, bool]]:
    """The results that a target speaks of, and whether each holds it."""

    def fits(row: Row) -> bool:
        return (
            row["group"] == target.group
            and target.dtype in (None, row["dtype"])
            and target.mode in (None, row["mode"])
            and target.tokens in (None, row.get("N"))
        )

    return [(pair, pair.ratio >= target.least) for pair in results([r for r in rows if fits(r)], target.against)]


def mib(row: Row) -> str:
    peak = row.get("peak_bytes")
    return "–" if peak is None else f"{peak / 2**20:,.0f}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def headline(records: dict[str, dict[str, Any]]) -> str:
    """The README's table, in Markdown: each op at the sizes that matter, beside the best other form."""
    lines = ["| float32 | nystromgan | best other form | ratio |", "|---|---|---|---|"]
    for ours, peer in results(rows_of(records)):
        if ours["dtype"] == "fp32" and ours["group"] in LABELS and ours.get("N", 16384) >= 16384:
            label = LABELS[ours["group"]].format(**ours)
            lines.append(
                f"| {label}, {ours['mode'].replace('+', ' + ')} | {number(ours['median_ms'])} ms | "
                f"{number(peer['median_ms'])} ms, {peer['form']} | {peer['ratio']:.1f} |"
            )
    where = next(iter(records.values()))["machine"]
    note = f"Medians on `{where['name']}`, torch {where['versions']['torch']}, by `nystromgan bench --full`;"
    return "\n".join([*lines, "", f"{note} [how, and the rest](docs/benchmarks.md)."])
