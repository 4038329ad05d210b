"""Microscope recordings: a folder of TIFF stacks, one page a frame."""

import os
import pathlib
from typing import Any

import numpy
import tifffile
from torch import Tensor

from nystromgan.zoo.data.clip_folder import ClipFolder, Recording, as_float

TIME_AXES = "TZQI"  # what programs call the axis of a plain stack, best first


class TiffStacks(ClipFolder):
    """Clips (1, T, size, size) float32 in [-1, 1], cut at the recording's own resolution from every .tif and .tiff.

    ImageJ, OME and plain multi-page stacks, of any real dtype and any compression that tifffile reads.

    Args:
        folder: searched with its subfolders.
        channel: the one taken from stacks of several.
        crop: "motion" unless given. SAVGAN's authors cut squares around moving cells, which they find by TV-L1 optical
            flow; differences of frames find them here.
        options: as `ClipFolder`.

    Raises:
        BrokenFileError: as `ClipFolder`; also for stacks with further axes, such as depth beside time.
    """

    suffixes = (".tif", ".tiff")

    def __init__(self, folder: str | os.PathLike, *, channel: int = 0, crop: str = "motion", **options: Any) -> None:
        if channel < 0:
            raise ValueError(f"channel must be at least 0, got {channel}")
        self.channel = channel
        super().__init__(folder, crop=crop, **options)

    def inspect(self, path: pathlib.Path) -> Recording:
        with tifffile.TiffFile(path) as file:
            sizes = _sizes(file)
            channels = sizes.get("C", 1)
            if self.channel >= channels:
                raise ValueError(f"has {channels} channels, and channel is {self.channel}")
            if _end(file.series[0]) > path.stat().st_size:  # better now than hours later
                raise ValueError(f"is cut short: {path.stat().st_size} bytes of {_end(file.series[0])}")
            return Recording(path, sizes["frames"], sizes["Y"], sizes["X"])

    def read(self, recording: Recording, start: int) -> Tensor:
        with tifffile.TiffFile(recording.path) as file:
            channels = _sizes(file).get("C", 1)
            frames = numpy.arange(start, start + self.span, self.stride)
            if len(file.series[0].pages) == recording.frames * channels:
                stack = file.asarray(series=0, key=(frames * channels + self.channel).tolist())
            else:  # a page holds several frames or channels
                whole = file.asarray(series=0).reshape(-1, channels, recording.height, recording.width)
                stack = whole[frames, self.channel]
        return as_float(stack.reshape(1, -1, recording.height, recording.width))


def _end(series: tifffile.TiffPageSeries) -> int:
    """The bytes from the file's beginning to the end of the last frame."""
    if series.dataoffset is not None:  # all frames in one piece
        return series.dataoffset + series.nbytes
    last = series.pages[len(series.pages) - 1]
    if last is None:
        raise ValueError("has no last frame")
    return max(offset + count for offset, count in zip(last.dataoffsets, last.databytecounts, strict=True))


def _sizes(file: tifffile.TiffFile) -> dict[str, int]:
    """The lengths of a stack's axes: "frames", "Y", "X" and perhaps "C"."""
    series = file.series[0]
    sizes = {axis: length for axis, length in zip(series.axes, series.shape, strict=True) if length > 1 or axis in "YX"}
    time = next((axis for axis in TIME_AXES if axis in sizes), None)
    if set(sizes) in ({"Y", "X"}, {"C", "Y", "X"}):
        raise ValueError("holds a single frame: a recording must be one file, a stack of its frames")
    if time is None or not {"Y", "X"} <= set(sizes):
        raise ValueError(f"is no stack of frames: its axes are {series.axes} of {series.shape}")
    order = "".join(sizes)
    if order not in (f"{time}YX", f"{time}CYX"):
        raise ValueError(
            f"must have the axes time, perhaps channel, height, width, got {series.axes} of {series.shape}"
        )
    return {"frames": sizes.pop(time), **sizes}
