"""TGANv2's discriminator of one level: a 3-D residual network that halves space, then space and time."""

import itertools
import math

from torch import Tensor, nn
from torch.nn import functional


class DownBlock(nn.Module):
    """(B, C, T, H, W) -> about half of each axis: two 3 x 3 x 3 convolutions beside a 1 x 1 x 1 shortcut, then a mean.

    Args:
        channels, out_channels: before and after; the first convolution keeps the number.
        first: the network's first block: no ReLU before it, out_channels from its first convolution on, time kept.
    """

    def __init__(self, channels: int, out_channels: int, *, first: bool = False) -> None:
        super().__init__()
        hidden = out_channels if first else channels
        self.first = first
        self.enter = nn.Conv3d(channels, hidden, 3, 1, 1)
        self.leave = nn.Conv3d(hidden, out_channels, 3, 1, 1)
        self.shortcut = nn.Conv3d(channels, out_channels, 1)
        for layer, gain in ((self.enter, math.sqrt(2)), (self.leave, math.sqrt(2)), (self.shortcut, 1)):
            nn.init.xavier_uniform_(layer.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.leave(functional.relu(self.enter(x if self.first else functional.relu(x))))
        axes = (3, 4) if self.first else (2, 3, 4)
        # Means and 1 x 1 x 1 convolutions without padding change places; after zeros are appended they would not.
        if self.first:
            return halved(residual, axes) + self.shortcut(halved(x, axes))
        return halved(residual + self.shortcut(x), axes)


class LevelDiscriminator(nn.Module):
    """(B, C, T, H, W) -> (B,) logits.

    Args:
        image_channels: C.
        width: channels of the first block; the fifth has 16 times as many.
    """

    def __init__(self, *, image_channels: int = 1, width: int = 64) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(5)]
        blocks = [DownBlock(before, after) for before, after in itertools.pairwise(widths)]
        self.blocks = nn.Sequential(DownBlock(image_channels, width, first=True), *blocks)
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(functional.relu(self.blocks(clips)).sum((2, 3, 4)))[:, 0]


def halved(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Means of pairs along some of T, H and W; axes of length 1 stay, and odd ones get a zero at the end."""
    sizes = [2 if axis in axes and x.shape[axis] > 1 else 1 for axis in (2, 3, 4)]
    padding = [pad for axis, size in zip((4, 3, 2), reversed(sizes), strict=True) for pad in (0, -x.shape[axis] % size)]
    return functional.avg_pool3d(functional.pad(x, padding) if any(padding) else x, tuple(sizes))
