"""One case in one mode: the gate, then interleaved rounds of every form, in visits that lie apart.

A form whose result is wrong is not timed. In each round every form runs once, so that what disturbs the machine
disturbs all of them; ratios are medians of the rounds' ratios. What changes within minutes shows between the visits.
"""

import contextlib
import gc
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nystromgan.bench import clock
from nystromgan.bench.case import BACKWARD, OURS, Case, Form, Inputs
from nystromgan.bench.forms import by_backend, call_of, compiles, forms_of, function_of, other_function, peer_of
from nystromgan.bench.gate import Exact, gemm_rate, takes_too_long, timed_errors, why_not, wrong
from nystromgan.bench.plan import Effort, Plan

Row = dict[str, Any]
Samples = dict[str, list[float]]  # seconds of one call of every form, round by round
EVERY_ROUND = 1.8  # forms slower than this times the fastest peer are timed in the first rounds of a visit only


def interleaved(
    calls: dict[str, Sequence[clock.Call]],
    repeats: dict[str, int],
    timer: clock.Clock,
    effort: Effort,
    every: bool = False,
) -> Samples:
    """Samples of every form, each over its repeats; the order turns over from round to round.

    Without `every`, forms far behind the fastest peer run in the first rounds only.
    """
    samples: Samples = {name: [] for name in calls}
    near, spent, rounds = list(calls), 0.0, 0
    while rounds < effort.least_rounds or (spent < effort.budget_s and rounds < effort.most_rounds):
        active = list(calls) if rounds < effort.far_rounds else near
        for name in active if rounds % 2 == 0 else reversed(active):
            samples[name].append(timer.sample_s(calls[name], repeats[name]))
        rounds += 1
        if rounds <= effort.far_rounds and not every:
            near = _worth_more(samples)
        spent = sum(sum(samples[name]) * repeats[name] for name in near)
    return samples


def _worth_more(samples: Samples) -> list[str]:
    """Ours, and the peers near the fastest: the others decide nothing."""
    best = min((min(times) for name, times in samples.items() if name != OURS), default=float("inf"))
    return [name for name, times in samples.items() if name == OURS or min(times) <= EVERY_ROUND * best]


class Measurement:
    """A case in one mode. Its first visit gates the forms; each after it times again what the one before has timed."""

    def __init__(self, case: Case, mode: str, plan: Plan) -> None:
        self.case, self.mode, self.plan, self.timer = case, mode, plan, clock.CLOCKS[plan.device]
        ours, *peers = forms_of(case, plan.compiling is not None and mode != BACKWARD)
        forms = [ours, *by_backend(case, plan.device), *peers]
        self.found = {form: _row(case, form, mode) for form in forms}  # all that is known of each but its times
        self.repeats: dict[str, int] = {}
        self.visits: list[Samples] = []

    def visit(self) -> list[Row]:
        """One row a form, of all visits until now: its errors and times, or why there are none."""
        if self.plan.compiling is not None:
            torch._dynamo.reset()  # else earlier shapes count against the number of recompilations
        sets = self._sets()
        chosen = self._again(sets) if self.visits else self._gated(sets)
        calls = {form: several for form, several in chosen if several}
        effort = self.plan.effort.of_visit(len(self.visits))
        self.visits.append(interleaved(calls, self.repeats, self.timer, effort))
        if self.plan.device == "cuda" and len(self.visits) == 1:
            self._on_gpu(calls)
        gc.collect()
        return [row | self._times(form) for form, row in self.found.items()]

    def _sets(self) -> list[Inputs]:
        """As many sets of inputs as the device's caches ask for."""
        case, device = self.case, self.plan.device
        first = case.make(device, case.shape, 0)
        count = self.timer.number_of_sets(sum(x.numel() * x.element_size() for x in first.values()))
        return [first, *(case.make(device, case.shape, seed) for seed in range(1, count))]

    def _gated(self, sets: Sequence[Inputs]) -> Iterator[tuple[str, list[clock.Call]]]:
        """Every form that is not left out, with its calls, the slow ones last; a row of one that is says why."""
        exact = Exact(self.case, sets[0], self.mode)
        for form, row in sorted(self.found.items(), key=lambda item: self._slowness(item[0])):
            reason = why_not(self.case, form, self.mode, self.plan)
            if reason is None:
                yield form, self._calls(form, sets, exact)
            else:
                row["wrong" if (self.case.name, form) in self.plan.failed else "not_run"] = reason

    def _again(self, sets: Sequence[Inputs]) -> Iterator[tuple[str, list[clock.Call]]]:
        """What the visit before has timed, from the last to the first, as far as torch.compile has time left."""
        for form in reversed(self.visits[-1]):
            if not self._compiles(form) or self.plan.compiling.left_s > 0:
                yield form, self._calls(form, sets)

    def _calls(self, form: str, sets: Sequence[Inputs], exact: Exact | None = None) -> list[clock.Call]:
        """The form's calls, one on each set, warm; none where it raises or does not pass beside `exact`."""
        try:
            with self.plan.compiling.spending() if self._compiles(form) else contextlib.nullcontext():
                function = function_of(self.case, form, self.plan.backend)
                if exact is not None and not self._passes(form, function, sets[0], exact):
                    return []
                calls = [call_of(self.case, function, inputs, self.mode) for inputs in sets]
                clock.warm(calls)
                if form not in self.repeats:
                    self.repeats[form] = clock.repeats(self.timer, calls)
        except Exception as error:  # a peer that refuses a shape, and a compiler that fails, are rows of the report
            self.found[form] |= _reason(self.case, form, error)
            return []
        return calls

    def _compiles(self, form: str) -> bool:
        return self.plan.compiling is not None and compiles(self.case, form)

    def _passes(self, form: str, function: Form, inputs: Inputs, exact: Exact) -> bool:
        """Whether the form is right, and as a peer that nothing compiles quick enough to be called some ten times."""
        row = self.found[form]
        row["errors"], seconds = timed_errors(self.case, form, function, inputs, exact)
        if wrong(self.case, row["errors"]):
            row["wrong"] = True
        elif seconds > self.plan.effort.limit_s and form in self.case.peers and not compiles(self.case, form):
            row["not_run"] = takes_too_long(self.plan)
            if self.plan.too_long is not None:
                self.plan.too_long.add((self.case.name, form))
        return not row.keys() & {"wrong", "not_run"}

    def _slowness(self, form: str) -> tuple[bool, float]:
        peer = peer_of(self.case, form)
        return compiles(self.case, form), 0.0 if peer is None else peer.flops

    def _on_gpu(self, calls: dict[str, list[clock.Call]]) -> None:
        """Adds the allocator's peak, and the time of a call in a CUDA graph of one on each set, where it can be one."""
        for form, several in calls.items():
            try:
                self.found[form] |= self._peak_and_graph(several)
            except Exception as error:  # it has a time, and may have no room for a graph
                self.found[form]["no_graph"] = f"{type(error).__name__}: {str(error)[:160]}"
            torch.cuda.empty_cache()  # of what the graph kept to itself
        ours_ms = self.found[OURS].get("graph_ms")
        for row in self.found.values():
            if ours_ms and row.get("graph_ms"):
                row["graph_ratio"] = row["graph_ms"] / ours_ms

    def _peak_and_graph(self, calls: list[clock.Call]) -> Row:
        found: Row = {"peak_bytes": allocated_bytes(calls[0])}
        if self.mode != BACKWARD and self.case.optimizer is None:
            graph = clock.graphed(calls)
            found["graph_ms"] = graph and clock.median_ms(graph, "cuda", 0.1) / len(calls)
        return found

    def _times(self, form: str) -> Row:
        """Over all visits; none of a form that raised in one of them."""
        timed = [visit for visit in self.visits if form in visit]
        if not timed or self.found[form].keys() & {"wrong", "not_run"}:
            return {}
        times = summary([visit[form] for visit in timed], [visit.get(OURS, []) for visit in timed])
        if not other_function(self.case, form):
            times["floor_ms"] = floor_ms(self.case, self.mode, self.plan.rates)
        return times


