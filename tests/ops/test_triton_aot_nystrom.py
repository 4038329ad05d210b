"""The Triton kernels of iterative_pinv and nystrom_attention compiled for GPUs that are not here.

Nothing may spill, shared memory must hold, and sm_90 must multiply by wgmma. `make triton-check` goes over many more
shapes.
"""

import re

import pytest
import torch

from nystromgan import _env
from nystromgan.bench.triton_aot import SHARED_LIMIT, resources

if _env.triton_interpret():
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from nystromgan.bench.triton_aot_cases import Case, check, compile_case, compile_pinv

ARCHITECTURES = [80, 90, 100]
LONG = Case(torch.bfloat16, 64, 64, 64, 65536)  # programs that work through several tiles of tokens
NARROW = Case(torch.float16, 64, 8, 64, 1024)
CASES = [
    *((architecture, LONG) for architecture in ARCHITECTURES),
    (80, Case(torch.bfloat16, 64, 16, 16, 4097, masked=True)),
    (80, Case(torch.bfloat16, 64, 256, 256, 4097)),
    *((architecture, Case(torch.bfloat16, 64, 64, 64, 4096, taps=33)) for architecture in ARCHITECTURES),
    (80, Case(torch.float32, 64, 64, 64, 1025, masked=True, taps=33)),
    (90, Case(torch.bfloat16, 64, 128, 128, 65536, taps=65)),
    (90, NARROW),
    (90, Case(torch.bfloat16, 64, 256, 256, 4096)),
    (100, Case(torch.bfloat16, 64, 8, 64, 2048)),
    (90, Case(torch.bfloat16, 512, 4, 32, 8192)),
    (90, Case(torch.float32, 64, 64, 64, 1024)),
    (90, Case(torch.float32, 33, 256, 256, 1025, masked=True)),
    (90, Case(torch.float32, 2, 1, 1, 1025, masked=True)),
    (100, Case(torch.float16, 64, 128, 128, 4097, masked=True)),
]


@pytest.mark.parametrize(("architecture", "case"), CASES, ids=str)
def test_nothing_spills(architecture: int, case: Case) -> None:
    check(architecture, compile_case(architecture, case))


def test_passes_over_tokens_use_wgmma_on_sm_90() -> None:
    needs = [resources(kernel) for kernel in compile_case(90, LONG)]
    for name in ("landmark_kernel", "output_kernel", "query_sums_kernel", "keys_kernel", "query_kernel"):
        assert all(need.wgmma for need in needs if need.kernel == name), name


def test_two_programs_or_more_of_a_pass_fit_an_sm_of_sm_90() -> None:
    """Registers decide it: an SM has 65,536, and warps get them in lots of 8 a thread."""
    needs = {need.kernel: need for need in map(resources, compile_case(90, LONG))}
    for name in ("landmark_kernel", "output_kernel", "query_kernel", "lloyd_kernel"):
        need = needs[name]
        assert -(-need.registers // 8) * 8 * 32 * need.num_warps <= 65536 // 2, need
        assert need.shared_bytes <= SHARED_LIMIT[90] // 2, need


def test_narrow_heads_are_read_sixteen_bytes_at_once() -> None:
    """A row of eight half precision numbers: all of it, and never one number."""
    for kernel in compile_case(90, NARROW):
        name, ptx = kernel.metadata.name, kernel.asm["ptx"]
        assert "ld.global.b16" not in ptx, name
        if name in ("block_mean_kernel", "landmark_kernel", "query_sums_kernel", "keys_kernel", "query_kernel"):
            assert "ld.global.v4.b32" in ptx or re.search(r"cp\.async\.cg.*0x10", ptx), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [16, 64, 128, 200])
def test_pinv_spills_nothing(architecture: int, size: int) -> None:
    check(architecture, compile_pinv(architecture, size))
