"""The targets stage of `gpu_check`: what decides the lines of `gpu_targets`, and nothing else.

First every case runs once in a process of its own, which compiles its kernels beside the others'; then cases are timed
one after another, beside the peers that a line names; last what max-autotune compiles.
"""

import functools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import nystromgan
from nystromgan import testing
from nystromgan.bench import clock, draw, forms, gpu_checks, gpu_parts, gpu_stages, gpu_targets, machine, measure
from nystromgan.bench.baselines import landmark
from nystromgan.bench.case import BOTH, BY, FORWARD, OURS, TUNED, Case, Inputs, Peer
from nystromgan.bench.cases import cases
from nystromgan.bench.gpu_targets import Line
from nystromgan.bench.plan import Allowance, Plan, Stage

Row = dict[str, Any]
# Seconds on a machine with an H200 and 16 cores: to start, to compile ahead, a case and mode, one under max-autotune.
START_S, AHEAD_S, CASE_S, AUTOTUNE_S = 20, 60, 3, 50
AHEAD_SHARE = 0.4  # of the time left, until kernels must be compiled
BACKEND_FORMS = (OURS, BY + "triton", BY + "cuda")
TINY = 64  # landmarks, which the interpreter multiplies in seconds


def lines(stage: Stage) -> list[Line]:
    """The lines of the stage's ops; for the interpreter without the sizes, which would take it hours."""
    wanted = [line for line in gpu_targets.LINES if stage.wants(line.op)]
    return [line._replace(shapes=({},)) for line in wanted] if stage.tiny else wanted


def chosen(stage: Stage) -> list[Case]:
    """The cases that the stage's lines name."""
    every = cases("cuda")
    if stage.tiny:
        every = list({case.name: case for case in map(_small, every) if case.shape.get("M", 0) <= TINY}.values())
    wanted = lines(stage)
    return [case for case in every if any(line.places([case]) for line in wanted if line.measure != "error")]


def _small(case: Case) -> Case:
    """Forward alone, of the size at which code is loaded, with one head."""
    shape = {**case.small, "H": 1} if "H" in case.small else case.small
    return case._replace(shape={name: size for name, size in shape.items() if isinstance(size, int)}, modes=(FORWARD,))


def rows(stage: Stage) -> Iterator[Row]:
    """The cases' rows, those of errors, and of launches where a line asks for them."""
    wanted = lines(stage)
    places = {place for line in wanted for place in line.places(chosen(stage))}
    pairs = [(case, mode) for case in chosen(stage) for mode in case.modes if (case.name, mode) in places]
    tuned = [(case, mode) for case, mode in pairs if _peers(case, mode, wanted, tuned=True)]
    estimate = START_S + AHEAD_S + CASE_S * len(pairs) + AUTOTUNE_S * len(tuned)
    yield {"places": len(pairs), "estimated_s_on_an_h200": estimate}
    failed = yield from _ahead(stage, pairs, wanted)
    rates = machine.rates(stage.device, stage.tiny)
    yield {"copy_tb_per_s": rates["copy_bytes_per_s"] / 1e12, "bf16_tflops": rates["gemm_bf16_flop_per_s"] / 1e12}
    plan = gpu_stages.plan_of(stage, rates)._replace(failed=failed)
    for case, mode in pairs:
        yield from _measured(case._replace(peers=_peers(case, mode, wanted)), mode, plan)
    for case, mode in pairs:
        if stage.device == "cuda" and any(
            line.measure == "launches" and (case.name, mode) in line.places([case]) for line in wanted
        ):
            yield _launches(case, mode)
    for case, mode in tuned:
        tuning = plan._replace(compiling=Allowance(stage.left_s()))
        yield from _measured(case._replace(peers=_peers(case, mode, wanted, tuned=True)), mode, tuning)


def _peers(case: Case, mode: str, wanted: Sequence[Line], tuned: bool = False) -> dict[str, Peer]:
    """The peers that a line compares with in this mode: as they are, or those of which max-autotune makes a form."""
    naming = [line for line in wanted if (case.name, mode) in line.places([case])]
    if tuned:
        return {
            name: peer._replace(compiled=False)
            for name, peer in case.peers.items()
            if peer.tuned and any(line.is_peer(name + TUNED) for line in naming)
        }
    return {
        name: peer
        for name, peer in case.peers.items()
        if not peer.needs_compile and any(line.is_peer(name) for line in naming)
    }


def _measured(case: Case, mode: str, plan: Plan) -> Iterator[Row]:
    """The rows of one visit, one of which has `unfinished` where the budget had ended."""
    if time.perf_counter() > plan.deadline:
        yield {"case": case.name, "mode": mode, "unfinished": gpu_parts.UNFINISHED}
        return
    try:
        yield from measure.Measurement(case, mode, plan).visit()
    except Exception as error:  # one case must not end the others
        yield measure.failed_row(case, OURS, mode, error)


def _launches(case: Case, mode: str) -> Row:
    row: Row = {"op": case.op, "case": case.name, "mode": mode, "form": OURS}
    try:
        call = forms.prepared(case, OURS, mode, "cuda")
        call()
        return row | {"launches": clock.launches(call)}
    except Exception as error:  # where there is no profiler
        return row | {"left_out": f"{type(error).__name__}: {str(error)[:200]}"}


