"""The tuning stage: it reaches every entry of the tables, and tells winners from what fails or is wrong."""

import contextlib
import importlib
import json
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nystromgan import _backend, _env, _triton
from nystromgan.bench import clock, draw, forms, gate, gpu_check, gpu_parts, gpu_tuning, gpu_tuning_findings, machine
from nystromgan.bench.gpu_tuning_entries import Entry, Measurement, measurements
from nystromgan.bench.plan import Stage

ARCHITECTURES = (80, 90, 100)
OPS = ("nystrom_attention", "iterative_pinv", "spatiotemporal_attention", "power_iteration")
TABLES = [(op, "TABLE") for op in OPS] + [("nystrom_attention", "SPLITS")]
PLANTED, FAILING, WRONG = "64x16/8/1", "16x16/4/1", "16x32/4/1"


def of_architecture(monkeypatch: pytest.MonkeyPatch, architecture: int) -> list[Measurement]:
    monkeypatch.setattr(_triton, "architecture", lambda _: architecture)
    return measurements("cpu", tiny=False)


def entries_of(op: str, table: str) -> Iterator[Entry]:
    """Every configuration of a table, found by its shape alone."""
    for key, held in getattr(importlib.import_module(f"nystromgan.ops.{op}.tuning"), table).items():
        for column in range(len(held)) if isinstance(held, tuple) else (None,):
            yield Entry(op, table, key, column)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_entry_of_the_tables_is_measured(monkeypatch: pytest.MonkeyPatch, architecture: int) -> None:
    found = {one.entry for one in of_architecture(monkeypatch, architecture)}
    every = {entry for place in TABLES for entry in entries_of(*place)}
    wanted = {entry for entry in every if architecture in (entry.key if isinstance(entry.key, tuple) else (entry.key,))}
    assert found == wanted - {Entry("iterative_pinv", "TABLE", ("beside", architecture), 0)}, "whose candidates are one"


def test_what_matters_most_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [one for one in of_architecture(monkeypatch, 90) if one.entry.op == "nystrom_attention"]
    order = [(one.case.shape["N"], one.case.shape["D"], one.case.dtype) for one in found]
    assert list(dict.fromkeys(order))[:5] == [
        (65536, 64, "bf16"), (16384, 64, "bf16"), (2048, 8, "bf16"), (16384, 4, "bf16"), (16384, 64, "fp32"),
    ]  # fmt: skip


