"""The Triton kernels of power_iteration, compiled for GPUs that are not here: one launch a step, and nothing spills."""

import pytest
import torch

from nystromgan import _env
from nystromgan.bench import triton_aot
from nystromgan.ops.power_iteration import triton as kernels

pytestmark = pytest.mark.skipif(_env.triton_interpret(), reason="the interpreter compiles nothing")
NETWORK = [(64, 27)] + [(width, 9 * width) for width in (64, 128, 256, 512) for _ in range(10)]


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_takes_one_launch_and_nothing_spills(dtype: torch.dtype, architecture: int) -> None:
    weights = [torch.empty(shape, dtype=dtype, device="meta") for shape in NETWORK]
    u = [torch.empty(shape[0], device="meta") for shape in NETWORK]
    v = [torch.empty(shape[1], device="meta") for shape in NETWORK]
    with triton_aot.compiled_for(architecture) as compiled:
        sigma, _ = kernels.power_iteration(weights, u, v, 1, 1e-12)
        kernels.spectral_normalize(weights, sigma, [torch.empty_like(weight) for weight in weights])
        kernels.spectral_normalize_backward(weights, weights, sigma, torch.cat([*u, *v]), weights)
    resources = [triton_aot.resources(kernel) for kernel in compiled]
    assert [used.kernel for used in resources] == [
        "_power_iteration_kernel", "_spectral_normalize_kernel", "_normalize_dots_kernel", "_normalize_gradient_kernel"
    ]  # fmt: skip
    for kernel, used in zip(compiled, resources, strict=True):
        assert used.spilled_bytes == 0, used
        assert "ld.global.v4" in kernel.asm["ptx"] or ".v4.b32" in kernel.asm["ptx"], used
