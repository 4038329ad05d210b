"""Rounds and visits: every form in turn, twice in a run, and a ratio marked where they disagree."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nystromgan.bench import clock, measure, runner, store, tables
from nystromgan.bench.case import COMPILED, OURS, Case, Peer
from nystromgan.bench.cases import iterative_pinv
from nystromgan.bench.plan import QUICK, Allowance, Effort, Plan

RATES = {"gemm_fp32_flop_per_s": 1e13, "gemm_bf16_flop_per_s": 1e13, "copy_bytes_per_s": 1e10}
PLAN = Plan("cpu", RATES, Effort(0.0, 5, 5, visits=2))
WHERE = {"commit": "abc"}


class Ticks:
    """A clock that only what it measures moves on."""

    device = "cpu"

    def __init__(self) -> None:
        self.now = 0.0

    def number_of_sets(self, set_bytes: int) -> int:
        return 1

    def sample_s(self, calls: list[clock.Call], repeats: int) -> float:
        start = self.now
        for _ in range(repeats):
            calls[0]()
        return (self.now - start) / repeats

    def taking(self, seconds: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which takes the first of `seconds` on this clock."""

        def call(**inputs: Any) -> Any:
            self.now += seconds[0]
            return function(**inputs)

        return call


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ticks]:
    made = Ticks()
    monkeypatch.setitem(clock.CLOCKS, "cpu", made)
    return made


def timed_case(ticks: Ticks, **peers: list[float]) -> Case:
    """Ours takes a second, each peer its own, which may change."""
    case = iterative_pinv.pinv_case(8, 16, "fp32")
    eager = case.peers["eager"].make()
    return case._replace(
        ours=lambda backend: ticks.taking([1.0], case.ours(backend)),
        peers={name: Peer(lambda s=seconds: ticks.taking(s, eager), compiled=True) for name, seconds in peers.items()},
        compiled_in_full=True,
    )


def test_rounds_are_interleaved(ticks: Ticks) -> None:
    order: list[str] = []
    calls = {name: [lambda n=name: order.append(n)] for name in ("ours", "peer")}
    samples = measure.interleaved(calls, dict.fromkeys(calls, 1), ticks, Effort(0.0, 2, 2))
    assert order == ["ours", "peer", "peer", "ours"]
    assert [len(times) for times in samples.values()] == [2, 2]


def test_the_budget_is_of_forms_near_the_fastest(ticks: Ticks) -> None:
    calls = {
        name: [ticks.taking([seconds], lambda: None)] for name, seconds in ((OURS, 1.0), ("near", 2.0), ("far", 9.0))
    }
    for far in (1, 2):
        samples = measure.interleaved(calls, dict.fromkeys(calls, 1), ticks, Effort(9.0, 1, 9, far_rounds=far))
        assert {name: len(times) for name, times in samples.items()} == {OURS: 3, "near": 3, "far": far}


def test_rounds_are_split_over_the_visits() -> None:
    shares = [QUICK.of_visit(i) for i in range(QUICK.visits)]
    assert [share.least_rounds for share in shares] == [2, 1]
    assert [share.most_rounds for share in shares] == [4, 3]
    assert [share.far_rounds for share in shares] == [1, 1]
    assert sum(share.budget_s for share in shares) == QUICK.budget_s
    assert Effort(1.0, 3, 9).of_visit(0) == Effort(1.0, 3, 9)