@pytest.mark.skipif(_env.triton_interpret(), reason="interpreted kernels are launched another way")
@pytest.mark.parametrize("op", OPS)
def test_a_candidate_is_what_the_measured_call_launches(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """An entry that its case does not run would be tuned by noise."""
    from triton.runtime.jit import JITFunction

    launches: list[Any] = []
    recorded = lambda self, *_, grid, **options: launches.append((self.__name__, grid, options))  # noqa: E731
    monkeypatch.setattr(JITFunction, "run", recorded)
    monkeypatch.setattr(_backend, "unsupported_reasons", lambda *_: [])
    monkeypatch.setattr(draw, "normal", lambda *shape, dtype=torch.float32, **_: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(forms, "direction", torch.empty_like)
    for one in of_architecture(monkeypatch, 90):
        if one.entry.op == op:
            inputs = one.case.make("cpu", one.case.shape, 0)
            seen = set()
            for name in one.names:
                launches.clear()
                with one.entry.using(name):
                    forms.call_of(one.case, one.case.ours("triton"), inputs, one.mode)()
                seen.add(str(launches))
                if len(seen) > 1:
                    break
            assert len(seen) > 1, one.place


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measurement:
    """One entry whose calls do no work and take 2 ms, 1 ms of the PLANTED; what is FAILING raises."""
    place = Entry("nystrom_attention", "TABLE", ("keys", 80, 4), 0)
    one = next(one for one in measurements("cpu", tiny=True) if one.entry == place)

    def ours(backend: str) -> Any:
        def form(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if one.entry.own == FAILING and backend == "triton":
                raise RuntimeError("out of resource: shared memory")
            return value * (2.0 if one.entry.own == WRONG and backend == "triton" else 1.0) + 0.0 * (query + key)

        return form

    monkeypatch.setattr(clock, "median_ms", lambda *_: 1.0 if one.entry.own == PLANTED else 2.0)
    return one._replace(candidates=(one.entry.own, FAILING, WRONG, PLANTED), case=one.case._replace(ours=ours))


def rows_of(monkeypatch: pytest.MonkeyPatch, found: list[Measurement], **stage: Any) -> list[dict[str, Any]]:
    monkeypatch.setattr(gpu_tuning, "measurements", lambda *_: found)
    monkeypatch.setattr(_backend, "unsupported_reasons", lambda *_: [])
    return list(gpu_tuning.rows(Stage("cpu", **stage)))


def test_the_fastest_right_candidate_wins_and_others_say_why_not(
    monkeypatch: pytest.MonkeyPatch, measured: Measurement
) -> None:
    (row,) = rows_of(monkeypatch, [measured])
    own = measured.entry.own
    assert own not in (PLANTED, FAILING, WRONG)
    assert (row["own"], row["own_ms"], row["best"], row["best_ms"]) == (own, 2.0, PLANTED, 1.0)
    assert row["times_ms"] == {own: 2.0, PLANTED: 1.0}
    assert row["refused"][FAILING] == "RuntimeError: out of resource: shared memory"
    assert row["refused"][WRONG].startswith("ArithmeticError: wrong")
    assert "wrong" not in row


def test_a_table_is_as_it_was_after_a_failure_too(measured: Measurement) -> None:
    for one in (measured, next(one for one in measurements("cpu", tiny=True) if one.entry.key == ("iterate", 80))):
        tables = [table for name, table in vars(one.entry.tuning).items() if isinstance(table, dict) and name.isupper()]
        before = [dict(table) for table in tables]
        with contextlib.suppress(KeyboardInterrupt), one.entry.using(FAILING):
            assert one.entry.own == FAILING
            assert tables != before
            raise KeyboardInterrupt
        assert tables == before


def test_a_table_whose_own_configuration_fails_is_wrong(monkeypatch: pytest.MonkeyPatch, measured: Measurement) -> None:
    with measured.entry.using(FAILING):
        (row,) = rows_of(monkeypatch, [measured])
    assert row["wrong"]
    assert row["own_ms"] is None
    (finding,) = gpu_tuning_findings.findings([row])
    assert finding.change
    assert finding.best == PLANTED


def test_what_is_beyond_the_budget_says_so(monkeypatch: pytest.MonkeyPatch, measured: Measurement) -> None:
    (row,) = rows_of(monkeypatch, [measured], deadline=0.0)
    assert row == {**measured.place, "unfinished": gpu_parts.UNFINISHED}
    left = iter([1.0, 1.0])  # until the entry is begun, and of its first candidate
    monkeypatch.setattr(Stage, "left_s", lambda _: next(left, -1.0))
    (row,) = rows_of(monkeypatch, [measured])
    assert list(row["times_ms"]) == [measured.entry.own]
    assert set(row["refused"]) == {FAILING, WRONG, PLANTED}
    assert row["unfinished"]
    assert not gpu_tuning_findings.findings([row])


def test_without_a_reference_nothing_is_judged(monkeypatch: pytest.MonkeyPatch, measured: Measurement) -> None:
    def ours(backend: str) -> Any:
        raise MemoryError("out of memory")

    (row,) = rows_of(monkeypatch, [measured._replace(case=measured.case._replace(ours=ours))])
    assert row == {**measured.place, "unfinished": "no reference: MemoryError: out of memory"}


def test_after_a_fault_nothing_else_runs(monkeypatch: pytest.MonkeyPatch, measured: Measurement) -> None:
    monkeypatch.setattr(gpu_tuning, "_alive", lambda _: False)
    first, last = rows_of(monkeypatch, [measured, measured])
    assert first["device_lost"] == FAILING
    assert list(first["times_ms"]) == [measured.entry.own]
    assert first["refused"][PLANTED] == "no device"
    assert "wrong" not in first
    assert last["unfinished"]


def test_a_run_goes_on_where_one_of_the_commit_was_cut_short(
    monkeypatch: pytest.MonkeyPatch, measured: Measurement, tmp_path: pathlib.Path
) -> None:
    other = measured._replace(entry=measured.entry._replace(column=1))
    done = {**json.loads(json.dumps(measured.place)), "times_ms": {}, "commit": "abc"}
    (tmp_path / "tuning.json").write_text(json.dumps({"rows": [done]}))
    for commit, first in (("abc", other), ("abc+", measured), ("def", measured)):
        monkeypatch.setattr(machine, "commit", lambda commit=commit: commit)
        rows = rows_of(monkeypatch, [measured, other], folder=tmp_path)
        assert [row["column"] == first.place["column"] for row in rows] == [True, False]
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    (row,) = rows_of(monkeypatch, [measured, other], folder=tmp_path, deadline=0.0)
    assert row["column"] == other.place["column"], "what is measured is not missing"


def test_parts_together_compile_every_candidate(monkeypatch: pytest.MonkeyPatch, measured: Measurement) -> None:
    run: list[str] = []
    monkeypatch.setattr(gpu_tuning, "wanted", lambda *_: [measured] * 30)
    monkeypatch.setattr(gate, "results", lambda *_: run.append(measured.entry.own) or 1 / 0)
    for share in range(gpu_tuning.SHARES):
        (row,) = gpu_tuning.part_rows(None, [], share, "cpu", True)
        assert row["share"] == share
    assert {name: run.count(name) for name in measured.names} == dict.fromkeys(measured.names, 30)
    assert list(gpu_tuning.part_rows(None, [gpu_tuning._place(measured.place)], 0, "cpu", True))
    assert len(run) == 30 * len(measured.names)


def row_of(entry: Entry, times: dict[str, float], case: str = "a") -> dict[str, Any]:
    place = {"op": entry.op, "table": entry.table, "key": entry.key, "column": entry.column_name}
    row = place | {"case": case, "mode": "forward", "own": entry.own, "times_ms": times}
    return json.loads(json.dumps(row))


def test_a_finding_is_over_all_cases_of_an_entry() -> None:
    """The best of one case that another cannot run, or runs far slower, is not the table's."""
    entry = Entry("nystrom_attention", "TABLE", ("keys", 90, 2), 0)
    own = entry.own
    rows = [
        row_of(entry, {own: 2.0, "a": 1.0, "b": 0.5, "c": 1.5}),
        row_of(entry, {own: 8.0, "a": 16.0, "c": 5.0}, "b"),
    ]
    (finding,) = gpu_tuning_findings.findings(rows)
    assert (finding.own, finding.own_ms, finding.best, finding.cases) == (own, pytest.approx(4.0), "c", 2)
    assert finding.best_ms == pytest.approx(statistics.geometric_mean((1.5, 5.0)))
    assert finding.ratio == pytest.approx(4.0 / math.sqrt(7.5))
    assert finding.change
    assert str(finding).startswith("CHANGE")
    assert json.dumps(finding.record())
    (finding,) = gpu_tuning_findings.findings([row_of(entry, {own: 1.0, "a": 0.99})])
    assert finding.best == "a"
    assert not finding.change, "by less than times repeat"
    (finding,) = gpu_tuning_findings.findings([row_of(entry, {})])
    assert (finding.best, finding.change) == (None, False)
    assert "nothing runs" in str(finding)


def test_lines_to_paste_are_the_table_s_rows() -> None:
    """What is pasted into the table is read back as a table that holds the winners."""
    entries = [
        *(Entry("nystrom_attention", "TABLE", ("keys", 90, 2), column) for column in (0, 2)),
        Entry("nystrom_attention", "SPLITS", 90), Entry("iterative_pinv", "TABLE", ("chip", 90), 1),
        Entry("spatiotemporal_attention", "TABLE", ("forward", 90, 4), 2), Entry("power_iteration", "TABLE", 90),
    ]  # fmt: skip
    winners = ["16x16/8/1", "32x16/8/1", "16", "2/1", "32x64/8/1", "8x512"]
    found = gpu_tuning_findings.findings(
        row_of(entry, {entry.own: 2.0, name: 1.0}) for entry, name in zip(entries, winners, strict=True)
    )
    lines = gpu_tuning_findings.pasted(found)
    assert [line for line in lines if not line.startswith(" ")] == [
        "nystromgan/ops/nystrom_attention/tuning.py, TABLE:", "nystromgan/ops/nystrom_attention/tuning.py, SPLITS:",
        "nystromgan/ops/iterative_pinv/tuning.py, TABLE:", "nystromgan/ops/spatiotemporal_attention/tuning.py, TABLE:",
        "nystromgan/ops/power_iteration/tuning.py, TABLE:",
    ]  # fmt: skip
    tables = iter(eval("{" + line + "}") for line in lines if line.startswith(" "))
    keys, splits, chip, maps, power = tables
    middle = entries[0].tuning.TABLE["keys", 90, 2][1]
    assert keys == {("keys", 90, 2): ("16x16/8/1", middle, "32x16/8/1")}
    assert splits == {90: 16}
    assert chip["chip", 90][1] == "2/1"
    assert len(chip["chip", 90]) == 4
    assert maps["forward", 90, 4][2] == "32x64/8/1"
    assert power == {90: "8x512"}
    assert not gpu_tuning_findings.pasted([])


def test_the_command_writes_and_prints_what_it_finds(
    monkeypatch: pytest.MonkeyPatch, measured: Measurement, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu_tuning, "measurements", lambda *_: [measured])
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    arguments = ["--device", "cpu", "--stage", "tuning", "--op", "nystrom_attention", "--output", str(tmp_path)]
    assert gpu_check.main(arguments) == gpu_check.GOOD
    (path,) = tmp_path.glob("*/tuning.json")
    (finding,) = json.loads(path.read_text())["findings"]
    assert (finding["best"], finding["change"], finding["ratio"]) == (PLANTED, True, 2.0)
    printed = capsys.readouterr().out
    assert "CHANGE" in printed
    assert f'    ("keys", 80, 4): ("{PLANTED}", ' in printed


def test_the_interpreter_measures_real_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """What runs on a GPU machine, on the CPU: candidates of the pseudo-inverse's kernels, right and timed."""
    if not _env.triton_interpret():
        done = gpu_parts.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "real_kernels"],
            environment={**os.environ, "TRITON_INTERPRET": "1"},
        )
        assert done[0] == 0, done[1] + done[2]
        return
    monkeypatch.setattr(clock, "median_ms", lambda call, *_: call() is None or 1.0)
    names = ("chip", "iterate", "product")
    found = [one for one in measurements("cpu", tiny=True) if one.entry.key in [(name, 80) for name in names]]
    rows = rows_of(monkeypatch, [one._replace(candidates=one.names[:2]) for one in found])
    assert [row["key"][0] for row in rows] == list(names)
    assert not any(row["refused"] for row in rows), rows
    assert all(len(row["times_ms"]) == 2 for row in rows)
