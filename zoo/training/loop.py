"""One step of training: players take turns, batches are computed in pieces, and every random number has its place.

Randomness is a function of (seed, stage, step, player, turn, piece), and batches are a function of their number, so a
state of weights, buffers, optimizers and four counters is enough to go on bit for bit.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nystromgan.zoo import config as tables
from nystromgan.zoo import storage
from nystromgan.zoo.training import batches, optimizers
from nystromgan.zoo.training.average import Average
from nystromgan.zoo.training.contract import Data, Objective, Player, Stage, Step
from nystromgan.zoo.training.optimizers import OptimizerConfig
from nystromgan.zoo.training.options import TrainOptions
from nystromgan.zoo.training.processes import Processes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved is whole."""


@dataclasses.dataclass
class Position:
    """How far training is: the stage, steps done in it, steps done in all, batches read."""

    stage: int = 0
    step: int = 0
    total: int = 0
    batches: int = 0


@dataclasses.dataclass(frozen=True)
class Turns:
    """A player with what the loop adds to it."""

    number: int
    player: Player
    parameters: list[nn.Parameter]
    config: OptimizerConfig
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


class Loop:
    """The training of one objective, a step at a time; writes no files."""

    def __init__(
        self,
        objective: Objective,
        data: Data,
        options: TrainOptions,
        players: Mapping[str, Mapping[str, Any]] | None = None,
        device: str = "auto",
    ) -> None:
        self.processes = Processes(device)
        self.device = self.processes.device
        self.objective, self.data, self.options = objective.to(self.device), data, options
        self.overrides = players or {}
        self.pieces = options.pieces(self.processes.count)
        self.mine = range(self.processes.rank, self.pieces, self.processes.count)
        self.stages = [dataclasses.replace(s, steps=s.steps or options.steps) for s in objective.stages()]
        self.position = Position()
        self.last_batch: Any = None
        self._generator = torch.Generator(self.device)
        self._enter()

    @property
    def stage(self) -> Stage:
        return self.stages[self.position.stage]

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps or 0 for stage in self.stages)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Each player's turns and optimizer, resolved: a recipe's [players]."""
        return {name: {"steps": turns.player.steps, **tables.table(turns.config)} for name, turns in self.turns.items()}

    @property
    def done(self) -> bool:
        return self.position.total >= self.steps

    def step(self) -> dict[str, float]:
        """Every player takes its turns; returns each logged value's mean over turns and pieces.

        Raises:
            TrainingError: a loss is not finite.
        """
        if self.position.step >= (self.stage.steps or 0):
            self.position.stage, self.position.step = self.position.stage + 1, 0
            self._enter()
        logs: dict[str, list[Tensor]] = collections.defaultdict(list)
        read = self._read(max(turns.player.steps for turns in self.turns.values()))
        for name, turns in self.turns.items():
            with self._only(turns.parameters):
                for turn in range(turns.player.steps):
                    self._turn(name, turns, turn, read[turn], logs)
        if self.options.ema:
            self.average.update(self.objective.model, self.position.total)
        self.position.step += 1
        self.position.total += 1
        return self._means(logs)

    def shipped(self) -> nn.Module:
        """The model as it would be shipped now, in eval mode."""
        if not self.options.ema:
            self.average.update(self.objective.model, 0)
        return self.average.model

    def preview(self) -> Tensor:
        """(samples, C, *grid) in [-1, 1], on the CPU: the same latents each time."""
        with torch.no_grad():
            samples = self.objective.preview(
                self.shipped(), self.last_batch, self.options.samples, seed=self.options.seed
            )
        return samples.float().cpu()

    def state(self) -> dict[str, Tensor]:
        """All tensors that training needs to go on."""
        tensors = {f"objective.{name}": value for name, value in self.objective.state_dict().items()}
        if self.options.ema:
            tensors |= {f"average.{name}": value for name, value in self.average.model.state_dict().items()}
        for name, turns in self.turns.items():
            kept = optimizers.state_tensors(turns.optimizer)
            tensors |= {f"optimizer.{name}.{key}": value for key, value in kept.items()}
            scale = {key: torch.tensor(float(value)) for key, value in turns.scaler.state_dict().items()}
            tensors |= {f"scaler.{name}.{key}": value for key, value in scale.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], position: Position, origin: str) -> None:
        """Goes on from a state; ValueError, naming `origin`, where it is of another objective."""
        if position.stage >= len(self.stages):
            raise ValueError(f"{origin} is at stage {position.stage}, but there are only {len(self.stages)}")
        for number in range(1, position.stage + 1):
            self.position.stage = number
            self._enter()
        self.position = position
        storage.load_strictly(self.objective, _under(tensors, "objective."), origin)
        if self.options.ema:
            storage.load_strictly(self.average.model, _under(tensors, "average."), f"the average in {origin}")
        for name, turns in self.turns.items():
            kept = _under(tensors, f"optimizer.{name}.")
            optimizers.load_state_tensors(
                turns.optimizer, kept, turns.config, f"the state of {name}'s optimizer in {origin}"
            )
            scale = _under(tensors, f"scaler.{name}.")
            if turns.scaler.is_enabled() and scale:
                turns.scaler.load_state_dict({key: float(value) for key, value in scale.items()})
        self._open_data()

    def _enter(self) -> None:
        """Begins the current stage: its modules, players, optimizers and average."""
        torch.manual_seed(batches.mix(self.options.seed, self.position.stage))
        self.objective.train()
        self.objective.begin_stage(self.stage, self.data)
        self.objective.to(self.device)
        self.turns = {
            name: self._player(number, name, player)
            for number, (name, player) in enumerate(self.objective.players.items())
        }
        if not self.position.stage:  # later stages may lack some of the first's
            tables.check_keys(self.overrides, list(self.turns), "[players]")
        owned = collections.Counter(parameter for turns in self.turns.values() for parameter in turns.parameters)
        if any(count > 1 for count in owned.values()):
            raise ValueError(f"players must share no parameter; {sum(c > 1 for c in owned.values())} are in several")
        self.average = Average(self.objective.model, self.options.ema)
        self._open_data()

    def _player(self, number: int, name: str, player: Player) -> Turns:
        overrides = dict(self.overrides.get(name, {}))
        player = dataclasses.replace(player, steps=overrides.pop("steps", player.steps))
        if player.steps < 1:
            raise ValueError(f"[players.{name}]: steps must be at least 1, got {player.steps}")
        config = tables.build(OptimizerConfig, {**player.optimizer, **overrides}, f"[players.{name}]")
        parameters = [parameter for parameter in player.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(f"player {name} has no parameter that requires a gradient")
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.options.precision == "fp16")
        return Turns(number, player, parameters, config, config.build(parameters), scaler)

    def _open_data(self) -> None:
        options, length = self.options, len(self.data)
        sampler = batches.Pieces(length, options.batch, options.seed, self.pieces, self.mine, self.position.batches)
        self._pieces = batches.loader(self.data, sampler, options.workers, self.device)

    def _read(self, count: int) -> list[list[Any]]:
        """This process's pieces of the next `count` batches."""
        read = [[batches.to_device(next(self._pieces), self.device) for _ in self.mine] for _ in range(count)]
        self.position.batches += count
        self.last_batch = read[0][0]
        return read

    @contextlib.contextmanager
    def _only(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Of all players' parameters only these require gradients, so that no turn computes what it does not use."""
        others = {p for turns in self.turns.values() for p in turns.parameters} - set(parameters)
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _turn(self, name: str, turns: Turns, turn: int, pieces: list[Any], logs: dict[str, list[Tensor]]) -> None:
        turns.optimizer.zero_grad(set_to_none=True)
        before = self._buffers() if self.pieces > 1 else {}
        after: dict[str, Tensor] = {}
        for piece, batch in zip(self.mine, pieces, strict=True):
            self._set_buffers(before)
            step = self._seeded(turns.number, turn, piece)
            with torch.autocast(self.device.type, DTYPES[self.options.precision], self.options.precision != "fp32"):
                loss, values = self.objective.loss(name, batch, step)
            if loss.ndim or not loss.requires_grad:
                raise ValueError(f"the loss of {name} must be a scalar with a gradient, got {tuple(loss.shape)}")
            turns.scaler.scale(loss / self.pieces).backward()
            for key, value in {"loss": loss, **values}.items():
                logs[f"{name}/{key}"].append(value.detach().float())
            after = after or (self._buffers() if self.pieces > 1 else {})
        self._set_buffers(after)
        self.processes.share(list(self.objective.buffers()))
        self._update(turns)

    def _update(self, turns: Turns) -> None:
        self.processes.sum_gradients(turns.parameters)
        turns.scaler.unscale_(turns.optimizer)
        if turns.config.clip_norm:
            nn.utils.clip_grad_norm_(turns.parameters, turns.config.clip_norm)
        for group in turns.optimizer.param_groups:
            group["lr"] = turns.config.learning_rate_at(self.position.step, self.stage.steps or 0)
        turns.scaler.step(turns.optimizer)
        turns.scaler.update()

    def _seeded(self, player: int, turn: int, piece: int) -> Step:
        """The step that a loss is given, with its generator and the global one seeded for this place."""
        place = (self.position.stage, self.position.step, player, turn, piece)
        seed = batches.mix(self.options.seed, *place)
        torch.manual_seed(seed)
        return Step(self.position.step, self.stage, self._generator.manual_seed(seed))

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.objective.named_buffers()}

    @torch.no_grad()
    def _set_buffers(self, values: dict[str, Tensor]) -> None:
        if values:
            for name, buffer in self.objective.named_buffers():
                buffer.copy_(values[name])

    def _means(self, logs: dict[str, list[Tensor]]) -> dict[str, float]:
        """The mean of every logged value over turns, pieces and processes; one wait for the device."""
        stacked = torch.stack([torch.stack(values).mean() for values in logs.values()])
        values = dict(zip(logs, self.processes.mean(stacked).tolist(), strict=True))
        for key, value in values.items():
            if key.endswith("/loss") and not math.isfinite(value):
                raise TrainingError(f"the loss of {key.removesuffix('/loss')} is {value} at step {self.position.total}")
        return values


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
