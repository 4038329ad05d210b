"""Whole steps of SAVGAN's training: a turn of the critics, with their gradient penalties, and one of the generator.

Forward is the loss, forward and backward the turn: loss, gradients of the player's parameters, the optimizer's step.
The peers are the same networks in plain PyTorch, with torch's spectral norm.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nystromgan import testing
from nystromgan.bench.baselines import exact, landmark
from nystromgan.bench.baselines.modules import bound, on_maps
from nystromgan.bench.case import DTYPES, FULL, MODES, Case, Inputs, Peer, Shape, by_mode
from nystromgan.bench.cases.zoo import Attend, as_people_write_it, critic_flops, generator_flops, new_objective, preset
from nystromgan.nn import SelfAttention3d

BATCH = 2
SEED = 0  # of the draws within a turn


def cases(device: str) -> list[Case]:
    name = "savgan-small" if device == "cpu" else "savgan"
    return [critics_case(name, device), generator_case(name, device)]


class Turn(nn.Module):
    """A player's loss (1,) of clips, or of latents (the generator's). Draws are the same each time."""

    def __init__(self, objective: Any, player: str) -> None:
        super().__init__()
        self.objective, self.player = objective.train(), player
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        from nystromgan.zoo.training.contract import Stage, Step

        model, batch = self.objective.model, len(x)
        latent = x if self.player == "generator" else testing.normal(batch, model.config.latent_dim, seed=SEED).to(x)
        model.draw_latent = lambda count, generator: latent.detach()
        generator = torch.Generator(x.device).manual_seed(SEED)
        # The critics' penalty is made of a gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.player == "discriminators"):
            return self.objective.loss(self.player, x.detach(), Step(0, Stage(), generator))[0][None]


def in_plain_torch(objective: Any, generator: list[Attend], critic: list[Attend]) -> Any:
    """The objective with these forms of attention, and torch's spectral norm for ours."""
    objective.model = as_people_write_it(objective.model, generator)
    objective.video_discriminator = as_people_write_it(objective.video_discriminator, critic)
    return objective


def critics_case(name: str, device: str) -> Case:
    """One turn of both critics, whose attention is exact; the penalty differentiates it twice.

    No fused kernel of torch has a second derivative, so the best plain form takes one for the pass over real and fake
    clips, and the plain products for the penalty's.
    """
    math, eager = exact.maps(exact.unfused), exact.eager_maps
    attends = {"N x N": eager, "SDPA math": math}
    for label, form in exact.fused(device).items():
        attends[f"SDPA {label}, N x N in the penalty"] = _by_batch(exact.maps(form), eager)
    landmarks = [on_maps(landmark.two_sdpa(count)) for count in preset(name).num_landmarks]
    peers = {
        f"{label}, torch's spectral norm": _peer(name, "discriminators", "nystrom", landmarks, [attend] * 2)
        for label, attend in attends.items()
    }
    # Of the clips' critic: both passes over real and fake clips, and over the penalty's, which has a gradient in it.
    made, seen = generator_flops(name, BATCH), critic_flops(name, BATCH)
    flops = by_mode(made + 4 * seen, made + 12 * seen)
    return _case(f"{name} critics' turn", name, "discriminators", peers, flops)


def generator_case(name: str, device: str) -> Case:
    """One turn of the generator, through the critics; beside generators with landmarks and with exact attention."""
    fused = {f"SDPA {label}": exact.maps(form) for label, form in exact.fused(device).items()}
    counts = preset(name).num_landmarks
    best = next(iter(fused.values()))
    makers = {"two SDPA calls": (landmark.two_sdpa, best), "eager, F (Z (G V))": (landmark.eager, exact.eager_maps)}
    peers = {
        f"{label}, torch's spectral norm": _peer(
            name, "generator", "nystrom", [on_maps(make(count)) for count in counts], [critic] * 2
        )
        for label, (make, critic) in makers.items()
    }
    definition = _definition(name, "generator")
    for label, attend in {**fused, "N x N": exact.eager_maps}.items():
        peer = _peer(name, "generator", "exact", [attend] * 2, [attend] * 2)
        peers[f"{FULL}, {label}"] = peer._replace(definition=definition)
    made, seen = generator_flops(name, BATCH), critic_flops(name, BATCH)
    flops = by_mode(made + seen, 3 * made + 2 * seen)  # the critic's weights need no gradient
    return _case(f"{name} generator's turn", name, "generator", peers, flops)


def _by_batch(one: Attend, other: Attend) -> Attend:
    """`one` over real and fake clips together, `other` over the penalty's, which are half as many."""
    return lambda query, key, value: (one if len(query) > BATCH else other)(query, key, value)


def _peer(name: str, player: str, attention: str, generator: list[Attend], critic: list[Attend]) -> Peer:
    return Peer(lambda: bound(Turn(in_plain_torch(new_objective(name, attention), generator, critic), player)))


def _definition(name: str, player: str) -> Callable[..., Tensor]:
    """In float64, with exact attention in the generator; made when it is called."""
    return lambda **tensors: bound(Turn(new_objective(name, "exact"), player))(**tensors)


def _case(group: str, name: str, player: str, peers: dict[str, Peer], flops: dict[str, float]) -> Case:
    config = preset(name)
    clip = (config.image_channels, config.frames, config.size, config.size)

    def make(device: str, shape: Shape, seed: int) -> Inputs:
        size = (config.latent_dim,) if player == "generator" else clip
        turn = Turn(new_objective(name, "nystrom"), player)
        owned = {id(parameter) for parameter in turn.objective.players[player].parameters()}
        found = {key: value.detach() for key, value in turn.named_parameters() if id(value) in owned}
        return {key: x.to(device) for key, x in {"x": testing.normal(shape["B"], *size, seed=seed), **found}.items()}

    def ours(backend: str) -> Callable[..., Tensor]:
        turn = Turn(new_objective(name, "nystrom"), player)
        for layer in turn.modules():
            if isinstance(layer, SelfAttention3d):
                layer.backend = backend
        return bound(turn)

    def optimizer(tensors: list[Tensor]) -> torch.optim.Optimizer:
        from nystromgan.zoo.training.optimizers import OptimizerConfig

        return OptimizerConfig(**new_objective(name, "nystrom").players[player].optimizer).build(tensors)

    tolerance = testing.TOLERANCES[DTYPES["fp32"]]
    return Case(
        "zoo", group, {"B": BATCH}, "fp32", make, ours, peers, flops, by_mode(0.0, 0.0), {"B": 1},
        testing.Tolerance(20 * tolerance.output, 40 * tolerance.gradient), training=True, modes=MODES,
        optimizer=optimizer,
    )  # fmt: skip
