"""The benchmark: its registry is sound, wrong results get no speed, and what the README says is what was measured."""

import json
import pathlib
import re

import pytest
import torch

from nystromgan import _memory, cli, testing
from nystromgan.bench import cases, machine, measure, report, tables
from nystromgan.bench import cli as bench_cli

ROOT = pathlib.Path(__file__).parents[1]
MACHINES = sorted(path for path in (ROOT / "bench" / "results").glob("cpu-*") if path.is_dir())
RATES = {"gemm_fp32_flop_per_s": 1e11, "gemm_bf16_flop_per_s": 1e11, "copy_bytes_per_s": 1e10}
BRIEF = measure.Effort(0.0, 2, 2)


def small(group: str, dtype: str = "fp32") -> cases.Case:
    """The first case of a group at the size that loads its code."""
    case = next(case for case in cases.cases() if case.group == group and case.dtype == dtype)
    return case._replace(shape=case.small)


GROUPS = sorted({case.group for case in cases.cases()})


def test_names_are_unique() -> None:
    names = [case.name for case in cases.cases()]
    assert len(set(names)) == len(names)
    assert {case.name for case in cases.cases(full=False)} < set(names)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mode", cases.MODES)
def test_every_form_is_right_and_timed(group: str, mode: str) -> None:
    rows = measure.rows(small(group), mode, "cpu", BRIEF, False, RATES)
    assert [row["form"] for row in rows] == measure.forms_of(small(group), False)
    assert all(row["median_ms"] > 0 and row["errors"]["output"] < 0.05 for row in rows), rows
    assert rows[0]["form"] == cases.OURS
    assert rows[0]["ratio"] == 1


def test_a_wrong_result_has_no_speed() -> None:
    case = small("maps")
    forms = {**case.forms, "wrong": lambda: lambda query, key, value: 1.01 * value}
    rows = measure.rows(case._replace(forms=forms), "forward", "cpu", BRIEF, False, RATES)
    assert rows[-1]["wrong"]
    assert "median_ms" not in rows[-1]


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: (lambda n=name: order.append(n)) for name in ("ours", "peer")}
    measure.SAMPLE_S, before = 0.0, measure.SAMPLE_S
    try:
        samples = measure.interleaved(calls, "cpu", measure.Effort(0.0, 2, 2))
    finally:
        measure.SAMPLE_S = before
    assert order[-4:] == ["ours", "peer", "peer", "ours"]
    assert [len(times) for times in samples.values()] == [2, 2]


def test_peak_memory_is_what_a_call_holds() -> None:
    size = 64 << 20
    assert _memory.extra_peak_bytes(lambda: torch.ones(size // 4).sum()) == pytest.approx(size, rel=0.1)


def test_the_command_writes_results_and_the_report_reads_them(tmp_path: pathlib.Path, capsys) -> None:
    arguments = ["bench", "--quick", "--op", "iterative_pinv", "--case", "B=8", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    folder = tmp_path / machine.name()
    rows = json.loads((folder / "iterative_pinv.json").read_text())["rows"]
    assert {row["mode"] for row in rows} == set(cases.MODES)
    assert all(row["peak_bytes"] >= 0 for row in rows)
    assert cli.main(["report", "--results", str(folder), "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "<figure>" not in page, "nothing was measured over tokens"
    assert not re.search(r'(src|href)="https?:', page), "the page must be self-contained"
    assert "| pinv B=8 M=64 fp32 | forward |" in (tmp_path / "page" / "report.md").read_text()


def test_an_unknown_case_is_one_clear_line(capsys) -> None:
    assert cli.main(["bench", "--case", "no such case"]) == 1
    assert "'no such case'" in capsys.readouterr().err


@pytest.mark.parametrize("folder", MACHINES, ids=lambda path: path.name)
def test_committed_results_are_right(folder: pathlib.Path) -> None:
    rows = tables.rows_of(tables.load(folder))
    known = {case.name for case in cases.cases()}
    assert rows
    assert {row["case"] for row in rows} <= known
    assert not [row for row in rows if row["form"] == cases.OURS and row.get("wrong")]


@pytest.mark.parametrize("folder", MACHINES, ids=lambda path: path.name)
def test_committed_results_are_drawn(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert cli.main(["report", "--results", str(folder), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == len(re.findall(r"</svg>\s*</figure>", page)) > 0


def test_readme_shows_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert report.with_headline(text, tables.load(bench_cli.RESULTS / report.README_MACHINE)) == text, "make bench-docs"


def test_half_precision_tolerance_is_the_library_s() -> None:
    assert small("landmarks", "bf16").tolerance == testing.TOLERANCES[torch.bfloat16]
