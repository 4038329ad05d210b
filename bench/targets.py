"""What the project promises on a two-core CPU, each line beside what was measured."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from nystromgan.bench import store
from nystromgan.bench.case import BOTH, FORWARD, FULL, PASSES, PLAIN
from nystromgan.bench.tables import Result, Row, results

TWO_CALLS = "two SDPA calls"


class Target(NamedTuple):
    """A promise about cases of one group.

    Attributes:
        line: in words.
        group, dtype, mode, tokens: the cases; None means all.
        measure: "ratio", the peer's time over ours, at least `bound`; "cost", ours over the peer's, "floor", ours over
            the floor, and "memory", ours over the peer's, at most `bound`.
        against: a form, or a family of forms by its first words; the best that computes the same without one.
    """

    line: str
    group: str
    bound: float
    measure: str = "ratio"
    dtype: str | None = None
    mode: str | None = None
    tokens: tuple[int, ...] | None = None
    against: str | None = None

    @property
    def needed(self) -> str:
        return f"{'≥' if self.measure == 'ratio' else '≤'} {self.bound:g}x"


LARGE = (16384, 65536)
TARGETS = [
    *(
        Target(f"Landmark attention, {mode}, {dtype}, against the best other form", "landmarks", bound, dtype=dtype,
               mode=mode, tokens=LARGE)
        for mode, bounds in ((FORWARD, {"fp32": 1.8, "bf16": 1.5}), (BOTH, {"fp32": 2.0, "bf16": 1.5}))
        for dtype, bound in bounds.items()
    ),
    Target("Its memory against two SDPA calls', in training too", "landmarks", 1.0, "memory", tokens=LARGE,
           against=TWO_CALLS),
    Target("Its forward in fp32 over the floor", "landmarks", 1.6, "floor", "fp32", FORWARD, LARGE),
    Target("Against torch's fused full attention from N = 512 on", "landmarks", 1.0, mode=BOTH, against=FULL),
    Target("SAVGAN's shapes, against the best other form", "savgan", 2.0),
    Target("Two Lloyd steps, what a forward costs beside segment means", "clustered", 2.5, "cost", mode=FORWARD,
           against=PLAIN),
    Target("Two Lloyd steps, what both passes cost", "clustered", 1.6, "cost", mode=BOTH, against=PLAIN),
    Target("Exact attention of maps, against transposing, padding and SDPA", "maps", 1.3),
    Target("Power iteration of 20 layers, against torch's", "power iteration", 2.5, mode=FORWARD),
    Target("W / sigma of 20 layers in training, against torch's", "spectral norm", 2.5),
    Target("Spectral norm in eval, where nothing is computed again", "spectral norm, eval", 2.5),
]  # fmt: skip


class Finding(NamedTuple):
    """A target, the case that comes nearest to missing it, and its value; no value where nothing was measured."""

    target: Target
    value: float | None = None
    place: str = ""
    noisy: bool = False

    @property
    def held(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.target.bound if self.target.measure == "ratio" else self.value <= self.target.bound


def findings(rows: Sequence[Row]) -> list[Finding]:
    return [_finding(target, rows) for target in TARGETS]


def _finding(target: Target, rows: Sequence[Row]) -> Finding:
    pairs = results([row for row in rows if _fits(target, row)], target.against)
    found = [(value, pair) for pair in pairs if (value := _value(target.measure, pair)) is not None]
    if not found:
        return Finding(target)
    choose = min if target.measure == "ratio" else max
    value, pair = choose(found, key=lambda item: item[0])
    ours = pair.ours
    place = f"{ours['case']}, {ours['mode']}" + ("" if target.measure == "floor" else f", {pair.peer['form']}")
    return Finding(target, value, place, pair.noisy and target.measure != "memory")


def _fits(target: Target, row: Row) -> bool:
    return (
        row["group"] == target.group
        and target.dtype in (None, row["dtype"])
        and row["mode"] in (PASSES if target.mode is None else (target.mode,))
        and (target.tokens is None or row.get("N") in target.tokens)
    )


def _value(measure: str, pair: Result) -> float | None:
    if measure == "memory":
        peaks = [row.get("peak_bytes") for row in pair]
        return peaks[0] / peaks[1] if all(peaks) else None
    if measure == "floor":
        return pair.ours["median_ms"] / pair.ours["floor_ms"]
    return 1 / pair.ratio if measure == "cost" else pair.ratio


def clustered_error(record: dict[str, Any]) -> float | None:
    """The most that 64 clustered landmarks' error is of as many segments', at sharpness 1."""
    errors = {row["kind"]: row["errors"].get("1") for row in record["rows"] if row["landmarks"] == 64}
    if not errors.get("clustered") or not errors.get("segment"):
        return None
    return errors["clustered"]["median"] / errors["segment"]["median"]


def spectral_line(records: dict[str, store.Record]) -> list[str]:
    """The line on what a network pays for spectral norm, in its forward and in a training step: the dearest of them."""
    line = ["What a fused spectral norm adds to 20 layers, over what torch's adds", "≤ 0.4x"]
    rows = records[store.DISCRIMINATOR]["rows"] if store.DISCRIMINATOR in records else []
    ours = [row for row in rows if row["form"] == "fuse_spectral_norm"]
    if not ours:
        return [*line, "–", "not measured", "–"]
    most = max(ours, key=lambda row: row["share_of_torch"])
    value, place = most["share_of_torch"], f"discriminator, batch of {most['batch']}, {most['mode']}"
    return [*line, f"{value:.2f}x", place, "yes" if value <= 0.4 else "no"]


def landmark_line(records: dict[str, store.Record]) -> list[str]:
    """The line on accuracy: needed, measured, where, held."""
    value = clustered_error(records[store.LANDMARKS]) if store.LANDMARKS in records else None
    line = ["Error of 64 clustered landmarks over 64 segments', sharpness 1", "≤ 0.5x"]
    if value is None:
        return [*line, "–", "not measured", "–"]
    return [*line, f"{value:.2f}x", "features of a video, median of three networks", "yes" if value <= 0.5 else "no"]
