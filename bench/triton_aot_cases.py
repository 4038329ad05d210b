"""What is compiled of `nystrom_attention` and `iterative_pinv` for GPUs that are not here."""

from typing import Any, NamedTuple

import torch

from nystromgan.bench.triton_aot import SHARED_LIMIT, compiled_for, resources
from nystromgan.ops.iterative_pinv import triton as pinv
from nystromgan.ops.nystrom_attention import triton as kernels
from nystromgan.ops.nystrom_attention.landmarks import grid_index, masked_landmarks

LIMIT = {**SHARED_LIMIT, 80: 99 * 1024}  # what serves sm_80 serves sm_86, sm_89 and sm_120, which have less


class Case(NamedTuple):
    """A training step of nystrom_attention."""

    dtype: torch.dtype
    landmarks: int
    head_dim: int
    value_dim: int
    tokens: int
    masked: bool = False
    taps: int = 0  # of a convolution, with a gamma and a residual, over channel-first maps


def compile_case(architecture: int, case: Case) -> list[Any]:
    """Every kernel that a training step with and without clustered landmarks launches.

    The launchers run as they are, on meta tensors, and compile what they would launch.
    """
    dtype, landmarks, head_dim, value_dim, tokens, masked, taps = case

    def empty(dim: int) -> torch.Tensor:
        if taps:
            return torch.empty(1, 2, dim, tokens, dtype=dtype, device="meta").mT
        return torch.empty(1, 2, tokens, dim, dtype=dtype, device="meta")

    query, key, value = empty(head_dim), empty(head_dim), empty(value_dim)
    epilogue: tuple = (None, None, None)
    if taps:
        epilogue = (torch.empty(2, taps, dtype=dtype, device="meta"), torch.empty((), device="meta"), empty(value_dim))
    index = grid_index((tokens,), (landmarks,), torch.device("meta"))
    plan: tuple = (None,) * 8
    if masked:
        mask = torch.empty(1, tokens, dtype=torch.bool, device="meta")
        index, absent, exact = masked_landmarks(mask, (tokens,), (landmarks,))
        plan = (None, None, index, index, mask, absent, absent, exact)
    options = ((tokens,), (tokens,), (landmarks,), landmarks, 0.125, 6, False, not taps, False)
    with compiled_for(architecture) as compiled:
        if masked:
            kernels.masked_landmarks(mask, (tokens,), (landmarks,))
            kernels.masked_landmarks(mask[:, : tokens // 2 * 2], (tokens // 2, 2), (landmarks, 1))
        output, *saved = kernels.nystrom_attention(query, key, value, *plan, *epilogue, *options)
        kernels.nystrom_attention_backward(output, query, key, value, *saved, *plan, *epilogue[:2], *options)
        kernels.cluster_landmarks(key, index, None, None, landmarks, 1)
    return compiled


def compile_pinv(architecture: int, size: int) -> list[Any]:
    """Every kernel that a training step of iterative_pinv launches for matrices of `size` rows."""
    matrix = torch.empty(2, size, size, device="meta")
    with compiled_for(architecture) as compiled:
        pinv.iterative_pinv(matrix, 6, False)
        pinv.iterative_pinv_backward(matrix, matrix, 6, False)
    return compiled


def check(architecture: int, compiled: list[Any]) -> None:
    """Raises AssertionError for a kernel that spills, or takes more shared memory than a program may."""
    for need in map(resources, compiled):
        assert need.spilled_bytes == 0, need
        assert need.shared_bytes <= LIMIT[architecture], need
