"""NystromAttention: what it computes, that it takes torch's place, and that it behaves as a module."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nystromgan import nystrom_attention
from nystromgan.nn import NystromAttention
from nystromgan.testing import padding_mask, relative_error

TOKENS, EMBED = 30, 64
KINDS: dict[str, dict[str, Any]] = {
    "segment": {"num_landmarks": 5},
    "grid": {"num_landmarks": (2, 3), "grid": (5, 6)},
    "clustered": {"num_landmarks": 5, "cluster_iterations": 2},
    "conv": {"num_landmarks": 5, "conv_kernel_size": 3},
    "exact": {"num_landmarks": 64},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def _attention(kind: str = "segment", **options: Any) -> NystromAttention:
    attention = NystromAttention(EMBED, 4, **{**KINDS[kind], **options})
    if attention.conv_weight is not None:
        nn.init.normal_(attention.conv_weight)
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    return attention


def _tokens(count: int = TOKENS, batch: int = 2, **options: Any) -> Tensor:
    return torch.randn(batch, count, EMBED, **options)


def _twin(attention: NystromAttention, **options: Any) -> nn.MultiheadAttention:
    """torch's module with the same parameters."""
    twin = nn.MultiheadAttention(EMBED, 4, batch_first=attention.batch_first, **options)
    twin.load_state_dict(attention.state_dict())
    return twin.train(attention.training)


def test_is_the_function_between_projections() -> None:
    attention, x = _attention("clustered"), _tokens()
    heads = [
        nn.functional.linear(x, weight, bias).unflatten(-1, (4, EMBED // 4)).transpose(1, 2)
        for weight, bias in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    ]
    expected = nystrom_attention(*heads, num_landmarks=5, cluster_iterations=2).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, x, x)[0], attention.out_proj(expected))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_is_torch_module_with_as_many_landmarks_as_tokens(batch_first: bool, bias: bool, cross: bool) -> None:
    attention = _attention("exact", batch_first=batch_first, bias=bias)
    twin = _twin(attention, bias=bias)
    query = _tokens()
    key, value = (_tokens(23), _tokens(23)) if cross else (query, query)
    mask = padding_mask([23, 11], 23) if cross else padding_mask([30, 17], 30)
    if not batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    for padding in (None, mask):
        output, weights = attention(query, key, value, key_padding_mask=padding)
        expected, _ = twin(query, key, value, key_padding_mask=padding, need_weights=False)
        assert weights is None
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_one_product_or_three_projections_agree() -> None:
    attention, x = _attention(), _tokens()
    torch.testing.assert_close(attention(x, x.clone(), x)[0], attention(x, x, x)[0])


@every_kind
def test_a_sequence_alone_in_a_batch_and_unbatched_agree(kind: str) -> None:
    attention, x = _attention(kind), _tokens()
    batched = attention(x, x, x)[0]
    torch.testing.assert_close(attention(x[:1], x[:1], x[:1])[0], batched[:1])
    torch.testing.assert_close(attention(x[1], x[1], x[1])[0], batched[1])
    assert attention(x[1], x[1], x[1], key_padding_mask=torch.zeros(TOKENS, dtype=torch.bool))[0].ndim == 2


@pytest.mark.parametrize("kind", ["segment", "clustered", "conv"])
def test_a_padded_row_is_the_row_alone(kind: str) -> None:
    attention, x = _attention(kind), _tokens()
    mask = padding_mask([TOKENS, 19], TOKENS)
    padded = attention(x, x, x, key_padding_mask=mask)[0]
    torch.testing.assert_close(padded[1, :19], attention(x[1, :19], x[1, :19], x[1, :19])[0], rtol=1e-4, atol=1e-5)
    biases = torch.zeros(mask.shape).masked_fill(mask, -torch.inf)  # what torch's own layers pass on
    assert torch.equal(attention(x, x, x, key_padding_mask=biases)[0], padded)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_serves_a_transformer_encoder(kind: str, training: bool) -> None:
    """Not its fast path, which computes exact attention from the parameters and never calls the module."""
    layer = nn.TransformerEncoderLayer(EMBED, 4, 32, dropout=0.0, batch_first=True)
    layer.self_attn = _attention(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it cannot use nested tensors
        encoder = nn.TransformerEncoder(layer, 2).train(training)
    assert not encoder.use_nested_tensor
    x, mask = _tokens(), padding_mask([TOKENS, 19], TOKENS)
    expected = x
    for layer in encoder.layers:
        attended = layer.self_attn(expected, expected, expected, key_padding_mask=mask)[0]
        expected = layer.norm1(expected + attended)
        expected = layer.norm2(expected + layer.linear2(layer.linear1(expected).relu()))
    torch.testing.assert_close(encoder(x, src_key_padding_mask=mask), expected)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, src_key_padding_mask=mask), expected)


def test_state_dict_goes_both_ways() -> None:
    attention = _attention()
    twin = _twin(attention)
    assert list(twin.state_dict()) == list(attention.state_dict())
    attention.load_state_dict(twin.state_dict())


def test_starts_as_torch_starts() -> None:
    torch.manual_seed(3)
    ours = NystromAttention(EMBED, 4, conv_kernel_size=3).state_dict()
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(EMBED, 4).state_dict()
    assert not ours.pop("conv_weight").any()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape
        assert ours[name].std().item() == pytest.approx(expected.std().item(), rel=0.2)


def test_dropout_acts_in_training_alone() -> None:
    attention, x = _attention(dropout=0.5), _tokens()
    assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    attention.eval()
    assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])


@every_kind
def test_gradcheck(kind: str) -> None:
    attention = _attention(kind, dtype=torch.float64)
    x = torch.randn(1, TOKENS, EMBED, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, x, x)[0], x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: attention(x, x, x)[0], x, fast_mode=True)


