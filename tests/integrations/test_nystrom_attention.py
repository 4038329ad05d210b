"""accelerate for the package nystrom-attention: its modules give what they gave."""

import copy
from typing import Any

import nystrom_attention as package
import pytest
import torch
from torch import Tensor, nn

from nystromgan.integrations.nystrom_attention import AcceleratedNystromAttention, accelerate
from nystromgan.testing import padding_mask, relative_error

DIM = 24


def _pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    settings = {"dim": DIM, "dim_head": 16, "heads": 3, "num_landmarks": 8, "residual_conv_kernel": 5, **options}
    original = package.NystromAttention(**settings)
    with torch.no_grad():
        original.to_qkv.weight.mul_(3)  # sharp enough for the landmarks' answers to be their own
    return accelerate(copy.deepcopy(original)), original


def _tokens(count: int) -> Tensor:
    return torch.randn(2, count, DIM)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 64),
        ({}, 61),  # padded in front
        ({"residual": False}, 40),
        ({"pinv_iterations": 3}, 64),
        ({"num_landmarks": 64}, 64),  # as many landmarks as tokens: not exact attention there
        ({"num_landmarks": 32}, 20),
        ({"dropout": 0.1}, 64),
    ],
)
def test_outputs_and_gradients_are_the_same(options: dict[str, Any], count: int) -> None:
    models, x = _pair(**options), _tokens(count)
    direction = torch.randn(2, count, DIM)
    gradients = []
    for model in models:
        leaf = x.clone().requires_grad_()
        output = model.eval()(leaf)
        gradients.append([output, *torch.autograd.grad((output * direction).sum(), [leaf, *model.parameters()])])
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-4


def test_a_mask_that_leaves_every_segment_a_token() -> None:
    (model, original), x = _pair(), _tokens(61)
    keep = torch.rand(2, 61) < 0.7
    keep[:, ::5] = True
    assert relative_error(model(x, mask=keep), original(x, mask=keep)) < 1e-5


def test_a_mask_that_empties_segments_runs_the_original() -> None:
    (model, original), x = _pair(), _tokens(64)
    keep = ~padding_mask([64, 20], 64)
    assert torch.equal(model(x, mask=keep), original(x, mask=keep))


def test_weights_asked_for_are_given() -> None:
    (model, original), x = _pair(), _tokens(64)
    for option in ("return_attn", "return_attn_matrices"):
        torch.testing.assert_close(model(x, **{option: True}), original(x, **{option: True}))


def test_the_batch_is_coupled_as_in_the_original() -> None:
    models, x = _pair(), _tokens(64)
    for model in models:
        together = model(x)
        assert max(relative_error(together[i : i + 1], model(x[i : i + 1])) for i in range(2)) > 1e-5


def test_a_whole_transformer_compiled_and_in_bfloat16() -> None:
    original = package.Nystromformer(dim=DIM, dim_head=16, heads=2, depth=2, num_landmarks=8)
    model, x = accelerate(copy.deepcopy(original)), _tokens(64)
    assert sum(isinstance(module, AcceleratedNystromAttention) for module in model.modules()) == 2
    assert list(model.state_dict()) == list(original.state_dict())
    expected = original(x)
    torch.compiler.reset()
    assert relative_error(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected) < 1e-4
    assert relative_error(model.bfloat16()(x.bfloat16()).float(), expected) < 3e-2
    with pytest.raises(RuntimeError, match="expected scalar type"):
        original.bfloat16()(x.bfloat16())


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"must contain a nystrom_attention\.NystromAttention, got Linear without one"):
        accelerate(nn.Linear(2, 2))
    module = package.NystromAttention(DIM, residual_conv_kernel=4)
    with pytest.raises(ValueError, match="residual_conv_kernel must be odd, got 4"):
        accelerate(module)
    assert type(module) is package.NystromAttention
