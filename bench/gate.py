"""What lets a form be timed: it would not take too long or too much, and its result is right."""

import time

import torch
from torch import Tensor

from nystromgan import testing
from nystromgan.bench.case import FORWARD, Case, Form, Inputs
from nystromgan.bench.forms import as_list, compiles, direction, eager_name, other_function, peer_of
from nystromgan.bench.plan import Plan

LIMIT_BYTES = {"cpu": 4 * 2**30, "cuda": 24 * 2**30}  # of N x N weights


def why_not(case: Case, form: str, mode: str, plan: Plan) -> str | None:
    """The reason to leave a form out; None: measure it."""
    peer = peer_of(case, form)
    if time.perf_counter() > plan.deadline:
        return "beyond the budget"
    if (case.name, form) in plan.failed:
        return "failed in a process of its own"
    if peer is None:
        return None
    if compiles(case, form) and plan.compiling is not None and plan.compiling.left_s <= 0:
        return "the time for torch.compile was spent"
    if mode not in peer.modes:
        return f"has no backward on the {plan.device}"
    # Measured: the share of the rate of products that fused attention reaches; both passes take 3.5 to 6 forwards.
    share = 0.6 if case.dtype == "fp32" else 0.3
    seconds = peer.flops / (share * gemm_rate(plan.rates, case.dtype)) * (1 if mode == FORWARD else 5)
    if seconds > plan.effort.limit_s:
        return f"a call would take about {seconds:.0f} s"
    if plan.too_long is not None and (case.name, eager_name(form)) in plan.too_long:
        return takes_too_long(plan)
    stored = peer.stored_bytes * (1 if mode == FORWARD else 3)
    if stored > LIMIT_BYTES[plan.device]:
        return f"would store {stored / 2**30:.0f} GiB of weights"
    return None


def takes_too_long(plan: Plan) -> str:
    return f"a call takes more than {plan.effort.limit_s:g} s"


def gemm_rate(rates: dict[str, float], dtype: str) -> float:
    """Operations a second of products of `dtype`; half precision may be multiplied as float32.

    Without instructions for bfloat16 torch's product of it runs at a hundredth of float32's rate (AVX2, torch 2.13).
    """
    return max(rates[f"gemm_{name}_flop_per_s"] for name in ("fp32", dtype))


class Exact:
    """What the forms of a case should give, in float64; computed once for all forms of one definition."""

    def __init__(self, case: Case, inputs: Inputs, mode: str) -> None:
        self.case, self.mode, self.whole = case, mode, inputs
        self.inputs = {name: (_first_head(x) if case.heads else x).double() for name, x in inputs.items()}
        self.known: dict[Form | None, list[list[Tensor]]] = {}  # by definition; None is that of ours

    def of(self, form: str) -> list[list[Tensor]]:
        peer = peer_of(self.case, form)
        definition = None if peer is None else peer.definition
        if definition not in self.known:
            self.known[definition] = self._results(definition, peer is not None and peer.coupled)
        return self.known[definition]

    def _results(self, definition: Form | None, coupled: bool) -> list[list[Tensor]]:
        if coupled:
            wide = {name: x.double() for name, x in self.whole.items()}
            return [[_first_head(x) for x in group] for group in results(definition, wide, self.mode)]
        return results(definition or self.case.ours("reference"), self.inputs, self.mode)


def errors(case: Case, form: str, function: Form, inputs: Inputs, exact: Exact) -> dict[str, float]:
    """`timed_errors` without the time."""
    return timed_errors(case, form, function, inputs, exact)[0]


def timed_errors(case: Case, form: str, function: Form, inputs: Inputs, exact: Exact) -> tuple[dict[str, float], float]:
    """Relative errors against float64, of the output and the largest of the gradients; and the seconds of that call.

    A gradient that vanishes is measured against the largest of its siblings. Of exact attention among landmark forms,
    whose N x N weights float64 cannot hold, the output of the first 64 queries alone is compared.
    """
    part = _first_head if case.heads else (lambda x: x)
    peer = peer_of(case, form)
    if case.heads and peer is not None and peer.flops and other_function(case, form):
        return _first_queries_error(case, form, function, inputs)
    start = time.perf_counter()
    values = results(function, inputs, exact.mode)
    seconds = time.perf_counter() - start
    expected = exact.of(form)
    found = {"output": max(testing.relative_error(part(x), y) for x, y in zip(values[0], expected[0], strict=True))}
    if len(values) > 1:
        largest = max(y.norm().item() for y in expected[1])
        found["gradient"] = max(
            _against_siblings(part(x), y, largest) for x, y in zip(values[1], expected[1], strict=True)
        )
    return found, seconds


def _against_siblings(value: Tensor, expected: Tensor, largest: float) -> float:
    norm = expected.norm().item()
    scale = norm if norm > 1e-9 * largest else largest or 1.0
    return (value.double() - expected).norm().item() / scale


def _first_queries_error(case: Case, form: str, function: Form, inputs: Inputs) -> tuple[dict[str, float], float]:
    with torch.no_grad():
        start = time.perf_counter()
        output = function(**inputs)[:1, :1, :64]  # type: ignore[call-overload]
        seconds = time.perf_counter() - start
        query, key, value = (_first_head(inputs[name]).double() for name in ("query", "key", "value"))
        definition = case.peers[eager_name(form)].definition
        expected = definition(query=query[:, :, :64], key=key, value=value)
        return {"output": testing.relative_error(output, expected)}, seconds


def _first_head(tensor: Tensor) -> Tensor:
    """Of a tensor (B, H, ...) or of a weight (H, taps)."""
    return tensor[:1, :1] if tensor.ndim > 2 else tensor[:1]


def results(function: Form, inputs: Inputs, mode: str) -> list[list[Tensor]]:
    """The outputs and, in a backward mode, the gradients along the fixed direction."""
    leaves = {name: x.detach().requires_grad_(mode != FORWARD) for name, x in inputs.items()}
    with torch.set_grad_enabled(mode != FORWARD):
        outputs = as_list(function(**leaves))
    if mode == FORWARD:
        return [[x.detach() for x in outputs]]
    directions = [direction(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), directions, materialize_grads=True)
    return [[x.detach() for x in outputs], list(gradients)]


def wrong(case: Case, found: dict[str, float]) -> bool:
    limits = {"output": case.tolerance.output, "gradient": case.tolerance.gradient}
    return any(not error <= limits[kind] for kind, error in found.items())
