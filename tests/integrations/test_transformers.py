"""accelerate: a randomly initialised Hugging Face Nyströmformer gives what it gave."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from nystromgan.integrations.transformers import AcceleratedSelfAttention, accelerate
from nystromgan.testing import padding_mask, relative_error

TOKENS = 48


def _model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.NystromformerConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=640,
        **{"segment_means_seq_len": TOKENS, "num_landmarks": 8, "conv_kernel_size": 5, **options},
    )
    model = transformers.NystromformerModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("query.weight", "key.weight")):  # sharp enough for the landmarks' answers to be their own
            nn.init.normal_(parameter, std=0.5)
    return model


def _pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    model = _model(**options)
    return accelerate(copy.deepcopy(model)), model


def _ids(batch: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, 50, (batch, tokens))


@pytest.mark.parametrize("options", [{}, {"num_landmarks": TOKENS}, {"num_landmarks": 16}])
def test_outputs_and_gradients_are_the_same(options: dict[str, Any]) -> None:
    models, ids = _pair(**options), _ids()
    outputs = [model(ids).last_hidden_state for model in models]
    assert relative_error(*outputs) < 1e-5
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        (output * direction).sum().backward()
    largest = max(parameter.grad.norm() for parameter in models[1].parameters() if parameter.grad is not None)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert (one.grad - other.grad).norm() < 1e-4 * other.grad.norm() + 1e-6 * largest, name


def test_long_convolutions_have_the_gradients_of_float64() -> None:
    """Those of the original are wrong in float32, by oneDNN's depthwise kernels, from 33 taps on."""
    torch.set_num_threads(1)
    model, original = _pair(segment_means_seq_len=640, conv_kernel_size=65)
    original.double()
    ids, direction = _ids(1, 640), torch.randn(1, 640, 32)
    gradients = []
    for one in (model, original):
        (one(ids).last_hidden_state * direction.to(one.dtype)).sum().backward()
        gradients.append(one.encoder.layer[0].attention.self.conv.weight.grad)
    assert relative_error(*gradients) < 1e-4


def test_activations_are_the_same_formula_where_they_are_replaced() -> None:
    model, original = _pair()
    for layer, other in zip(model.encoder.layer, original.encoder.layer, strict=True):
        assert isinstance(layer.intermediate.intermediate_act_fn, nn.GELU)
        x = torch.linspace(-6, 6, 101)
        expected = other.intermediate.intermediate_act_fn(x)
        torch.testing.assert_close(layer.intermediate.intermediate_act_fn(x), expected)
    model, original = _pair(hidden_act="relu")
    activations = [one.encoder.layer[0].intermediate.intermediate_act_fn for one in (model, original)]
    assert type(activations[0]) is type(activations[1])


def test_the_start_of_the_inverse_couples_the_batch_as_the_original_does() -> None:
    models, ids = _pair(), _ids()
    for model in models:
        together, alone = model(ids).last_hidden_state[:1], model(ids[:1]).last_hidden_state
        assert relative_error(together, alone) > 1e-5
    for layer in models[0].encoder.layer:
        layer.attention.self.init_option = "exact"
    assert relative_error(models[0](ids).last_hidden_state[:1], models[0](ids[:1]).last_hidden_state) < 1e-5


def test_padding_with_exact_attention() -> None:
    models, ids = _pair(num_landmarks=TOKENS), _ids()
    mask = ~padding_mask([TOKENS, 30, 1], TOKENS)
    accelerated, original = (model(ids, attention_mask=mask.long()).last_hidden_state[mask] for model in models)
    assert relative_error(accelerated, original) < 1e-5


def test_padding_with_landmarks_masks_keys_alone() -> None:
    """By the module, since this version's model gives an N x N mask, with which the original's landmarks raise."""
    accelerated, original = (model.encoder.layer[0].attention.self for model in _pair())
    padding = padding_mask([TOKENS, 30, 11], TOKENS)
    mask = torch.zeros(3, 1, 1, TOKENS).masked_fill(padding[:, None, None], torch.finfo(torch.float32).min)
    x = torch.randn(3, TOKENS, 32)
    # Values past the end differ: the original's convolution and query landmarks see padding, and so do these.
    assert relative_error(accelerated(x, mask)[0], original(x, mask)[0]) < 1e-5
    square = mask.expand(3, 1, TOKENS, TOKENS)
    assert torch.equal(accelerated(x, square)[0], accelerated(x, mask)[0])
    with pytest.raises(RuntimeError, match="must match the size"):
        original(x, square)


def test_the_model_takes_padding_where_the_original_raises() -> None:
    model, original = _pair()
    ids, mask = _ids(), ~padding_mask([TOKENS, 30, 11], TOKENS)
    with pytest.raises(RuntimeError, match="must match the size"):
        original(ids, attention_mask=mask.long())
    assert model(ids, attention_mask=mask.long()).last_hidden_state.isfinite().all()


def test_weights_are_the_same_objects_and_asked_for_attentions_are_given() -> None:
    model = _model()
    state = {name: value.data_ptr() for name, value in model.state_dict().items()}
    ids = _ids()
    expected = model(ids, output_attentions=True).attentions
    assert accelerate(model) is model
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == state
    for one, other in zip(model(ids, output_attentions=True).attentions, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_trains_under_checkpointing_and_compiles() -> None:
    model, ids = accelerate(_model().train()), _ids()
    model.activation_checkpointing_enable()
    model(ids).last_hidden_state.sum().backward()
    model.eval().activation_checkpointing_disable()
    torch.compiler.reset()
    attention = model.encoder.layer[0].attention.self
    assert isinstance(attention, AcceleratedSelfAttention)
    x = torch.randn(2, TOKENS, 32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], attention(x)[0])


def test_refuses() -> None:
    with pytest.raises(ValueError, match="model must contain a NystromformerSelfAttention, got Linear without one"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"config\.conv_kernel_size must be odd, got 4"):
        accelerate(_model(conv_kernel_size=4))
    model = accelerate(_model())
    with pytest.raises(ValueError, match="segment_means_seq_len 48 tokens, got 24"):
        model(_ids(tokens=24))  # the original pools landmarks across samples here
    attention, x = model.encoder.layer[0].attention.self, torch.randn(2, TOKENS, 32)
    causal = torch.full((1, 1, TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)
    with pytest.raises(RuntimeError, match="attention_mask must be one of padding"):
        attention(x, causal.expand(2, -1, -1, -1))
    with pytest.raises(RuntimeError, match="attention_mask must hold 0 and large negative values alone"):
        attention(x, torch.full((2, 1, 1, TOKENS), -1.0))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, 1, 1 or N, 48\), got \(2, 48\)"):
        attention(x, torch.zeros(2, TOKENS))