def allocated_bytes(call: clock.Call) -> int:
    """The most bytes that a warm call has allocated on the GPU beyond those before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _row(case: Case, form: str, mode: str) -> Row:
    row: Row = {"op": case.op, "case": case.name, "group": case.group, **case.shape, "dtype": case.dtype}
    return row | {"mode": mode, "form": form} | ({"other": True} if other_function(case, form) else {})


def failed_row(case: Case, form: str, mode: str, error: Exception) -> Row:
    """The row of a form that raised: ours is wrong, a peer was not run."""
    return _row(case, form, mode) | _reason(case, form, error)


def _reason(case: Case, form: str, error: Exception) -> Row:
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return {"wrong" if peer_of(case, form) is None else "not_run": message}


def floor_ms(case: Case, mode: str, rates: dict[str, float]) -> float:
    """The time of the operations at the rate of products, or of the bytes at that of a copy, whichever is longer."""
    seconds = max(case.flops[mode] / gemm_rate(rates, case.dtype), case.moved_bytes[mode] / rates["copy_bytes_per_s"])
    return 1e3 * seconds


def summary(visits: Sequence[list[float]], ours: Sequence[list[float]] = ()) -> Row:
    """Of all visits' rounds: median and quartiles in milliseconds, and how many times ours it takes, round by round."""
    times = list(itertools.chain(*visits))
    row: Row = {
        "median_ms": 1e3 * statistics.median(times), "low_ms": 1e3 * quartile(times, 0.25),
        "high_ms": 1e3 * quartile(times, 0.75), "rounds": len(times),
    }  # fmt: skip
    by_visit = [_ratios(*pair) for pair in zip(visits, ours, strict=False)]
    ratios = list(itertools.chain(*by_visit))
    if ratios:
        row |= {"ratio": statistics.median(ratios), "ratio_low": quartile(ratios, 0.25)}
        row |= {"ratio_high": quartile(ratios, 0.75)}
        row["ratio_visits"] = [statistics.median(several) for several in by_visit if several]
    return row


def _ratios(times: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Of the rounds that both were in, which are the first of a visit."""
    return [theirs / own for theirs, own in zip(times, ours, strict=False)]


def quartile(values: Sequence[float], fraction: float) -> float:
    return sorted(values)[round(fraction * (len(values) - 1))]
