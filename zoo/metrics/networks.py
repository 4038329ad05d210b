"""The networks whose features the metrics compare, trained by this repository on moving digits (train_networks.py).

`DigitResNet18` sees frames: ResNet-18's blocks at a quarter of its width. `DigitVideoNet` sees clips. Both know digits
alone: on other videos their features mean little.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = pathlib.Path(__file__).parent / "weights"
FRAME_SIZE = 32


class _Block(nn.Module):
    """ResNet's basic block: relu(x + conv(relu(conv(x)))), with batch norm."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.residual(x))


class DigitResNet18(nn.Module):
    """Frames (B, 1, H, W) in [-1, 1] -> logits of the ten digits (B, 10).

    He et al., "Deep residual learning for image recognition", 2016, table 1: 18 layers in four stages of two blocks, of
    16, 32, 64 and 128 channels instead of 64 to 512, so that the file is small. Frames are resized to 32 x 32.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        blocks = [_Block(a, b, 1 + (a != b)) for a, b in zip((16, *widths), widths, strict=False)]
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.Sequential(
            *(nn.Sequential(block, _Block(b, b, 1)) for block, b in zip(blocks, widths, strict=True))
        )
        self.head = nn.Linear(widths[-1], 10)

    def features(self, frames: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 128), what the last layer sees."""
        return self.stages(self.stem(resized(frames))).mean((2, 3))

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.features(frames))


class DigitVideoNet(nn.Module):
    """Clips (B, 1, T, H, W) in [-1, 1], T at least 8 -> (B, 12): logits of the ten digits, speed and place.

    Five 3-D convolutions with batch norm. The speed is the mean displacement a frame and the place the first column,
    both in frame widths. Frames are resized to 32 x 32.
    """

    def __init__(self) -> None:
        super().__init__()

        def layer(channels: int, out_channels: int, stride: tuple[int, int, int]) -> tuple[nn.Module, ...]:
            convolution = nn.Conv3d(channels, out_channels, 3, stride, 1, bias=False)
            return convolution, nn.BatchNorm3d(out_channels), nn.ReLU()

        self.layers = nn.Sequential(
            *layer(1, 16, (1, 2, 2)),
            *layer(16, 32, (2, 2, 2)),
            *layer(32, 64, (2, 2, 2)),
            *layer(64, 64, (1, 1, 1)),
            *layer(64, 128, (2, 2, 2)),
        )
        self.head = nn.Linear(128, 12)

    def features(self, clips: Tensor) -> Tensor:
        """(B, 1, T, H, W) -> (B, 128), what the last layer sees."""
        frames = resized(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))  # (B, T, 1, 32, 32)
        return self.layers(frames.transpose(1, 2)).mean((2, 3, 4))

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.features(clips))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"digit_resnet18": DigitResNet18, "digit_video": DigitVideoNet}


def resized(frames: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, 1, 32, 32)."""
    if frames.shape[-2:] == (FRAME_SIZE, FRAME_SIZE):
        return frames
    return functional.interpolate(frames, (FRAME_SIZE, FRAME_SIZE), mode="bilinear", antialias=True)


def load_network(name: str) -> Any:
    """A trained network in eval; `facts(name)` says how good it is."""
    network = NETWORKS[name]()
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        network.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118
    return network.eval().requires_grad_(False)


def facts(name: str) -> dict[str, Any]:
    """What the file of a trained network says of itself: its scores on held-out digits and the command that made it."""
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["facts"])


@torch.no_grad()
def batched(function: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int = 64) -> Tensor:
    """function(inputs) in pieces of the first axis."""
    return torch.cat([function(part) for part in inputs.split(batch_size)])
