"""One case: the gate, then interleaved rounds of every form.

A form whose result is wrong is not timed. In each round every form runs once, so that what disturbs the machine
disturbs all of them; ratios are medians of the rounds' ratios.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nystromgan import testing
from nystromgan.bench import machine
from nystromgan.bench.cases import COMPILED, FULL, OURS, PLAIN, Case, Inputs

Row = dict[str, Any]
LIMIT_S = 3.0  # a form that should take longer is left out
LIMIT_BYTES = 4 * 2**30  # of N x N weights
SAMPLE_S = 4e-3  # a shorter call is repeated until a sample lasts this long
RETRIES = 4
DISTURBED = 0.02  # the share of a sample that our threads may have waited for a core
EVERY_ROUND = 1.8  # forms slower than this times the fastest peer are timed in the first two rounds only


class Effort(NamedTuple):
    """How long to repeat one case in one mode."""

    budget_s: float
    least_rounds: int
    most_rounds: int


QUICK, THOROUGH = Effort(0.6, 3, 7), Effort(2.0, 3, 21)


def forms_of(case: Case, with_compiled: bool) -> list[str]:
    return [name for name in case.forms if with_compiled or not name.endswith(COMPILED)]


def prepared(case: Case, form: str, mode: str, device: str, shape: dict[str, int] | None = None) -> Callable[[], Any]:
    """The call to measure on fresh inputs: a forward without gradients, or a forward and all gradients."""
    return _call(case.forms[form](), case.make(device, shape or case.shape), mode, case.training)


def _call(form: Callable[..., Any], inputs: Inputs, mode: str, training: bool) -> Callable[[], Any]:
    if mode == "forward" and not training:
        return torch.no_grad()(lambda: form(**inputs))
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    if mode == "forward":
        return lambda: form(**leaves)
    with torch.no_grad():
        directions = [_direction(x) for x in _as_list(form(**leaves))]
    return lambda: torch.autograd.grad(_as_list(form(**leaves)), list(leaves.values()), directions)


def _as_list(output: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def why_not(case: Case, form: str, mode: str, gemm_flop_per_s: float) -> str | None:
    """The reason to leave a form of N x N work out; None: measure it."""
    if form not in (FULL, "authors, N x N"):
        return None
    s = case.shape
    pairs = s["B"] * s["H"] * s["N"] ** 2
    width = s["D"] + s["E"] if form == FULL else s["M"] + s["E"]
    # Measured: the share of the rate of products that fused attention reaches; both passes take 3.5 to 6 forwards.
    share = 0.6 if case.dtype == "fp32" else 0.3
    seconds = 2 * pairs * width / (share * gemm_flop_per_s) * (1 if mode == "forward" else 5)
    if seconds > LIMIT_S:
        return f"a call would take about {seconds:.0f} s"
    copies = 1 if mode == "forward" else 3
    if form != FULL and copies * pairs * 4 > LIMIT_BYTES:
        return f"would store {copies * pairs * 4 / 2**30:.0f} GiB of weights"
    return None


class Exact:
    """What the forms of a case should give, in float64; computed once for all forms of one definition."""

    def __init__(self, case: Case, inputs: Inputs, mode: str) -> None:
        self.case, self.mode = case, mode
        first = _first_head if case.op == "nystrom_attention" else (lambda x: x)
        self.inputs = {name: first(x).double() for name, x in inputs.items()}
        self.found: dict[bool, list[list[Tensor]]] = {}

    def of(self, form: str) -> list[list[Tensor]]:
        plain = form == PLAIN
        if plain not in self.found:
            definition = self.case.plain_exact if plain else self.case.exact
            assert definition is not None
            self.found[plain] = _results(definition, self.inputs, self.mode)
        return self.found[plain]


def errors(case: Case, form: str, function: Callable[..., Any], inputs: Inputs, exact: Exact) -> dict[str, float]:
    """Relative errors against float64: of the output, and the largest of the gradients.

    Of attention the first head of the first sample is compared; of full attention, the output of the first 64 queries.
    """
    if form == FULL:
        return {"output": _full_error(function, inputs)}
    first = _first_head if case.op == "nystrom_attention" else (lambda x: x)
    results = _results(function, inputs, exact.mode)
    found = {}
    for kind, values, expected in zip(("output", "gradient"), results, exact.of(form), strict=False):
        found[kind] = max(testing.relative_error(first(x), y) for x, y in zip(values, expected, strict=True))
    return found


def _full_error(function: Callable[..., Any], inputs: Inputs) -> float:
    with torch.no_grad():
        output = function(**inputs)[:1, :1, :64]
        query, key, value = (inputs[name][:1, :1].double() for name in ("query", "key", "value"))
        weights = (query[:, :, :64] @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        return testing.relative_error(output, weights @ value)


def _first_head(tensor: Tensor) -> Tensor:
    return tensor[:1, :1]


def _results(function: Callable[..., Any], inputs: Inputs, mode: str) -> list[list[Tensor]]:
    """The outputs and, in a backward mode, the gradients along the fixed direction."""
    leaves = {name: x.detach().requires_grad_(mode != "forward") for name, x in inputs.items()}
    outputs = _as_list(function(**leaves))
    if mode == "forward":
        return [outputs]
    directions = [_direction(x) for x in outputs]
    return [[x.detach() for x in outputs], list(torch.autograd.grad(outputs, list(leaves.values()), directions))]


def _direction(output: Tensor) -> Tensor:
    """A fixed direction; every head of every sample has the same, so that a part of the output has that part of it."""
    shape = output.shape if output.ndim < 4 else (1, 1, *output.shape[2:])
    direction = testing.normal(*shape, dtype=torch.bfloat16, device=output.device.type, seed=9)
    return direction.to(output).expand_as(output).contiguous()


def interleaved(calls: dict[str, Callable[[], Any]], device: str, effort: Effort) -> dict[str, list[float]]:
    """Seconds of one call of every form, round by round, after a call of each to warm up."""
    repeats = {name: _repeats(call, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    active, spent, rounds = list(calls), 0.0, 0
    while rounds < effort.least_rounds or (spent < effort.budget_s and rounds < effort.most_rounds):
        for name in active if rounds % 2 == 0 else reversed(active):
            samples[name].append(_sample_s(calls[name], repeats[name], device))
            spent += samples[name][-1] * repeats[name]
        rounds += 1
        if rounds == 2:
            active, spent = _worth_more(samples), 0.0
    return samples


def _worth_more(samples: dict[str, list[float]]) -> list[str]:
    """Ours, and the peers near the fastest: the others decide nothing."""
    best = min((min(times) for name, times in samples.items() if name != OURS), default=float("inf"))
    return [name for name, times in samples.items() if name == OURS or min(times) <= EVERY_ROUND * best]


def _repeats(call: Callable[[], Any], device: str) -> int:
    """Calls in one sample."""
    once_s = machine.duration_s(call, device)
    if once_s < 10 * SAMPLE_S:
        once_s = machine.duration_s(call, device)
    return max(1, round(SAMPLE_S / max(once_s, 1e-6)))


def _sample_s(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds of one call; a sample in which other processes took the cores is taken again, up to RETRIES times."""

    def several() -> None:
        for _ in range(repeats):
            call()

    taken = []
    for _ in range(1 + RETRIES):
        waited_s = machine.waited_s()
        seconds = machine.duration_s(several, device)
        taken.append((machine.waited_s() - waited_s, seconds))
        if taken[-1][0] <= DISTURBED * seconds:
            break
    return min(taken)[1] / repeats


