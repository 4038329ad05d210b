"""`make gpu-check` as far as it goes without a GPU: budgets, files, exit statuses, and tiny runs of its stages."""

import contextlib
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nystromgan import testing
from nystromgan.bench import (
    clock,
    draw,
    forms,
    gate,
    gpu_check,
    gpu_checks,
    gpu_parts,
    gpu_stages,
    gpu_target_rows,
    gpu_tests,
    machine,
    measure,
)  # fmt: skip
from nystromgan.bench.case import BOTH, BY, FORWARD, OURS, Case
from nystromgan.bench.cases import cases, nystrom_attention, power_iteration
from nystromgan.bench.gpu_targets import FAIL, LINES, NOT_MEASURED, PASS, Line
from nystromgan.bench.plan import Effort, Plan, Stage

CASES = cases("cuda")
RATES = {"gemm_fp32_flop_per_s": 1e13, "gemm_bf16_flop_per_s": 1e13, "copy_bytes_per_s": 1e10}


def line_of(words: str) -> Line:
    return next(line for line in LINES if words in line.words)


def row(place: tuple[str, str], form: str = OURS, **fields: Any) -> dict[str, Any]:
    return {"case": place[0], "mode": place[1], "form": form, **fields}


def test_floors_of_a_gpu_count_what_is_read_twice() -> None:
    shape = {"B": 1, "H": 8, "N": 65536, "D": 64, "E": 64, "M": 64}
    elements = 8 * 65536 * 64 * 2
    moved = nystrom_attention.work(shape, "bf16", "cuda")[1]
    assert (moved[FORWARD], moved[BOTH]) == (5 * elements, 14 * elements)
    moved = nystrom_attention.work(shape, "bf16", "cpu")[1]
    assert (moved[FORWARD], moved[BOTH]) == (4 * elements, 12 * elements)


def test_the_case_of_power_iteration_alone_is_right() -> None:
    case = power_iteration.sigma_case(4, "fp32")
    inputs = case.make("cpu", case.shape, 0)
    exact = gate.Exact(case, inputs, FORWARD)
    for form in forms.forms_of(case, False):
        errors = gate.errors(case, form, forms.function_of(case, form), inputs, exact)
        assert not gate.wrong(case, errors), form
    assert case.moved_bytes[FORWARD] == 2 * sum(x.numel() * x.element_size() for x in inputs.values())


def test_inputs_on_the_cpu_are_those_of_the_tests() -> None:
    options = {"dtype": torch.bfloat16, "device": "cpu", "seed": 2}
    tokens = testing.attention_inputs(1, 2, 5, None, 4, 3, **options)
    assert all(torch.equal(x, tokens[name]) for name, x in draw.tokens(1, 2, 5, 4, 3, **options).items())
    maps = testing.map_inputs(1, 2, (3, 4), None, 5, **options)
    assert all(torch.equal(x, maps[name]) for name, x in draw.maps(1, 2, (3, 4), 5, **options).items())


def small_case() -> Case:
    case = next(case for case in cases() if case.group == "pinv" and case.dtype == "fp32")
    return case._replace(shape=case.small)


@pytest.mark.parametrize(
    ("plan", "field"), [({"deadline": 0.0}, "not_run"), ({"failed": frozenset({(small_case().name, OURS)})}, "wrong")]
)
def test_no_form_is_started_after_the_deadline_or_once_it_has_failed(plan: dict, field: str) -> None:
    rows = measure.Measurement(small_case(), FORWARD, Plan("cpu", RATES, Effort(0.0, 2, 2), **plan)).visit()
    assert rows[0][field]
    assert "median_ms" not in rows[0]


def test_slow_forms_come_last() -> None:
    case = next(case for case in CASES if case.group == "landmarks" and case.shape["N"] == 16384)
    one = measure.Measurement(case, FORWARD, Plan("cpu", RATES))
    order = sorted(one.found, key=one._slowness)
    assert order[0] == OURS
    assert order[-1].startswith("full attention")


