"""Whole networks of the zoo in training: SAVGAN's generator and its critic of clips, spectral norms included.

Landmarks are segments here, which every eager form can pool too.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

from nystromgan import testing
from nystromgan.bench.baselines import exact, landmark
from nystromgan.bench.baselines.modules import EagerSelfAttention, bound, on_maps
from nystromgan.bench.case import DTYPES, FULL, MODES, Case, Form, Inputs, Peer, Shape, by_mode
from nystromgan.nn import SelfAttention3d

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str) -> list[Case]:
    name = "savgan-small" if device == "cpu" else "savgan"
    return [generator_case(name, 2, device), critic_case(name, 2, device)]


def new_objective(name: str, attention: str) -> Any:
    """A preset's networks, drawn from one seed."""
    from nystromgan.zoo import registry  # here, because it imports the paper

    module = registry.paper_of_preset(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = module.OBJECTIVE(registry.create_model(name, attention=attention, landmarks="segment"))
    for parameter_name, parameter in objective.named_parameters():
        if parameter_name.endswith("gamma"):
            nn.init.ones_(parameter)  # a block that is trained
    return objective


def generator_case(name: str, batch: int, device: str) -> Case:
    """Latents to clips."""

    def build(attention: str) -> nn.Module:
        return new_objective(name, attention).model

    def inputs(shape: Shape, seed: int) -> Tensor:
        return testing.normal(shape["B"], preset(name).latent_dim, seed=seed)

    attends = {"two SDPA calls": landmark.two_sdpa, "eager, F (Z (G V))": landmark.eager}
    eager = {
        f"{label}, torch's spectral norm": [on_maps(make(count)) for count in preset(name).num_landmarks]
        for label, make in attends.items()
    }
    full = {f"{FULL}, {label}": exact.maps(form) for label, form in exact.fused(device).items()}
    return _case(f"{name} generator", batch, build, inputs, eager, full, generator_flops(name, batch))


def critic_case(name: str, batch: int, device: str) -> Case:
    """Clips to logits; its attention is exact."""

    def build(attention: str) -> nn.Module:
        return new_objective(name, "exact").video_discriminator

    def inputs(shape: Shape, seed: int) -> Tensor:
        config = preset(name)
        return testing.normal(shape["B"], config.image_channels, config.frames, config.size, config.size, seed=seed)

    attends = {f"SDPA {label}": exact.maps(form) for label, form in exact.fused(device).items()}
    attends["eager, N x N"] = exact.eager_maps
    eager = {f"{label}, torch's spectral norm": [attend] * 2 for label, attend in attends.items()}
    return _case(f"{name} critic", batch, build, inputs, eager, {}, critic_flops(name, batch))


def generator_flops(name: str, batch: int) -> float:
    """Of the transposed convolutions, forward."""
    config = preset(name)
    positions = config.frames * config.size**2 / 16**3
    widths = [8 * config.width, 4 * config.width, 2 * config.width, config.width, config.image_channels]
    layers = itertools.pairwise(widths)
    return batch * sum(2 * 64 * a * b * positions * 8**i for i, (a, b) in enumerate(layers))


def critic_flops(name: str, batch: int) -> float:
    """Of the convolutions, forward."""
    config = preset(name)
    widths = [config.image_channels, config.width, 2 * config.width, 4 * config.width, 8 * config.width]
    positions = [config.frames * config.size**2 / (4 * 8**i) for i in range(4)]
    layers = zip(widths, widths[1:], positions, strict=False)
    return batch * sum(2 * 64 * a * b * count for a, b, count in layers)


def preset(name: str) -> Any:
    from nystromgan.zoo import registry

    return registry.preset(name, {})


def _case(
    group: str, batch: int, build: Callable[[str], nn.Module], inputs: Callable[[Shape, int], Tensor],
    eager: dict[str, list[Attend]], full: dict[str, Attend], flops: float,
) -> Case:  # fmt: skip
    def make(device: str, shape: Shape, seed: int) -> Inputs:
        model = build("nystrom")
        tensors = {"x": inputs(shape, seed)} | {key: value.detach() for key, value in model.named_parameters()}
        return {key: tensor.to(device) for key, tensor in tensors.items()}

    def ours(backend: str) -> Form:
        model = build("nystrom")
        for layer in model.modules():
            if isinstance(layer, SelfAttention3d):
                layer.backend = backend
        return bound(model.train())

    peers = {
        label: Peer(lambda attends=attends: bound(as_people_write_it(build("nystrom"), attends)))
        for label, attends in eager.items()
    }
    for label, attend in full.items():
        peers[label] = Peer(
            lambda attend=attend: bound(as_people_write_it(build("exact"), [attend] * 2)),
            lambda **tensors: bound(build("exact").train())(**tensors),
        )
    # Wider than the ops': where a ReLU's input is near zero, rounding decides, and a gradient moves by up to 1e-3.
    tolerance = testing.TOLERANCES[DTYPES["fp32"]]
    return Case(
        "zoo", group, {"B": batch}, "fp32", make, ours, peers, by_mode(flops, 3 * flops), by_mode(0.0, 0.0), {"B": 1},
        testing.Tolerance(20 * tolerance.output, 40 * tolerance.gradient), training=True,
        modes=MODES,
    )  # fmt: skip


def as_people_write_it(model: nn.Module, attends: list[Attend]) -> nn.Module:
    """The network with eager attention blocks and torch's spectral norm for ours, and the same state."""
    state, remaining = model.state_dict(), iter(attends)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SelfAttention3d):
                setattr(parent, name, EagerSelfAttention(child.channels, 3, next(remaining)))
            elif nn.utils.parametrize.is_parametrized(child):
                setattr(parent, name, torch_spectral_norm(_plain(child)))
    model.load_state_dict(state)
    model._forward_pre_hooks.clear()  # of the grouped launch
    model._forward_hooks.clear()
    return model.train()


def _plain(layer: nn.Module) -> nn.Module:
    """A new convolution of the layer's sizes."""
    made = nn.ConvTranspose3d if layer.__class__.__name__.endswith("ConvTranspose3d") else nn.Conv3d
    return made(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)  # type: ignore
