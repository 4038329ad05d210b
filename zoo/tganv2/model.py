"""TGANv2's generator: a ConvLSTM makes the motion, and images are rendered from it at four resolutions."""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 4


@dataclasses.dataclass(frozen=True)
class TGANv2Config:
    """What makes a generator; it renders at size / 8, size / 4, size / 2 and size.

    Attributes:
        frames: T, a multiple of 8: in training each level but the first has half the frames of the one before.
        size: H and W of the last level, a multiple of 2 ** doublings.
        image_channels: of a frame.
        latent_dim: of z, uniform in [-1, 1].
        width: channels of the last two blocks; each block before has twice as many as the next.
        lstm_channels: of the ConvLSTM.
        lstm_layers: one on the other.
        doublings: blocks from the ConvLSTM's resolution to the last level's, 4 to 6.
    """

    frames: int = 16
    size: int = 64
    image_channels: int = 1
    latent_dim: int = 256
    width: int = 32
    lstm_channels: int = 1024
    lstm_layers: int = 1
    doublings: int = 6

    def __post_init__(self) -> None:
        if not 4 <= self.doublings <= 6:
            raise ValueError(f"doublings must be 4, 5 or 6, got {self.doublings}")
        for name, unit in (("frames", 2 ** (LEVELS - 1)), ("size", 2**self.doublings)):
            value = getattr(self, name)
            if value < unit or value % unit:
                raise ValueError(f"{name} must be a multiple of {unit}, at least {unit}, got {value}")
        for name in ("image_channels", "latent_dim", "width", "lstm_channels", "lstm_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a clip: (C, T, H, W)."""
        return self.image_channels, self.frames, self.size, self.size


class ConvLSTM(nn.Module):
    """h_t = o tanh(c_t), c_t = f c_{t-1} + i tanh(g); i, f, o and g are 3 x 3 convolutions of x_t and h_{t-1}.

    No peepholes; h and c start at 0. Source: Shi et al., "Convolutional LSTM network", 2015, equation 3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Conv2d(channels, 4 * channels, 3, 1, 1)
        self.hidden = nn.Conv2d(channels, 4 * channels, 3, 1, 1, bias=False)
        for layer in (self.input, self.hidden):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, inputs: list[Tensor | None]) -> list[Tensor]:
        """x_t (B, C, H, W), or None for zeros but at t = 0 -> h_t."""
        outputs: list[Tensor] = []
        cell: Tensor | None = None
        for x in inputs:
            gates = self._gates(x, outputs[-1] if outputs else None)
            write, forget, show, new = gates.chunk(4, 1)
            cell = write.sigmoid() * new.tanh() + (0 if cell is None else forget.sigmoid() * cell)
            outputs.append(show.sigmoid() * cell.tanh())
        return outputs

    def _gates(self, x: Tensor | None, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            return self.input(x)
        recurrent = self.hidden(hidden)
        if x is None:  # a convolution of zeros is its bias
            return recurrent + self.input.bias[:, None, None]  # type: ignore[index]
        return recurrent + self.input(x)


class UpBlock(nn.Module):
    """(B, C, H, W) -> (B, out_channels, 2H, 2W): BN, ReLU, doubling, conv, BN, ReLU, conv, beside a 1 x 1 shortcut."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.normalise, self.first = nn.BatchNorm2d(channels), nn.Conv2d(channels, out_channels, 3, 1, 1)
        self.normalise_again, self.second = nn.BatchNorm2d(out_channels), nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.shortcut = nn.Conv2d(channels, out_channels, 1)
        for layer, gain in ((self.first, math.sqrt(2)), (self.second, math.sqrt(2)), (self.shortcut, 1)):
            nn.init.xavier_uniform_(layer.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.first(_doubled(functional.relu(self.normalise(x))))
        residual = self.second(functional.relu(self.normalise_again(residual)))
        return _doubled(self.shortcut(x)) + residual  # a 1 x 1 convolution and the doubling change places for less work


class TGANv2(nn.Module):
    """Latents to clips.

    Source: Saito et al., "Train sparsely, generate densely: memory-efficient unsupervised training of high-resolution
    temporal GAN", 2020, figures 2 and 3 and section 3.
    """

    def __init__(self, config: TGANv2Config) -> None:
        super().__init__()
        self.config = config
        self.start = config.size // 2**config.doublings
        self.latent = nn.Linear(config.latent_dim, config.lstm_channels * self.start**2)
        self.recurrent = nn.ModuleList(ConvLSTM(config.lstm_channels) for _ in range(config.lstm_layers))
        widths = [config.width * factor for factor in (16, 8, 4, 2, 1, 1)][-config.doublings :]
        before = [config.lstm_channels, *widths[:-1]]
        blocks = [UpBlock(channels, width) for channels, width in zip(before, widths, strict=True)]
        stem = config.doublings - LEVELS + 1
        self.abstract = nn.ModuleList([nn.Sequential(*blocks[:stem]), *blocks[stem:]])  # one for each level
        self.render = nn.ModuleList(self._renderer(width) for width in widths[-LEVELS:])

    def _renderer(self, width: int) -> nn.Sequential:
        layer = nn.Conv2d(width, self.config.image_channels, 3, 1, 1)
        nn.init.xavier_uniform_(layer.weight)
        return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), layer, nn.Tanh())

    def motion(self, latent: Tensor) -> Tensor:
        """(B, latent_dim) -> (B, T, lstm_channels, H / 2^doublings, W / 2^doublings); the latent enters at t = 0."""
        config = self.config
        first = self.latent(latent).unflatten(1, (config.lstm_channels, self.start, self.start))
        maps: list[Tensor | None] = [first, *[None] * (config.frames - 1)]
        for layer in self.recurrent:
            maps = list(layer(maps))
        return torch.stack([frame for frame in maps if frame is not None], 1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, latent_dim) -> every frame of the last level, (B, C, T, H, W) in [-1, 1]."""
        maps = self.motion(latent)
        frames = maps.flatten(0, 1)
        for block in self.abstract:
            frames = block(frames)
        return self.render[-1](frames).unflatten(0, maps.shape[:2]).transpose(1, 2)

    def levels(self, latent: Tensor, phases: list[int]) -> list[Tensor]:
        """(B, latent_dim) -> clips (B, C, T / 2^l, H / 2^(3 - l), ...) for l = 0 to 3.

        Between levels every second frame is kept, from 0 or 1 on as `phases` says.
        """
        maps = self.motion(latent)  # (B, T, C, H, W)
        clips = []
        for level, (block, render) in enumerate(zip(self.abstract, self.render, strict=True)):
            if level:
                maps = maps[:, phases[level - 1] :: 2]
            batch = maps.shape[:2]
            frames = block(maps.flatten(0, 1))
            clips.append(render(frames).unflatten(0, batch).transpose(1, 2))
            maps = frames.unflatten(0, batch)
        return clips

    def draw_latent(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, latent_dim) uniform in [-1, 1], on the generator's device."""
        shape = (n, self.config.latent_dim)
        return torch.rand(shape, generator=generator, device=generator.device).mul_(2).sub_(1)

    @torch.no_grad()
    def sample(self, n: int, *, seed: int | None = None, batch_size: int = 16) -> Tensor:
        """n clips (n, C, T, H, W) in [-1, 1], the same for the same seed; random without one."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        latent = self.draw_latent(n, generator).to(self.latent.weight)
        training = self.training
        self.eval()
        try:
            return torch.cat([self(part) for part in latent.split(batch_size)])
        finally:
            self.train(training)


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")
