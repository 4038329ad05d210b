"""Memory that a training step uses again, once nobody holds what the last step made in it.

What is as large as a network's weights comes from the system page by page, and each page is filled with zeros first: of
the 22 ms that W / sigma of a 20-layer discriminator (56 MB) added to its forward, that was 18 (2 cores).
"""

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import WeakTensorKeyDictionary

LEAST_BYTES = 2**17  # below it glibc's heap serves without new pages
MOST_KEPT = 4  # storages a weight: two normalised weights and two gradients, for losses of D(real) and D(fake)

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # a weight -> what was made for it, as long as it lives


def empty_like(weight: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the weight's shape and dtype, for something of its size and lifetime.

    Its memory is new, or that of an earlier one whose last tensor or view is gone.
    """
    size = weight.numel() * weight.element_size()
    if weight.device.type != "cpu" or size < LEAST_BYTES:
        return weight.new_empty(weight.shape)
    owner = weight if weight._base is None else weight._base
    storages: list[UntypedStorage] = _kept.setdefault(owner, [])
    for _ in range(len(storages)):
        storage = storages.pop(0)  # out of the list while it is looked at: another thread finds it nowhere
        if storage.nbytes() == size and _is_free(storage):
            tensor = weight.new_empty(0).set_(storage, 0, weight.shape)  # type: ignore[call-overload]  # strides may be left out
            storages.append(storage)
            return tensor
        storages.append(storage)
    tensor = weight.new_empty(weight.shape)
    storages.append(tensor.untyped_storage())
    del storages[:-MOST_KEPT]
    return tensor


def _is_free(storage: UntypedStorage) -> bool:
    """Whether no tensor has it but this list, in this process or another."""
    return torch._C._storage_Use_Count(storage._cdata) == 1 and not storage.is_shared()