def rows(case: Case, mode: str, device: str, effort: Effort, with_compiled: bool, rates: dict[str, float]) -> list[Row]:
    """One row a form: its errors and times, or why there are none."""
    torch._dynamo.reset()  # else earlier shapes count against the number of recompilations
    inputs = case.make(device, case.shape)
    exact = Exact(case, inputs, mode)
    found: dict[str, Row] = {}
    calls = {}
    rate = rates[f"gemm_{case.dtype}_flop_per_s"]
    for form in forms_of(case, with_compiled):
        row: Row = {"op": case.op, "case": case.name, "group": case.group, **case.shape, "dtype": case.dtype}
        found[form] = row | {"mode": mode, "form": form}
        reason = why_not(case, form, mode, rate)
        if reason:
            found[form]["not_run"] = reason
            continue
        function = case.forms[form]()
        found[form]["errors"] = errors(case, form, function, inputs, exact)
        if wrong(case, found[form]["errors"]):
            found[form]["wrong"] = True
            continue
        calls[form] = _call(function, inputs, mode, case.training)
    samples = interleaved(calls, device, effort)
    floor_s = max(case.flops[mode] / rate, case.moved_bytes[mode] / rates["copy_bytes_per_s"])
    for form, times in samples.items():
        found[form] |= summary(times, samples.get(OURS, []))
        if form != FULL:
            found[form]["floor_ms"] = 1e3 * floor_s
    return list(found.values())


def wrong(case: Case, found: dict[str, float]) -> bool:
    limits = {"output": case.tolerance.output, "gradient": case.tolerance.gradient}
    return any(not error <= limits[kind] for kind, error in found.items())


def summary(times: list[float], ours: list[float]) -> Row:
    """Median and quartiles in milliseconds, and how many times ours it takes, round by round."""
    row: Row = {
        "median_ms": 1e3 * statistics.median(times), "low_ms": 1e3 * _quartile(times, 0.25),
        "high_ms": 1e3 * _quartile(times, 0.75), "rounds": len(times),
    }  # fmt: skip
    ratios = [theirs / own for theirs, own in zip(times, ours, strict=False)]
    if ratios:
        row |= {"ratio": statistics.median(ratios), "ratio_low": _quartile(ratios, 0.25)}
        row["ratio_high"] = _quartile(ratios, 0.75)
    return row


def _quartile(values: list[float], fraction: float) -> float:
    return sorted(values)[round(fraction * (len(values) - 1))]
