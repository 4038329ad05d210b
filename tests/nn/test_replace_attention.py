"""replace_attention: the model keeps its parameters and its answers, up to the landmarks."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nystromgan.nn import NystromAttention, replace_attention
from nystromgan.testing import padding_mask, relative_error


def _encoder(batch_first: bool = True, dropout: float = 0.0) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=dropout, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=batch_first)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_with_as_many_landmarks_as_tokens_the_model_gives_what_it_gave(training: bool, batch_first: bool) -> None:
    model = _encoder(batch_first).train(training)
    x, mask = torch.randn(2, 21, 16), padding_mask([21, 9], 21)
    x = x if batch_first else x.transpose(0, 1)
    kept = ~mask if batch_first else ~mask.T
    expected = model(x, src_key_padding_mask=mask)
    assert replace_attention(model, 21) is model
    torch.testing.assert_close(model(x, src_key_padding_mask=mask)[kept], expected[kept], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_landmarks_are_really_used() -> None:
    model, x = _encoder().eval(), torch.randn(2, 200, 16)
    with torch.no_grad():
        exact = model(x)
        errors = [relative_error(replace_attention(copy.deepcopy(model), count)(x), exact) for count in (4, 200)]
    assert errors[0] > 1e-4
    assert errors[1] < 1e-5


def test_parameters_are_the_same_objects() -> None:
    model = _encoder()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    replace_attention(model, 4)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters


def test_settings_reach_every_module() -> None:
    model = replace_attention(
        _encoder(dropout=0.25).eval(), 6, cluster_iterations=2, conv_kernel_size=3, backend="reference"
    )
    replaced = [module for module in model.modules() if isinstance(module, NystromAttention)]
    assert len(replaced) == 3
    for module in replaced:
        assert (module.num_landmarks, module.cluster_iterations, module.backend) == (6, 2, "reference")
        assert (module.dropout, module.training) == (0.25, False)
        assert not module.conv_weight.any()
        assert module.conv_weight.device.type == "cpu"


def test_a_shared_module_stays_shared() -> None:
    attention = nn.MultiheadAttention(16, 4)
    model = replace_attention(nn.ModuleDict({"a": attention, "b": attention, "c": nn.Sequential(attention)}))
    assert isinstance(model["a"], NystromAttention)
    assert model["a"] is model["b"] is model["c"][0]


def test_a_module_alone_is_returned() -> None:
    attention = nn.MultiheadAttention(16, 4)
    new = replace_attention(attention, 5)
    assert new.in_proj_weight is attention.in_proj_weight
    assert not new.batch_first


def test_a_causal_model_raises() -> None:
    model = replace_attention(_encoder(), 4)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    with pytest.raises(ValueError, match="attn_mask must be None"):
        model(torch.randn(2, 9, 16), mask=mask)


def test_trains_compiled() -> None:
    torch.compiler.reset()
    model = replace_attention(_encoder(), 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(2, 40, 16), padding_mask([40, 31], 40)
    expected = torch.autograd.grad(model(x, src_key_padding_mask=mask).square().sum(), model.parameters())
    actual = torch.autograd.grad(compiled(x, src_key_padding_mask=mask).square().sum(), model.parameters())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(4, 4), "torch.nn.MultiheadAttention or timm's Attention, got Linear without one"),
        (lambda: nn.MultiheadAttention(16, 4, kdim=8), "kdim and vdim equal to embed_dim 16, got 8 and 16"),
        (lambda: nn.MultiheadAttention(16, 4, vdim=8), "kdim and vdim equal to embed_dim 16, got 16 and 8"),
        (lambda: nn.MultiheadAttention(16, 4, add_bias_kv=True), "model must have add_bias_kv=False, got True"),
        (lambda: nn.MultiheadAttention(16, 4, add_zero_attn=True), "must have add_zero_attn=False, got True"),
    ],
)
def test_refuses_what_would_change_the_answer(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace_attention(make())


def test_changes_nothing_where_it_refuses() -> None:
    model = nn.Sequential(nn.MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4))
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="1 must have no hooks, since they would be lost, got 1"):
        replace_attention(model)
    assert isinstance(model[0], nn.MultiheadAttention)
    with warnings.catch_warnings(action="ignore"), pytest.raises(TypeError, match="unexpected keyword argument"):
        replace_attention(nn.Sequential(nn.MultiheadAttention(16, 4)), landmarks=3)
