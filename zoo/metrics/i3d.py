"""I3D, the network of FVD: Inception-v1 inflated to 3-D, with 400 logits.

Weights are the user's: python -m nystromgan.zoo.metrics.i3d i3d_torchscript.pt i3d.safetensors turns the TorchScript
file that FVD tools share (or a state dict of it) into safetensors. It runs the script on a clip and refuses where this
network gives something else.
"""

import argparse
import os
import pathlib
import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from nystromgan.zoo import cli, storage

LEAST_FRAMES = 9
CLIP = (1, 3, 10, 224, 224)  # that a script is run on: of the metrics' frames, whose number is odd after two layers
TOLERANCE = 1e-3  # of the largest logit
# What the shared script's forward may be told, so that it gives logits of the clip as it is.
OPTIONS = {"rescale": False, "resize": False, "return_features": True}
# Channels of the four branches: 1x1x1; 1x1x1 then 3x3x3; 1x1x1 then 3x3x3; 3x3x3 maxima then 1x1x1.
MIXED = {
    "mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def padded(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """(B, C, *grid) with zeros around as TensorFlow's SAME puts them: n becomes ceil(n / stride), the odd one behind.

    zeros = max((ceil(n / s) - 1) s + k - n, 0) along an axis
    """
    padding: list[int] = []
    for n, k, s in zip(x.shape[:1:-1], reversed(kernel), reversed(stride), strict=True):
        zeros = max((-(-n // s) - 1) * s + k - n, 0)
        padding += [zeros // 2, zeros - zeros // 2]
    return functional.pad(x, padding)


class _Unit(nn.Module):
    """relu(batch norm(convolution)) with SAME's zeros; batch norm's epsilon is the TensorFlow original's, 1e-3."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, out_channels, kernel, stride, bias=False)
        self.batch3d = nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.batch3d(self.conv3d(padded(x, self.conv3d.kernel_size, self.conv3d.stride))))


class _Pool(nn.Module):
    """Maxima over kernel blocks, with SAME's zeros; what comes in is never negative."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_pool3d(padded(x, self.kernel, self.stride), self.kernel, self.stride)


class _Mixed(nn.Module):
    def __init__(self, channels: int, *widths: int) -> None:
        super().__init__()
        one, reduce_a, three_a, reduce_b, three_b, pooled = widths
        self.branch_0 = _Unit(channels, one)
        self.branch_1 = nn.Sequential(_Unit(channels, reduce_a), _Unit(reduce_a, three_a, 3))
        self.branch_2 = nn.Sequential(_Unit(channels, reduce_b), _Unit(reduce_b, three_b, 3))
        self.branch_3 = nn.Sequential(_Pool((3, 3, 3), (1, 1, 1)), _Unit(channels, pooled))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(x)], 1)


class I3D(nn.Module):
    """Clips (B, 3, T, 224, 224) in [-1, 1], T at least 9 -> (B, 400) logits, averaged over time.

    Source: Carreira and Zisserman, "Quo vadis, action recognition?", 2017, figure 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.pool_2a = _Pool((1, 3, 3), (1, 2, 2))
        self.conv3d_2b_1x1 = _Unit(64, 64)
        self.conv3d_2c_3x3 = _Unit(64, 192, 3)
        self.pool_3a = _Pool((1, 3, 3), (1, 2, 2))
        self.mixed_3b, self.mixed_3c = _Mixed(*MIXED["mixed_3b"]), _Mixed(*MIXED["mixed_3c"])
        self.pool_4a = _Pool((3, 3, 3), (2, 2, 2))
        for name in ("mixed_4b", "mixed_4c", "mixed_4d", "mixed_4e", "mixed_4f"):
            self.add_module(name, _Mixed(*MIXED[name]))
        self.pool_5a = _Pool((2, 2, 2), (2, 2, 2))
        self.mixed_5b, self.mixed_5c = _Mixed(*MIXED["mixed_5b"]), _Mixed(*MIXED["mixed_5c"])
        self.conv3d_0c_1x1 = nn.ModuleDict({"conv3d": nn.Conv3d(1024, 400, 1)})

    def forward(self, clips: Tensor) -> Tensor:
        if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < LEAST_FRAMES:
            raise ValueError(f"clips must be (B, 3, T, H, W) with T at least {LEAST_FRAMES}, got {tuple(clips.shape)}")
        x = clips
        for name, layer in self.named_children():
            if name != "conv3d_0c_1x1":
                x = layer(x)
        pooled = functional.avg_pool3d(x, (2, 7, 7), 1)
        return self.conv3d_0c_1x1["conv3d"](pooled).mean((2, 3, 4))


