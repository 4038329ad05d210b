"""The benchmark: its registry is sound, wrong results get no speed, and what the README says is what was measured."""

import contextlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor

from nystromgan import cli, testing
from nystromgan.bench import cli as bench_cli
from nystromgan.bench import (
    clock,
    compare,
    forms,
    gate,
    machine,
    measure,
    memory,
    runner,
    store,
    tables,
    targets,
)
from nystromgan.bench.case import COMPILED, FORWARD, OURS, PASSES, Case, Form, Peer
from nystromgan.bench.cases import cases
from nystromgan.bench.plan import Allowance, Effort, Plan

ROOT = pathlib.Path(__file__).parents[1]
RATES = {"gemm_fp32_flop_per_s": 1e13, "gemm_bf16_flop_per_s": 1e13, "copy_bytes_per_s": 1e10}
PLAN = Plan("cpu", RATES, Effort(0.0, 2, 2))
BATCH_WIDE = ("nystrom-attention package", "transformers")  # tests/integrations hold the second


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SAMPLE_S", 0.0)


def small(group: str, dtype: str = "fp32") -> Case:
    """The first case of a group at the size that loads its code, without the packages that take seconds to import."""
    case = next(case for case in cases() if case.group == group and case.dtype == dtype)
    peers = {name: peer for name, peer in case.peers.items() if not name.startswith(BATCH_WIDE)}
    return case._replace(shape=case.small, peers=peers)


def measured(case: Case, mode: str, plan: Plan = PLAN) -> list[store.Row]:
    """The rows of a first visit."""
    return measure.Measurement(case, mode, plan).visit()


GROUPS = sorted({(case.group, case.modes[-1]) for case in cases()})


def test_names_are_unique() -> None:
    for device in ("cpu", "cuda"):
        names = [case.name for case in cases(device)]
        assert len(set(names)) == len(names)
    assert {case.name for case in cases(full=False)} < {case.name for case in cases()}


