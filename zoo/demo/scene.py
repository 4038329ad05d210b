"""The video, its features, and the attention block over them in each form."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nystromgan.functional import nystrom_attention, spatiotemporal_attention
from nystromgan.nn import SelfAttention3d
from nystromgan.zoo.data import hela

CHANNELS = 64
STRIDE = 4  # pixels a token, in height and width
# A nucleus that divides: even at first, a bright plate in the fourth frame shown, two daughters from the fifth on.
FRAMES, ROWS, COLUMNS = slice(8, 16), slice(490, 618), slice(280, 472)
PLATE = (3, 46, 86)  # frame, row and column in the crop
WIDE_FRAMES, WIDE_ROWS, WIDE_COLUMNS = (
    slice(0, 16),
    slice(444, 700),
    slice(240, 496),
)  # where the larger inputs come from


class Form(NamedTuple):
    """One way to compute the block's attention."""

    name: str
    num_landmarks: int | None
    cluster_iterations: int = 0


EXACT = Form("exact", None)
GRID = Form("64 grid landmarks", 64)
CLUSTERED = Form("64 clustered landmarks", 64, 2)
FORMS = (EXACT, GRID, CLUSTERED)


class Scene(NamedTuple):
    """What the forms are compared on."""

    frames: Tensor  # (T, rows, columns) in [0, 1]
    features: Tensor  # (1, CHANNELS, T, H, W)
    token: tuple[int, int, int]  # the voxel whose attention is shown
    seed: int


def features(frames: Tensor, seed: int) -> Tensor:
    """Random features of frames (T, rows, columns): (1, CHANNELS, T, rows / 4, columns / 4), each voxel of norm 8.

    Two 3-D convolutions that halve height and width; without the last normalisation a few bright voxels would rule.
    """
    torch.manual_seed(seed)
    stem = nn.Sequential(
        nn.Conv3d(1, 32, 3, stride=(1, 2, 2), padding=1, padding_mode="replicate"),
        nn.GELU(),
        nn.Conv3d(32, CHANNELS, 3, stride=(1, 2, 2), padding=1, padding_mode="replicate"),
        nn.InstanceNorm3d(CHANNELS),
    ).requires_grad_(False)
    return functional.normalize(stem(frames[None, None]), dim=1) * CHANNELS**0.5


def load(seed: int) -> Scene:
    frames = hela.video()[FRAMES, ROWS, COLUMNS]
    frame, row, column = PLATE
    return Scene(frames, features(frames, seed), (frame, row // STRIDE, column // STRIDE), seed)


def block(form: Form, seed: int, sharpness: float = 1.0, over: Tensor | None = None) -> SelfAttention3d:
    """The block with seeded weights, the same for every form.

    Keys are made as queries are, so that a voxel attends to voxels like it, as a trained block would have it; with
    `over`, the logits' standard deviation over these features is `sharpness`. Gamma is 1: the sum is x + attention(x).
    """
    torch.manual_seed(seed + 1)
    module = SelfAttention3d(
        CHANNELS, num_landmarks=form.num_landmarks, cluster_iterations=form.cluster_iterations, bias=False
    )
    module.key.load_state_dict(module.query.state_dict())
    nn.init.ones_(module.gamma)
    if over is not None:
        module.scale = sharpness / logit_deviation(module, over)
    return module.requires_grad_(False)


def logit_deviation(module: SelfAttention3d, features: Tensor) -> float:
    """The standard deviation of query . key, over every eleventh token."""
    query, key = (conv(features).flatten(2)[0, :, ::11] for conv in (module.query, module.key))
    return (query.mT @ key).std().item()


def attended(module: SelfAttention3d, features: Tensor) -> Tensor:
    """What the block adds to its input, (1, CHANNELS, T, H, W)."""
    return module(features) - features


def attention_row(module: SelfAttention3d, features: Tensor, token: tuple[int, int, int]) -> Tensor:
    """The weight that `token` gives to every token, (T, H, W): exact, or the row F Z G of the landmark form.

    The output is linear in the values, so the weights are its derivative by them; no other use is made of the inside
    of the op.
    """
    query, key = module.query(features), module.key(features)
    grid = query.shape[2:]
    value = torch.zeros(1, 1, *grid, requires_grad=True)
    if module.num_landmarks is None:
        output = spatiotemporal_attention(query, key, value, scale=module.scale)
    else:
        tokens = (maps.flatten(2)[:, None].mT for maps in (query, key, value))  # (1, 1, N, C)
        output = nystrom_attention(
            *tokens,
            num_landmarks=module.num_landmarks,
            grid=tuple(grid),
            cluster_iterations=module.cluster_iterations,
            scale=module.scale,
        ).mT.reshape(1, 1, *grid)
    (row,) = torch.autograd.grad(output[0, 0][token], value)
    return row[0, 0]


def error(approximate: Tensor, exact: Tensor, value: Tensor) -> float:
    """|approximate - exact| / |exact - mean of value|: 1 is no better than giving every voxel the plain mean."""
    mean = value.mean((2, 3, 4), keepdim=True)
    return ((approximate - exact).norm() / (exact - mean).norm()).item()


def wide_features(seed: int, grid: tuple[int, int, int]) -> Tensor:
    """Features of a larger part of the video, (1, CHANNELS, *grid), for grids up to (16, 64, 64)."""
    frames, height, width = grid
    return features(_wide_clip()[:frames, : height * STRIDE, : width * STRIDE], seed)


@functools.lru_cache(maxsize=1)
def _wide_clip() -> Tensor:
    return hela.video()[WIDE_FRAMES, WIDE_ROWS, WIDE_COLUMNS].clone()
