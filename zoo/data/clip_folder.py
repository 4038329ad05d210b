"""What a folder of videos and a folder of microscope stacks share: which clip is drawn, cut out and scaled."""

import abc
import os
import pathlib
import warnings
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

CROPS = ("random", "centre", "motion")
MOST_DRAWS = 100  # of a clip's file and start, where files turn out to be broken


class BrokenFileError(ValueError):
    """Files that cannot be read, or are too short or too small, by name and reason."""


class Recording(NamedTuple):
    """One file: its frames, and their height and width in pixels."""

    path: pathlib.Path
    frames: int
    height: int
    width: int


class ClipFolder(abc.ABC, Dataset[Tensor]):
    """Clips (C, T, size, size) float32 in [-1, 1] from the files of a folder; clip i is a function of options and i.

    A clip is a file's frames at a random start, cut to a square; its own darkest pixel becomes -1 and its brightest 1.

    Args:
        folder: with its subfolders; files of other kinds are left alone.
        frames: T.
        size: height and width of a clip, in pixels.
        stride: takes every stride-th frame.
        resize: pixels that the shorter side of a frame is resized to before it is cut; None keeps the file's own.
        crop: "random" anywhere; "centre"; "motion", where frames differ the most: squares are drawn with a probability
            that grows with the mean absolute difference of successive frames inside.
        length: number of clips; as many as fit end to end into the files unless given.
        seed: of the choice of file, start and place.
        skip_broken: warns of files that cannot serve and goes on without them, instead of raising BrokenFileError; a
            file that only turns out to be broken when its frames are read is warned of once, and the clip drawn anew.

    Raises:
        BrokenFileError: files that cannot be read, are too short or too small, all of them named; on reading, frames
            that cannot be decoded or have pixels that are not finite.
        ValueError, FileNotFoundError: naming the option, the rule and the value.
    """

    suffixes: tuple[str, ...]

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        frames: int = 32,
        size: int = 64,
        stride: int = 1,
        resize: int | None = None,
        crop: str = "random",
        length: int | None = None,
        seed: int = 0,
        skip_broken: bool = False,
    ) -> None:
        for name, value in (("frames", frames), ("size", size), ("stride", stride), ("length", length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if resize is not None and resize < size:
            raise ValueError(f"resize must be at least size {size}, got {resize}")
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {CROPS}, got {crop!r}")
        self.frames, self.size, self.stride, self.resize, self.crop, self.seed = (
            frames, size, stride, resize, crop, seed,
        )  # fmt: skip
        self.span = (frames - 1) * stride + 1  # frames from a clip's first to its last
        self.skip_broken, self.told = skip_broken, set[pathlib.Path]()
        self.recordings = self._fit_recordings(pathlib.Path(folder), skip_broken)
        starts = [recording.frames - self.span + 1 for recording in self.recordings]
        self.last_starts = numpy.cumsum(starts)
        self.length = length or sum(recording.frames // self.span for recording in self.recordings)

    @abc.abstractmethod
    def inspect(self, path: pathlib.Path) -> Recording:
        """Opens a file and measures it; any exception means that it is broken."""

    @abc.abstractmethod
    def read(self, recording: Recording, start: int) -> Tensor:
        """(C, T, H, W) float32: T frames from `start` on, `stride` apart, on the file's own scale."""

    def _fit_recordings(self, folder: pathlib.Path, skip_broken: bool) -> list[Recording]:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in self.suffixes and path.is_file())
        if not paths:
            raise FileNotFoundError(f"folder must hold files of {', '.join(self.suffixes)}, got none in {folder}")
        fit, reasons = [], {}
        for path in paths:
            try:
                fit.append(self._checked(self.inspect(path)))
            except Exception as error:  # whatever a decoder raises, the file is what is wrong
                reasons[path] = str(error) or type(error).__name__
        if len(paths) > 2 and not fit and len(set(reasons.values())) == 1:  # said once: it is the folder
            raise BrokenFileError(f"all {len(paths)} files in {folder} cannot serve: each {reasons[paths[0]]}")
        broken = [f"{path}: {reason}" for path, reason in reasons.items()]
        if broken and not (skip_broken and fit):
            raise BrokenFileError("\n".join([f"{len(broken)} of {len(paths)} files cannot serve:", *broken]))
        if broken:
            warnings.warn("\n".join([f"skipped {len(broken)} of {len(paths)} files:", *broken]), stacklevel=3)
        return fit

    def _checked(self, recording: Recording) -> Recording:
        if recording.frames < self.span:
            raise ValueError(f"has {recording.frames} frames, and a clip spans {self.span}")
        if self.resize is None and min(recording.height, recording.width) < self.size:
            raise ValueError(
                f"frames are {recording.height} x {recording.width}, and a clip is {self.size} high and wide"
            )
        return recording

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be between 0 and {self.length - 1}, got {index}")
        for attempt in range(MOST_DRAWS):
            random = numpy.random.default_rng((self.seed, index, attempt) if attempt else (self.seed, index))
            recording, start = self._drawn(random)
            try:
                return self._cut(self._read(recording, start), random)
            except BrokenFileError as error:
                if not self.skip_broken:
                    raise
                self._warn_of(recording.path, error)
        raise BrokenFileError(f"clip {index} was drawn {MOST_DRAWS} times, each time from a file that is broken")

    def _drawn(self, random: numpy.random.Generator) -> tuple[Recording, int]:
        """A file and a start in it, every start of every file with the same probability."""
        drawn = int(random.integers(self.last_starts[-1]))
        which = int(numpy.searchsorted(self.last_starts, drawn, side="right"))
        return self.recordings[which], drawn - (int(self.last_starts[which - 1]) if which else 0)

    def _read(self, recording: Recording, start: int) -> Tensor:
        """`read`; whatever is wrong is a BrokenFileError."""
        try:
            clip = self.read(recording, start)
        except Exception as error:
            raise BrokenFileError(f"{recording.path}: {str(error) or type(error).__name__}") from error
        broken = (~clip.isfinite().all(-1).all(-1).all(0)).nonzero()[:, 0]
        if len(broken):
            frames = ", ".join(str(start + self.stride * position) for position in broken.tolist())
            raise BrokenFileError(f"{recording.path}: has pixels that are not finite in frames {frames} (from 0)")
        return clip

    def _cut(self, clip: Tensor, random: numpy.random.Generator) -> Tensor:
        if self.resize is not None:
            clip = shorter_side_to(clip, self.resize)
        top, left = self._corner(clip, random)
        return min_max(clip[..., top : top + self.size, left : left + self.size])

    def _warn_of(self, path: pathlib.Path, error: BrokenFileError) -> None:
        if path not in self.told:
            self.told.add(path)
            warnings.warn(f"skipped {error}", stacklevel=3)

    def _corner(self, clip: Tensor, random: numpy.random.Generator) -> tuple[int, int]:
        free = [length - self.size for length in clip.shape[-2:]]
        if self.crop == "centre":
            return free[0] // 2, free[1] // 2
        if self.crop == "motion" and clip.shape[1] > 1:
            return moving_corner(clip, self.size, random)
        return int(random.integers(free[0] + 1)), int(random.integers(free[1] + 1))


def min_max(clip: Tensor) -> Tensor:
    """Scales a clip linearly to [-1, 1]; a constant one becomes -1."""
    low, high = clip.aminmax()
    return ((clip - low) / (high - low if high > low else 1)).mul_(2).sub_(1)


def shorter_side_to(clip: Tensor, length: int) -> Tensor:
    """(C, T, H, W) -> the same with the shorter of H and W resized to `length`, both by the same factor."""
    factor = length / min(clip.shape[-2:])
    shape = [max(round(side * factor), length) for side in clip.shape[-2:]]
    if shape == list(clip.shape[-2:]):
        return clip
    return functional.interpolate(clip, shape, mode="bilinear", antialias=True)


def moving_corner(clip: Tensor, size: int, random: numpy.random.Generator) -> tuple[int, int]:
    """The top left pixel of a square, drawn with a probability that grows with the motion inside.

    Squares lie a quarter of their size apart; their weight is the square of their mean absolute difference of frames
    above the stillest square's, so that the noise of an empty field draws nothing.
    """
    motion = (clip[:, 1:] - clip[:, :-1]).abs().mean((0, 1))  # (H, W)
    step = max(size // 4, 1)
    means = functional.avg_pool2d(motion[None, None], size, step)[0, 0]  # one a square
    weights = (means - means.min()).square().flatten().double().numpy()
    total = weights.sum()
    chosen = int(random.choice(len(weights), p=weights / total if total else None))
    return chosen // means.shape[1] * step, chosen % means.shape[1] * step


def as_float(frames: numpy.ndarray) -> Tensor:
    """Any real dtype to float32; integers keep their values."""
    return torch.from_numpy(numpy.ascontiguousarray(frames.astype("float32")))