def test_a_graph_s_time_is_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds a call on every set, so that none finds its inputs in the cache by luck."""
    monkeypatch.setattr(measure, "allocated_bytes", lambda call: 7)
    monkeypatch.setattr(clock, "graphed", lambda calls: lambda: None)
    monkeypatch.setattr(clock, "median_ms", lambda call, device, budget_s: 6.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    one = measure.Measurement(small_case(), FORWARD, Plan("cpu", RATES))
    one._on_gpu({OURS: [lambda: None] * 3, "eager": [lambda: None] * 2})
    assert one.found[OURS] | {"graph_ms": 2.0, "graph_ratio": 1.0, "peak_bytes": 7} == one.found[OURS]
    assert one.found["eager"] | {"graph_ms": 3.0, "graph_ratio": 1.5} == one.found["eager"]


def test_what_runs_at_the_deadline_is_stopped_with_what_it_started(tmp_path: pathlib.Path) -> None:
    script = "import subprocess, sys; print('started', flush=True); subprocess.run(['sleep', '600'])"
    start = time.perf_counter()
    code, printed, _ = gpu_parts.run([sys.executable, "-c", script], 5.0, cwd=tmp_path)
    assert code is None
    assert printed == "started\n"
    assert time.perf_counter() - start < 120
    assert gpu_parts.run([sys.executable, "-c", "import sys; sys.exit('no')"])[0::2] == (1, "no\n")


@pytest.mark.parametrize(
    ("ended", "expected"),
    [((None, 'row {"a": 1}\n', ""), {"unfinished": gpu_parts.UNFINISHED}),
     ((-11, 'noise\nrow {"a": 1}\n', "x\nfault"), {"wrong": True, "error": "exit status -11: fault"}),
     ((0, 'row {"a": 1}\n', ""), None)],
)  # fmt: skip
def test_a_part_keeps_the_rows_that_it_gave(monkeypatch: pytest.MonkeyPatch, ended: tuple, expected: Any) -> None:
    monkeypatch.setattr(gpu_parts, "run", lambda *_: ended)
    found = list(gpu_parts.rows(Stage("cuda"), "gpu_checks", [{"op": "x"}]))
    assert found == [{"a": 1}] + ([{"op": "x", **expected}] if expected else [])


def test_after_the_budget_no_part_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "run", None)
    (row,) = gpu_parts.rows(Stage("cuda", deadline=0.0), "gpu_checks", [{"op": "x"}])
    assert row["unfinished"]
    (row,) = gpu_parts.ahead(Stage("cuda", deadline=0.0), "gpu_checks", [{"op": "x"}])
    assert "unfinished" not in row, "what only compiles ahead leaves nothing unmeasured"


def test_a_crash_of_ours_ahead_is_wrong_and_a_late_part_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [{"case": "a", "compiled": OURS, "seconds": 1.0},
            {"case": "a", "wrong": True, "error": "exit status -11: x"},
            {"case": "b", "crashed": BY + "cuda", "error": "illegal"}, {"case": "c", "unfinished": "late"},
            {"case": "d", "wrong": True, "error": "exit status 1: x"}]  # fmt: skip
    monkeypatch.setattr(gpu_parts, "rows", lambda *_: iter(told))
    failed: frozenset = frozenset()

    def ahead() -> Iterator[Any]:
        nonlocal failed
        failed = yield from gpu_target_rows._ahead(Stage("cuda"), [], [])

    assert len(list(ahead())) == len(told)
    assert failed == {("a", BY + "triton"), ("a", BY + "cuda"), ("b", BY + "cuda")}


def test_a_stage_that_hangs_is_stopped_and_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def hanging(stage: Stage) -> Any:
        yield {"tests": "one", "wrong": False}
        while True:
            with contextlib.suppress(Exception):  # as measurements do
                time.sleep(600)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.1)
    monkeypatch.setitem(gpu_check.STAGES, "tests", hanging)
    arguments = ["--device", "cpu", "--stage", "tests", "--budget-s", "0.1", "--output", str(tmp_path)]
    assert gpu_check.main(arguments) == gpu_check.UNFINISHED
    (path,) = tmp_path.glob("*/tests.json")
    assert [row.get("tests") for row in json.loads(path.read_text())["rows"]] == ["one", None]


def test_stages_run_apart_and_the_worst_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check._worst([0, 0]) == 0
    assert gpu_check._worst([0, 2]) == 2
    assert gpu_check._worst([2, 1]) == 1
    assert gpu_check._worst([0, -11]) == 1
    calls: list[list[str]] = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu_check, "_in_process", lambda stage, options: calls.append(stage) or 0)
    assert gpu_check.main(["--device", "cpu"]) == 0
    assert calls == list(gpu_check.STAGES)
    assert calls[0] == "targets"


def test_a_file_keeps_the_rows_that_a_run_does_not_replace(tmp_path: pathlib.Path) -> None:
    path, where = tmp_path / "tuning.json", {"commit": "abc"}
    first = gpu_check.Record(path, where)
    first.add({"op": "a", "table": ("forward", 90, 2), "best": "x"})
    first.add({"op": "b", "table": ("forward", 90, 2), "best": "y"})
    first.add({"op": "c", "unfinished": "late"})
    second = gpu_check.Record(path, {"commit": "def"})
    second.add({"op": "a", "table": ("forward", 90, 2), "best": "z"})
    rows = json.loads(path.read_text())["rows"]
    assert [(row["op"], row["best"], row["commit"]) for row in rows] == [("b", "y", "abc"), ("a", "z", "def")]
    third = gpu_check.Record(path, {"commit": "def"})
    third.add({"op": "a", "table": ("forward", 90, 2), "unfinished": "late"})
    assert [row.get("best") for row in json.loads(path.read_text())["rows"]] == ["y", "z", None]


def test_the_exit_status_and_the_file_tell_the_verdicts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    line = line_of("40 layers: launches")
    (place,) = line.places(CASES)
    monkeypatch.setattr(gpu_target_rows, "lines", lambda stage: [line])
    monkeypatch.setattr(gpu_target_rows, "chosen", lambda stage: CASES)
    path = tmp_path / "targets.json"
    for fields, status, word in (({"launches": 1}, 0, PASS), ({"launches": 2}, 1, FAIL), ({}, 2, NOT_MEASURED)):
        record = gpu_check.Record(path, {"commit": None})
        record.add(row(place, **fields))
        assert gpu_check._summary("targets", Stage("cuda"), record) == status
        assert [each["verdict"] for each in json.loads(path.read_text())["verdicts"]] == [word]
        assert f"1 {word}" in capsys.readouterr().out


def test_a_copy_without_git_names_the_commit_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.delenv("NYSTROMGAN_COMMIT", raising=False)
    assert machine.commit() is None
    monkeypatch.setenv("NYSTROMGAN_COMMIT", "abc+")
    assert machine.commit() == "abc+"
    assert gpu_check.environment("cpu")["commit"] == "abc+"


def test_speed_goes_on_where_a_run_of_the_commit_was_cut_short(tmp_path: pathlib.Path) -> None:
    rows = [row(("a", FORWARD), commit="abc", median_ms=1.0), row(("b", FORWARD), commit="old", median_ms=1.0)]
    (tmp_path / "iterative_pinv.json").write_text(json.dumps({"rows": rows}))
    assert gpu_stages._measured(tmp_path, "abc") == {("a", FORWARD)}
    assert not gpu_stages._measured(tmp_path, "abc+")


def test_pseudo_inverses_are_checked_as_the_op_alone() -> None:
    """What else a check computed would be compiled with it, and bits compared that are not the op's."""
    for check in gpu_checks.checks(tiny=False):
        assert check.function.__name__ == check.op
        if check.op == "iterative_pinv":
            matrix = check.make(torch.bfloat16, "cpu")["matrix"]
            assert len(set(matrix.double().abs().sum(-1)[0].tolist())) > 1
    found = gpu_checks._errors(
        next(check for check in gpu_checks.checks(False) if check.op == "iterative_pinv"),
        torch.float32,
        "reference",
        "cpu",
    )
    assert not found["wrong"]


