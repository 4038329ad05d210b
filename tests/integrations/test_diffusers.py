"""diffusers' processors: models of video, randomly initialised, give what they gave, up to the landmarks."""

from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel, WanTransformer3DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from nystromgan.integrations.diffusers import NystromAttnProcessor, WanNystromAttnProcessor
from nystromgan.testing import relative_error

FRAMES, SIDE = 3, 16


def _unet() -> tuple[UNetSpatioTemporalConditionModel, dict[str, Any]]:
    """Stable Video Diffusion's network, small, and what it is called with."""
    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(
        sample_size=SIDE,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_attention_heads=(2, 2),
        cross_attention_dim=8,
        layers_per_block=1,
        num_frames=FRAMES,
    ).eval()
    inputs = {
        "sample": torch.randn(1, FRAMES, 8, SIDE, SIDE),
        "timestep": torch.tensor([10.0]),
        "encoder_hidden_states": torch.randn(1, 1, 8),
        "added_time_ids": torch.ones(1, 3),
    }
    return model, inputs


def _wan() -> tuple[WanTransformer3DModel, dict[str, Any]]:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, FRAMES, SIDE, SIDE),  # (3, 8, 8) tokens after patches
        "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }
    return model, inputs


def _call(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).sample


def test_a_unet_with_as_many_landmarks_as_tokens_gives_what_it_gave() -> None:
    model, inputs = _unet()
    expected = _call(model, inputs)
    model.set_attn_processor(NystromAttnProcessor(SIDE * SIDE))
    assert {type(processor) for processor in model.attn_processors.values()} == {NystromAttnProcessor}
    assert relative_error(_call(model, inputs), expected) < 1e-4


def test_a_unet_takes_landmarks_at_every_level() -> None:
    model, inputs = _unet()
    expected = _call(model, inputs)
    errors = []
    for processor in (NystromAttnProcessor(16), NystromAttnProcessor((4, 4), grid=(SIDE, SIDE), cluster_iterations=2)):
        model.set_attn_processor(processor)
        errors.append(relative_error(_call(model, inputs), expected))
    assert all(0 < error < 0.1 for error in errors)
    model.set_attn_processor(NystromAttnProcessor((4, 4), grid=(12, 12)))
    with pytest.raises(ValueError, match=r"grid \(12, 12\) must have 256 tokens"):
        _call(model, inputs)


def test_wan_attends_over_space_and_time() -> None:
    model, inputs = _wan()
    expected = _call(model, inputs)
    model.set_attn_processor(WanNystromAttnProcessor(FRAMES * 64))
    assert relative_error(_call(model, inputs), expected) < 1e-4
    model.set_attn_processor(WanNystromAttnProcessor((3, 4, 4), grid=(FRAMES, 8, 8)))
    assert 1e-6 < relative_error(_call(model, inputs), expected) < 0.1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
        {"qk_norm": "layer_norm", "bias": True},
    ],
)
@pytest.mark.parametrize("maps", [False, True])
def test_one_layer_is_the_stock_processor(options: dict[str, Any], maps: bool) -> None:
    attention = Attention(16, heads=2, dim_head=8, **options)
    x = torch.randn(2, 16, 5, 6) if maps else torch.randn(2, 30, 16)
    expected = AttnProcessor2_0()(attention, x)
    torch.testing.assert_close(NystromAttnProcessor(30)(attention, x), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_and_its_mask_stay_exact() -> None:
    attention = Attention(16, cross_attention_dim=12, heads=2, dim_head=8)
    x, text, mask = torch.randn(2, 30, 16), torch.randn(2, 9, 12), torch.randn(2, 1, 9)
    expected = AttnProcessor2_0()(attention, x, text, mask)
    assert torch.equal(NystromAttnProcessor(4)(attention, x, text, mask), expected)


def test_gradients_reach_every_parameter() -> None:
    attention = Attention(16, heads=2, dim_head=8, norm_num_groups=4, processor=NystromAttnProcessor(5))
    attention(torch.randn(2, 30, 16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in attention.parameters())


def test_refuses() -> None:
    attention, x = Attention(16, heads=2, dim_head=8), torch.randn(2, 30, 16)
    with pytest.raises(ValueError, match=r"attn_mask must be None.*got one of shape \(2, 1, 30\)"):
        NystromAttnProcessor(4)(attention, x, attention_mask=torch.zeros(2, 1, 30))
    with pytest.raises(ValueError, match=r"num_landmarks \(2, 2\) must have one count per axis of grid, got None"):
        NystromAttnProcessor((2, 2))
    with pytest.raises(ValueError, match="num_landmarks must be at least 1, got 0"):
        WanNystromAttnProcessor(0)
