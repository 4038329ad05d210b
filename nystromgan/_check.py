"""Argument checks shared by the public functions; every message names the argument, the rule and the value received."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor


def tensor(name: str, value: Any, ndim: int | None = None) -> None:
    """`value` is a floating-point tensor, of `ndim` axes where given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(value.shape)}")


def same(name: str, value: Tensor, other_name: str, other: Tensor, *attributes: str) -> None:
    """`value` and `other` agree in each of `attributes` ("device", "dtype")."""
    for attribute in attributes:
        if getattr(value, attribute) != getattr(other, attribute):
            raise ValueError(
                f"{name} must have {other_name}'s {attribute} {getattr(other, attribute)}, "
                f"got {getattr(value, attribute)}"
            )


def size(name: str, value: Tensor, axis: int, expected: int, reason: str) -> None:
    """`value` has `expected` entries along `axis`."""
    if value.shape[axis] != expected:
        raise ValueError(f"{name} axis {axis} must be {expected} ({reason}), got shape {tuple(value.shape)}")


def at_least(name: str, value: Any, minimum: int) -> None:
    """`value` is an integer no smaller than `minimum`."""
    # an int is what it mostly is, and to ask the abstract class first took a fortieth of a call over 2048 tokens
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt))):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def finite(name: str, value: Any) -> float:
    """`value` is a finite real number; returns it as a float."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
    """`value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name} must be one of {options}, got {value!r}")


def padding_mask(name: str, value: Any, batch: int, tokens: int, device: torch.device) -> None:
    """`value` is a boolean (batch, tokens) tensor on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool (True = ignore), got {value.dtype}")
    if value.ndim != 2 or value.shape[0] != batch or value.shape[1] != tokens:
        raise ValueError(f"{name} must have shape ({batch}, {tokens}), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