def test_the_interpreter_measures_what_lines_name(tmp_path: pathlib.Path) -> None:
    """What runs on a GPU machine, on the CPU: rows, verdicts, and an exit status that says them."""
    command = [sys.executable, "-m", "nystromgan.bench.gpu_check", "--device", "cpu", "--tiny", "--stage", "targets",
               "--op", "iterative_pinv", "--output", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    (path,) = tmp_path.glob("interpreter-*/targets.json")
    report = json.loads(path.read_text())
    words = {each["line"]: each["verdict"] for each in report["verdicts"]}
    assert done.returncode == (1 if FAIL in words.values() else 2), done.stdout + done.stderr
    assert set(words) == {line.words for line in LINES if line.op == "iterative_pinv"}
    ours = [each for each in report["rows"] if each.get("form") == OURS]
    assert any("median_ms" in each and each["errors"]["output"] < 1e-5 for each in ours)
    assert any(math.isfinite(each["error_ratio"]) for each in ours if "error_ratio" in each)


def test_gpu_check_measures_the_registry_under_the_interpreter(tmp_path: pathlib.Path) -> None:
    """What runs on a GPU machine, on the CPU: the Triton kernels gated and timed, in the files that reports read."""
    command = [sys.executable, "-m", "nystromgan.bench.gpu_check", "--device", "cpu", "--tiny", "--stage", "speed",
               "--op", "iterative_pinv", "--output", str(tmp_path)]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("interpreter-*/iterative_pinv.json")
    ours = [row for row in json.loads(path.read_text())["rows"] if row["form"] == OURS]
    assert [row["mode"] for row in ours] == [FORWARD]
    assert ours[0]["median_ms"] > 0
    assert ours[0]["errors"]["output"] < 1e-5


def test_gpu_check_runs_the_op_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    (folder / "test_good.py").write_text("def test_good(): pass\n")
    (folder / "test_bad.py").write_text("def test_bad(): assert False\n")
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    rows = list(gpu_tests.rows(Stage("cuda")))
    assert [(row["tests"], row["wrong"]) for row in rows] == [("test_bad", True), ("test_good", False)]
    assert "test_bad" in rows[0]["failed"][0]
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path / "nowhere")
    (row,) = gpu_tests.rows(Stage("cuda"))
    assert row["tests"].startswith("left out")
