"""Every model by name: which paper it is of, and with which configuration. A paper is imported when it is asked for."""

import dataclasses
import difflib
import fnmatch
import importlib
import pathlib
from types import ModuleType
from typing import Any

from torch import nn

from nystromgan.zoo import config as tables

# A paper's module has TASK, MODEL (a class), OBJECTIVE (a class), and PRESETS {name: configuration}.
PAPERS: dict[str, str] = {"savgan": "nystromgan.zoo.savgan", "tganv2": "nystromgan.zoo.tganv2"}


def list_models(pattern: str = "*", task: str | None = None) -> list[str]:
    """The names that match a shell pattern, of one task ("video", "image", ...) if given, in order."""
    papers = [paper(name) for name in PAPERS]
    names = [name for module in papers if task in (None, module.TASK) for name in module.PRESETS]
    return sorted(fnmatch.filter(names, pattern))


def create_model(name: str, **config: Any) -> nn.Module:
    """A new model of a preset's configuration, with the fields in `config` changed.

    Raises:
        ValueError: no such model, or no such field, or a value that the configuration refuses.
    """
    module = paper_of_preset(name)
    return module.MODEL(preset(name, config))


def preset(name: str, overrides: dict[str, Any]) -> Any:
    """A preset's configuration with fields changed, checked as a recipe's are."""
    base = paper_of_preset(name).PRESETS[name]
    tables.check_keys(overrides, [field.name for field in dataclasses.fields(base)], f"the configuration of {name}")
    return tables.build(type(base), {**tables.table(base), **overrides}, f"the configuration of {name}")


def paper(name: str) -> ModuleType:
    """A paper's module; ValueError for a name that is none."""
    if name not in PAPERS:
        raise ValueError(f"no paper is called {name!r}; there are {', '.join(PAPERS)}")
    return importlib.import_module(PAPERS[name])


def paper_of_preset(name: str) -> ModuleType:
    for module in map(paper, PAPERS):
        if name in module.PRESETS:
            return module
    names = list_models()
    near = difflib.get_close_matches(name, names, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"no model is called {name!r}{hint}; there are {', '.join(names)}")


def name_of_paper(model: nn.Module) -> str:
    """The paper whose MODEL an instance is of."""
    for name in PAPERS:
        if type(model) is paper(name).MODEL:
            return name
    raise ValueError(f"model must be of a paper of the zoo ({', '.join(PAPERS)}), got {type(model).__name__}")


def recipes() -> dict[str, pathlib.Path]:
    """Every recipe that ships, by its file's name; a folder's recipe.toml has the folder's name."""
    found: dict[str, pathlib.Path] = {}
    for name in PAPERS:
        folder = pathlib.Path(str(paper(name).__file__)).parent
        found |= {path.stem: path for path in sorted(folder.glob("recipes/*.toml"))}
        if (folder / "recipe.toml").exists():
            found[folder.name] = folder / "recipe.toml"
    return found
