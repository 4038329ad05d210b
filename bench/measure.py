"""One case: the gate, then interleaved rounds of every form.

A form whose result is wrong is not timed. In each round every form runs once, so that what disturbs the machine
disturbs all of them; ratios are medians of the rounds' ratios.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nystromgan import _backend, testing
from nystromgan.bench import clock
from nystromgan.bench.case import BACKWARD, BY, COMPILED, FORWARD, OURS, TUNED, Case, Form, Inputs, Peer, Shape

Row = dict[str, Any]
LIMIT_BYTES = {"cpu": 4 * 2**30, "cuda": 24 * 2**30}  # of N x N weights
EVERY_ROUND = 1.8  # forms slower than this times the fastest peer are timed in the first two rounds only


class Effort(NamedTuple):
    """How long to repeat one case in one mode; a form that should take longer than the limit is left out."""

    budget_s: float
    least_rounds: int
    most_rounds: int
    limit_s: float = 3.0


QUICK, THOROUGH = Effort(0.6, 3, 7, 0.7), Effort(1.5, 5, 21)


class Allowance:
    """Seconds that torch.compile may take in a whole run; what comes after they are spent is left out."""

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.left_s -= time.perf_counter() - start


class Plan(NamedTuple):
    """What a run measures on: device and backend, how long, the time for torch.compile if any, the machine's rates."""

    device: str
    rates: dict[str, float]
    effort: Effort = QUICK
    compiling: Allowance | None = None
    backend: str = "auto"


def forms_of(case: Case, compiled: bool) -> list[str]:
    """The names of ours and of the peers, each compiled one after its eager one."""
    names = [OURS]
    for name, peer in case.peers.items():
        names += [name] if compiled or not peer.needs_compile else []
        if compiled and case.compiled_in_full and peer.compiled:
            names += [name + COMPILED] + ([name + TUNED] if peer.tuned else [])
    return names


def by_backend(case: Case, device: str) -> list[str]:
    """Ours by each GPU backend, where there is a choice; OURS is the first of them."""
    able = [name for name in _backend.IMPLEMENTED.get(case.op, ()) if name in ("cuda", "triton")]
    able = [name for name in able if device == "cuda" and not _backend.unsupported_reasons(case.op, name, [])]
    return [BY + name for name in able] if len(able) > 1 else []


def eager_name(form: str) -> str:
    return form.removesuffix(COMPILED).removesuffix(TUNED)


def peer_of(case: Case, form: str) -> Peer | None:
    """The peer that a form is of; None for ours."""
    return None if form == OURS or form.startswith(BY) else case.peers[eager_name(form)]


def compiles(case: Case, form: str) -> bool:
    peer = peer_of(case, form)
    return form.endswith((COMPILED, TUNED)) or (peer is not None and peer.needs_compile)


def function_of(case: Case, form: str, backend: str = "auto") -> Form:
    """The form by its name, with state of its own."""
    peer = peer_of(case, form)
    if peer is None:
        return case.ours(form.removeprefix(BY) if form.startswith(BY) else backend)
    made = peer.make()
    if form.endswith(COMPILED):
        return torch.compile(made, dynamic=False)
    if form.endswith(TUNED):
        return torch.compile(made, dynamic=False, mode="max-autotune-no-cudagraphs")
    return made


def prepared(case: Case, form: str, mode: str, device: str, shape: Shape | None = None) -> Callable[[], Any]:
    """The call to measure on fresh inputs: without gradients for a forward; a backward alone runs on a kept graph."""
    return call_of(case, function_of(case, form), case.make(device, shape or case.shape, 0), mode)