def test_the_registry_computes_nothing() -> None:
    """Memory is measured in processes forked after the registry is made, which threads do not outlive."""
    code = (
        "import os, torch\nthreads = len(os.listdir('/proc/self/task'))\n"
        "from nystromgan.bench.cases import cases\ncases('cpu'), cases('cuda')\n"
        "assert len(os.listdir('/proc/self/task')) == threads\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_transformers_form_needs_nothing_of_the_tests() -> None:
    """Beside torch's CPU build PyPI's torchvision breaks what imports it; tests/conftest.py mends that for tests."""
    code = (
        "import torch, nystromgan\nfrom nystromgan.bench.baselines import packages\n"
        "qkv = torch.randn(3, 1, 2, 64, 8)\nform = packages.transformers(2, 8, 16)\n"
        "for tokens in (64, 32):\n"
        "    inputs = qkv[:, :, :, :tokens]\n"
        "    exact = nystromgan.nystrom_attention(*inputs, num_landmarks=16, pinv_init='global_max')\n"
        "    torch.testing.assert_close(form(*inputs), exact)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_half_precision_is_multiplied_as_float32_where_that_is_faster() -> None:
    rates = {"gemm_fp32_flop_per_s": 2.0, "gemm_bf16_flop_per_s": 1.0, "copy_bytes_per_s": 1e10}
    assert gate.gemm_rate(rates, "bf16") == gate.gemm_rate(rates, "fp32") == 2
    assert gate.gemm_rate({**rates, "gemm_bf16_flop_per_s": 16.0}, "bf16") == 16
    assert gate.gemm_rate({**rates, "gemm_bf16_flop_per_s": 16.0}, "fp32") == 2


def test_a_peer_that_takes_too_long_is_called_once() -> None:
    case = small("landmarks")
    calls = []

    def make() -> Form:
        form = case.peers["two SDPA calls"].make()

        def slow(**inputs: Tensor) -> Tensor:
            calls.append(0)
            time.sleep(0.05)
            return form(**inputs)

        return slow

    plan = PLAN._replace(effort=Effort(0.0, 2, 2, limit_s=0.04), too_long=set())
    for mode in ("forward", "forward+backward"):
        row = measured(case._replace(peers={"slow": Peer(make)}), mode, plan)[1]
        assert row["not_run"] == "a call takes more than 0.04 s"
    assert len(calls) == 1


@pytest.mark.parametrize(("group", "mode"), GROUPS)
def test_every_form_is_right_and_timed(group: str, mode: str) -> None:
    case = small(group)
    rows = measured(case, mode)
    assert [row["form"] for row in rows] == forms.forms_of(case, False)
    assert all(row["median_ms"] > 0 and row["errors"]["output"] < 0.05 for row in rows), rows
    assert rows[0]["form"] == OURS
    assert rows[0]["ratio"] == 1


def test_a_wrong_result_has_no_speed() -> None:
    case = small("maps")
    peers = {**case.peers, "wrong": Peer(lambda: lambda query, key, value: 1.01 * value)}
    rows = measured(case._replace(peers=peers), "forward")
    assert rows[-1]["wrong"]
    assert "median_ms" not in rows[-1]
    ours = measured(
        case._replace(ours=lambda backend: lambda query, key, value: (2 - (backend == "auto")) * value), "forward"
    )
    assert ours[0]["wrong"]
    assert "median_ms" not in ours[0]


def test_a_form_that_raises_says_why() -> None:
    def refuse(**_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such shape")

    case = small("maps")
    rows = measured(case._replace(peers={"refusing": Peer(lambda: refuse)}), "forward")
    assert rows[-1]["not_run"] == "RuntimeError: no such shape"


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # in what torch.compile imports
def test_compiled_forms_are_beside_eager_ones() -> None:
    case = small("landmarks")._replace(compiled_in_full=True)
    names = forms.forms_of(case, True)
    assert names.index("two SDPA calls" + COMPILED) == names.index("two SDPA calls") + 1
    middle = next(case for case in cases(full=True) if case.group == "landmarks" and case.shape["N"] == 4096)
    assert any("FlexAttention" in name for name in forms.forms_of(middle, True))
    assert not any("FlexAttention" in name for name in forms.forms_of(middle, False))
    largest = next(case for case in cases(full=True) if case.group == "landmarks" and case.shape["N"] == 65536)
    compiled = [name for name in forms.forms_of(largest, True) if forms.compiles(largest, name)]
    assert compiled == ["two SDPA calls" + COMPILED, "eager, F (Z (G V))" + COMPILED]
    peers = {"doubled": Peer(lambda: lambda matrix: matrix.exp(), compiled=True)}
    function = forms.function_of(case._replace(peers=peers), "doubled" + COMPILED)
    matrix = testing.normal(3, 3)
    assert testing.relative_error(function(matrix=matrix), matrix.exp()) < 1e-6


def test_a_spent_allowance_leaves_out_what_compiles() -> None:
    case = small("landmarks")._replace(compiled_in_full=True)
    peers = {name: peer for name, peer in case.peers.items() if name == "two SDPA calls"}
    rows = measured(case._replace(peers=peers), "forward", PLAN._replace(compiling=Allowance(0.0)))
    assert [row["form"] for row in rows if "median_ms" in row] == [OURS, "two SDPA calls"]
    assert {row["not_run"] for row in rows[2:]} == {"the time for torch.compile was spent"}


def test_a_run_outlives_a_case_that_raises_and_ends_in_time(tmp_path: pathlib.Path) -> None:
    def refuse(*_: object) -> dict[str, torch.Tensor]:
        raise MemoryError("no room")

    case, told = small("pinv"), []
    pairs = [(case._replace(make=refuse), "forward"), (case, "forward+backward")]
    where = {"commit": "abc"}
    found = list(runner.timed(pairs, PLAN, where, tmp_path, told.append))
    assert found[0][2][0]["wrong"] == "MemoryError: no room"
    assert "median_ms" in found[1][2][0]
    assert not list(runner.timed(pairs, PLAN, where, tmp_path, told.append, deadline=0.0))
    assert [line.startswith("LEFT OUT") for line in told] == [False, False, True, True]


def test_progress_tells_the_time_left(capsys: pytest.CaptureFixture) -> None:
    advance = bench_cli.steps(2)
    advance("one")
    advance("two")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("1/2  one")
    assert "s left  2/2  two" in lines[1]


def test_a_backward_alone_is_what_both_passes_add() -> None:
    case = small("maps")
    inputs = case.make("cpu", case.shape, 0)
    calls = {mode: forms.call_of(case, case.ours("auto"), inputs, mode) for mode in case.modes}
    for alone, both in zip(calls["backward"](), calls["forward+backward"](), strict=True):
        assert torch.equal(alone, both)
    assert case.flops["forward"] + case.flops["backward"] == case.flops["forward+backward"]


def test_a_step_ends_with_the_optimizer_s_and_leaves_the_inputs() -> None:
    case = small("pinv")._replace(optimizer=lambda tensors: torch.optim.SGD(tensors, lr=1.0))
    inputs = case.make("cpu", case.shape, 0)
    before = {name: x.clone() for name, x in inputs.items()}
    seen: list[torch.Tensor] = []

    def form(matrix: torch.Tensor) -> torch.Tensor:
        seen.append(matrix.detach().clone())
        return matrix.square()

    step = forms.call_of(case, form, inputs, "forward+backward")
    step()
    step()
    assert not torch.equal(seen[-1], seen[-2])
    assert torch.equal(inputs["matrix"], before["matrix"])


def test_sets_of_inputs_take_turns() -> None:
    order: list[int] = []
    clock.CpuClock().sample_s([lambda i=i: order.append(i) for i in range(3)], 5)
    assert order[:5] == [0, 1, 2, 0, 1]


class FakeEvent:
    """A CUDA event on a clock that every call moves on by a millisecond."""

    now = 0.0

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


def test_the_cuda_clock_times_by_events_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    properties = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    def call() -> None:
        FakeEvent.now += 1.0

    assert clock.CudaClock().sample_s([call], 4) == pytest.approx(1e-3)
    assert clock.CudaClock().number_of_sets(10 << 20) == 10
    assert clock.CudaClock().number_of_sets(1 << 30) == 2


@pytest.mark.parametrize(
    ("this", "other", "word"),
    [([1.2] * 9, [1.0] * 9, "slower"), ([1.0] * 9, [1.2] * 9, "faster"), ([1.02] * 9, [1.0] * 9, "same"),
     ([0.5, 2.0, 1.1] * 3, [1.0] * 9, "same")],
)  # fmt: skip
def test_verdicts_need_more_than_noise(this: list[float], other: list[float], word: str) -> None:
    assert compare.verdict(this, other).word == word


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_compare_measures_two_trees(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "BUDGET_S", 0.0)
    arguments = ["bench", "--compare", "HEAD", "--case", "pinv B=8 M=16 fp32", "--mode", "forward"]
    assert cli.main(arguments) in (0, 1)  # a loaded machine may see a difference
    printed = capfd.readouterr().out
    assert "1/1  pinv B=8 M=16 fp32, forward: " in printed
    assert printed.splitlines()[1].split()[-1] in ("slower", "same", "faster")
    assert cli.main([*arguments[:2], "no-such-commit", *arguments[3:]]) == 1
    assert "'no-such-commit'" in capfd.readouterr().err
    assert (
        "tree"
        not in subprocess.run(["git", "-C", str(ROOT), "worktree", "list"], capture_output=True, text=True).stdout
    )


@pytest.mark.alone
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
@pytest.mark.parametrize("slow", ["this", "other"])
def test_compare_flags_a_slowed_op(
    slow: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two trees sleeps 5 ms in every pseudo-inverse."""
    package = tmp_path / "nystromgan"
    package.mkdir()
    for path in (ROOT / "nystromgan").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("zoo", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    (package / "functional.py").unlink()
    slowed = "import time\n_quick = iterative_pinv\n"
    slowed += "def iterative_pinv(*a, **k):\n time.sleep(5e-3)\n return _quick(*a, **k)\n"
    (package / "functional.py").write_text((ROOT / "nystromgan" / "functional.py").read_text() + slowed)
    trees = {"this": ROOT, "other": ROOT} | {slow: tmp_path}
    monkeypatch.setattr(compare, "BUDGET_S", 0.0)
    monkeypatch.setattr(compare, "ROOT", trees["this"])
    monkeypatch.setattr(compare, "_checked_out", lambda revision: contextlib.nullcontext(trees["other"]))
    case = next(case for case in cases() if case.name == "pinv B=8 M=16 fp32")
    assert compare.run("REV", [case], ["forward"], "cpu", False) == (slow == "this")
    verdict = "slower" if slow == "this" else "faster"
    assert capfd.readouterr().out.splitlines()[1].endswith(verdict)


def test_peak_memory_is_what_a_call_holds() -> None:
    size = 64 << 20
    assert testing.extra_peak_bytes(lambda: torch.ones(size // 4).sum()) == pytest.approx(size, rel=0.1)


@pytest.mark.skipif("cpu" not in testing.backends_of("nystrom_attention"), reason="reference stores what is N x M")
def test_memory_is_what_the_formulas_predict() -> None:
    wanted = [case for case in cases() if case.held_bytes and case.dtype == "fp32"]
    keys = [(case.name, OURS, mode) for case in wanted for mode in case.modes]
    predicted = [case.held_bytes[mode] for case in wanted for mode in case.modes]
    assert len(keys) == 4
    for key, peak, bytes_held in zip(keys, list(memory.on_cpu(keys)), predicted, strict=True):
        assert peak == pytest.approx(bytes_held, rel=0.1), key


def test_target_of_spectral_norm_is_the_dearest_share() -> None:
    rows = [
        {"form": form, "share_of_torch": share, "batch": batch, "mode": "forward"}
        for form, share, batch in (
            ("torch's parametrization", 1.0, 1),
            ("fuse_spectral_norm", 0.3, 1),
            ("fuse_spectral_norm", 0.5, 8),
        )
    ]
    assert targets.spectral_line({store.DISCRIMINATOR: {"rows": rows}})[2:] == [
        "0.50x", "discriminator, batch of 8, forward", "no",
    ]  # fmt: skip
    assert targets.spectral_line({})[3] == "not measured"


def test_targets_tell_what_is_missed() -> None:
    row = {
        "case": "c",
        "group": "savgan",
        "dtype": "fp32",
        "mode": FORWARD,
        "N": 2048,
        "ratio_low": 1,
        "ratio_high": 1,
    }
    rows = [row | {"form": OURS, "ratio": 1.0}, row | {"form": "eager", "ratio": 1.5}]
    found = {finding.target.group: finding for finding in targets.findings(rows)}
    assert found["savgan"].value == 1.5
    assert found["savgan"].held is False
    assert found["maps"].held is None


def test_crossings_lie_between_the_sizes_measured() -> None:
    assert tables.crossing({512: 0.5, 1024: 2.0}) == pytest.approx(724, rel=0.01)
    assert tables.crossing({512: 1.5, 1024: 2.0}) == 512
    assert tables.crossing({512: 0.5, 1024: 0.9}) is None


def test_the_command_writes_results_and_the_report_reads_them(tmp_path: pathlib.Path) -> None:
    arguments = ["bench", "--quick", "--op", "iterative_pinv", "--case", "B=8 M=64 fp32", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    folder = tmp_path / machine.name()
    rows = json.loads((folder / "iterative_pinv.json").read_text())["rows"]
    assert {row["mode"] for row in rows} == set(PASSES)
    assert all(row["peak_bytes"] >= 0 for row in rows)
    assert cli.main(["report", "--results", str(folder), "--output", str(tmp_path / "page")]) == 0
    assert "<figure>" not in (tmp_path / "page" / "report.html").read_text(), "nothing was measured over tokens"
    assert "| pinv B=8 M=64 fp32 | forward |" in (tmp_path / "page" / "report.md").read_text()


def test_a_run_without_native_kernels_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys) -> None:
    arguments = ["bench", "--case", "pinv B=8 M=16 fp32", "--part", "memory", "--output", str(tmp_path)]
    for reasons in ([], ["the native CPU library is not built"]):
        monkeypatch.setattr(bench_cli._native, "cpu_reasons", lambda reasons=reasons: reasons)
        monkeypatch.setattr(bench_cli, "_memory", lambda *arguments: None)
        assert cli.main(arguments) == 0
        assert ("No native kernels" in capsys.readouterr().err) == bool(reasons)


def test_an_unknown_case_is_one_clear_line(capsys) -> None:
    assert cli.main(["bench", "--case", "no such case"]) == 1
    assert "'no such case'" in capsys.readouterr().err


def test_half_precision_tolerance_is_the_library_s() -> None:
    assert small("landmarks", "bf16").tolerance == testing.TOLERANCES[torch.bfloat16]
