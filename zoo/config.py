"""Tables (TOML, JSON) to typed objects and back: unknown keys, missing keys and wrong types are errors that say so."""

import dataclasses
import difflib
import inspect
import json
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def build(target: Callable[..., T], table: Mapping[str, Any], where: str, *given: Any) -> T:
    """Calls `target(*given, **table)` after checking the table's keys and types against its signature.

    Lists become tuples where the signature has tuples; the string "none" stands for None, which TOML does not have.

    Raises:
        ValueError: naming `where`, the key, the rule and the value.
    """
    known = parameters(target)[len(given) :]
    check_keys(table, [parameter.name for parameter in known], where)
    missing = [p.name for p in known if p.default is p.empty and p.name not in table]
    if missing:
        raise ValueError(f"{where} must have {', '.join(missing)}; it has {', '.join(table) or 'nothing'}")
    hints = {parameter.name: parameter.annotation for parameter in known}
    values = {name: _convert(value, hints[name], f"{where}: {name}") for name, value in table.items()}
    try:
        return target(*given, **values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def parameters(target: Callable[..., Any]) -> list[inspect.Parameter]:
    """What a call takes by name, with types resolved; a class that has **options also takes its bases' keywords."""
    found: dict[str, inspect.Parameter] = {}
    constructors: list[Any] = (
        [vars(b).get("__init__") for b in target.__mro__] if isinstance(target, type) else [target]
    )
    for function in filter(None, constructors):
        hints = typing.get_type_hints(function)
        own = [parameter for name, parameter in inspect.signature(function).parameters.items() if name != "self"]
        named = [
            parameter for parameter in own if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]
        found = {p.name: p.replace(annotation=hints.get(p.name, Any)) for p in named} | found
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return list(found.values())


def defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of what a call takes by name."""
    return {p.name: p.default for p in parameters(target) if p.default is not p.empty}


def check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{where} has no key {key!r}{hint}; known are {', '.join(known) or 'none'}")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The value as the type `hint` asks; ValueError where it is of another."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) == len(value):
            return tuple(_convert(item, each, where) for item, each in zip(value, hints, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    kind = origin or hint
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    name = str(hint) if origin else getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where} must be {name}, got {value!r}")


def _convert_union(value: Any, hints: Sequence[Any], where: str) -> Any:
    if type(None) in hints and (value is None or (value == "none" and str not in hints)):
        return None
    problems = []
    for hint in hints:
        if hint is not type(None):
            try:
                return _convert(value, hint, where)
            except ValueError as error:
                problems.append(str(error))
    raise ValueError(" or ".join(problems))


def table(config: Any) -> dict[str, Any]:
    """A dataclass as a table that JSON can hold and `build` turns back: tuples become lists, paths strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def read_toml(path: pathlib.Path) -> dict[str, Any]:
    """A TOML file's table; ValueError or OSError names the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def to_toml(tables: Mapping[str, Any], prefix: str = "") -> str:
    """TOML of nested tables of scalars and lists; None becomes "none"."""
    plain = {key: value for key, value in tables.items() if not isinstance(value, Mapping)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in tables.items():
        if isinstance(value, Mapping):
            inner = to_toml(value, f"{prefix}{key}.")
            nested_only = value and all(isinstance(item, Mapping) for item in value.values())
            lines += [inner] if nested_only else [f"\n[{prefix}{key}]", inner]
    return "\n".join(line for line in lines if line)


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(str(value) if isinstance(value, pathlib.Path) else value, ensure_ascii=False)


def parse_override(text: str) -> tuple[list[str], Any]:
    """`train.steps=100` as its path of keys and its value, read as TOML where it is and as a string elsewhere."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise ValueError(f"an override must be TABLE.KEY=VALUE, got {text!r}")
    try:
        return path.split("."), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path.split("."), value


def seed(value: int) -> int:
    """A seed that torch takes; ValueError for another."""
    if not 0 <= value < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2 ** 63, got {value}")
    return value


def device(name: str) -> torch.device:
    """A device by name; ValueError where torch does not know it or does not find it."""
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one that torch knows, such as cpu or cuda, got {name!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no GPU")
    return found
