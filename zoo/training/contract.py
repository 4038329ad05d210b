"""What a paper gives the training loop: players that take turns, a loss for each, and stages.

A step of the loop reads max(player.steps) batches; then every player in order takes its `steps` turns, turn t on batch
t. In a turn only the player's own parameters require gradients, and its own optimizer minimises its loss. Data,
precision, accumulation, averaging, checkpoints, logging and processes are the loop's.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Data(Protocol):
    """A map-style dataset whose item i is a pure function of (seed, i), so that a resumed run sees the same batches.

    An item is a clip (C, T, H, W) or an image (C, H, W), float32 in [-1, 1], or a dict of such tensors and integer
    labels where a paper has several domains. Batches are made by torch's default_collate.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Player:
    """Modules that are trained together, with one loss and one optimizer.

    Attributes:
        modules: whose parameters the player owns. Players may share none.
        steps: turns in each step of the loop (WGAN-GP: 5 for a discriminator, 1 for the generator).
        optimizer: the paper's settings, fields of `training.optimizers.OptimizerConfig`; a recipe's [players.<name>]
            overrides them.
    """

    modules: tuple[nn.Module, ...]
    steps: int = 1
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        """Each parameter once, in the modules' order."""
        return list(dict.fromkeys(parameter for module in self.modules for parameter in module.parameters()))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of training with players of its own (SinGAN's scales); optimizers start anew in each.

    Attributes:
        steps: steps of the loop; None: the recipe's.
    """

    name: str = "main"
    steps: int | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a loss is called, and the only source of its randomness.

    Attributes:
        index: of this step within its stage, from 0.
        stage: with its number of steps filled in.
        generator: on the batch's device, seeded by (seed, stage, step, player, turn, piece of the batch); draw with
            `torch.randn(shape, generator=step.generator, device=step.generator.device)`. The global generator is seeded
            too, for modules that draw from it (dropout, random landmarks).
    """

    index: int
    stage: Stage
    generator: torch.Generator


class Objective(nn.Module, abc.ABC):
    """A training problem: the model that is shipped, the other players' networks, and what each player minimises.

    The constructor takes the model first, then keywords with plain types and defaults: the recipe's [objective]. All
    state that a resumed run needs is in parameters and buffers. A step's change of buffers (spectral norm's u and v,
    running statistics, image pools) is the one that the first piece of its batch makes, so that accumulation and the
    number of processes change nothing.

    Attributes:
        model: the module that is shipped, with `config` and `sample(n, *, seed)`.
        players: in the order of turns; read anew after `begin_stage`.
    """

    model: nn.Module
    players: Mapping[str, Player]

    @abc.abstractmethod
    def loss(self, player: str, batch: Any, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar that a player minimises, a mean over the batch, and scalars to log.

        Called under the recipe's autocast: turn it off locally where a term needs float32.
        """

    def stages(self) -> Sequence[Stage]:
        return (Stage(),)

    def begin_stage(self, stage: Stage, data: Data) -> None:
        """Called when a stage begins; when a run resumes, for every stage up to the current one, before its state is
        loaded. Modules that it makes must depend on the configuration alone."""

    def preview(self, model: nn.Module, batch: Any, n: int, seed: int) -> Tensor:
        """(n, C, *grid) in [-1, 1]: what the sample sheets show; `model` is the averaged one where there is one."""
        return model.sample(n, seed=seed)  # type: ignore[operator]
