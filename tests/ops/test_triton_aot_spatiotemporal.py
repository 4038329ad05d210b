"""The Triton kernels of spatiotemporal_attention, compiled for GPUs that are not here, spill nothing and fit."""

import pytest
import torch
from torch import Tensor

from nystromgan import _env
from nystromgan.bench import triton_aot
from nystromgan.ops.spatiotemporal_attention import triton as kernels

pytestmark = pytest.mark.skipif(_env.triton_interpret(), reason="the interpreter compiles nothing")
NAMES = {"_forward_kernel", "_grad_query_kernel", "_grad_key_value_kernel"}


def compile_all(channels: int, values: int, tokens: int, dtype: torch.dtype, architecture: int) -> list:
    """Forward and backward with gamma and a residual, on tensors without memory."""

    def maps(size: int) -> Tensor:
        return torch.empty(2, 2, size, tokens, dtype=dtype, device="meta")

    query, key, value, residual = maps(channels), maps(channels), maps(values), maps(values)
    gamma = torch.empty((), device="meta")
    with triton_aot.compiled_for(architecture) as compiled:
        output, attended, lse = kernels.spatiotemporal_attention(
            query, key, value, None, gamma, residual, 0.1, False, True
        )
        kernels.spatiotemporal_attention_backward(output, query, key, value, None, gamma, attended, lse, 0.1, False)
    return [triton_aot.resources(kernel) for kernel in compiled]


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    ("channels", "values", "tokens", "dtype"),
    [
        (8, 64, 4096, torch.bfloat16),
        (32, 128, 4096, torch.float16),
        (32, 128, 999, torch.bfloat16),
        (256, 256, 4096, torch.bfloat16),
        (8, 64, 4096, torch.float32),
        (32, 256, 4096, torch.float32),
    ],
    ids=str,
)
def test_nothing_spills_and_shared_memory_suffices(
    channels: int, values: int, tokens: int, dtype: torch.dtype, architecture: int
) -> None:
    resources = compile_all(channels, values, tokens, dtype, architecture)
    assert {used.kernel for used in resources} == NAMES
    for used in resources:
        assert used.spilled_bytes == 0, used
        assert used.shared_bytes <= triton_aot.SHARED_LIMIT[architecture], used
        if architecture == 90 and dtype != torch.float32 and values <= 128:
            assert used.wgmma, used
