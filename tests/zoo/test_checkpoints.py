"""Checkpoints: a round trip keeps every bit, whatever is wrong is named, and nothing is overwritten."""

import json
import pathlib
import socket
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import nystromgan.zoo as zoo
from nystromgan.zoo import checkpoints, recipes, registry, storage

pytestmark = pytest.mark.usefixtures("one_thread", "tiny_paper")


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    return zoo.save_checkpoint(tiny.Tiny(tiny.TinyConfig(width=6)), tmp_path / "model")


def test_round_trip_keeps_every_bit_and_the_configuration(tmp_path: pathlib.Path) -> None:
    model = zoo.create_model("tiny", width=5, dropout=0.5)
    model(torch.randn(7, 4))  # moves the running statistics, and u and v
    folder = zoo.save_checkpoint(model, tmp_path / "new" / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for place in (folder, str(folder), folder / "model.safetensors"):
        loaded = zoo.load_checkpoint(place)
        assert loaded.config == tiny.TinyConfig(width=5, dropout=0.5)
        assert not loaded.training
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.sample(3, seed=1), model.eval().sample(3, seed=1))


def test_a_file_alone_describes_itself(saved: pathlib.Path) -> None:
    for name in ("config.json", "README.md"):
        (saved / name).unlink()
    assert zoo.load_checkpoint(saved).config.width == 6


def test_config_json_says_what_the_file_says(saved: pathlib.Path) -> None:
    description = json.loads((saved / "config.json").read_text())
    assert description["config"] == {"width": 6, "latent_dim": 4, "dropout": 0.2}
    assert description["paper"] == "tiny"
    found = checkpoints.describe(saved)
    assert found["config"] == description["config"]
    assert found["values"] == sum(value.numel() for value in load_file(saved / "model.safetensors").values())


def test_configuration_that_is_no_architecture_can_be_changed(saved: pathlib.Path) -> None:
    assert zoo.load_checkpoint(saved, dropout=0.0).config.dropout == 0.0
    with pytest.raises(ValueError, match=r"is of another model than this Tiny: size mismatch for layers.0"):
        zoo.load_checkpoint(saved, width=7)
    with pytest.raises(ValueError, match=r"has no key 'widht' \(did you mean width\?\); known are width, latent_dim"):
        zoo.load_checkpoint(saved, widht=7)


def test_a_missing_checkpoint_lists_those_that_ship(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.save_checkpoint(tiny.Tiny(tiny.TinyConfig()), tmp_path / "one")
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint is called 'two'.*shipped are: one"):
        zoo.load_checkpoint("two")
    assert zoo.load_checkpoint("one").config.width == 8
    (size,) = zoo.list_checkpoints().values()
    assert size == (tmp_path / "one" / "model.safetensors").stat().st_size


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def _pickle(content: bytes) -> bytes:
    return b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07missing\x94."


@pytest.mark.parametrize(
    ("damage", "message"), [(_truncate, "truncated"), (_flip, "is corrupted: its tensors"), (_pickle, "no safetensors")]
)
def test_a_damaged_file_is_named(saved: pathlib.Path, damage: Any, message: str) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        zoo.load_checkpoint(saved)
    assert str(path) in str(caught.value)


def test_files_of_others_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="has no sha256 in its metadata"):
        zoo.load_checkpoint(path)
    storage.save_tensors(path, {"a": torch.ones(2)}, {"kind": "something"})
    with pytest.raises(ValueError, match="is no checkpoint of a model: its metadata has kind, sha256"):
        zoo.load_checkpoint(path)
    storage.save_tensors(path, {"a": torch.ones(2)}, {"paper": "future", "config": "{}"})
    with pytest.raises(ValueError, match="is of 'future', which this version does not know"):
        zoo.load_checkpoint(path)
    storage.save_tensors(path, {"a": torch.ones(2)}, {"paper": "tiny", "config": "{}"})
    with pytest.raises(ValueError, match=r"is of another model than this Tiny: layers.* is missing; .* and \d+ more"):
        zoo.load_checkpoint(path)


def test_an_unreadable_file_is_named(saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: pathlib.Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=r"model.safetensors cannot be read: Permission denied"):
        zoo.load_checkpoint(saved)


def test_weights_that_are_not_finite_are_not_written(saved: pathlib.Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    model = tiny.Tiny(tiny.TinyConfig())
    with torch.no_grad():
        model.layers[3].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"is not written: layers.3.bias has values that are not finite"):
        zoo.save_checkpoint(model, saved)
    assert (saved / "model.safetensors").read_bytes() == before


def test_models_of_others_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"model must be of a paper of the zoo .* got Linear"):
        zoo.save_checkpoint(torch.nn.Linear(1, 1), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["hf://", "hf://owner", "hf://a/b/c"])
