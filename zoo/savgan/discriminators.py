"""SAVGAN's two critics: one sees whole clips, the other single frames. Both give a logit for each patch."""

import functools
from collections.abc import Callable

from torch import Tensor, nn

from nystromgan.nn import SelfAttention3d, fuse_spectral_norm, spectral_norm

NORMS = ("none", "instance")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": functools.partial(nn.LeakyReLU, 0.1),
}


class VideoDiscriminator(nn.Module):
    """(B, C, T, H, W) -> (B, patches) logits.

    Four convolutions of stride 2, the first in space alone, with exact attention after the third and the fourth; then
    one of 3 x 3 x 3, or of what is left of a smaller clip.

    Args:
        image_channels: C.
        frames, size: T, and H and W, of the clips.
        width: channels of the first layer; the last has 8 times as many.
        norm: "none" or "instance", of the second to fourth layers.
        activation: "leaky_relu" with slope 0.1, or "relu".
        attention: without it, 3DGAN's.
        attention_scale: of the logits; query channels ** -0.5 unless given.
        normalised: divides the weights of the four convolutions by their spectral norm.
        backend: of the attention.
    """

    def __init__(
        self,
        *,
        image_channels: int = 1,
        frames: int = 32,
        size: int = 64,
        width: int = 32,
        norm: str = "none",
        activation: str = "leaky_relu",
        attention: bool = True,
        attention_scale: float | None = None,
        normalised: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")

        def halved(channels: int, out_channels: int, stride: int | tuple[int, int, int] = 2) -> list[nn.Module]:
            layer = nn.Conv3d(channels, out_channels, 4, stride, 1)
            middle = [nn.InstanceNorm3d(out_channels)] if norm == "instance" and stride == 2 else []
            return [spectral_norm(layer) if normalised else layer, *middle, ACTIVATIONS[activation]()]

        def attend(channels: int) -> list[nn.Module]:
            return [SelfAttention3d(channels, scale=attention_scale, backend=backend)] if attention else []

        grid = _halved(_halved(_halved((frames - 1, size // 2, size // 2))))
        if min(grid) < 1:
            raise ValueError(f"frames must be at least 16 and size at least 16, got {frames} and {size}")
        frames_left, height_left, width_left = (min(length, 3) for length in grid)
        self.layers = nn.Sequential(
            *halved(image_channels, width, (1, 2, 2)),
            *halved(width, 2 * width),
            *halved(2 * width, 4 * width),
            *attend(4 * width),
            *halved(4 * width, 8 * width),
            *attend(8 * width),
            nn.Conv3d(8 * width, 1, (frames_left, height_left, width_left)),
        )
        if normalised:
            fuse_spectral_norm(self)

    def forward(self, clips: Tensor) -> Tensor:
        return self.layers(clips).flatten(1)


class ImageDiscriminator(nn.Module):
    """(B, C, H, W) -> (B, patches) logits: five 3 x 3 convolutions, the first three of stride 2.

    Args:
        image_channels: C.
        width: channels of the first layer; the fourth has 8 times as many.
    """

    def __init__(self, *, image_channels: int = 1, width: int = 64) -> None:
        super().__init__()

        def layer(channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
            convolution = nn.Conv2d(channels, out_channels, 3, stride, 1)
            return convolution, nn.InstanceNorm2d(out_channels), nn.LeakyReLU(0.2)

        self.layers = nn.Sequential(
            nn.Conv2d(image_channels, width, 3, 2, 1),
            nn.LeakyReLU(0.2),
            *layer(width, 2 * width, 2),
            *layer(2 * width, 4 * width, 2),
            *layer(4 * width, 8 * width, 1),
            nn.Conv2d(8 * width, 1, 3, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


def _halved(grid: tuple[int, ...]) -> tuple[int, ...]:
    """What a convolution of kernel 4, stride 2 and padding 1 leaves."""
    return tuple((length - 2) // 2 + 1 for length in grid)
