"""What every test stands on: fixed seeds, two threads, and poisoned memory under the op tests."""

import pathlib
from collections.abc import Iterator

import pytest
import torch

from nystromgan.bench.baselines.packages import make_torchvision_importable

OPS = pathlib.Path(__file__).parent / "ops"

make_torchvision_importable()  # before any test imports timm or transformers


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
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())  # torch's own may lack one
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
