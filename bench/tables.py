"""What the results say: ratios against the best peer, crossovers, noise, and the README's table."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from nystromgan.bench import store
from nystromgan.bench.case import BY, COMPILED, FULL, OURS, PASSES, TUNED

Row = dict[str, Any]
LABELS = {  # rows of the README's table, by group
    "landmarks": "{N:,} tokens of 8 heads of 64, 64 landmarks",
    "maps": "exact attention of {side} x {side} maps, {C} and {E} channels",
    "spectral norm": "W / sigma of {layers} layers, in memory",
}
PICTURE = "docs/images/bench.png"  # the README's plot
NOISY = 0.1  # a ratio is noisy where its quartiles, visits or two runs of one commit lie this share of it apart


class Result(NamedTuple):
    """Ours and the best other form of one case in one mode."""

    ours: Row
    peer: Row

    @property
    def ratio(self) -> float:
        return self.peer["ratio"]

    @property
    def noisy(self) -> bool:
        return is_noisy(self.peer)


def is_noisy(row: Row) -> bool:
    """Whether the rounds of a ratio, its visits, or this run and the one before at the same commit, disagree."""
    ratio, visits = row["ratio"], row.get("ratio_visits", [row["ratio"]])
    spread = max(row["ratio_high"] - row["ratio_low"], max(visits) - min(visits))
    return spread > NOISY * ratio or _apart(ratio, row.get("ratio_before", ratio))


def _apart(ratio: float, other: float) -> bool:
    """Whether the ratios of two runs disagree, whichever of them came first."""
    return abs(ratio - other) > NOISY * min(ratio, other)


def disagreements(rows: Sequence[Row], again: Sequence[Row]) -> tuple[int, list[Row]]:
    """How many ratios two runs share, and the rows of `again` that are over 10% apart and marked noisy in neither."""
    before = {(row["case"], row["mode"], row["form"]): row for row in rows if "ratio" in row}
    pairs = [
        (before[place], row)
        for row in again
        if "ratio" in row and (place := (row["case"], row["mode"], row["form"])) in before and row["form"] != OURS
    ]
    apart = [
        row for old, row in pairs if _apart(row["ratio"], old["ratio"]) and not is_noisy(old) and not is_noisy(row)
    ]
    return len(pairs), apart


def results(rows: Sequence[Row], against: str | None = None) -> list[Result]:
    """One result a case and mode: ours beside the fastest peer that computes the same, or of the family named."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["case"], row["mode"]), []).append(row)
    pairs = []
    for group in found.values():
        timed = [row for row in group if "ratio" in row]
        ours = [row for row in timed if row["form"] == OURS]
        rivals = [row for row in timed if _is_rival(row, against)]
        if ours and rivals:
            pairs.append(Result(ours[0], min(rivals, key=lambda row: row["ratio"])))
    return pairs


def _is_rival(row: Row, against: str | None) -> bool:
    if row["form"] == OURS or row["form"].startswith(BY):
        return False
    return row["form"].startswith(against) if against else "other" not in row


def crossovers(rows: Sequence[Row]) -> list[tuple[str, str, dict[int, float]]]:
    """(dtype, mode, tokens to the ratio against the fastest of torch's fused full attention)."""
    pairs = results([row for row in rows if row["group"] == "landmarks"], FULL)
    found = []
    for dtype in ("fp32", "bf16"):
        for mode in PASSES:
            wanted = [pair for pair in pairs if (pair.ours["dtype"], pair.ours["mode"]) == (dtype, mode)]
            if wanted:
                found.append((dtype, mode, {pair.ours["N"]: pair.ratio for pair in wanted}))
    return found


def crossing(ratios: dict[int, float]) -> float | None:
    """The number of tokens at which ours becomes the faster, on a line through logarithms; None where it never does.

    The smallest number measured, where ours is faster from there on.
    """
    tokens = sorted(ratios)
    losing = [n for n in tokens if ratios[n] <= 1]
    if not losing:
        return float(tokens[0])
    after = [n for n in tokens if n > losing[-1]]
    if not after:
        return None
    low, high = losing[-1], after[0]
    share = -math.log(ratios[low]) / (math.log(ratios[high]) - math.log(ratios[low]))
    return low * (high / low) ** share


def predicted(rows: Sequence[Row], held: dict[tuple[str, str], float]) -> list[tuple[Row, float]]:
    """Rows of ours whose memory a formula tells, with measured over predicted."""
    return [
        (row, row["peak_bytes"] / held[row["case"], row["mode"]])
        for row in rows
        if row["form"] == OURS and row.get("peak_bytes") and (row["case"], row["mode"]) in held
    ]


def mib(row: Row) -> str:
    peak = row.get("peak_bytes")
    return "–" if peak is None else number(peak / 2**20)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def headline(records: dict[str, store.Record]) -> str:
    """The README's table, in Markdown: each op at the sizes that matter, beside the best other form."""
    rows = store.rows_of(records)
    lines = ["| float32 | nystromgan | best other form | ratio |", "|---|---|---|---|"]
    shown = set()
    for ours, peer in results(rows):
        if ours["dtype"] == "fp32" and ours["group"] in LABELS and ours.get("N", 16384) >= 16384:
            shown.add(ours["case"])
            label = LABELS[ours["group"]].format(**ours)
            lines.append(
                f"| {label}, {ours['mode'].replace('+', ' + ')} | {number(ours['median_ms'])} ms | "
                f"{number(peer['median_ms'])} ms, {peer['form']} | {peer['ratio']:.1f} |"
            )
    where = next(iter(records.values()))["machine"]
    compiled = {row["case"] for row in rows if row["form"].endswith((COMPILED, TUNED))}
    command = "nystromgan bench --full" + ("" if shown & compiled else " --no-compile")
    note = f"Medians on `{where['name']}`, torch {where['versions']['torch']}, by `{command}`;"
    picture = f"![Time and memory of both passes over tokens, float32]({PICTURE})"
    return "\n".join([*lines, "", picture, "", f"{note} [how, and the rest](docs/benchmarks.md)."])
