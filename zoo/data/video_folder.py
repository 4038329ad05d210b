"""A folder of videos: mp4, avi, gif and what else FFmpeg decodes, through PyAV."""

import os
import pathlib
from typing import Any

import av
import numpy
from torch import Tensor

from nystromgan.zoo.data.clip_folder import ClipFolder, Recording, as_float

FORMATS = {1: "gray", 3: "rgb24"}


class VideoFolder(ClipFolder):
    """Clips (channels, T, size, size) float32 in [-1, 1] from every .mp4, .avi, .gif, .mov, .mkv and .webm.

    Frames are resized so that the shorter side is `size`, unless told otherwise, and then cut.

    Args:
        folder: searched with its subfolders.
        channels: 1 for luminance, 3 for red, green and blue.
        size, resize, options: as `ClipFolder`.

    Raises:
        BrokenFileError: as `ClipFolder`.
    """

    suffixes = (".mp4", ".avi", ".gif", ".mov", ".mkv", ".webm")

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        channels: int = 1,
        size: int = 64,
        resize: int | None = None,
        **options: Any,
    ) -> None:
        if channels not in FORMATS:
            raise ValueError(f"channels must be one of {tuple(FORMATS)}, got {channels}")
        self.channels = channels
        self.times: dict[pathlib.Path, list[int]] = {}  # of every frame, in the stream's own unit
        super().__init__(folder, size=size, resize=size if resize is None else resize, **options)

    def inspect(self, path: pathlib.Path) -> Recording:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            times = [packet.pts for packet in container.demux(stream) if packet.size]
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
        known = [time for time in times if time is not None]
        self.times[path] = sorted(known) if len(set(known)) == len(times) else []
        return Recording(path, len(times), frame.height, frame.width)

    def read(self, recording: Recording, start: int) -> Tensor:
        times = self.times[recording.path]
        wanted = range(0, self.span, self.stride)
        frames = []
        with av.open(str(recording.path)) as container:
            if times:  # from the key frame before, not from the beginning
                container.seek(times[start], stream=container.streams.video[0], backward=True)
            for position, frame in enumerate(container.decode(video=0)):
                offset = (times.index(frame.pts) if times and frame.pts is not None else position) - start
                if frame.is_corrupt:
                    raise ValueError(f"frame {start + offset} is damaged")
                if offset in wanted:
                    frames.append(frame.to_ndarray(format=FORMATS[self.channels]))
                if offset >= self.span - 1:
                    break
        if len(frames) != self.frames:
            raise ValueError(f"gave {len(frames)} of the {self.frames} frames from {start} on: the file is damaged")
        stack = numpy.stack(frames).reshape(self.frames, recording.height, recording.width, self.channels)
        return as_float(stack.transpose(3, 0, 1, 2))
