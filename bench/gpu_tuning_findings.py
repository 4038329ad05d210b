"""What the tuning stage's rows say of each table: its own configuration beside the fastest, and lines to paste."""

import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nystromgan.bench.gpu_tuning_entries import Entry, column_names, replaced

Row = dict[str, Any]
WORTH = 1.02  # times as fast as the table's own, below which a table stays: times of one graph repeat no better


class Finding(NamedTuple):
    """An entry, and over all cases that ran it the geometric mean of the times of its own configuration and the best.

    No own time: it failed or was wrong in a case. No best: every candidate did.
    """

    entry: Entry
    cases: int
    own: str
    own_ms: float | None
    best: str | None
    best_ms: float | None

    @property
    def ratio(self) -> float | None:
        return self.own_ms / self.best_ms if self.own_ms and self.best_ms else None

    @property
    def change(self) -> bool:
        """Whether the table should have the best in its place."""
        return self.best not in (None, self.own) and (self.ratio is None or self.ratio >= WORTH)

    def record(self) -> Row:
        """For JSON."""
        entry = self.entry
        return {
            "op": entry.op, "table": entry.table, "key": entry.key, "column": entry.column_name, "cases": self.cases,
            "own": self.own, "own_ms": self.own_ms, "best": self.best, "best_ms": self.best_ms, "ratio": self.ratio,
            "change": self.change,
        }  # fmt: skip

    def __str__(self) -> str:
        keys = self.entry.key if isinstance(self.entry.key, tuple) else (self.entry.key,)
        place = " ".join(map(str, (self.entry.op, self.entry.table, *keys, self.entry.column_name or "")))
        own, best = (f"{name} {'–' if ms is None else f'{ms:.4f}'}" for name, ms in
                     ((self.own, self.own_ms), (self.best or "nothing runs", self.best_ms)))  # fmt: skip
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        return f"{'CHANGE' if self.change else 'keep':<8}{place:<56}{own:<22}{best:<22}{ratio}"


HEAD = f"{'':<8}{'entry':<56}{'table, ms':<22}{'fastest, ms':<22}ratio"


def findings(rows: Iterable[Row]) -> list[Finding]:
    """One an entry that has a whole row, in their order; of rows of one place the later counts."""
    entries: dict[Entry, dict[str, Row]] = {}
    for row in rows:
        if "times_ms" in row and "unfinished" not in row:
            entries.setdefault(_entry(row), {})[f"{row['case']}, {row['mode']}"] = row
    return [_finding(entry, list(places.values())) for entry, places in entries.items()]


def _entry(row: Row) -> Entry:
    key = tuple(row["key"]) if isinstance(row["key"], list) else row["key"]
    column = None if row["column"] is None else column_names(row["op"]).index(row["column"])
    return Entry(row["op"], row["table"], key, column)


def _finding(entry: Entry, rows: Sequence[Row]) -> Finding:
    """A configuration that fails or is wrong in one of the cases is not the best of the entry."""
    names = [name for name in rows[0]["times_ms"] if all(name in row["times_ms"] for row in rows)]
    means = {name: statistics.geometric_mean(row["times_ms"][name] for row in rows) for name in names}
    best, own = min(means, key=lambda name: means[name], default=None), rows[-1]["own"]
    return Finding(entry, len(rows), own, means.get(own), best, means.get(best or ""))


def pasted(found: Iterable[Finding]) -> list[str]:
    """Lines for the ops' tuning.py: every row of a table that should change, whole."""
    held: dict[tuple[str, str, Any], Any] = {}
    for finding in found:
        entry = finding.entry
        if finding.change:
            place = (entry.op, entry.table, entry.key)
            before = held.get(place, getattr(entry.tuning, entry.table)[entry.key])
            held[place] = replaced(before, entry.column, str(finding.best))
    lines, last = [], None
    for (op, table, key), value in held.items():
        if (op, table) != last:
            lines.append(f"nystromgan/ops/{op}/tuning.py, {table}:")
        last = op, table
        lines.append(f"    {_source(key)}: {_source(value)},")
    return lines


def _source(value: Any) -> str:
    """Python of a key or a configuration, or of a row of them."""
    return f"({', '.join(map(_source, value))})" if isinstance(value, tuple) else json.dumps(value)


def summary(found: Sequence[Finding]) -> list[str]:
    return ["", HEAD, *map(str, found), *(["", *lines] if (lines := pasted(found)) else [])]
