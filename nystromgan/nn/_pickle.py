"""Pickling of modules with parametrizations, which torch refuses."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


def make_picklable(module: nn.Module) -> None:
    """Lets a parametrized module pickle, `torch.save` whole and `copy.copy`.

    torch gives such a module a class of its own, which no import finds, and forbids its pickling. It is taken apart to
    the class before parametrization, the parametrized names and its attributes, and put together from them.
    """
    type(module).__reduce__ = _reduce  # type: ignore[method-assign, assignment]


def _reduce(module: nn.Module) -> tuple[Callable[..., nn.Module], tuple[type, tuple[str, ...]], Any]:
    source = parametrize.type_before_parametrizations(module)
    getstate = getattr(source, "__getstate__", None)  # Python 3.10's object has none
    state = getstate(module) if getstate else module.__dict__
    return _parametrized, (source, tuple(module.parametrizations)), state  # type: ignore[arg-type]


def _parametrized(source: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A module of torch's class for a parametrized `source`, whose attributes pickle fills in after."""
    module = source.__new__(source)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(Tensor()))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    make_picklable(module)
    return module
