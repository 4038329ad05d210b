"""Time and peak memory of the block in each form as tokens grow."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import nystromgan
from nystromgan.nn import SelfAttention3d
from nystromgan.testing import MEMORY_ENVIRONMENT
from nystromgan.zoo.demo import scene

GRIDS = ((4, 16, 16), (8, 16, 16), (4, 32, 32), (8, 32, 32), (16, 32, 32), (8, 64, 64), (16, 64, 64))
TORCH = "exact, torch's fused attention"
FORMS = {"exact": scene.EXACT, TORCH: scene.EXACT, scene.GRID.name: scene.GRID, scene.CLUSTERED.name: scene.CLUSTERED}
MODES = ("forward", "forward + backward")
LIMIT_S = 3.5  # exact attention is not run where a call should take longer, or more than LIMIT_BYTES
LIMIT_BYTES = 3 * 2**30
BUDGET_S = 0.5  # of repeating one measurement


class Case(NamedTuple):
    """One measurement."""

    form: str
    mode: str
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width


def cases(quick: bool) -> list[Case]:
    grids = GRIDS[:4] if quick else GRIDS
    return [Case(form, mode, grid) for mode in MODES for form in FORMS for grid in grids]


def torch_block(module: SelfAttention3d, x: Tensor) -> Tensor:
    """The block by torch's fused attention, which wants tokens before channels and value's head dim for all."""
    query, key, value = (
        conv(x).flatten(2).mT[:, None].contiguous() for conv in (module.query, module.key, module.value)
    )
    pad = (0, value.shape[-1] - query.shape[-1])
    scale = query.shape[-1] ** -0.5
    output = functional.scaled_dot_product_attention(
        functional.pad(query, pad), functional.pad(key, pad), value, scale=scale
    )
    return x + module.gamma * output[:, 0].mT.reshape(x.shape)


def prepared(case: Case, seed: int) -> Callable[[], object]:
    """The call to measure: a forward without gradients, or a forward and the gradients of input and weights."""
    features = scene.wide_features(seed, case.grid)
    module = scene.block(FORMS[case.form], seed)
    function = (lambda x: torch_block(module, x)) if case.form == TORCH else module
    if case.mode == "forward":
        return torch.no_grad()(lambda: function(features))
    module.requires_grad_(True)
    features.requires_grad_(True)
    grad_output = torch.ones_like(features)
    inputs = [features, *module.parameters()]
    return lambda: torch.autograd.grad(function(features), inputs, grad_output)


def timed(call: Callable[[], object]) -> dict[str, Any]:
    """Median, least and most milliseconds of 3 to 12 calls; a short first call is a warm-up and does not count."""
    durations = [_duration_s(call)]
    if durations[0] < BUDGET_S:
        durations = []
    while len(durations) < 3 or (sum(durations) < BUDGET_S and len(durations) < 12):
        durations.append(_duration_s(call))
    return {
        "median_ms": 1e3 * statistics.median(durations),
        "min_ms": 1e3 * min(durations),
        "max_ms": 1e3 * max(durations),
        "repeats": len(durations),
    }


def _duration_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def why_not(case: Case, before: dict[str, Any] | None) -> str | None:
    """The reason to leave out a case of exact attention, from the one of fewer tokens before it; None: measure it."""
    if before is None or FORMS[case.form].num_landmarks is not None:
        return None
    if "not_run" in before:
        return before["not_run"]
    if before["min_ms"] / 1e3 * (case.tokens / before["tokens"]) ** 2 > LIMIT_S:
        return f"from {case.tokens:,} tokens on a call would take over {LIMIT_S:g} s"
    stores_weights = case.form == "exact" and bool(nystromgan.available_backends()["cpu"])
    if stores_weights and 20 * case.tokens**2 > LIMIT_BYTES:
        return f"from {case.tokens:,} tokens on the reference backend would take over {LIMIT_BYTES >> 30} GiB"
    return None


def times(selected: list[Case], seed: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a case: its name, its time or the reason why it was not run."""
    rows: list[dict[str, Any]] = []
    for case in selected:
        previous = rows[-1] if rows and (rows[-1]["form"], rows[-1]["mode"]) == (case.form, case.mode) else None
        row: dict[str, Any] = {**case._asdict(), "tokens": case.tokens}
        reason = why_not(case, previous)
        row.update({"not_run": reason} if reason else timed(prepared(case, seed)))
        progress(f"{case.mode}, {case.form}: {case.tokens:,} tokens")
        rows.append(row)
    return rows


def add_memory(rows: list[dict[str, Any]], seed: int, progress: Callable[[str], None]) -> None:
    """Adds peak_bytes to every row that was run, measured in a process of its own."""
    run = [row for row in rows if "not_run" not in row]
    request = json.dumps({"seed": seed, "cases": [[row[name] for name in Case._fields] for row in run]})
    # Large blocks go back to the system when freed, so that each case starts from the same base.
    environment = {**os.environ, **MEMORY_ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen(
        [sys.executable, "-m", "nystromgan.zoo.demo.memory"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(request)
    child.stdin.close()
    for row, line in zip(run, iter(child.stdout.readline, ""), strict=False):
        row["peak_bytes"] = int(line)
        progress(f"memory, {row['mode']}, {row['form']}: {row['tokens']:,} tokens")
    child.stdout.close()
    if child.wait() != 0:
        raise RuntimeError(f"the memory measurement ended early, with exit status {child.returncode}")
