"""What the Triton launchers launch, how often and with which options: nothing is compiled and nothing runs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nystromgan import _env, _triton

if _env.triton_interpret():
    pytest.skip("interpreted kernels are launched another way", allow_module_level=True)

from triton.runtime.jit import JITFunction

from nystromgan.ops.iterative_pinv import triton as pinv
from nystromgan.ops.iterative_pinv import tuning as pinv_tuning
from nystromgan.ops.nystrom_attention import triton as kernels
from nystromgan.ops.nystrom_attention import tuning
from nystromgan.ops.nystrom_attention.landmarks import grid_index, masked_landmarks
from nystromgan.ops.power_iteration import triton as power
from nystromgan.ops.spatiotemporal_attention import triton as maps

Launch = tuple[str, dict[str, Any]]


@contextlib.contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Inside, a launch adds a kernel's name and keyword arguments to the list and does no more."""
    launches: list[Launch] = []
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, *_, **options: launches.append((self.__name__, options)))
        patch.setattr(_triton, "architecture", lambda _: 90)
        yield launches


def attention(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, landmarks: int, head_dim: int, tokens: int = 4096,
    layout: bool = True, masked: bool = False, finished: bool = False,
) -> tuple[list[Launch], list[Launch]]:  # fmt: skip
    """The launches of a forward and of a backward; `finished` by a convolution, gamma and a residual."""
    query, key, value = (torch.empty(2, 2, tokens, head_dim, dtype=dtype, device="meta") for _ in range(3))
    plan: tuple = (None,) * 8
    grids: tuple = ((tokens,), (tokens,), (landmarks,))
    if masked:
        mask = torch.empty(2, tokens, dtype=torch.bool, device="meta")
        index, absent, exact = masked_landmarks(mask, (tokens,), (landmarks,))
        plan = (None, None, index, index, mask, absent, absent, exact)
    elif not layout:
        index = grid_index((tokens,), (landmarks,), torch.device("meta"))
        plan = (None, None, index, index, *plan[4:])
    options = (*grids, landmarks, 0.125, 6, False, True, False)
    epilogue: tuple = (None, None, None)
    if finished:
        epilogue = (torch.empty(2, 33, dtype=dtype, device="meta"), torch.empty((), device="meta"), value)
    with recorded(monkeypatch) as forward:
        output, *saved = kernels.nystrom_attention(query, key, value, *plan, *epilogue, *options)
    with recorded(monkeypatch) as backward:
        kernels.nystrom_attention_backward(output, query, key, value, *saved, *plan, *epilogue[:2], *options)
    return forward, backward


@pytest.mark.parametrize("tokens", [1024, 65536])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_attention_takes_four_launches_and_six(monkeypatch: pytest.MonkeyPatch, head_dim: int, tokens: int) -> None:
    forward, backward = attention(monkeypatch, torch.bfloat16, 64, head_dim, tokens)
    assert [name for name, _ in forward] == ["block_mean_kernel", "landmark_kernel", "mix_kernel", "output_kernel"]
    assert [name for name, _ in backward] == [
        "query_sums_kernel", "reduce_kernel", "core_backward_kernel", "keys_kernel", "reduce_kernel", "query_kernel",
    ]  # fmt: skip


def test_gamma_a_residual_and_a_convolution_add_no_launch_but_the_gradient_of_its_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward, backward = attention(monkeypatch, torch.bfloat16, 64, 64, finished=True)
    assert [name for name, _ in forward] == ["block_mean_kernel", "landmark_kernel", "mix_kernel", "output_kernel"]
    assert [name for name, _ in backward][6:] == ["weight_gradient_kernel", "reduce_kernel"]


def test_a_mask_pools_all_that_it_must_in_two_launches_and_counts_its_landmarks_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Queries and keys of self-attention have one index; the means of exact rows' values come with theirs."""
    forward, backward = attention(monkeypatch, torch.bfloat16, 64, 64, masked=True)
    assert [name for name, _ in forward] == [
        "index_sum_kernel", "mean_kernel", "landmark_kernel", "mix_kernel", "output_kernel",
    ]  # fmt: skip
    assert dict(forward)["index_sum_kernel"]["SIDES"] == 2
    assert dict(forward)["index_sum_kernel"]["HAS_VALUES"]
    assert [name for name, _ in backward].count("count_kernel") == 1


