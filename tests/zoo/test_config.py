"""Recipes and configurations: what is wrong with them is said with the key, the rule and the value."""

import dataclasses
import pathlib
from typing import Any, Literal

import pytest

from nystromgan.zoo import config as tables
from nystromgan.zoo import recipes, registry

pytestmark = pytest.mark.usefixtures("tiny_paper")


@dataclasses.dataclass(frozen=True)
class Example:
    count: int = 1
    rate: float = 0.5
    name: str = "none"
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int, ...] = ()
    maybe: int | None = 3
    either: int | tuple[int, int] = 1


def test_values_of_every_type_come_through_toml(tmp_path: pathlib.Path) -> None:
    example = Example(7, 1e-4, 'quo"te\\n', True, "b", (3, 4.5), (1, 2, 3), None, (5, 6))
    path = tmp_path / "example.toml"
    path.write_text(tables.to_toml({"example": tables.table(example)}))
    assert tables.build(Example, tables.read_toml(path)["example"], "it") == example


def test_toml_of_nested_tables(tmp_path: pathlib.Path) -> None:
    content: dict[str, Any] = {
        "a": {"x": 1},
        "players": {"one": {"rate": 1e-8}, "two": {"list": [1.0, 2.0]}},
        "empty": {},
    }
    path = tmp_path / "nested.toml"
    path.write_text(tables.to_toml(content))
    assert tables.read_toml(path) == content


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"count": 1.5}, r"it: count must be int, got 1.5"),
        ({"count": True}, r"it: count must be int, got True"),
        ({"rate": "fast"}, r"it: rate must be float, got 'fast'"),
        ({"flag": 1}, r"it: flag must be bool, got 1"),
        ({"kind": "c"}, r"it: kind must be one of 'a', 'b', got 'c'"),
        ({"pair": [1]}, r"it: pair must be tuple\[int, float\], got \[1\]"),
        ({"many": [1, "2"]}, r"it: many must be int, got '2'"),
        ({"maybe": "x"}, r"it: maybe must be int, got 'x'"),
        ({"either": "x"}, r"it: either must be int, got 'x' or it: either must be tuple"),
        ({"cuont": 1}, r"it has no key 'cuont' \(did you mean count\?\); known are count, rate, name"),
    ],
)
def test_wrong_values_are_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.build(Example, table, "it")


def test_whole_numbers_serve_as_floats_and_none_as_none() -> None:
    assert tables.build(Example, {"rate": 1, "maybe": "none", "name": "none"}, "it") == Example(rate=1.0, maybe=None)
    assert isinstance(tables.build(Example, {"rate": 1}, "it").rate, float)


def test_a_missing_key_is_named() -> None:
    def make(first: int, second: int) -> int:
        return first + second

    with pytest.raises(ValueError, match=r"it must have second; it has nothing"):
        tables.build(make, {}, "it", 1)
    assert tables.build(make, {"second": 2}, "it", 1) == 3


def test_options_of_a_base_class_are_known() -> None:
    class Base:
        def __init__(self, *, size: int = 1, seed: int = 0) -> None:
            self.size, self.seed = size, seed

    class Derived(Base):
        def __init__(self, folder: str, *, size: int = 2, **options: Any) -> None:
            super().__init__(size=size, **options)

    assert tables.build(Derived, {"folder": "x", "seed": 5}, "it").seed == 5
    assert tables.defaults(Derived) == {"size": 2, "seed": 0}
    with pytest.raises(ValueError, match="it has no key 'sede'"):
        tables.build(Derived, {"folder": "x", "sede": 5}, "it")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("[trian]\nsteps = 1", r"tiny.toml has no key 'trian' \(did you mean train\?\)"),
        ("[train]\nstep = 1", r"is not TOML|has no key 'step'"),
        (
            "[players.generator]\nlearning_rat = 1",
            r"\[players.generator\] has no key 'learning_rat' \(did you mean learning_",
        ),
        ("[players.writer]\nsteps = 1", r"\[players\] has no key 'writer'; known are critic, generator"),
        ("[players.critic]\nsteps = 0", r"\[players.critic\]: steps must be at least 1, got 0"),
        ("[objective]\npenalti = 1", r"\[objective\] has no key 'penalti' \(did you mean penalty\?\)"),
    ],
)
def test_wrong_recipes_are_named(edit: str, message: str, recipe: str) -> None:
    from nystromgan.zoo.training.loop import Loop

    path = pathlib.Path(recipe)
    path.write_text(f"{path.read_text()}\n{edit}\n")

    def begin() -> Loop:
        loaded = recipes.load(recipe)
        return Loop(*loaded.problem(), loaded.train, loaded.players, device="cpu")

    with pytest.raises(ValueError, match=message):
        begin()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch=0", r"\[train\]: batch must be at least 1, got 0"),
        ("train.precision=fp8", r"\[train\]: precision must be one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
        ("train.batches=4", r"\[train\] has no key 'batches' \(did you mean batch\?\)"),
        ("model.preset=tinny", r"no model is called 'tinny' \(did you mean tiny\?\)"),
        ("model.width=[1]", r"the configuration of tiny: width must be int, got \[1\]"),
        ("data.source=blob", r"\[data\] source must be one of .*blobs.*, got 'blob'"),
        ("data.lenght=4", r"\[data\] has no key 'lenght' \(did you mean length\?\)"),
        ("model.preset=3", r"\[model\] preset must be a name, got 3"),
        ("data.source=[1]", r"\[data\] source must be a name, got \[1\]"),
        ("players.generator=1", r"\[players.generator\] must be a table, got generator = 1"),
        ("train", r"an override must be TABLE.KEY=VALUE, got 'train'"),
        ("train.steps.more=1", r"an override must name a table's key, got 'train.steps.more=1'"),
    ],
)
def test_wrong_overrides_are_named(override: str, message: str, recipe: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.load(recipe, [override]).problem()


def test_overrides_are_read_as_toml(recipe: str) -> None:
    loaded = recipes.load(recipe, ["train.ema=0.5", "model.dropout=0", "players.generator.betas=[0.5, 0.9]"])
    assert (loaded.train.ema, loaded.model["dropout"], loaded.players["generator"]["betas"]) == (0.5, 0, [0.5, 0.9])


def test_a_missing_recipe_lists_those_that_ship(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe is called .*shipped: .*savgan-mmnist"):
        recipes.load(tmp_path / "nothing.toml")


@pytest.mark.parametrize("name", registry.recipes())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    loaded = recipes.load(name)
    paper = registry.paper_of_preset(loaded.model["preset"])
    known = [parameter.name for parameter in tables.parameters(paper.OBJECTIVE)]
    tables.check_keys(loaded.objective, known, name)
    sources = [parameter.name for parameter in tables.parameters(recipes.source(loaded.data))]
    tables.check_keys(loaded.data, ["source", *sources], name)
