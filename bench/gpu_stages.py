"""The speed stage of `gpu_check`: the benchmark's registry, as other machines measure it."""

import pathlib
from collections.abc import Iterator
from typing import Any

from nystromgan import _backend
from nystromgan.bench import gpu_parts, machine, runner, store
from nystromgan.bench.case import FORWARD, OURS, Case
from nystromgan.bench.cases import cases
from nystromgan.bench.plan import Allowance, Effort, Plan, Stage

Row = dict[str, Any]
TIME = Effort(0.4, 3, 15, 1.0)


def speed_rows(stage: Stage) -> Iterator[Row]:
    """The registry's cases, as `nystromgan bench` measures them and into its files; torch.compile's rows come last.

    Cases without a row of this commit come first, so that a run goes on where the one before was cut short.
    """
    rates = machine.rates(stage.device, stage.tiny)
    yield {"copy_tb_per_s": rates["copy_bytes_per_s"] / 1e12, "bf16_tflops": rates["gemm_bf16_flop_per_s"] / 1e12}
    where = machine.describe(stage.device)
    chosen = [case for case in (tiny_cases() if stage.tiny else cases(stage.device)) if stage.wants(case.op)]
    for compiled in (False,) if stage.tiny else (False, True):
        allowance = Allowance(stage.left_s()) if compiled else None
        plan = plan_of(stage, rates)._replace(compiling=allowance)
        pairs = [(case, mode) for case in chosen for mode in case.modes if case.compiled_in_full or not compiled]
        known = _measured(stage.folder, where["commit"])
        for pair in sorted(pairs, key=lambda pair: (pair[0].name, pair[1]) in known):
            if stage.left_s() < 0:
                yield {"case": pair[0].name, "mode": pair[1], "unfinished": gpu_parts.UNFINISHED}
                continue
            for *_, new in runner.timed([pair], plan, where, stage.folder, lambda message: None, stage.deadline):
                yield from new


def plan_of(stage: Stage, rates: dict[str, float]) -> Plan:
    """Ours by the chosen backend; under the interpreter, the Triton kernels."""
    if stage.tiny:
        return Plan(stage.device, rates, Effort(0.0, 2, 2), backend="triton", deadline=stage.deadline)
    return Plan(stage.device, rates, TIME, deadline=stage.deadline)


def _measured(folder: pathlib.Path, commit: str | None) -> set[tuple[str, str]]:
    """The cases and modes that have a time at this commit; none at one whose files have changed since."""
    if commit is None or commit.endswith("+"):
        return set()
    rows = store.rows_of(store.load(folder))
    return {(row["case"], row["mode"]) for row in rows if row.get("commit") == commit and "median_ms" in row}


def tiny_cases() -> list[Case]:
    """One small case an op, for the interpreter, whose backward takes seconds: forward, beside the first peer."""
    found = {
        case.op: case for case in reversed(cases("cpu")) if case.dtype == "fp32" and case.op in _backend.IMPLEMENTED
    }
    return [
        case._replace(
            shape={**case.small, "H": 1} if "H" in case.small else case.small,
            peers=dict(list(case.peers.items())[:1]), modes=(FORWARD,),
        )
        for case in found.values()
    ]  # fmt: skip


def summary(rows: list[Row]) -> list[str]:
    """One line a case and mode: our time on the GPU and of a plain call, in floors, and what other forms take of it."""
    timed = [row for row in rows if "median_ms" in row]
    lines = []
    for ours in (row for row in timed if row["form"] == OURS):
        others = [
            f"{row['form']} {row.get('graph_ratio', row['ratio']):.2f}x"
            for row in timed
            if (row["case"], row["mode"]) == (ours["case"], ours["mode"]) and row["form"] != OURS
        ]
        gpu_ms = ours.get("graph_ms") or ours["median_ms"]
        title = f"{ours['case']}, {ours['mode']}: {gpu_ms:.3f} ms, {gpu_ms / ours['floor_ms']:.2f} floors"
        lines.append("; ".join([f"{title}, {ours['median_ms']:.3f} ms a plain call", *others]))
    return lines
