"""The Triton kernels of iterative_pinv and nystrom_attention compiled for GPUs that are not here.

Nothing may spill, shared memory must hold, and sm_90 must multiply by wgmma. The launchers run as they are, on meta
tensors, and compile what they would launch.
"""

import re
from typing import Any

import pytest
import torch

from nystromgan import _env
from nystromgan.bench.triton_aot import SHARED_LIMIT, compiled_for, resources

if _env.triton_interpret():
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from nystromgan.ops.iterative_pinv import triton as pinv
from nystromgan.ops.nystrom_attention import triton as kernels
from nystromgan.ops.nystrom_attention.landmarks import grid_index

ARCHITECTURES = [80, 90, 100]
Case = tuple[torch.dtype, int, int, int]  # dtype, M, D, E
CASES = [(torch.bfloat16, 64, 64, 64)]
CASES_SM90 = [(torch.float32, 64, 64, 64), (torch.float16, 64, 8, 64), (torch.bfloat16, 512, 4, 32)]


def compile_case(architecture: int, case: Case) -> list[Any]:
    """Every kernel that a training step with and without clustered landmarks launches."""
    dtype, landmarks, head_dim, value_dim = case
    tokens = 16 * landmarks
    query, key = (torch.empty(1, 2, tokens, head_dim, dtype=dtype, device="meta") for _ in range(2))
    value = torch.empty(1, 2, tokens, value_dim, dtype=dtype, device="meta")
    index = grid_index((tokens,), (landmarks,), torch.device("meta"))
    plan = (None,) * 8
    options = (landmarks, 0.125, 6, False)
    layout = ((tokens,), (tokens,), (landmarks,))
    with compiled_for(architecture) as compiled:
        output, *saved = kernels.nystrom_attention(query, key, value, *plan, *options, layout)
        kernels.nystrom_attention_backward(output, query, key, value, *saved, *plan, *options, layout)
        kernels.cluster_landmarks(key, index, None, None, landmarks, 1)
    return compiled


def check(architecture: int, compiled: list[Any]) -> None:
    for need in map(resources, compiled):
        assert need.spilled_bytes == 0, need
        assert need.shared_bytes <= SHARED_LIMIT[architecture], need


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_spills(architecture: int, case: Case) -> None:
    check(architecture, compile_case(architecture, case))


@pytest.mark.parametrize("case", CASES_SM90, ids=str)
def test_nothing_spills_on_sm_90(case: Case) -> None:
    check(90, compile_case(90, case))


def test_passes_over_tokens_use_wgmma_on_sm_90() -> None:
    needs = [resources(kernel) for kernel in compile_case(90, CASES[0])]
    for name in ("landmark_kernel", "output_kernel", "query_sums_kernel", "keys_kernel", "query_kernel"):
        assert all(need.wgmma for need in needs if need.kernel == name), name


def test_narrow_heads_are_read_sixteen_bytes_at_once() -> None:
    """A row of eight half precision numbers: all of it, and never one number."""
    for kernel in compile_case(90, CASES_SM90[1]):
        name, ptx = kernel.metadata.name, kernel.asm["ptx"]
        assert "ld.global.b16" not in ptx, name
        if name in ("block_mean_kernel", "landmark_kernel", "query_sums_kernel", "keys_kernel", "query_kernel"):
            assert "ld.global.v4.b32" in ptx or re.search(r"cp\.async\.cg.*0x10", ptx), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [16, 64, 128, 200])
def test_pinv_spills_nothing(architecture: int, size: int) -> None:
    matrix = torch.empty(2, size, size, device="meta")
    with compiled_for(architecture) as compiled:
        pinv.iterative_pinv(matrix, 6, False)
        pinv.iterative_pinv_backward(matrix, matrix, 6, False)
    check(architecture, compiled)