def test_addresses_are_checked_before_anything_is_fetched(address: str) -> None:
    with pytest.raises(ValueError, match="an address must be hf://owner/name"):
        zoo.load_checkpoint(address)


def test_the_hash_sees_names_dtypes_shapes_and_values() -> None:
    tensors = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(8, dtype=torch.bfloat16)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {"a": torch.tensor(0.0)},
    ]
    assert len({storage.digest(each) for each in tensors}) == len(tensors)


def test_list_models_matches_patterns_and_tasks() -> None:
    assert {"tiny", "tiny-wide"} <= set(zoo.list_models())
    assert zoo.list_models("tiny*") == ["tiny", "tiny-wide"]
    assert zoo.list_models("tiny*", task="image") == []
    assert zoo.list_models("tiny*", task="video") == ["tiny", "tiny-wide"]


def test_create_model_checks_names_and_fields() -> None:
    assert zoo.create_model("tiny-wide", dropout=0.1).config == tiny.TinyConfig(width=16, dropout=0.1)
    with pytest.raises(ValueError, match=r"no model is called 'tinny' \(did you mean tiny\?\)"):
        zoo.create_model("tinny")
    with pytest.raises(ValueError, match=r"the configuration of tiny has no key 'layers'; known are width"):
        zoo.create_model("tiny", layers=3)
    with pytest.raises(ValueError, match=r"the configuration of tiny: width must be int, got 'wide'"):
        zoo.create_model("tiny", width="wide")
    with pytest.raises(ValueError, match=r"width must be at least 1, got 0"):
        zoo.create_model("tiny", width=0)


@pytest.mark.parametrize("name", registry.PAPERS)
def test_every_paper_declares_what_the_registry_needs(name: str) -> None:
    module = registry.paper(name)
    kinds = {type(config) for config in module.PRESETS.values()}
    assert len(kinds) == 1
    assert isinstance(module.TASK, str)
    assert issubclass(module.MODEL, torch.nn.Module)
    assert hasattr(module.MODEL, "sample")


def test_presets_have_one_paper_each() -> None:
    names = [preset for paper in registry.PAPERS for preset in registry.paper(paper).PRESETS]
    assert len(names) == len(set(names))


def test_every_shipped_checkpoint_loads_and_is_small() -> None:
    for name in zoo.list_checkpoints():
        folder = checkpoints.SHIPPED / name
        assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6
        assert json.loads((folder / "config.json").read_text())["config"] == checkpoints.describe(name)["config"]
        assert (folder / "README.md").read_text().startswith("# ")
        assert all(parameter.isfinite().all() for parameter in zoo.load_checkpoint(name).parameters())


def test_the_checkpoints_of_equal_budgets_ship() -> None:
    names = ["savgan-mmnist", "3dgan-mmnist"]
    assert set(names) <= set(zoo.list_checkpoints())
    one, other = (recipes.load(checkpoints.SHIPPED / name) for name in names)
    assert (one.train, one.players, one.objective, one.data) == (
        other.train,
        other.players,
        other.objective,
        other.data,
    )


@pytest.mark.parametrize("name", ["savgan-mmnist", "3dgan-mmnist", "tganv2-mmnist"])
def test_shipped_checkpoints_draw_digits_without_a_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "socket", refuse)
    model = zoo.load_checkpoint(name)
    clips = model.sample(4, seed=0)
    untrained = type(model)(model.config).sample(4, seed=0)
    assert (clips < -0.8).float().mean() > 0.6  # black, but for a digit
    assert (clips.amax((1, 2, 3, 4)) > 0.5).all()
    assert (untrained < -0.8).float().mean() < 0.1
    assert (clips - untrained).abs().mean() > 0.5
    assert (clips - clips[:1]).abs().mean((1, 2, 3, 4))[1:].min() > 0.02  # not all alike


def test_attention_is_configuration_and_not_weights(tmp_path: pathlib.Path) -> None:
    """One file serves exact attention, other landmarks and other counts of them, the same at every load."""
    model = zoo.create_model("savgan-small", width=4, num_landmarks=(4, 8))
    with torch.no_grad():
        for gamma in model.gammas():
            gamma.fill_(1.0)
    folder = zoo.save_checkpoint(model, tmp_path / "savgan")
    for changes in ({}, {"attention": "exact"}, {"landmarks": "grid"}, {"num_landmarks": (8, 16)}):
        one, other = (zoo.load_checkpoint(folder, **changes).sample(1, seed=0) for _ in range(2))
        assert torch.equal(one, other)
        assert torch.equal(one, model.eval().sample(1, seed=0)) == (not changes)
    with pytest.raises(ValueError, match=r"is of another model than this SAVGAN: layers.* is unknown"):
        zoo.load_checkpoint(folder, attention="none")
