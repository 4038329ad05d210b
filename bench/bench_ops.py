"""Every case of the registry under pytest-benchmark: to look at one form, or for regressions, by that tool's options.

OMP_NUM_THREADS=2 python -m pytest bench/bench_ops.py -k "N=4096 and nystromgan" --benchmark-columns=median,iqr,rounds

Ratios come from `nystromgan bench`, which interleaves the forms.
"""

from typing import Any

import pytest
import torch

from nystromgan.bench import forms, gate
from nystromgan.bench.case import Case
from nystromgan.bench.cases import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST_FLOPS = 1e11  # of a forward of N x N work
SELECTED = [
    pytest.param(case, form, mode, id=f"{case.name}-{mode}-{form}")
    for case in cases(DEVICE, full=False)
    for mode in case.modes
    for form in forms.forms_of(case, compiled=False)
    if form not in case.peers or (case.peers[form].flops <= LARGEST_FLOPS and mode in case.peers[form].modes)
]


@pytest.mark.parametrize(("case", "form", "mode"), SELECTED)
def test_speed(benchmark: Any, case: Case, form: str, mode: str) -> None:
    inputs = case.make(DEVICE, case.shape, 0)
    function = forms.function_of(case, form)
    found = gate.errors(case, form, function, inputs, gate.Exact(case, inputs, mode))
    assert not gate.wrong(case, found), f"no speed of a wrong result: {found}"
    benchmark.group = f"{case.name}, {mode}"
    benchmark.extra_info = {"errors": found, "flops": case.flops[mode], "moved_bytes": case.moved_bytes[mode]}
    call = forms.call_of(case, function, inputs, mode)
    benchmark(call if DEVICE == "cpu" else lambda: (call(), torch.cuda.synchronize()))
