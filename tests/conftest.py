"""What every test stands on: fixed seeds, two threads, and poisoned memory under the op tests."""

import importlib.util
import pathlib
from collections.abc import Iterator
from importlib import metadata

import pytest
import torch

OPS = pathlib.Path(__file__).parent / "ops"

# timm imports torchvision, and transformers does where it is installed. PyPI's torchvision is built for CUDA's torch:
# beside torch's CPU build its own ops are missing, and its import ends at the first two that it mentions.
if (
    torch.version.cuda is None
    and importlib.util.find_spec("torchvision")
    and "+" not in metadata.version("torchvision")
):
    TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills new memory with NaN (floats) and the largest value (integers), so that an element nobody wrote shows.

    Torch's deterministic mode does it in the allocation itself, and so reaches tensors made in C++ too.
    """
    if OPS not in request.path.parents:
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
