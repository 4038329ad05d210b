"""SAVGAN's generator: transposed 3-D convolutions with two Nyström self-attention blocks; without them, 3DGAN."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from nystromgan.nn import SelfAttention3d, fuse_spectral_norm, spectral_norm

Latent = Literal["normal", "uniform"]
Activation = Literal["relu", "leaky_relu"]
Attention = Literal["nystrom", "exact", "none"]
Landmarks = Literal["grid", "segment", "random"]
SLOPES = {"relu": 0.0, "leaky_relu": 0.1}  # below zero


@dataclasses.dataclass(frozen=True)
class SAVGANConfig:
    """What makes a generator; attention's kind and landmarks change no parameter but "none", which has no attention.

    Attributes:
        frames: T of a clip, a multiple of 16.
        size: H and W of a clip, a multiple of 16, at least 32.
        image_channels: C of a clip.
        latent_dim: of z.
        latent: "normal", N(0, I), or "uniform", U(-1, 1).
        width: channels before the last layer; the first layer gives 8 times as many.
        activation: "relu" or "leaky_relu" with slope 0.1.
        attention: "nystrom"; "exact"; or "none", which is 3DGAN.
        num_landmarks: of the two blocks, which see N / 64 and N / 8 positions of the clip's N = T H W.
        landmarks: "random", the same tokens for queries and keys, drawn at each training forward; "grid" or "segment"
            means.
        cluster_iterations: Lloyd steps from "grid" or "segment" means.
        pinv_iterations: steps of the pseudo-inverse.
        attention_scale: of the logits; query channels ** -0.5 unless given.
        spectral_norm: of the three middle layers.
    """

    frames: int = 32
    size: int = 64
    image_channels: int = 1
    latent_dim: int = 128
    latent: Latent = "normal"
    width: int = 32
    activation: Activation = "relu"
    attention: Attention = "nystrom"
    num_landmarks: tuple[int, int] = (64, 64)
    landmarks: Landmarks = "random"
    cluster_iterations: int = 0
    pinv_iterations: int = 6
    attention_scale: float | None = None
    spectral_norm: bool = True

    def __post_init__(self) -> None:
        for name, least in (("frames", 16), ("size", 32)):
            value = getattr(self, name)
            if value < least or value % 16:
                raise ValueError(f"{name} must be a multiple of 16, at least {least}, got {value}")
        for name in ("image_channels", "latent_dim", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, choices in (
            ("latent", Latent), ("activation", Activation), ("attention", Attention), ("landmarks", Landmarks)
        ):  # fmt: skip
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        if not isinstance(self.num_landmarks, Sequence) or len(self.num_landmarks) != 2 or min(self.num_landmarks) < 1:
            raise ValueError(f"num_landmarks must be two counts, each at least 1, got {self.num_landmarks}")
        object.__setattr__(self, "num_landmarks", tuple(self.num_landmarks))  # JSON and TOML have lists

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a clip: (C, T, H, W)."""
        return self.image_channels, self.frames, self.size, self.size


class SAVGAN(nn.Module):
    """Latents to clips.

    Source: SAVGAN (ISBI 2023), figure 1; layers as in the authors' code. README.md maps the equations to lines.
    """

    def __init__(self, config: SAVGANConfig) -> None:
        super().__init__()
        self.config = config
        width, start = config.width, (config.frames // 16, config.size // 16, config.size // 16)
        self.layers = nn.Sequential(
            nn.ConvTranspose3d(config.latent_dim, 8 * width, start),
            *self._normalised(8 * width),  # 8 width x T/16 x H/16 x W/16
            *self._doubled(8 * width, 4 * width),
            *self._doubled(4 * width, 2 * width),
            self._attention(2 * width, 0),  # 2 width x T/4 x H/4 x W/4
            *self._doubled(2 * width, width),
            self._attention(width, 1),  # width x T/2 x H/2 x W/2
            nn.ConvTranspose3d(width, config.image_channels, 4, 2, 1),
            nn.Tanh(),
        )
        if config.spectral_norm:
            fuse_spectral_norm(self)

    def _normalised(self, channels: int) -> tuple[nn.Module, nn.Module]:
        slope = SLOPES[self.config.activation]
        return nn.InstanceNorm3d(channels), nn.LeakyReLU(slope) if slope else nn.ReLU()

    def _doubled(self, channels: int, out_channels: int) -> tuple[nn.Module, ...]:
        layer = nn.ConvTranspose3d(channels, out_channels, 4, 2, 1)
        return spectral_norm(layer) if self.config.spectral_norm else layer, *self._normalised(out_channels)

    def _attention(self, channels: int, index: int) -> nn.Module:
        config = self.config
        if config.attention == "none":
            return nn.Identity()
        if config.attention == "exact":
            return SelfAttention3d(channels, scale=config.attention_scale)
        return SelfAttention3d(
            channels,
            num_landmarks=config.num_landmarks[index],
            landmarks=config.landmarks,
            cluster_iterations=config.cluster_iterations,
            pinv_iterations=config.pinv_iterations,
            scale=config.attention_scale,
        )

    def forward(self, latent: Tensor) -> Tensor:
        """(B, latent_dim) -> clips (B, C, T, H, W) in [-1, 1]."""
        return self.layers(latent[:, :, None, None, None])

    def draw_latent(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, latent_dim) on the generator's device."""
        shape, device = (n, self.config.latent_dim), generator.device
        if self.config.latent == "uniform":
            return torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1)
        return torch.randn(shape, generator=generator, device=device)

    def gammas(self) -> list[Tensor]:
        """The weight of each attention block."""
        return [layer.gamma for layer in self.layers if isinstance(layer, SelfAttention3d)]

    @torch.no_grad()
    def sample(self, n: int, *, seed: int | None = None, batch_size: int = 16) -> Tensor:
        """n clips (n, C, T, H, W) in [-1, 1], the same for the same seed; random without one.

        Latents are drawn on the CPU, so that the device doesn't matter; batch_size bounds the memory.
        """
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        latent = self.draw_latent(n, generator).to(next(self.parameters()))
        training = self.training
        self.eval()  # keeps the landmarks, and u and v
        try:
            return torch.cat([self(part) for part in latent.split(batch_size)])
        finally:
            self.train(training)