def test_more_than_128_landmarks_take_four_products_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: the inverse comes with its derivative."""
    matrix = torch.empty(2, 130, 130, device="meta")
    with recorded(monkeypatch) as forward:
        pinv.iterative_pinv(matrix, 6, False)
    with recorded(monkeypatch) as backward:
        pinv.iterative_pinv_backward(matrix, matrix, 6, False)
    assert [name for name, _ in forward] == [name for name, _ in backward] == ["product_kernel"] * 24
    _, backward = attention(monkeypatch, torch.bfloat16, 130, 8)
    assert [name for name, _ in backward] == [
        "query_stats_kernel", "query_sums_kernel", "core_kernel", "reduce_kernel", "core_backward_kernel",
        *["product_kernel"] * 24, "core_backward_kernel", "keys_kernel", "keys_kernel", "reduce_kernel", "query_kernel",
    ]  # fmt: skip


def test_every_launch_says_whether_products_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns where it has to look up the default, and warnings are errors here."""
    for case in ((torch.bfloat16, 64, 64), (torch.float32, 130, 8)):
        for options in ({}, {"layout": False}, {"masked": True}, {"finished": True}):
            for launches in attention(monkeypatch, *case, **options):
                assert_fused(launches)
    x, vectors = torch.empty(1, 2, 90, 8, device="meta"), [torch.empty(9, device="meta")]
    index = grid_index((90,), (8,), torch.device("meta"))
    weights, maps_ = [torch.empty(9, 9, device="meta")], torch.empty(1, 1, 8, 90, device="meta")
    with recorded(monkeypatch) as launches:
        kernels.cluster_landmarks(x, index, None, None, 8, 1)
        for size in (9, 65, 130):
            matrix = torch.empty(1, size, size, device="meta")
            pinv.iterative_pinv(matrix, 1, False)
            pinv.iterative_pinv_backward(matrix, matrix, 1, False)
        output, _, lse = maps.spatiotemporal_attention(maps_, maps_, maps_, None, None, None, 1.0, False, True)
        maps.spatiotemporal_attention_backward(output, maps_, maps_, maps_, None, None, output, lse, 1.0, False)
        sigma, _ = power.power_iteration(weights, vectors, vectors, 1, 1e-12)
        power.spectral_normalize(weights, sigma, weights)
        power.spectral_normalize_backward(weights, weights, sigma, torch.cat([*vectors, *vectors]), weights)
    assert_fused(launches)


def assert_fused(launches: list[Launch]) -> None:
    assert launches
    for name, options in launches:
        assert options.get("enable_fp_fusion") is True, name


def test_tiles_that_span_more_than_32_bits_count_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    far = torch.empty(1, device="meta").as_strided((1, 1, 90, 64), (0, 0, 1, 2**26))
    near = torch.empty(1, 1, 90, 64, device="meta")
    with recorded(monkeypatch) as launches:
        kernels.nystrom_attention(
            near, far, near, *(None,) * 8, *(None,) * 3, (90,), (90,), (8,), 8, 0.125, 1, False, True, False
        )
    options = dict(launches)
    assert options["block_mean_kernel"]["ACCESS"] == options["landmark_kernel"]["KEY_ACCESS"] == (1, True)
    assert options["landmark_kernel"]["VALUE_ACCESS"] == options["output_kernel"]["QUERY_ACCESS"] == (4, False)
    matrix = near.as_strided((2, 64, 64), (64, 2**26, 1))
    assert pinv.within_32_bits(matrix).is_contiguous()


def test_every_configuration_of_the_tables_is_a_candidate() -> None:
    for (_, _, itemsize), row in tuning.TABLE.items():
        assert len(row) == len(tuning.COLUMNS)
        assert set(row) <= set(tuning.CANDIDATES[itemsize])
    for (kernel, _), row in pinv_tuning.TABLE.items():
        assert len(row) == len(pinv_tuning.COLUMNS)
        assert set(row) <= set(pinv_tuning.CANDIDATES.get(kernel, pinv_tuning.TILED))
