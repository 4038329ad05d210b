"""The modules, parameters included, beside what people write and torch has."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nystromgan import testing
from nystromgan.bench.baselines import exact, landmark
from nystromgan.bench.baselines.modules import EagerNystromAttention, EagerSelfAttention, bound, on_maps
from nystromgan.bench.case import DTYPES, FULL, Case, Form, Inputs, Peer, Shape, by_mode
from nystromgan.nn import NystromAttention, SelfAttention2d, SelfAttention3d

LANDMARKS = 64
Build = Callable[[], nn.Module]


def cases(device: str) -> list[Case]:
    found = []
    for dtype in ("fp32", "bf16"):
        found += [
            exact_block(SelfAttention2d, (64, 64), dtype, device),
            exact_block(SelfAttention3d, (4, 32, 32), dtype, device),
            landmark_block(SelfAttention3d, (8, 32, 32), dtype, device),
            multihead(4096, dtype),
            encoder(4096, dtype),
        ]
    return found


def module_case(
    group: str, shape: Shape, small: Shape, dtype: str, build: Callable[[str], nn.Module], peers: dict[str, Peer],
    size: Callable[[Shape], tuple[int, ...]], flops: float, call: Callable[[nn.Module, Tensor], Tensor] | None = None,
    quick: bool = False,
) -> Case:  # fmt: skip
    """A case of a module: its inputs are x, of `size(shape)`, and every parameter."""
    called = {} if call is None else {"call": call}

    def make(device: str, shape: Shape, seed: int) -> Inputs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parameters = {name: x.detach() for name, x in build("auto").named_parameters()}
        parameters = {name: torch.ones_like(x) if name == "gamma" else x for name, x in parameters.items()}
        x = testing.normal(*size(shape), seed=seed)
        return {name: tensor.to(device, DTYPES[dtype]) for name, tensor in {"x": x, **parameters}.items()}

    elements = torch.Size(size(shape)).numel()
    moved = 2.0 * DTYPES[dtype].itemsize * elements
    return Case(
        "modules", group, shape, dtype, make, lambda backend: bound(build(backend).eval(), **called), peers,
        by_mode(flops, 3 * flops), by_mode(moved, 3 * moved), small, _tolerance(dtype), quick=quick,
        training=True,
    )  # fmt: skip


def _tolerance(dtype: str) -> testing.Tolerance:
    """The op's, doubled: projections before and after it round too."""
    output, gradient = testing.TOLERANCES[DTYPES[dtype]]
    return testing.Tolerance(2 * output, 2 * gradient)


def _blocks(block: Any, grid: tuple[int, ...], **options: Any) -> tuple[Shape, Shape, Callable[[str], nn.Module]]:
    """Shape, small shape and builder of a block of 64 channels."""
    channels = 64
    shape = {"B": 1, "C": channels, "grid": grid}
    small = {**shape, "grid": (24, 24) if len(grid) == 2 else (2, 16, 16)}
    return shape, small, lambda backend: block(channels, backend=backend, **options)


def _maps(shape: Shape) -> tuple[int, ...]:
    return shape["B"], shape["C"], *shape["grid"]


