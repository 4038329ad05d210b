"""replace_attention on timm's vision transformers: what they give, up to the landmarks."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from nystromgan.integrations.timm import NystromAttention
from nystromgan.nn import replace_attention
from nystromgan.testing import relative_error

NAMES = ("vit_tiny_patch16_224", "vit_base_patch16_siglip_gap_256")  # with and without a class token


def _model(name: str = NAMES[0], size: int = 64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        name, img_size=size, depth=2, embed_dim=48, num_heads=3, num_classes=5, patch_size=8, **options
    ).eval()


def _images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"proj_drop_rate": 0.1}])
def test_with_as_many_landmarks_as_tokens_the_model_gives_what_it_gave(name: str, options: dict[str, Any]) -> None:
    model, x = _model(name, **options), _images()
    expected = model(x)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    names = list(model.state_dict())
    assert replace_attention(model, 65) is model
    assert sum(isinstance(module, NystromAttention) for module in model.modules()) == 2
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert list(model.state_dict()) == names


def test_gated_and_normed_attention() -> None:
    attention = timm.layers.Attention(
        24, 3, qkv_bias=True, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm, dim_out=12
    )
    x = torch.randn(2, 20, 24)
    expected = attention(x)
    torch.testing.assert_close(replace_attention(attention, 20)(x), expected, rtol=1e-4, atol=1e-5)


def test_landmarks_are_used_and_grids_fit_models_without_a_class_token() -> None:
    model, x = _model(NAMES[1], 128), _images(128)
    exact = model(x)
    for options in ({"num_landmarks": 16}, {"num_landmarks": (4, 4), "grid": (16, 16), "cluster_iterations": 2}):
        landmarks = replace_attention(copy.deepcopy(model), **options)
        assert 1e-5 < relative_error(landmarks(x), exact) < 0.5
    with pytest.raises(ValueError, match=r"grid"):
        replace_attention(_model(size=128), (4, 4), grid=(16, 16))(x)  # 257 tokens


def test_hooks_are_kept_and_nothing_else_changes() -> None:
    model, calls = _model(), []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    before = model.blocks[0].attn
    replace_attention(model, 16)(_images())
    assert calls == [1]
    assert type(before) is timm.layers.Attention
    with pytest.raises(ValueError, match="num_landmarks must be at least 1, got 0"):
        replace_attention(before, 0)
    with pytest.raises(TypeError, match="conv_kernel_size"):
        replace_attention(before, 16, conv_kernel_size=3)


def test_trains_compiles_and_copies() -> None:
    model, x = replace_attention(_model(), 16).train(), _images()
    expected = torch.autograd.grad(model(x).square().sum(), model.parameters())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(x).square().sum(), model.parameters()), expected, strict=True):
        assert relative_error(one, other) < 1e-3
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_refuses_masks() -> None:
    attention, x = replace_attention(timm.layers.Attention(24, 3), 4), torch.randn(2, 20, 24)
    with pytest.raises(ValueError, match=r"attn_mask must be None.*got one of shape \(20, 20\)"):
        attention(x, torch.zeros(20, 20))
    with pytest.raises(ValueError, match="is_causal must be False"):
        attention(x, is_causal=True)
