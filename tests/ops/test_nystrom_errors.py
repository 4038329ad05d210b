"""Every refusal of nystrom_attention names the argument, the rule and the value received."""

import re
from typing import Any

import pytest
import torch

from nystromgan import UnsupportedError, nystrom_attention
from nystromgan.testing import attention_inputs, native_backends_of

T = torch.empty  # shapes of the wrong tensors below
QUERY = (2, 3, 20, 8)
LANDMARKS = {"query_landmarks": T(2, 3, 4, 8), "key_landmarks": T(2, 3, 4, 8)}

WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"query": T(2, 20, 8)}, "query must have 4 axes, got shape (2, 20, 8)"),
    ({"key": T(1, 2, 3, 20, 8)}, "key must have 4 axes, got shape (1, 2, 3, 20, 8)"),
    ({"value": T(20, 8)}, "value must have 4 axes, got shape (20, 8)"),
    ({"key": T(1, 3, 20, 8)}, "key axis 0 must be 2 (query's batch), got shape (1, 3, 20, 8)"),
    ({"key": T(2, 4, 20, 8)}, "key axis 1 must be 3 (query's heads), got shape (2, 4, 20, 8)"),
    ({"key": T(2, 3, 20, 9)}, "key axis 3 must be 8 (query's head dim D), got shape (2, 3, 20, 9)"),
    ({"value": T(2, 1, 20, 8)}, "value axis 1 must be 3 (query's heads), got shape (2, 1, 20, 8)"),
    ({"value": T(2, 3, 19, 8)}, "value axis 2 must be 20 (key's tokens S), got shape (2, 3, 19, 8)"),
    ({"query": T(2, 3, 0, 8)}, "query's tokens N must be at least 1, got 0"),
    ({"key": T(2, 3, 0, 8), "value": T(2, 3, 0, 8)}, "key's tokens S must be at least 1, got 0"),
    ({"query": T(2, 3, 20, 0), "key": T(2, 3, 20, 0)}, "query's head dim D must be at least 1, got 0"),
    ({"value": T(2, 3, 20, 0)}, "value's head dim E must be at least 1, got 0"),
    ({"key": T(QUERY).bfloat16()}, "key must have query's dtype torch.float32, got torch.bfloat16"),
    ({"value": T(QUERY, device="meta")}, "value must have query's device cpu, got meta"),
    ({"scale": float("nan")}, "scale must be finite, got nan"),
    ({"scale": float("-inf")}, "scale must be finite, got -inf"),
    ({"num_landmarks": 0}, "num_landmarks must be at least 1, got 0"),
    ({"num_landmarks": -3}, "num_landmarks must be at least 1, got -3"),
    ({"num_landmarks": (2, 2)}, "num_landmarks must be an integer without grid, got (2, 2)"),
    ({"grid": (4, 6)}, "grid (4, 6) must have as many positions as query has tokens, 20"),
    ({"grid": ((4, 5), (2, 5))}, "grid (2, 5) must have as many positions as key has tokens, 20"),
    ({"grid": (0, 20)}, "grid's sizes must be at least 1, got 0"),
    ({"grid": ()}, "grid must be a shape, or a pair (query_grid, key_grid), got ()"),
    ({"grid": ((4, 5), 20)}, "grid must be a shape, or a pair (query_grid, key_grid), got ((4, 5), 20)"),
    ({"grid": ((20,),) * 3}, "grid must be a shape, or a pair (query_grid, key_grid), got ((20,), (20,), (20,))"),
    ({"grid": ((4, 5), (20,))}, "grid must have as many axes for queries as for keys, got (4, 5) and (20,)"),
    ({"grid": (4, 5), "num_landmarks": (2,)}, "num_landmarks must give one count per axis of grid (4, 5), got (2,)"),
    ({"grid": (4, 5), "num_landmarks": (2, 0)}, "num_landmarks[1] must be at least 1, got 0"),
    ({"grid": (4, 5), "num_landmarks": 0}, "num_landmarks must be at least 1, got 0"),
    ({"cluster_iterations": -1}, "cluster_iterations must be at least 0, got -1"),
    ({"pinv_iterations": -1}, "pinv_iterations must be at least 0, got -1"),
    ({"pinv_init": "max"}, "pinv_init must be one of ('per_matrix', 'global_max'), got 'max'"),
    ({"key_padding_mask": T(2, 19, dtype=torch.bool)}, "key_padding_mask must have shape (2, 20), got (2, 19)"),
    ({"key_padding_mask": T(20, dtype=torch.bool)}, "key_padding_mask must have shape (2, 20), got (20,)"),
    ({"query_padding_mask": T(1, 20, dtype=torch.bool)}, "query_padding_mask must have shape (2, 20), got (1, 20)"),
    ({"key_padding_mask": T(2, 20, dtype=torch.bool, device="meta")}, "key_padding_mask must be on cpu, got meta"),
    ({"conv_weight": T(3)}, "conv_weight must have 2 axes, got shape (3,)"),
    ({"conv_weight": T(2, 3)}, "conv_weight axis 0 must be 3 (query's heads), got shape (2, 3)"),
    ({"conv_weight": T(3, 4)}, "conv_weight must have an odd kernel size, got 4"),
    ({"conv_weight": T(3, 0)}, "conv_weight must have an odd kernel size, got 0"),
    ({"conv_weight": T(3, 3), "query": T(2, 3, 9, 8)}, "conv_weight needs N = S, got 9 queries and 20 keys"),
    ({"gamma": T(2)}, "gamma must have one element, got shape (2,)"),
    ({"gamma": T(1, device="meta")}, "gamma must have query's device cpu, got meta"),
    ({"residual": T(2, 20, 3, 8)}, "residual must have the output's shape (2, 3, 20, 8), got (2, 20, 3, 8)"),
    (
        {"key_landmarks": T(2, 3, 4, 8)},
        "query_landmarks and key_landmarks must be given together, got no query_landmarks",
    ),
    (
        {"query_landmarks": T(2, 3, 4, 8)},
        "query_landmarks and key_landmarks must be given together, got no key_landmarks",
    ),
    (
        {**LANDMARKS, "key_landmarks": T(2, 3, 5, 8)},
        "key_landmarks axis 2 must be 4 (query_landmarks' count M), got shape",
    ),
    (
        {**LANDMARKS, "query_landmarks": T(2, 3, 4, 7)},
        "query_landmarks axis 3 must be 8 (query's head dim D), got shape",
    ),
    ({**LANDMARKS, "query_landmarks": T(1, 3, 4, 8)}, "query_landmarks axis 0 must be 2 (query's batch), got shape"),
    (dict.fromkeys(LANDMARKS, T(2, 3, 0, 8)), "query_landmarks' count M must be at least 1, got 0"),
    ({**LANDMARKS, "grid": (4, 5)}, "grid must not be given with landmarks, got (4, 5)"),
    ({**LANDMARKS, "cluster_iterations": 2}, "cluster_iterations must not be given with landmarks, got 2"),
    ({"backend": "gpu"}, "backend must be one of ('auto', 'cuda', 'triton', 'cpu', 'reference'), got 'gpu'"),
]

WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"query": [[1.0]]}, "query must be a tensor, got list"),
    ({"value": None}, "value must be a tensor, got NoneType"),
    ({"key": T(QUERY, dtype=torch.int64)}, "key must have a floating-point dtype, got torch.int64"),
    ({"query": T(QUERY, dtype=torch.complex64)}, "query must have a floating-point dtype, got torch.complex64"),
    ({"scale": "1"}, "scale must be a real number, got '1'"),
    ({"num_landmarks": 2.0}, "num_landmarks must be an integer, got 2.0"),
    ({"num_landmarks": True}, "num_landmarks must be an integer, got True"),
    ({"grid": 20}, "grid must be a shape, or a pair (query_grid, key_grid), got 20"),
    ({"grid": (4.0, 5.0)}, "grid's sizes must be an integer, got 4.0"),
    ({"cluster_iterations": 1.5}, "cluster_iterations must be an integer, got 1.5"),
    ({"pinv_iterations": None}, "pinv_iterations must be an integer, got None"),
    ({"key_padding_mask": T(2, 20)}, "key_padding_mask must have dtype torch.bool (True = ignore), got torch.float32"),
    ({"key_padding_mask": [True]}, "key_padding_mask must be a tensor, got list"),
    ({"query_padding_mask": T(2, 20, dtype=torch.uint8)}, "query_padding_mask must have dtype torch.bool"),
    ({"conv_weight": T(3, 3, dtype=torch.int32)}, "conv_weight must have a floating-point dtype, got torch.int32"),
    ({**LANDMARKS, "query_landmarks": 4}, "query_landmarks must be a tensor, got int"),
]


def call(**wrong: Any) -> None:
    inputs: dict[str, Any] = attention_inputs(2, 3, 20, head_dim=8)
    nystrom_attention(**{**inputs, "num_landmarks": 4, **wrong})


@pytest.mark.parametrize(("wrong", "message"), WRONG_VALUES, ids=[message for _, message in WRONG_VALUES])
def test_wrong_value(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**wrong)


@pytest.mark.parametrize(("wrong", "message"), WRONG_TYPES, ids=[message for _, message in WRONG_TYPES])
def test_wrong_type(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call(**wrong)


@pytest.mark.parametrize("backend", native_backends_of("nystrom_attention"))
def test_a_named_backend_refuses_float64_and_never_falls_back(backend: str) -> None:
    inputs = attention_inputs(2, 3, 20, dtype=torch.float64)
    message = rf"backend '{backend}' cannot run nystrom_attention on \(2, 3, 20, 16\) torch.float64 on cpu.*"
    with pytest.raises(UnsupportedError, match=message + "takes float32, bfloat16 and float16, got torch.float64"):
        nystrom_attention(**inputs, num_landmarks=4, backend=backend)


@pytest.mark.parametrize("batch", [(0, 3), (2, 0)])
def test_an_empty_batch_is_no_error(batch: tuple[int, int]) -> None:
    inputs = {name: x.requires_grad_() for name, x in attention_inputs(*batch, 20).items()}
    for options in ({}, {"cluster_iterations": 2}, {"num_landmarks": 20}):
        output = nystrom_attention(**inputs, **{"num_landmarks": 4, **options})
        assert output.shape == (*batch, 20, 16)
        assert torch.autograd.grad(output.sum(), inputs["query"])[0].shape == (*batch, 20, 16)