@every_kind
def test_autocast_and_bfloat16(kind: str) -> None:
    attention, x = _attention(kind).eval(), _tokens()
    with torch.no_grad():
        expected = attention(x, x, x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            y = attention(x, x, x)[0]
        assert y.dtype == torch.bfloat16
        assert relative_error(y.float(), expected) < 3e-2
        z = attention.bfloat16()(*(x.bfloat16(),) * 3)[0]
        assert relative_error(z.float(), expected) < 3e-2


@every_kind
def test_compiles_whole(kind: str) -> None:
    torch.compiler.reset()
    attention, mask = _attention(kind), padding_mask([TOKENS, 19], TOKENS)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = _tokens()
    results = []
    for module in (compiled, attention):
        attention.zero_grad()
        y = module(x, x, x, key_padding_mask=mask.float().masked_fill(mask, -torch.inf))[0]
        y.square().sum().backward()
        results.append([y, *(parameter.grad.clone() for parameter in attention.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_kind
def test_exports_with_any_batch(kind: str) -> None:
    attention = _attention(kind).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(attention, (_tokens(),) * 3, dynamic_shapes=(batch, batch, batch))
    x = _tokens(batch=5)
    torch.testing.assert_close(program.module()(x, x, x)[0], attention(x, x, x)[0])


@every_kind
def test_copies(kind: str) -> None:
    attention, x = _attention(kind).eval(), _tokens()
    expected = attention(x, x, x)[0]
    other = _attention(kind).eval()
    assert torch.equal(torch.func.functional_call(other, attention.state_dict(), (x, x, x))[0], expected)
    meta = NystromAttention(EMBED, 4, **KINDS[kind], device="meta")
    assert {tensor.device.type for tensor in meta.state_dict().values()} == {"meta"}
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention)), meta.to_empty(device="cpu")):
        twin.load_state_dict(attention.state_dict())
        assert torch.equal(twin(x, x, x)[0], expected)


def test_frozen_parts_get_no_gradient() -> None:
    attention, x = _attention(), _tokens()
    attention.out_proj.requires_grad_(False)
    attention(x, x, x)[0].sum().backward()
    assert attention.out_proj.weight.grad is None
    assert attention.in_proj_weight.grad is not None


def test_gradient_checkpointing() -> None:
    attention, x = _attention("clustered", dropout=0.3), _tokens().requires_grad_()
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(attention(x, x, x)[0].square().sum(), x)
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(lambda x: attention(x, x, x)[0], x, use_reentrant=False)
    (actual,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_warns_once_where_landmarks_are_dearer_than_exact_attention() -> None:
    x = _tokens(101)
    attention = NystromAttention(EMBED, 4, num_landmarks=64)
    with pytest.warns(UserWarning, match=r"num_landmarks=64 takes .* over 101 x 101 positions") as caught:
        attention(x, x, x)
    assert caught[0].filename == __file__
    attention(x, x, x)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "num_heads must divide embed_dim 64, got 3"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"kdim": 8}, TypeError, "unexpected keyword argument 'kdim'"),
        ({"num_landmarks": 0}, ValueError, "num_landmarks must be at least 1, got 0"),
        (
            {"num_landmarks": (2, 2)},
            ValueError,
            r"num_landmarks \(2, 2\) must have one count per axis of grid, got None",
        ),
        ({"grid": (4, 0)}, ValueError, "grid must be at least 1, got 0"),
        ({"conv_kernel_size": 4}, ValueError, "conv_kernel_size must be odd, got 4"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1, got 1.5"),
        ({"cluster_iterations": -1}, ValueError, "cluster_iterations must be at least 0, got -1"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NystromAttention(**{"embed_dim": EMBED, "num_heads": 4, **settings})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"need_weights": True}, ValueError, "need_weights must be False.*got True"),
        ({"is_causal": True}, ValueError, "is_causal must be False.*got True"),
        ({"attn_mask": torch.zeros(30, 30)}, ValueError, r"attn_mask must be None.*got one of shape \(30, 30\)"),
        ({"key_padding_mask": torch.rand(2, 30)}, RuntimeError, "key_padding_mask must be bool, or hold 0 and -inf"),
        ({"key_padding_mask": torch.ones(2, 30).int()}, TypeError, "key_padding_mask must have dtype torch.bool"),
        ({"key_padding_mask": torch.ones(2, 29).bool()}, ValueError, r"must have shape \(2, 30\), got \(2, 29\)"),
        ({"key": torch.ones(2, 30, 8)}, ValueError, r"key axis 2 must be 64 \(embed_dim\), got shape \(2, 30, 8\)"),
        ({"value": torch.ones(30, 64)}, ValueError, r"value must have 3 axes, or 2 as .* got shape \(30, 64\)"),
    ],
)
def test_refuses_what_it_cannot_honour(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = _tokens()
    with pytest.raises(error, match=message):
        _attention()(**{"query": x, "key": x, "value": x, **options})


def test_refuses_nested_tensors_with_the_way_out() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, 4, 32, batch_first=True), 1).eval()
    encoder.layers[0].self_attn = _attention()
    with (
        torch.no_grad(),
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ValueError, match="use_nested_tensor = False"),
    ):
        encoder(_tokens(), src_key_padding_mask=padding_mask([TOKENS, 19], TOKENS))


def test_repr_shows_the_settings() -> None:
    shown = repr(_attention("grid"))
    for setting in ("64, num_heads=4", "num_landmarks=(2, 3)", "grid=(5, 6)", "batch_first=True", "backend='auto'"):
        assert setting in shown
