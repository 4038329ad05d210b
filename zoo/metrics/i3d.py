"""I3D, the network of FVD: Inception-v1 inflated to 3-D, with 400 logits.

Weights are the user's: python -m nystromgan.zoo.metrics.i3d i3d_torchscript.pt i3d.safetensors turns the TorchScript
file that FVD tools share (or a state dict of it) into safetensors.
"""

import argparse
import os
import pathlib
import warnings
from collections.abc import Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

LEAST_FRAMES = 10
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


class _Unit(nn.Module):
    """relu(batch norm(convolution)), zeros around as TensorFlow's SAME puts them: the odd one behind."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.padding = _around(kernel, stride) * 3
        self.conv3d = nn.Conv3d(channels, out_channels, kernel, stride, bias=False)
        self.batch3d = nn.BatchNorm3d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.batch3d(self.conv3d(functional.pad(x, self.padding))))


class _Pool(nn.Module):
    """Maxima over kernel blocks, with zeros around; what comes in is never negative."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.padding = [pad for k, s in zip(reversed(kernel), reversed(stride), strict=True) for pad in _around(k, s)]

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_pool3d(functional.pad(x, self.padding), self.kernel, self.stride, ceil_mode=True)


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
    """Clips (B, 3, T, 224, 224) in [-1, 1], T at least 10 -> (B, 400) logits, averaged over time.

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


def _around(kernel: int, stride: int) -> tuple[int, int]:
    total = max(kernel - stride, 0)
    return total // 2, total - total // 2


def load_i3d(path: str | os.PathLike) -> I3D:
    """I3D in eval with the weights of a safetensors file.

    Raises:
        ValueError: the file is not of I3D; names what is missing or too much.
    """
    network = I3D()
    state = load_file(path)
    expected = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
    if set(state) != expected:
        missing, other = sorted(expected - set(state))[:3], sorted(set(state) - expected)[:3]
        raise ValueError(f"{os.fspath(path)} must hold I3D's weights: misses {missing}, and has {other} besides")
    network.load_state_dict(state, strict=False)
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nystromgan.zoo.metrics.i3d", description=__doc__)
    parser.add_argument("source", type=pathlib.Path, help="TorchScript, or a state dict saved by torch")
    parser.add_argument("output", type=pathlib.Path, help="safetensors")
    arguments = parser.parse_args()
    save_file(converted(_state_of(arguments.source)), arguments.output)
    print(f"wrote {arguments.output}")


def _state_of(path: pathlib.Path) -> Mapping[str, Tensor]:
    """The tensors of either kind of file; of TorchScript nothing is called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a file is TorchScript, and that TorchScript is deprecated
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except RuntimeError:
            return torch.jit.load(path, map_location="cpu").state_dict()


if __name__ == "__main__":
    main()
