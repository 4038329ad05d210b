"""Samples as files: GIF and PNG sheets through Pillow, MP4 through PyAV."""

import io
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from nystromgan.zoo import storage

MAX_COLUMNS = 16  # frames of a clip on a sheet


def to_bytes(samples: Tensor) -> numpy.ndarray:
    """(n, T, H, W, 3) uint8 of clips (n, C, T, H, W) or images (n, C, H, W) in [-1, 1]; C is 1 or 3."""
    if samples.ndim not in (4, 5) or samples.shape[1] not in (1, 3):
        raise ValueError(f"samples must be (n, 1 or 3, [T,] H, W), got {tuple(samples.shape)}")
    if samples.ndim == 4:
        samples = samples.unsqueeze(2)
    scaled = ((samples.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.expand(-1, 3, -1, -1, -1).permute(0, 2, 3, 4, 1).numpy()


def sheet(samples: Tensor) -> numpy.ndarray:
    """(H, W, 3) uint8: a row a clip, its frames from left to right, at most 16 of them; images in a square."""
    frames = to_bytes(samples)
    if frames.shape[1] == 1:
        return tile(frames[:, 0], math.ceil(math.sqrt(len(frames))))
    chosen = numpy.linspace(0, frames.shape[1] - 1, min(MAX_COLUMNS, frames.shape[1])).round().astype(int)
    return tile(frames[:, chosen].reshape(-1, *frames.shape[2:]), len(chosen))


def tile(images: numpy.ndarray, columns: int, gap: int = 1) -> numpy.ndarray:
    """(rows, columns) of images (n, H, W, 3), with white lines between them."""
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[1] + gap, images.shape[2] + gap
    canvas = numpy.full((rows * height - gap, columns * width - gap, 3), 255, dtype=numpy.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * height, number % columns * width
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def png(image: numpy.ndarray) -> bytes:
    """(H, W, 3) uint8 as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def save(samples: Tensor, path: pathlib.Path, fps: float = 8.0, scale: int = 1) -> None:
    """Writes samples by the path's ending: .png a sheet, .gif and .mp4 the clips side by side, .safetensors numbers.

    Raises:
        ValueError: another ending, or still images as a video.
        OSError: as `storage.write`.
    """
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"output must end in {', '.join(WRITERS)}, got {path.name!r}")
    storage.write(path, WRITERS[path.suffix.lower()](samples, fps, scale))


def _enlarged(frames: numpy.ndarray, scale: int) -> numpy.ndarray:
    """Every pixel as scale x scale pixels; the last axis is colour."""
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def _movie(samples: Tensor, scale: int) -> numpy.ndarray:
    """(T, H, W, 3) uint8: the clips beside one another."""
    clips = to_bytes(samples)
    if clips.shape[1] == 1:
        raise ValueError("still images cannot be a video; write .png")
    columns = math.ceil(math.sqrt(len(clips)))
    return _enlarged(numpy.stack([tile(clips[:, time], columns) for time in range(clips.shape[1])]), scale)


def _gif(samples: Tensor, fps: float, scale: int) -> bytes:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in _movie(samples, scale)]
    buffer = io.BytesIO()
    images[0].save(buffer, "gif", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def _mp4(samples: Tensor, fps: float, scale: int) -> bytes:
    """H.264 where the installed FFmpeg has it, MPEG-4 elsewhere; sides are made even, as both need."""
    import av

    movie = _movie(samples, scale)
    height, width = (size - size % 2 for size in movie.shape[1:3])
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=round(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in movie[:, :height, :width]:
            for packet in stream.encode(av.VideoFrame.from_ndarray(numpy.ascontiguousarray(image), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def _tensor(samples: Tensor, fps: float, scale: int) -> bytes:
    import safetensors.torch

    return safetensors.torch.save({"samples": samples.cpu().contiguous()})


WRITERS: dict[str, Callable[[Tensor, float, int], bytes]] = {
    ".png": lambda samples, fps, scale: png(_enlarged(sheet(samples), scale)),
    ".gif": _gif,
    ".mp4": _mp4,
    ".safetensors": _tensor,
}
