"""One case: the gate, then interleaved rounds of every form.

A form whose result is wrong is not timed. In each round every form runs once, so that what disturbs the machine
disturbs all of them; ratios are medians of the rounds' ratios.
"""

import contextlib
import gc
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from nystromgan.bench import clock
from nystromgan.bench.case import BACKWARD, OURS, Case, Inputs
from nystromgan.bench.forms import by_backend, call_of, compiles, forms_of, function_of, other_function, peer_of
from nystromgan.bench.gate import Exact, errors, gemm_rate, why_not, wrong
from nystromgan.bench.plan import Effort, Plan

Row = dict[str, Any]
EVERY_ROUND = 1.8  # forms slower than this times the fastest peer are timed in the first two rounds only


def interleaved(
    calls: dict[str, Sequence[clock.Call]], timer: clock.Clock, effort: Effort, every: bool = False
) -> dict[str, list[float]]:
    """Seconds of one call of every form, round by round; the order turns over from round to round.

    Without `every`, forms far behind the fastest peer run in the first two rounds only.
    """
    repeats = {name: clock.repeats(timer, several) for name, several in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    active, spent, rounds = list(calls), 0.0, 0
    while rounds < effort.least_rounds or (spent < effort.budget_s and rounds < effort.most_rounds):
        for name in active if rounds % 2 == 0 else reversed(active):
            samples[name].append(timer.sample_s(calls[name], repeats[name]))
            spent += samples[name][-1] * repeats[name]
        rounds += 1
        if rounds == 2 and not every:
            active, spent = _worth_more(samples), 0.0
    return samples


def _worth_more(samples: dict[str, list[float]]) -> list[str]:
    """Ours, and the peers near the fastest: the others decide nothing."""
    best = min((min(times) for name, times in samples.items() if name != OURS), default=float("inf"))
    return [name for name, times in samples.items() if name == OURS or min(times) <= EVERY_ROUND * best]


def rows(case: Case, mode: str, plan: Plan) -> list[Row]:
    """One row a form: its errors and times, or why there are none."""
    torch._dynamo.reset()  # else earlier shapes count against the number of recompilations
    timer = clock.CLOCKS[plan.device]
    first = case.make(plan.device, case.shape, 0)
    count = timer.number_of_sets(sum(x.numel() * x.element_size() for x in first.values()))
    sets = [first, *(case.make(plan.device, case.shape, seed) for seed in range(1, count))]
    exact = Exact(case, first, mode)
    forms = forms_of(case, plan.compiling is not None and mode != BACKWARD) + by_backend(case, plan.device)
    found = {form: _row(case, form, mode) for form in forms}
    calls: dict[str, Sequence[clock.Call]] = {}
    for form, row in found.items():
        gated = _gated(case, form, row, exact, sets, plan)
        if gated:
            calls[form] = gated
    samples = interleaved(calls, timer, plan.effort)
    for form, times in samples.items():
        found[form] |= summary(times, samples.get(OURS, []))
        if not other_function(case, form):
            found[form]["floor_ms"] = floor_ms(case, mode, plan.rates)
        if plan.device == "cuda" and mode != BACKWARD and case.optimizer is None:
            graph = clock.graphed(calls[form][0])
            found[form]["graph_ms"] = graph and clock.median_ms(graph, "cuda", 0.1)
    gc.collect()
    return list(found.values())


def _row(case: Case, form: str, mode: str) -> Row:
    row: Row = {"op": case.op, "case": case.name, "group": case.group, **case.shape, "dtype": case.dtype}
    return row | {"mode": mode, "form": form} | ({"other": True} if other_function(case, form) else {})


def failed_row(case: Case, form: str, mode: str, error: Exception) -> Row:
    """The row of a form that raised: ours is wrong, a peer was not run."""
    return _row(case, form, mode) | _reason(case, form, error)


def _reason(case: Case, form: str, error: Exception) -> Row:
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return {"wrong" if peer_of(case, form) is None else "not_run": message}


def _gated(case: Case, form: str, row: Row, exact: Exact, sets: Sequence[Inputs], plan: Plan) -> list[clock.Call]:
    """The calls of a form that can run and is right, one on each set; else none, and the row says why."""
    reason = why_not(case, form, exact.mode, plan)
    if reason is not None:
        row["not_run"] = reason
        return []
    spending = plan.compiling.spending() if plan.compiling and compiles(case, form) else contextlib.nullcontext()
    try:
        with spending:
            function = function_of(case, form, plan.backend)
            row["errors"] = errors(case, form, function, sets[0], exact)
            calls = [call_of(case, function, inputs, exact.mode) for inputs in sets]
            calls[0]()  # compiles what the gate has not
    except Exception as error:  # a peer that refuses a shape, and a compiler that fails, are rows of the report
        row |= _reason(case, form, error)
        return []
    if wrong(case, row["errors"]):
        row["wrong"] = True
        return []
    return calls


def floor_ms(case: Case, mode: str, rates: dict[str, float]) -> float:
    """The time of the operations at the rate of products, or of the bytes at that of a copy, whichever is longer."""
    seconds = max(case.flops[mode] / gemm_rate(rates, case.dtype), case.moved_bytes[mode] / rates["copy_bytes_per_s"])
    return 1e3 * seconds


def summary(times: list[float], ours: list[float]) -> Row:
    """Median and quartiles in milliseconds, and how many times ours it takes, round by round."""
    row: Row = {
        "median_ms": 1e3 * statistics.median(times), "low_ms": 1e3 * quartile(times, 0.25),
        "high_ms": 1e3 * quartile(times, 0.75), "rounds": len(times),
    }  # fmt: skip
    ratios = [theirs / own for theirs, own in zip(times, ours, strict=False)]
    if ratios:
        row |= {"ratio": statistics.median(ratios), "ratio_low": quartile(ratios, 0.25)}
        row["ratio_high"] = quartile(ratios, 0.75)
    return row


def quartile(values: Sequence[float], fraction: float) -> float:
    return sorted(values)[round(fraction * (len(values) - 1))]