def call_of(case: Case, form: Form, inputs: Inputs, mode: str) -> Callable[[], Any]:
    if mode == FORWARD and not case.training:
        return torch.no_grad()(lambda: form(**inputs))
    # An optimizer writes to its tensors; other forms are to find theirs as they were.
    inputs = inputs if case.optimizer is None else {name: x.clone() for name, x in inputs.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    if mode == FORWARD:
        return lambda: form(**leaves)
    # With gradients, as it will be called: torch.compile would otherwise compile twice.
    directions = [_direction(x.detach()) for x in _as_list(form(**leaves))]
    tensors = list(leaves.values())
    if mode == BACKWARD:
        outputs = _as_list(form(**leaves))
        return lambda: torch.autograd.grad(outputs, tensors, directions, retain_graph=True, materialize_grads=True)
    if case.optimizer is not None:
        return _step(
            lambda: torch.autograd.grad(_as_list(form(**leaves)), tensors, directions, materialize_grads=True),
            tensors,
            case,
        )
    return lambda: torch.autograd.grad(_as_list(form(**leaves)), tensors, directions, materialize_grads=True)


def _step(gradients: Callable[[], Sequence[Tensor]], tensors: list[Tensor], case: Case) -> Callable[[], None]:
    """Gradients, and the optimizer's step along them."""
    assert case.optimizer is not None
    optimizer = case.optimizer(tensors)

    def step() -> None:
        for tensor, gradient in zip(tensors, gradients(), strict=True):
            tensor.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return step


def _as_list(output: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def why_not(case: Case, form: str, mode: str, plan: Plan) -> str | None:
    """The reason to leave a form out; None: measure it."""
    peer = peer_of(case, form)
    if peer is None:
        return None
    if compiles(case, form) and plan.compiling is not None and plan.compiling.left_s <= 0:
        return "the time for torch.compile was spent"
    if mode not in peer.modes:
        return f"has no backward on the {plan.device}"
    # Measured: the share of the rate of products that fused attention reaches; both passes take 3.5 to 6 forwards.
    share = 0.6 if case.dtype == "fp32" else 0.3
    seconds = peer.flops / (share * _gemm_rate(plan.rates, case.dtype)) * (1 if mode == FORWARD else 5)
    if seconds > plan.effort.limit_s:
        return f"a call would take about {seconds:.0f} s"
    stored = peer.stored_bytes * (1 if mode == FORWARD else 3)
    if stored > LIMIT_BYTES[plan.device]:
        return f"would store {stored / 2**30:.0f} GiB of weights"
    return None


def _gemm_rate(rates: dict[str, float], dtype: str) -> float:
    return rates[f"gemm_{dtype}_flop_per_s"]


class Exact:
    """What the forms of a case should give, in float64; computed once for all forms of one definition."""

    def __init__(self, case: Case, inputs: Inputs, mode: str) -> None:
        self.case, self.mode, self.whole = case, mode, inputs
        self.inputs = {name: (_first_head(x) if case.heads else x).double() for name, x in inputs.items()}
        self.ours: list[list[Tensor]] | None = None

    def of(self, form: str) -> list[list[Tensor]]:
        peer = peer_of(self.case, form)
        if peer is not None and peer.coupled:
            wide = {name: x.double() for name, x in self.whole.items()}
            return [[_first_head(x) for x in group] for group in results(peer.definition, wide, self.mode)]
        if peer is not None and peer.definition is not None:
            return results(peer.definition, self.inputs, self.mode)
        if self.ours is None:
            self.ours = results(self.case.ours("reference"), self.inputs, self.mode)
        return self.ours


def errors(case: Case, form: str, function: Form, inputs: Inputs, exact: Exact) -> dict[str, float]:
    """Relative errors against float64: of the output, and the largest of the gradients.

    A gradient that vanishes is measured against the largest of its siblings. Of exact attention among landmark forms,
    whose N x N weights float64 cannot hold, the output of the first 64 queries alone is compared.
    """
    part = _first_head if case.heads else (lambda x: x)
    peer = peer_of(case, form)
    if case.heads and peer is not None and peer.flops and other_function(case, form):
        return {"output": _first_queries_error(case, form, function, inputs)}
    values = results(function, inputs, exact.mode)
    expected = exact.of(form)
    found = {"output": max(testing.relative_error(part(x), y) for x, y in zip(values[0], expected[0], strict=True))}
    if len(values) > 1:
        largest = max(y.norm().item() for y in expected[1])
        found["gradient"] = max(
            _against_siblings(part(x), y, largest) for x, y in zip(values[1], expected[1], strict=True)
        )
    return found


def _against_siblings(value: Tensor, expected: Tensor, largest: float) -> float:
    norm = expected.norm().item()
    scale = norm if norm > 1e-9 * largest else largest or 1.0
    return (value.double() - expected).norm().item() / scale


def other_function(case: Case, form: str) -> bool:
    peer = peer_of(case, form)
    return peer is not None and peer.definition is not None


def _first_queries_error(case: Case, form: str, function: Form, inputs: Inputs) -> float:
    with torch.no_grad():
        output = function(**inputs)[:1, :1, :64]  # type: ignore[call-overload]
        query, key, value = (_first_head(inputs[name]).double() for name in ("query", "key", "value"))
        definition = case.peers[eager_name(form)].definition
        return testing.relative_error(output, definition(query=query[:, :, :64], key=key, value=value))


def _first_head(tensor: Tensor) -> Tensor:
    return tensor[:1, :1]


def results(function: Form, inputs: Inputs, mode: str) -> list[list[Tensor]]:
    """The outputs and, in a backward mode, the gradients along the fixed direction."""
    leaves = {name: x.detach().requires_grad_(mode != FORWARD) for name, x in inputs.items()}
    with torch.set_grad_enabled(mode != FORWARD):
        outputs = _as_list(function(**leaves))
    if mode == FORWARD:
        return [[x.detach() for x in outputs]]
    directions = [_direction(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), directions, materialize_grads=True)
    return [[x.detach() for x in outputs], list(gradients)]


def _direction(output: Tensor) -> Tensor:
    """A fixed direction; every head of every sample has the same, so that a part of the output has that part of it."""
    shape = output.shape if output.ndim < 4 else (1, 1, *output.shape[2:])
    direction = testing.normal(*shape, dtype=torch.bfloat16, device=output.device.type, seed=9)
    return direction.to(output).expand_as(output).contiguous()


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


def wrong(case: Case, found: dict[str, float]) -> bool:
    limits = {"output": case.tolerance.output, "gradient": case.tolerance.gradient}
    return any(not error <= limits[kind] for kind, error in found.items())


def floor_ms(case: Case, mode: str, rates: dict[str, float]) -> float:
    """The time of the operations at the rate of products, or of the bytes at that of a copy, whichever is longer."""
    seconds = max(case.flops[mode] / _gemm_rate(rates, case.dtype), case.moved_bytes[mode] / rates["copy_bytes_per_s"])
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
