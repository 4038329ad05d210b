"""The Triton kernels of iterative_pinv and nystrom_attention compiled for GPUs that are not here, over many shapes.

A quarter of an hour on two cores, so apart from the tests: `make triton-check`.
"""

import itertools

import pytest
import torch

from nystromgan.bench.triton_aot_cases import Case, check, compile_case, compile_pinv

ARCHITECTURES = (80, 90, 100)
HALF, SINGLE = torch.bfloat16, torch.float32
SHAPES = [
    *((landmarks, dim, dim) for landmarks in (33, 64, 128, 512) for dim in (8, 32, 64, 128, 256)),
    *((64, *dims) for dims in ((4, 32), (8, 64), (16, 128), (16, 256), (64, 256), (256, 16), (256, 64))),
]
CASES = [
    *(Case(dtype, *shape, 1024) for dtype, shape in itertools.product((HALF, SINGLE), SHAPES)),
    *(Case(dtype, 63, dim, dim, 1025, masked=True) for dtype in (HALF, SINGLE) for dim in (8, 64, 256)),
    *(Case(dtype, 64, dim, dim, 4096, taps=33) for dtype in (HALF, SINGLE) for dim in (8, 64, 256)),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_spills(architecture: int, case: Case) -> None:
    check(architecture, compile_case(architecture, case))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 17, 33, 65, 100, 127, 129, 512])
def test_pinv_spills_nothing(architecture: int, size: int) -> None:
    check(architecture, compile_pinv(architecture, size))