def exact_block(block: Any, grid: tuple[int, ...], dtype: str, device: str) -> Case:
    """The block with exact attention, beside its eager form and torch's fused attention in its place."""
    shape, small, build = _blocks(block, grid)
    channels, axes, tokens = shape["C"], len(grid), torch.Size(grid).numel()
    attends = {f"SDPA {name}": exact.maps(form) for name, form in exact.fused(device).items()}
    attends["eager, N x N"] = exact.eager_maps
    peers = {name: Peer(_eager_block(channels, axes, attend)) for name, attend in attends.items()}
    flops = 2.0 * tokens**2 * (channels // 8 + channels) + 2.0 * tokens * channels * (2 * channels // 8 + channels)
    return module_case(block.__name__, shape, small, dtype, build, peers, _maps, flops)


def landmark_block(block: Any, grid: tuple[int, ...], dtype: str, device: str) -> Case:
    """The block with landmarks (strips of tokens, as eager forms pool them), beside eager forms and exact ones."""
    shape, small, build = _blocks(block, grid, num_landmarks=LANDMARKS, landmarks="segment")
    channels, axes, tokens = shape["C"], len(grid), torch.Size(grid).numel()
    attends = {"two SDPA calls": landmark.two_sdpa, "eager, F (Z (G V))": landmark.eager}
    peers = {
        name: Peer(_eager_block(channels, axes, on_maps(make(LANDMARKS))), compiled=True)
        for name, make in attends.items()
    }
    definition = _later(_eager_block(channels, axes, exact.eager_maps))
    for name, form in exact.fused(device).items():
        peers[f"{FULL}, {name}"] = Peer(
            _eager_block(channels, axes, exact.maps(form)), definition, flops=4.0 * tokens**2 * channels
        )
    flops = 4.0 * tokens * LANDMARKS * (channels // 8 + channels) + 2.0 * tokens * channels * (channels // 4 + channels)
    name = f"{block.__name__}, landmarks"
    return module_case(name, shape, small, dtype, build, peers, _maps, flops, quick=dtype == "fp32")


def _later(make: Callable[[], Form]) -> Form:
    """A definition whose module is made when it is called: building the registry computes nothing."""
    return lambda **inputs: make()(**inputs)


def _eager_block(channels: int, axes: int, attend: Any) -> Callable[[], Any]:
    return lambda: bound(EagerSelfAttention(channels, axes, attend))


def _tokens(shape: Shape) -> tuple[int, ...]:
    return shape["B"], shape["N"], shape["C"]


def _self(module: nn.Module, x: Tensor) -> Tensor:
    """Self-attention by a module with MultiheadAttention's forward."""
    return module(x, x, x, need_weights=False)[0]


def multihead(tokens: int, dtype: str) -> Case:
    """NystromAttention beside the same module in eager PyTorch, and MultiheadAttention, which is exact."""
    width, heads = 512, 8
    shape = {"B": 1, "N": tokens, "C": width}

    def build(backend: str) -> nn.Module:
        return NystromAttention(width, heads, num_landmarks=LANDMARKS, backend=backend)

    full = functools.partial(nn.MultiheadAttention, width, heads, batch_first=True)
    attends = {"two SDPA calls": landmark.two_sdpa, "eager, F (Z (G V))": landmark.eager}
    peers = {name: Peer(_eager_multihead(width, heads, make), compiled=True) for name, make in attends.items()}
    peers[f"{FULL}, MultiheadAttention"] = Peer(lambda: bound(full(), _self), _later(lambda: bound(full(), _self)))
    flops = 8.0 * tokens * width**2 + 8.0 * tokens * LANDMARKS * width
    return module_case(
        "NystromAttention", shape, {**shape, "N": 512}, dtype, build, peers, _tokens, flops, _self, dtype == "fp32"
    )


def _eager_multihead(width: int, heads: int, make: Any) -> Callable[[], Any]:
    return lambda: bound(EagerNystromAttention(width, heads, make(LANDMARKS)))


def encoder(tokens: int, dtype: str) -> Case:
    """A transformer's encoder of two layers with NystromAttention in its layers, beside torch's own, which is exact."""
    width, heads = 256, 4
    shape = {"B": 1, "N": tokens, "C": width}

    def exact_encoder() -> nn.Module:
        # GELU: a ReLU's input near zero may round to either side, which moves a gradient by 1e-3.
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def build(backend: str) -> nn.Module:
        model = exact_encoder()
        for layer in model.layers:
            layer.self_attn = NystromAttention(width, heads, num_landmarks=LANDMARKS, backend=backend)
        return model

    peers = {
        f"{FULL}, MultiheadAttention": Peer(lambda: bound(exact_encoder()), _later(lambda: bound(exact_encoder())))
    }
    flops = 2 * (24.0 * tokens * width**2 + 8.0 * tokens * LANDMARKS * width)
    return module_case("TransformerEncoder", shape, {**shape, "N": 512}, dtype, build, peers, _tokens, flops)
