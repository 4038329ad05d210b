"""Recipes: TOML files that say which model is trained, on what, and how; validated before anything runs."""

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nystromgan.zoo import config as tables
from nystromgan.zoo import data as sources
from nystromgan.zoo import registry
from nystromgan.zoo.training.contract import Data, Objective
from nystromgan.zoo.training.options import TrainOptions

TABLES = ("model", "objective", "data", "train", "players")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe with every default filled in where it is known before the model is made.

    Attributes:
        model: "preset" and changed fields of its configuration.
        objective: keywords of the paper's objective.
        data: "source" and keywords of its class.
        players: each player's optimizer settings and `steps`.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    train: TrainOptions
    objective: dict[str, Any] = dataclasses.field(default_factory=dict)
    players: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def problem(self) -> tuple[Objective, Data]:
        """The objective, its networks initialised from the seed, and the data."""
        options = dict(self.model)
        preset = options.pop("preset")
        data = open_data(self.data)
        torch.manual_seed(self.train.seed)
        model = registry.create_model(preset, **options)
        check_shape(data, model.config)
        objective = tables.build(registry.paper_of_preset(preset).OBJECTIVE, self.objective, "[objective]", model)
        return objective, data

    def resolved(self, players: Mapping[str, Mapping[str, Any]]) -> "Recipe":
        """The same with every default written out, and each player's settings as the loop found them."""
        preset = self.model["preset"]
        overrides = {key: value for key, value in self.model.items() if key != "preset"}
        model = {"preset": preset, **tables.table(registry.preset(preset, overrides))}
        objective = tables.defaults(registry.paper_of_preset(preset).OBJECTIVE) | self.objective
        data = {"source": self.data["source"], **tables.defaults(source(self.data)), **self.data}
        return Recipe(model, data, self.train, objective, {name: dict(value) for name, value in players.items()})

    def to_toml(self) -> str:
        return (
            tables.to_toml({name: getattr(self, name) for name in TABLES} | {"train": tables.table(self.train)}) + "\n"
        )


def load(name_or_path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that ships, a .toml file or a run's folder, with `TABLE.KEY=VALUE` overrides.

    Raises:
        FileNotFoundError: there is no such recipe; lists those that ship.
        ValueError: unknown keys, missing keys or wrong types, with their names.
    """
    path = find(name_or_path)
    content = tables.read_toml(path)
    for text in overrides:
        keys, value = tables.parse_override(text)
        _set(content, keys, value, text)
    return parse(content, str(path))


def find(name_or_path: str | pathlib.Path) -> pathlib.Path:
    """The file of a recipe that ships, of a run's folder, or itself."""
    path = pathlib.Path(name_or_path)
    shipped = registry.recipes()
    for candidate in (path, path / "recipe.toml", shipped.get(str(name_or_path))):
        if candidate and candidate.is_file():
            return candidate
    names = ", ".join(shipped) or "none"
    raise FileNotFoundError(f"no recipe is called {str(name_or_path)!r}, and no file or run's folder; shipped: {names}")


def parse(content: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from its tables, checked as far as it can be before data are read."""
    tables.check_keys(content, TABLES, where)
    for name, value in content.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: {name} must be a table, got {value!r}")
    for name, key in (("model", "preset"), ("data", "source"), ("train", "steps")):
        if key not in content.get(name, {}):
            raise ValueError(f"{where}: [{name}] must have {key!r}")
    for name, key in (("model", "preset"), ("data", "source")):
        if not isinstance(content[name][key], str):
            raise ValueError(f"{where}: [{name}] {key} must be a name, got {content[name][key]!r}")
    for name, table in content.get("players", {}).items():
        if not isinstance(table, Mapping):
            raise ValueError(f"{where}: [players.{name}] must be a table, got {name} = {table!r}")
    model = dict(content["model"])
    registry.preset(model["preset"], {key: value for key, value in model.items() if key != "preset"})
    train = tables.build(TrainOptions, content["train"], f"{where}: [train]")
    players = {name: dict(table) for name, table in content.get("players", {}).items()}
    return Recipe(model, dict(content["data"]), train, dict(content.get("objective", {})), players)


def open_data(table: Mapping[str, Any]) -> Data:
    """The dataset that a [data] table describes."""
    return tables.build(source(table), {key: value for key, value in table.items() if key != "source"}, "[data]")


def check_shape(data: Data, config: Any) -> None:
    """ValueError where the data's first item has not the shape that a model's configuration says."""
    expected = getattr(config, "shape", None)
    if expected is not None and tuple(data[0].shape) != tuple(expected):
        raise ValueError(
            f"[data] must give what the model does, {tuple(expected)} (channels, frames, height, width), "
            f"got {tuple(data[0].shape)}: change frames, size or channels of [data], or [model]"
        )


def folder_data(folder: pathlib.Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """The [data] table of a folder of the user's, with the keys of `table` that its source knows too.

    Raises:
        FileNotFoundError: the folder is missing, or holds no file that a source reads.
    """
    kinds = {name: source({"source": name}) for name in sources.SOURCES}
    suffixes = {name: kind.suffixes for name, kind in kinds.items() if hasattr(kind, "suffixes")}
    found = {path.suffix.lower() for path in folder.rglob("*")}
    for name, readable in suffixes.items():
        if found & set(readable):
            known = [parameter.name for parameter in tables.parameters(kinds[name])]
            kept = {key: value for key, value in table.items() if key in known}
            return {"source": name, **kept, "folder": str(folder.resolve())}
    readable = ", ".join(suffix for group in suffixes.values() for suffix in group)
    raise FileNotFoundError(f"--data must be a folder that holds files of {readable}, got {folder}")


def source(table: Mapping[str, Any]) -> type:
    """The class that a [data] table names."""
    name = table["source"]
    if name not in sources.SOURCES:
        raise ValueError(f"[data] source must be one of {', '.join(sources.SOURCES)}, got {name!r}")
    module, _, kind = sources.SOURCES[name].partition(":")
    return getattr(importlib.import_module(module), kind)


def _set(content: dict[str, Any], keys: Sequence[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise ValueError(f"an override must name a table's key, got {text!r}")
    content[keys[-1]] = value
