"""What the Triton kernels of several ops share: tile sizes, the device's class, and where a launch happens."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nystromgan import _env

TILE_MIN = 16  # the smallest side of a tensor-core product
FUSED = {"enable_fp_fusion": True}  # goes with every launch: where Triton 3.9 looks the default up, it warns


def tile(size: int, most: int | None = None) -> int:
    """The power of two that holds `size`, at least TILE_MIN and at most `most`."""
    padded = max(TILE_MIN, 1 << (size - 1).bit_length())
    return padded if most is None else min(padded, most)


def launch_on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: makes it that of `tensor`. On the CPU the interpreter runs."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else _interpreter()


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """Lets the bound of a loop be an argument: up to 3.8 Triton takes it for an array, no number to numpy >= 2.4."""
    from triton.runtime import interpreter

    def patch_with_bounds(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch = interpreter._patch_lang_tensor
    interpreter._patch_lang_tensor = patch_with_bounds
    try:
        yield
    finally:
        interpreter._patch_lang_tensor = patch


@functools.lru_cache(maxsize=64)
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(tensor: Tensor) -> int:
    """The class of the tensor's device in the tuning tables: 80 (mma.sync), 90 (wgmma) or 100 (tcgen05).

    Consumer Blackwell (120) multiplies as 80 does, and has the 99 KiB of shared memory of 86 and 89, so the tables keep
    to that for 80. The interpreter counts as 80.
    """
    capability = _capability(tensor.device.index) if tensor.is_cuda else 80
    return 100 if 100 <= capability < 120 else 90 if capability == 90 else 80


def precision(dtype: torch.dtype) -> str:
    """How `dot` multiplies `dtype`: three tf32 products for float32, whose digits a single one would lose."""
    if _env.triton_interpret():
        return "interpreted"
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def dot(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_a @ b_b in float32. The interpreter, which takes bfloat16 for integers, gets wider operands."""
    if PRECISION == "interpreted":
        b_sum = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_sum)
    else:
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
    return b_sum
