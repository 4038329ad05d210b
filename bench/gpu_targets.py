"""What the project promises on an H200, each line with the cases that decide it, and the verdict over measured rows.

Time is the GPU's, of calls replayed in a CUDA graph; that of a plain call, with what Python takes, is told beside it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nystromgan.bench.case import BOTH, BY, COMPILED, FORWARD, FULL, OURS, PASSES, TUNED, Case, Shape
from nystromgan.bench.targets import TWO_CALLS

Row = dict[str, Any]
Place = tuple[str, str]  # a case's name and a mode
AT_LEAST = ("ratio",)
PASS, FAIL, NOT_MEASURED = WORDS = ("PASS", "FAIL", "NOT MEASURED")


class Line(NamedTuple):
    """A promise, held where every one of its places holds it.

    Attributes:
        words: what is promised.
        measure: "ratio", the fastest peer's time over ours, at least `bound`. At most it: "floor", ours over the floor;
            "best floor", that of our fastest backend; "memory", our peak over the peer's; "us", ours in microseconds;
            "backward", what a backward adds over a forward; "choice", the chosen backend's time over the fastest's;
            "launches" of kernels; "error", ours over the eager form's in the same dtype.
        group, dtype, modes: the cases; of these, those whose shape has all of one of `shapes`; none: of every shape.
        against: the peers, by their first words, and by their last ones, without which no compiled form is meant.
    """

    words: str
    measure: str
    bound: float
    op: str
    group: str | None
    dtype: str | None = "bf16"
    modes: Sequence[str] = (BOTH,)
    shapes: Sequence[Shape] = ({},)
    against: tuple[str, str] = ("", "")

    @property
    def needed(self) -> str:
        return f"{'>=' if self.measure in AT_LEAST else '<='} {self.bound:g}"

    def places(self, cases: Sequence[Case]) -> list[Place]:
        """The cases and modes that decide; errors have cases of their own."""
        if self.measure == "error":
            return [(errors_name(self.op, dtype), BOTH) for dtype in ERROR_DTYPES[self.group or ""]]
        return [(case.name, mode) for case in cases if self._fits(case) for mode in self.modes if mode in case.modes]

    def _fits(self, case: Case) -> bool:
        return (
            case.op == self.op
            and self.group in (None, case.group)
            and self.dtype in (None, case.dtype)
            and any(shape.items() <= case.shape.items() for shape in self.shapes)
        )

    def is_peer(self, form: str) -> bool:
        """Whether the line compares ours with this form."""
        first, last = self.against
        if not first or form == OURS or form.startswith(BY) or not form.startswith(first):
            return False
        return form.endswith(last) if last else not form.endswith((COMPILED, TUNED))

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.measure in AT_LEAST else value <= self.bound


def errors_name(op: str, dtype: str) -> str:
    return f"errors of {op} {dtype}"


def _sizes(*tokens: int) -> list[Shape]:
    return [{"N": count} for count in tokens]


NYSTROM, MAPS, PINV, POWER = "nystrom_attention", "spatiotemporal_attention", "iterative_pinv", "power_iteration"
LARGE, SMALL, FULL_FROM = _sizes(16384, 65536), _sizes(1024, 2048, 4096, 8192), _sizes(4096, 8192, 16384, 65536)
AUTHORS = ("authors, N x N", "")
SAVGAN: list[Shape] = [{"B": 8, "N": 2048}, {"B": 8, "N": 16384}]
NARROW: list[Shape] = [{"B": 1, "C": 32, "E": 128, "side": 64}, {"B": 1, "C": 32, "E": 128, "side": 128}]
PINVS: list[Shape] = [{"B": 64, "M": 64}, {"B": 64, "M": 512}, {"B": 1, "M": 512}]
ERROR_DTYPES = {"half": ("bf16", "fp16"), "fp32": ("fp32",)}
LINES = [
    Line("Forward of 65,536 tokens over its floor", "floor", 1.3, NYSTROM, "landmarks", modes=(FORWARD,),
         shapes=LARGE[1:]),
    Line("The same by the fastest backend", "best floor", 1.3, NYSTROM, "landmarks", modes=(FORWARD,),
         shapes=LARGE[1:]),
    Line("Both passes over 65,536 tokens over their floor", "floor", 1.6, NYSTROM, "landmarks", shapes=LARGE[1:]),
    Line("Both passes against the eager form of the same", "ratio", 4, NYSTROM, "landmarks", shapes=LARGE,
         against=("eager", "")),
    Line("Both passes against that under max-autotune", "ratio", 2, NYSTROM, "landmarks", shapes=LARGE,
         against=("eager", TUNED)),
    Line("Both passes against two SDPA calls", "ratio", 1.5, NYSTROM, "landmarks", shapes=LARGE,
         against=(TWO_CALLS, "")),
    Line("Against torch's fused full attention from 4,096 tokens on", "ratio", 1, NYSTROM, "landmarks", modes=PASSES,
         shapes=FULL_FROM, against=(FULL, "")),
    Line("Both passes against it over 65,536 tokens", "ratio", 100, NYSTROM, "landmarks", shapes=LARGE[1:],
         against=(FULL, "")),
    Line("Forward of 1,024 to 8,192 tokens in microseconds", "us", 40, NYSTROM, "landmarks", modes=(FORWARD,),
         shapes=SMALL),
    Line("SAVGAN's shapes against its authors' form", "ratio", 5, NYSTROM, "savgan", modes=PASSES, shapes=SAVGAN,
         against=AUTHORS),
    Line("Their memory over that form's", "memory", 0.1, NYSTROM, "savgan", modes=PASSES, shapes=SAVGAN,
         against=AUTHORS),
    Line("Exact attention of maps against transposing, padding and SDPA", "ratio", 1.5, MAPS, "maps", shapes=NARROW,
         against=("transpose, pad, SDPA", "")),
    Line("Power iteration of 40 layers: launches", "launches", 1, POWER, "power iteration", "fp32", (FORWARD,)),
    Line("Against torch's parametrization", "ratio", 8, POWER, "power iteration", "fp32", (FORWARD,),
         against=("torch's parametrization", "")),
    Line("Over the floor of reading every weight twice", "floor", 2, POWER, "power iteration", "fp32", (FORWARD,)),
    Line("Pseudo-inverse of 64 matrices of 64 rows in microseconds", "us", 30, PINV, "pinv", "fp32", (FORWARD,),
         PINVS[:1]),
    Line("64 matrices of 512 rows against eager products", "ratio", 2, PINV, "pinv", "fp32", (FORWARD,), PINVS[1:2],
         ("eager", "")),
    Line("One matrix of 512 rows against eager products", "ratio", 3, PINV, "pinv", "fp32", (FORWARD,), PINVS[2:],
         ("eager", "")),
    Line("Backward of a pseudo-inverse over its forward", "backward", 3, PINV, "pinv", "fp32", shapes=PINVS),
    # 5% is what the order of sums alone moves an error by
    Line("Its error over the eager form's in float32", "error", 1.05, PINV, "fp32", "fp32"),
    *(Line(f"Errors of {op} in half precision over the eager form's", "error", 1.5, op, "half", None)
      for op in (NYSTROM, MAPS)),
    # 10% is noise
    *(Line(f"The backend chosen for {op} over the fastest", "choice", 1.1, op, group, dtype, PASSES, shapes)
      for op, group, dtype, shapes in (
          (NYSTROM, "landmarks", "bf16", [*SMALL, *LARGE]), (NYSTROM, "savgan", "bf16", SAVGAN),
          (MAPS, "maps", "bf16", NARROW), (PINV, "pinv", "fp32", PINVS), (POWER, "power iteration", "fp32", [{}]),
      )),
]  # fmt: skip


class Verdict(NamedTuple):
    """A line's word, the place nearest to a miss with its value there, and that of plain calls."""

    line: Line
    word: str
    value: float | None = None
    plain: float | None = None
    place: str = ""

    def record(self) -> Row:
        """For JSON."""
        line = self.line
        return {
            "line": line.words, "verdict": self.word, "measure": line.measure, "needed": line.needed,
            "measured": self.value, "plain_call": self.plain, "where": self.place,
        }  # fmt: skip

    def __str__(self) -> str:
        value = "" if self.value is None else f"{self.value:.3g}"
        plain = "" if self.plain is None else f"{self.plain:.3g}"
        needed = f"{self.line.measure} {self.line.needed}"
        return f"{self.word:<13}{value:>9}{plain:>9}  {needed:<16}{self.line.words}: {self.place}"


