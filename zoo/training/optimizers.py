"""Optimizers by name, and learning rates as a function of the step alone, so that there is no schedule to save."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """A player's optimizer and its schedule.

    Attributes:
        betas, eps: Adam's. momentum: RMSprop's and SGD's.
        schedule: "constant"; "linear" or "cosine" from the learning rate at `decay_start` to 0 at the stage's end;
            "steps": times `decay_factor` at each step of `decay_at`.
        warmup_steps: over which the learning rate rises linearly from 0.
        clip_norm: the largest norm of a player's gradients; 0: any.
    """

    name: Literal["adam", "adamw", "rmsprop", "sgd"] = "adam"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine", "steps"] = "constant"
    decay_start: int = 0
    decay_at: tuple[int, ...] = ()
    decay_factor: float = 0.1
    warmup_steps: int = 0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("eps", "momentum", "weight_decay", "decay_start", "warmup_steps", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        shared: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.name == "adam":
            return torch.optim.Adam(parameters, betas=self.betas, eps=self.eps, **shared)
        if self.name == "adamw":
            return torch.optim.AdamW(parameters, betas=self.betas, eps=self.eps, **shared)
        if self.name == "rmsprop":
            return torch.optim.RMSprop(parameters, momentum=self.momentum, eps=self.eps, **shared)
        return torch.optim.SGD(parameters, momentum=self.momentum, **shared)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step `step`, from 0, of a stage of `steps`."""
        rate = self.learning_rate * min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "steps":
            return rate * self.decay_factor ** sum(step >= at for at in self.decay_at)
        done = min(1.0, max(0, step - self.decay_start) / max(1, steps - self.decay_start))
        if self.schedule == "linear":
            return rate * (1 - done)
        return rate * (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else rate


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state by "<parameter's number>.<key>"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items() if _kept(value)}


def _kept(value: object) -> bool:
    """SGD and RMSprop without momentum have empty entries."""
    return isinstance(value, Tensor)


def load_state_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], config: OptimizerConfig, origin: str
) -> None:
    """The inverse of `state_tensors`, for the optimizer that `config` builds.

    Raises:
        ValueError: the state is of another kind of optimizer; names `origin`.
    """
    wanted, found = _keys(config), {name.split(".", 1)[1] for name in tensors}
    if found and found != wanted:  # before the first step there is none
        raise ValueError(f"{origin} must be of {config.name}, which keeps {sorted(wanted)}, got {sorted(found)}")
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _keys(config: OptimizerConfig) -> set[str]:
    """What an optimizer of this configuration keeps of a parameter, seen after a step on one."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = config.build([parameter])
    optimizer.step()
    return {name.split(".", 1)[1] for name in state_tensors(optimizer)}
