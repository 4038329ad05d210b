"""Every case of the registry under pytest-benchmark: to look at one form, or for regressions, by that tool's options.

OMP_NUM_THREADS=2 python -m pytest bench/bench_ops.py -k "N=4096 and nystromgan" --benchmark-columns=median,iqr,rounds

Ratios come from `nystromgan bench`, which interleaves the forms.
"""

from typing import Any

import pytest

from nystromgan.bench import cases, measure

SELECTED = [
    pytest.param(case, form, mode, id=f"{case.name}-{mode}-{form}")
    for case in cases.cases(full=False)
    for mode in cases.MODES
    for form in measure.forms_of(case, with_compiled=False)
    if form != cases.FULL or case.shape["N"] <= 4096
]


@pytest.mark.parametrize(("case", "form", "mode"), SELECTED)
def test_speed(benchmark: Any, case: cases.Case, form: str, mode: str) -> None:
    inputs = case.make("cpu", case.shape)
    function = case.forms[form]()
    found = measure.errors(case, form, function, inputs, measure.Exact(case, inputs, mode))
    assert not measure.wrong(case, found), f"no speed of a wrong result: {found}"
    benchmark.group = f"{case.name}, {mode}"
    benchmark.extra_info = {"errors": found, "flops": case.flops[mode], "moved_bytes": case.moved_bytes[mode]}
    benchmark(measure.prepared(case, form, mode, "cpu"))