HEAD = f"{'verdict':<13}{'measured':>9}{'plain':>9}  {'needed':<16}line: where it is nearest to a miss"


def verdicts(rows: Iterable[Row], cases: Sequence[Case], lines: Sequence[Line] = LINES) -> list[Verdict]:
    """One a line. Of rows of one case, mode and form the later add to the earlier."""
    known: dict[Place, dict[str, Row]] = {}
    for row in rows:
        if "case" in row and "form" in row:
            forms = known.setdefault((row["case"], row["mode"]), {})
            forms[row["form"]] = forms.get(row["form"], {}) | row
    return [_verdict(line, line.places(cases), known) for line in lines]


def _verdict(line: Line, places: Sequence[Place], known: dict[Place, dict[str, Row]]) -> Verdict:
    """FAIL where a place misses or ours is wrong, NOT MEASURED where one is missing, else PASS."""
    wrong = [place for place in places if known.get(place, {}).get(OURS, {}).get("wrong")]
    if wrong:
        return Verdict(line, FAIL, place=f"{', '.join(wrong[0])}: wrong")
    found = {place: _values(line, place, known) for place in places}
    missing = [place for place, values in found.items() if values is None]
    order = sorted(
        ((*values, place) for place, values in found.items() if values is not None),
        key=lambda item: item[0], reverse=line.measure not in AT_LEAST,
    )  # fmt: skip
    if order and not line.holds(order[0][0]):
        value, plain, place = order[0]
        return Verdict(line, FAIL, value, plain, ", ".join(place))
    if missing or not order:
        return Verdict(line, NOT_MEASURED, place=", ".join(missing[0]) if missing else "no case")
    value, plain, place = order[0]
    return Verdict(line, PASS, value, plain, ", ".join(place))


