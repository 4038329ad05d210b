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


def as_bytes(mask: Tensor | None, absent: Tensor) -> Tensor:
    """A boolean mask as bytes; `absent` in place of None, never read."""
    return absent if mask is None else mask.contiguous().view(torch.uint8)


@triton.jit
def dot(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_a @ b_b in float32. The interpreter, which takes bfloat16 for integers, gets wider operands."""
    if PRECISION == "interpreted":
        b_sum = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_sum)
    else:
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def dot_rows(b_a, b_b, PRECISION: tl.constexpr, b_sum=None):
    """b_sum + b_a @ b_b^T in float32, of tiles (R, K) and (C, K).

    More than 128 float32 columns are taken 32 at a time, by one warp each: every warp of a whole product would hold all
    256 columns of its rows, twice as tf32x3 splits them, which are more registers than it has.
    """
    R: tl.constexpr = b_a.shape[0]
    C: tl.constexpr = b_b.shape[0]
    K: tl.constexpr = b_a.shape[1]
    if b_sum is None:
        b_sum = tl.zeros((R, C), tl.float32)
    if b_a.dtype == tl.float32 and K > 128:
        b_a = tl.permute(tl.reshape(b_a, (R, K // 32, 32)), (1, 0, 2))
        b_b = tl.permute(tl.reshape(b_b, (C, K // 32, 32)), (1, 2, 0))
        b_sum += tl.sum(dot(b_a, b_b, tl.zeros((K // 32, R, C), tl.float32), PRECISION), 0)
    else:
        b_sum = dot(b_a, tl.trans(b_b), b_sum, PRECISION)
    return b_sum