def test_a_second_visit_adds_rounds_and_gates_nothing(ticks: Ticks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms far behind are in the first round of each."""
    one = measure.Measurement(timed_case(ticks, near=[2.0], far=[9.0]), "forward", PLAN)
    assert [row["rounds"] for row in one.visit()] == [3, 3, 1]
    monkeypatch.setattr(measure, "Exact", None)
    rows = one.visit()
    assert [row["rounds"] for row in rows] == [5, 5, 2]
    assert [row["ratio"] for row in rows] == [1, 2, 9]
    assert all(row["errors"]["output"] < 1e-5 for row in rows)
    assert not any(tables.is_noisy(row) for row in rows)


@pytest.mark.parametrize(("form", "rounds"), [("near", 5), ("far", 2)])
def test_a_machine_that_changes_between_visits_marks_the_ratio(ticks: Ticks, form: str, rounds: int) -> None:
    seconds = {"near": [2.0], "far": [9.0]}
    one = measure.Measurement(timed_case(ticks, **seconds), "forward", PLAN)
    assert not any(tables.is_noisy(row) for row in one.visit())
    seconds[form][0] *= 1.2
    marked = {row["form"]: row for row in one.visit() if tables.is_noisy(row)}
    assert list(marked) == [form]
    assert marked[form]["rounds"] == rounds
    assert marked[form]["ratio_visits"] == pytest.approx([seconds[form][0] / 1.2, seconds[form][0]])


def test_what_raises_in_a_second_visit_has_no_time(ticks: Ticks) -> None:
    case = timed_case(ticks, near=[2.0], next=[2.0])
    one = measure.Measurement(case, "forward", PLAN)
    one.visit()

    def refuse() -> None:
        raise RuntimeError("no longer")

    case.peers["near"] = Peer(refuse)
    rows = {row["form"]: row for row in one.visit()}
    assert rows["near"]["not_run"] == "RuntimeError: no longer"
    assert "median_ms" not in rows["near"]
    assert rows["next"]["rounds"] == 5


def test_compiled_forms_keep_their_first_visit_where_the_time_to_compile_is_spent(
    ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda form, **_: form)
    plan = PLAN._replace(compiling=Allowance(60.0))
    one = measure.Measurement(timed_case(ticks, near=[2.0]), "forward", plan)
    assert [row["rounds"] for row in one.visit()] == [3, 3, 3]
    plan.compiling.left_s = 0.0
    rows = {row["form"]: row["rounds"] for row in one.visit()}
    assert rows == {OURS: 5, "near": 5, "near" + COMPILED: 3}


def written(folder: pathlib.Path) -> dict[tuple[str, str], store.Row]:
    rows = store.read(folder / "iterative_pinv.json")["rows"]
    return {(row["mode"], row["form"]): row for row in rows}


def test_a_run_goes_over_all_cases_and_then_over_all_again(ticks: Ticks, tmp_path: pathlib.Path) -> None:
    seconds, told = [2.0], []
    case = timed_case(ticks, eager=seconds)
    pairs = [(case, "forward"), (case, "forward+backward")]
    for _ in runner.timed(pairs, PLAN, WHERE, tmp_path, told.append):
        pass
    assert [line.split(" ", 1)[0] for line in told] == ["time", "time", "again", "again"]
    assert {row["rounds"] for row in written(tmp_path).values()} == {5}
    assert not any("ratio_before" in row for row in written(tmp_path).values())
    seconds[0] = 4.0
    for _ in runner.timed(pairs, PLAN, WHERE, tmp_path, told.append):
        pass
    row = written(tmp_path)["forward", "eager"]
    assert (row["ratio_before"], row["ratio"]) == (2.0, 4.0), "of the run before, not of the first visit"
    assert row["ratio_visits"] == [4.0, 4.0]


def test_a_run_that_ends_in_its_first_visit_keeps_what_it_has(ticks: Ticks, tmp_path: pathlib.Path) -> None:
    case = timed_case(ticks, eager=[2.0])
    run = runner.timed([(case, "forward"), (case, "forward+backward")], PLAN, WHERE, tmp_path, lambda _: None)
    next(run)
    run.close()
    assert {place: row["rounds"] for place, row in written(tmp_path).items()} == {
        ("forward", OURS): 3, ("forward", "eager"): 3,
    }  # fmt: skip


def noisy_row(**fields: Any) -> store.Row:
    return {"ratio": 2.0, "ratio_low": 1.95, "ratio_high": 2.05, **fields}


def test_a_ratio_is_noisy_where_rounds_visits_or_runs_disagree() -> None:
    assert not tables.is_noisy(noisy_row())
    assert not tables.is_noisy(noisy_row(ratio_before=1.85, ratio_visits=[1.95, 2.1]))
    assert tables.is_noisy(noisy_row(ratio_high=2.3))
    assert tables.is_noisy(noisy_row(ratio_visits=[2.0, 2.3]))
    assert tables.is_noisy(noisy_row(ratio_before=1.7))


def test_what_two_runs_disagree_on_is_named() -> None:
    place = {"case": "c", "mode": "forward", "form": "eager"}
    same, apart = (noisy_row() | place for _ in range(2))
    apart |= {"ratio": 2.5, "ratio_low": 2.45, "ratio_high": 2.55}
    assert tables.disagreements([same], [same]) == (1, [])
    assert tables.disagreements([same], [apart]) == (1, [apart])
    assert tables.disagreements([same], [apart | {"ratio_high": 3.0}]) == (1, [])


@pytest.mark.parametrize("other", [1.7, 1.81, 1.83, 2.19, 2.21, 2.5])
def test_a_second_run_marks_all_that_it_disagrees_on_with_the_first(other: float) -> None:
    """Which of the two is the larger ratio does not matter, nor which is compared with which."""
    place = {"case": "c", "mode": "forward", "form": "eager"}
    first = {"ratio": other, "ratio_low": other, "ratio_high": other} | place
    second = noisy_row(ratio_before=other) | place
    unmarked = noisy_row() | place
    assert tables.is_noisy(second) == bool(tables.disagreements([unmarked], [first])[1])
    assert tables.disagreements([second], [first]) == tables.disagreements([first], [second]) == (1, [])


def test_a_second_run_of_a_commit_knows_the_first(ticks: Ticks) -> None:
    """Two runs agree within 10%, or the report marks the ratio."""
    seconds, rows = [2.0], []
    for run, noisy in ((2.0, False), (2.1, False), (2.5, True)):
        seconds[0] = run
        new = measure.Measurement(timed_case(ticks, eager=seconds), "forward", PLAN).visit()
        before, rows = rows, store.merged(rows, [row | WHERE for row in new], "cpu")
        assert [row["ratio"] for row in before] == [row["ratio_before"] for row in rows if "ratio_before" in row]
        assert tables.is_noisy(rows[1]) == noisy
    other = store.merged(rows, [row | {"commit": "def"} for row in new], "cpu")
    assert not [row for row in other if "ratio_before" in row]