def _values(line: Line, place: Place, known: dict[Place, dict[str, Row]]) -> tuple[float, float | None] | None:
    """The line's measure at one place, by the GPU's time and by plain calls; None where something is not measured."""
    forms = known.get(place, {})
    ours, peers = forms.get(OURS, {}), [row for form, row in forms.items() if line.is_peer(form)]
    if line.measure in ("error", "launches"):
        value = ours.get({"error": "error_ratio"}.get(line.measure, line.measure))
        return None if value is None else (value, None)
    if line.measure == "memory":
        peaks = [row["peak_bytes"] for row in peers if row.get("peak_bytes")]
        return (ours["peak_bytes"] / min(peaks), None) if peaks and "peak_bytes" in ours else None
    by = [row for form, row in forms.items() if form.startswith(BY)]
    rest = {
        "ratio": peers, "floor": [], "us": [], "choice": by, "best floor": [ours, *by],
        "backward": [known.get((place[0], FORWARD), {}).get(OURS, {})],
    }[line.measure]  # fmt: skip
    gpu, plain = (_of_times(line.measure, ours, rest, field) for field in ("graph_ms", "median_ms"))
    if gpu is None and not any("graph_ms" in row for row in (ours, *rest)):
        gpu = plain  # where there are no CUDA graphs at all
    return None if gpu is None else (gpu, plain)


def _of_times(measure: str, ours: Row, rest: Sequence[Row], field: str) -> float | None:
    """The measure by one kind of time; peers that were measured beside ours keep their ratio to it."""
    own_ms = ours.get(field)
    others = [row[field] for row in rest if row.get(field)]
    if not own_ms or (measure in ("ratio", "choice", "backward") and not others):
        return None
    if measure == "ratio":
        name = "graph_ratio" if field == "graph_ms" else "ratio"
        return min((row[name] for row in rest if row.get(name)), default=None)
    if measure == "choice":
        return own_ms / min(others)
    if measure == "backward":
        return (own_ms - others[0]) / others[0]
    if measure == "us":
        return 1e3 * own_ms
    return (min(others) if measure == "best floor" else own_ms) / ours["floor_ms"]