def load_i3d(path: str | os.PathLike) -> I3D:
    """I3D in eval with the weights of a safetensors file.

    Raises:
        ValueError: the file is not of I3D; names what is missing or too much.
        OSError: it cannot be read.
    """
    state = _loaded(pathlib.Path(path))
    network = I3D()
    expected = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
    if set(state) != expected:
        missing, other = sorted(expected - set(state))[:3], sorted(set(state) - expected)[:3]
        raise ValueError(f"{os.fspath(path)} must hold I3D's weights: misses {missing}, and has {other} besides")
    return _with_weights(network, state)


def _loaded(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file of I3D's weights: {error}") from error


def _with_weights(network: I3D, state: Mapping[str, Tensor]) -> I3D:
    network.load_state_dict(state, strict=False)  # without batch norm's counts
    return network.eval().requires_grad_(False)


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the shared TorchScript (or of the module it was made of) in this module's names.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    wanted = {key: value for key, value in I3D().state_dict().items() if not key.endswith("num_batches_tracked")}
    found = {}
    for key, value in wanted.items():
        if key not in state:
            raise ValueError(f"the file must hold I3D's {key}, got {', '.join(list(state)[:5])}, ...")
        if state[key].shape != value.shape:
            raise ValueError(f"{key} must be {tuple(value.shape)}, got {tuple(state[key].shape)}")
        found[key] = state[key].float().contiguous().clone()
    return found


def convert(source: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the weights of TorchScript, or of a state dict saved by torch, as safetensors.

    Raises:
        ValueError: a weight is missing or has another shape, or the script gives other logits than this network.
        OSError: a file cannot be read or written.
    """
    state, script = _read(source)
    weights = converted(state)
    if script is not None:
        check_script(script, _with_weights(I3D(), weights))
    storage.write(output, safetensors.torch.save(weights))


@torch.no_grad()
def check_script(script: Any, network: nn.Module) -> None:
    """ValueError where a script and the network give unlike logits of one clip."""
    clip = torch.rand(CLIP, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = {argument.name for argument in script.forward.schema.arguments}
    found = script(clip, **{name: value for name, value in OPTIONS.items() if name in known})
    expected = network(clip)
    error = (found - expected).abs().max() / expected.abs().max() if found.shape == expected.shape else None
    if error is None or not error <= TOLERANCE:
        what = f"{tuple(found.shape)} for {tuple(expected.shape)}" if error is None else f"an error of {error:.2g}"
        raise ValueError(f"the script must give I3D's logits to {TOLERANCE} of the largest, got {what}")


def _read(path: pathlib.Path) -> tuple[Mapping[str, Tensor], Any]:
    """The tensors of either kind of file, and the script where it is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a file is TorchScript, and that TorchScript is deprecated
        try:
            return torch.load(path, map_location="cpu", weights_only=True), None
        except (RuntimeError, pickle.UnpicklingError):
            pass
        try:
            script = torch.jit.load(path, map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"{path} must be TorchScript or a state dict saved by torch: {error}") from error
        return script.state_dict(), script


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nystromgan.zoo.metrics.i3d", description=__doc__)
    parser.add_argument("source", type=pathlib.Path, help="TorchScript, or a state dict saved by torch")
    parser.add_argument("output", type=pathlib.Path, help="safetensors")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    cli.run_module("nystromgan.zoo.metrics.i3d", main)
