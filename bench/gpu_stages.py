"""The stages of `gpu_check` that use what other machines use too: the op tests, and the benchmark's registry."""

import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from nystromgan import _backend
from nystromgan.bench import machine, runner
from nystromgan.bench.case import FORWARD, OURS, Case
from nystromgan.bench.cases import cases
from nystromgan.bench.plan import Allowance, Effort, Plan

Row = dict[str, Any]
ROOT = pathlib.Path(__file__).parents[1]
TIME = Effort(0.4, 3, 15, 1.0)


def op_test_rows(
    device: str, tiny: bool, ops: list[str] | None, budget_s: float, folder: pathlib.Path
) -> Iterator[Row]:
    """A row a file of tests/ops, whose tests run each backend on its own device; `wrong` where one fails."""
    paths = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    if not paths:
        yield {"tests": "left out: this installation has no tests, a checkout has them"}
    for path in paths[-1:] if tiny else paths:
        if ops is None or any(op in path.stem or op.split("_")[0] in path.stem for op in ops):
            yield _tested(path, budget_s)


def _tested(path: pathlib.Path, budget_s: float) -> Row:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    row: Row = {"tests": path.stem}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=budget_s)
    except subprocess.TimeoutExpired:
        return {**row, "wrong": True, "summary": f"not done after {budget_s:.0f} s"}
    failed = re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE)
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    return {**row, "wrong": done.returncode != 0, "summary": last, **({"failed": failed[:20]} if failed else {})}


def speed_rows(device: str, tiny: bool, ops: list[str] | None, budget_s: float, folder: pathlib.Path) -> Iterator[Row]:
    """The registry's cases, as `nystromgan bench` measures them and into its files; torch.compile's rows come last."""
    started = time.perf_counter()
    rates = machine.rates(device, tiny)
    yield {"copy_tb_per_s": rates["copy_bytes_per_s"] / 1e12, "bf16_tflops": rates["gemm_bf16_flop_per_s"] / 1e12}
    where = machine.describe(device)
    chosen = [case for case in (_tiny() if tiny else cases(device)) if ops is None or case.op in ops]
    for compiled in (False,) if tiny else (False, True):
        effort, backend = (Effort(0.0, 2, 2), "triton") if tiny else (TIME, "auto")
        plan = Plan(device, rates, effort, Allowance(budget_s) if compiled else None, backend)
        pairs = [(case, mode) for case in chosen for mode in case.modes if case.compiled_in_full or not compiled]
        for pair in pairs:
            if time.perf_counter() - started > budget_s:
                yield {"case": pair[0].name, "mode": pair[1], "left_out": "beyond the budget"}
                continue
            for *_, new in runner.timed([pair], plan, where, folder, lambda message: None):
                yield from new


def _tiny() -> list[Case]:
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
    """One line a case and mode: our time, in floors, and how many times longer each other form takes."""
    timed = [row for row in rows if "median_ms" in row]
    lines = []
    for ours in (row for row in timed if row["form"] == OURS):
        others = [
            f"{row['form']} {row['ratio']:.2f}x"
            for row in timed
            if (row["case"], row["mode"]) == (ours["case"], ours["mode"]) and row["form"] != OURS
        ]
        floors = ours["median_ms"] / ours["floor_ms"]
        title = f"{ours['case']}, {ours['mode']}: {ours['median_ms']:.3f} ms, {floors:.2f} floors"
        lines.append("; ".join([title, *others]))
    return lines