def _ahead(
    stage: Stage, pairs: Sequence[tuple[Case, str]], wanted: Sequence[Line]
) -> Generator[Row, None, frozenset[tuple[str, str]]]:
    """Rows of errors, and of kernels compiled ahead; returns (case, form) of those that failed in that."""
    parts: list[Row] = [
        {"errors_of": line.op, "dtype": dtype}
        for line in wanted
        if line.measure == "error"
        for dtype in gpu_targets.ERROR_DTYPES[line.group or ""][: 1 if stage.tiny else None]
    ]
    if stage.device == "cuda":
        modes: dict[str, list[str]] = {}
        for case, mode in pairs:
            modes.setdefault(case.name, []).append(mode)
        parts = [{"case": name, "modes": several} for name, several in modes.items()] + parts
    done, failed = set[tuple[str, str]](), set[tuple[str, str]]()
    until = time.perf_counter() + AHEAD_SHARE * stage.left_s()
    for row in gpu_parts.ahead(stage._replace(deadline=until), "gpu_target_rows", parts):
        yield row
        if "compiled" in row:
            done.add((row["case"], row["compiled"]))
        elif "crashed" in row:
            failed.add((row["case"], row["crashed"]))
        elif "case" in row and row.get("error", "").startswith("exit status -"):  # of a signal
            failed |= {(row["case"], form) for form in BACKEND_FORMS} - done
    return frozenset(failed)


def part_rows(
    device: str, tiny: bool, case: str | None = None, modes: Sequence[str] = (), errors_of: str | None = None,
    dtype: str = "",
) -> Iterator[Row]:  # fmt: skip
    """Runs ours once by every backend, the C++ kernels last; or compares its errors with eager's."""
    if case is not None:
        found = next(one for one in cases(device) if one.name == case)
        yield from _compiled(found, modes, device)
    if errors_of is not None:
        yield _error_row(errors_of, dtype, device, tiny)


def _compiled(case: Case, modes: Sequence[str], device: str) -> Iterator[Row]:
    for form in sorted({OURS, *forms.by_backend(case, device)}, key=BACKEND_FORMS.index):
        start = time.perf_counter()
        for mode in modes:
            try:
                forms.prepared(case, form, mode, device)()
                torch.cuda.synchronize()
            except Exception as error:  # the other forms of the case are then timed without it
                yield {"case": case.name, "crashed": form, "error": f"{type(error).__name__}: {str(error)[:200]}"}
                return  # a fault leaves the process no device
        yield {"case": case.name, "compiled": form, "seconds": time.perf_counter() - start}


def _error_row(op: str, dtype: str, device: str, tiny: bool) -> Row:
    """Our relative errors against float64 over the eager form's, less what the order of sums alone moves them by."""
    kind = gpu_checks.DTYPE_NAMES[dtype]
    function, options, eager, inputs = _compared(op, kind, device, tiny)
    backend = "triton" if device == "cpu" else "auto"
    ours = testing.errors_of(functools.partial(function, **options, backend=backend), _exact(function, options), inputs)
    theirs = testing.errors_of(eager, _exact(function, options), inputs)
    noise = testing.EAGER_NOISE[kind]
    pairs = [(ours.output, theirs.output), *((ours.gradients[name], theirs.gradients[name]) for name in inputs)]
    return {
        "op": op, "case": gpu_targets.errors_name(op, dtype), "mode": BOTH, "form": OURS,
        "error_ratio": max(max(0.0, mine - noise) / other for mine, other in pairs),
        "errors": ours._asdict(), "eager_errors": theirs._asdict(),
    }  # fmt: skip


def _exact(function: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    return functools.partial(function, **options, backend="reference")


def _compared(op: str, dtype: torch.dtype, device: str, tiny: bool) -> tuple[Any, dict[str, Any], Any, Inputs]:
    """The public function, its options, the eager form and inputs of a size where rounding averages out."""
    if op == "nystrom_attention":
        options = {"num_landmarks": 16 if tiny else 64}
        inputs = draw.tokens(1, 1 if tiny else 4, 64 if tiny else 4096, 64, 64, dtype=dtype, device=device)
        return (
            nystromgan.nystrom_attention,
            options,
            functools.partial(testing.eager_nystrom_attention, **options),
            inputs,
        )
    if op == "spatiotemporal_attention":
        inputs = draw.maps(1, 32, (8, 8) if tiny else (64, 64), 128, dtype=dtype, device=device)
        return nystromgan.spatiotemporal_attention, {}, testing.eager_spatiotemporal_attention, inputs
    side = 16 if tiny else 64
    sums = torch.linspace(0.9, 1.0, side, device=device)[:, None]  # equal row sums leave |A|_inf's gradient to rounding
    matrix = (draw.normal(8, side, side, device=device).softmax(-1) * sums).to(dtype)
    return nystromgan.iterative_pinv, {}, landmark.pinv, {"matrix": matrix}
