"""Memory that a call uses again, once nobody holds what an earlier call made in it.

New memory comes from the system page by page, and each page is filled with zeros first. Of the 22 ms that W / sigma of
a 20-layer discriminator (56 MB) added to its forward, that was 18; of a forward of attention over 16384 tokens (34 MB),
6 of 30 (2 cores). glibc asks the system for 32 MiB and more in every call, and gives back what is free at its heap's
end: a forward over 4 times 2048 tokens (2 MB) took 2.1 ms in a loop that did nothing else, and 1.6 from here. So from
1 MiB on the native library takes outputs from here, and what a forward keeps of the pseudo-inverse for its backward.
"""

import math
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import WeakTensorKeyDictionary

from nystromgan import _library

LEAST_KEPT = 2**17  # bytes: below it the heap serves without new pages
MOST_KEPT = 4  # storages a weight: two normalised weights and two gradients, for losses of D(real) and D(fake)
MOST_POOLED = 128  # storages of calls of many sizes, each of which a call may have to look at

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # a weight -> what was made for it, as long as it lives
_pool: list[UntypedStorage] = []  # what was made for nobody in particular, the latest last
_lock = threading.RLock()  # over both


def empty_like(weight: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the weight's shape and dtype, for something of its size and lifetime.

    Its memory is new, or that of an earlier one whose last tensor or view is gone.
    """
    size = weight.numel() * weight.element_size()
    if not weight.is_cpu or size < LEAST_KEPT:
        return weight.new_empty(weight.shape)
    owner = weight if weight._base is None else weight._base
    with _lock:
        storages: list[UntypedStorage] = _kept.setdefault(owner, [])
        tensor = _empty(weight, weight.shape, storages, size)
        del storages[:-MOST_KEPT]
    return tensor


def empty_cache() -> None:
    """Gives back to the system the memory that calls on the CPU keep for the next ones.

    Kept are outputs and gradients of attention and iterates of its pseudo-inverse from 1 MiB on, the last 128 of them
    and of the machine's memory a sixteenth at most, and up to four tensors for each spectrally normalised weight. What
    a tensor still holds stays.
    """
    with _lock:
        _pool.clear()
        _kept.clear()


def _from_pool(like: Tensor, shape: list[int]) -> Tensor:
    """As `empty_like`, of any shape."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16
    with _lock:
        tensor = _empty(like, shape, _pool, like.element_size() * math.prod(shape))
        while len(_pool) > MOST_POOLED or sum(storage.nbytes() for storage in _pool) > most:
            _pool.pop(0)
    return tensor


def _empty(like: Tensor, shape: Sequence[int], storages: list[UntypedStorage], size: int) -> Tensor:
    """An empty tensor on one of the storages of `size` bytes that nothing else holds, or on a new one, put last."""
    for i, storage in enumerate(storages):
        if storage.nbytes() == size and _is_free(storage):
            storages.append(storages.pop(i))
            return like.new_empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]  # strides may be left out
    tensor = like.new_empty(shape)
    storages.append(tensor.untyped_storage())
    return tensor


def _is_free(storage: UntypedStorage) -> bool:
    """Whether no tensor has it but this list, in this process or another."""
    return torch._C._storage_Use_Count(storage._cdata) == 1 and not storage.is_shared()


# What the native library calls for its large outputs.
_library.define(
    "empty_recycled(Tensor like, SymInt[] shape) -> Tensor", _from_pool, lambda like, shape: like.new_empty(shape)
)
