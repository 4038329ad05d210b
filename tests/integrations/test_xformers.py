"""The module that xformers dropped: its formula, written out in plain PyTorch, and what it refuses."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nystromgan.integrations.xformers import NystromAttention
from nystromgan.testing import padding_mask, relative_error

BATCH, HEADS, DIM = 2, 3, 8


def _formula(module: NystromAttention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
    """F Z (G V) of segment means, the last N mod M segments one longer; padding (B * H, N), True = ignore."""
    bias = torch.zeros(k.shape[0], 1, k.shape[1], dtype=k.dtype)
    if padding is not None:
        bias = bias.masked_fill(padding[:, None], -torch.inf)
        q, k = q.masked_fill(padding[..., None], 0), k.masked_fill(padding[..., None], 0)
    scale, count = q.shape[-1] ** -0.5, module.num_landmarks
    if count >= k.shape[1]:
        return (q @ k.mT * scale + bias).softmax(-1) @ v
    short = k.shape[1] // count
    sizes = [short + (i >= count - k.shape[1] % count) for i in range(count)]
    q_means, k_means = (torch.stack([part.mean(1) for part in x.split(sizes, 1)], 1) for x in (q, k))
    core = (q_means @ k_means.mT * scale).softmax(-1)
    columns = core.sum(-2)
    largest = columns.max() if module.pinverse_original_init else columns.max(-1).values[:, None, None]
    inverse, eye = core.mT / largest, torch.eye(count, dtype=core.dtype)
    for _ in range(module.inv_iterations):
        product = core @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    if not module.use_razavi_pinverse:
        inverse = torch.linalg.pinv(core)
    mixed = (q_means @ k.mT * scale + bias).softmax(-1) @ v
    return (q @ k_means.mT * scale).softmax(-1) @ inverse @ mixed


def _inputs(tokens: int = 37, value_dim: int = DIM, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = BATCH * HEADS
    return (
        torch.randn(rows, tokens, DIM, **options) * 2,
        torch.randn(rows, tokens, DIM, **options),
        torch.randn(rows, tokens, value_dim, **options),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pinverse_original_init": True},
        {"use_razavi_pinverse": False, "num_landmarks": 3},
        {"inv_iterations": 3},
        {"num_landmarks": 37},
        {"num_landmarks": 64},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [35, 37])
def test_gives_what_it_gave(options: dict[str, Any], masked: bool, tokens: int) -> None:
    module = NystromAttention(0.0, HEADS, **{"num_landmarks": 5, **options})
    inputs = [x.requires_grad_() for x in _inputs(tokens, value_dim=6, dtype=torch.float64)]
    padding = padding_mask([tokens, 21], tokens)
    rows = padding.repeat_interleave(HEADS, 0) if masked else None
    output = module(*inputs, key_padding_mask=~padding if masked else None)
    expected = _formula(module, *inputs, rows)
    assert relative_error(output, expected) < 1e-9
    direction = torch.randn_like(output)
    grads, wanted = (torch.autograd.grad(x, inputs, direction) for x in (output, expected))
    for one, other in zip(grads, wanted, strict=True):
        assert relative_error(one, other) < 1e-7


def test_float32_and_the_forms_of_the_mask() -> None:
    module, inputs, padding = NystromAttention(0.0, HEADS, 5), _inputs(), padding_mask([37, 20], 37)
    rows = padding.repeat_interleave(HEADS, 0)
    expected = module(*inputs, key_padding_mask=~padding)
    assert relative_error(expected, _formula(module, *inputs, rows)) < 1e-4
    additive = torch.zeros(rows.shape).masked_fill(rows, -torch.inf)
    for mask in (~rows, additive, additive[:, None], additive[::HEADS]):
        assert torch.equal(module(*inputs, mask), expected)


def test_more_axes() -> None:
    """UniDepth passes (B, N, H, D), of which the original took the heads for tokens: its weights were trained so."""
    module = NystromAttention(num_landmarks=128, num_heads=HEADS, dropout=0.0)
    q, k, v = torch.randn(3, BATCH, 37, HEADS, DIM).unbind()
    expected = (q @ k.mT * DIM**-0.5).softmax(-1) @ v
    torch.testing.assert_close(module(q, k, v, key_padding_mask=None), expected)
    module = NystromAttention(0.0, HEADS, 5)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # (B, H, N, D)
    expected = module(*(x.flatten(0, 1) for x in (q, k, v)))
    assert torch.equal(module(q, k, v).flatten(0, 1), expected)
    with pytest.raises(ValueError, match="key_padding_mask must be None with q of more than 3 axes, got q of 4"):
        module(q, k, v, torch.ones(BATCH, 37, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"k axis 1 must be {HEADS}"):
        module(q, k[:, :1], v)


def test_skip_connections_and_pooling() -> None:
    inputs = _inputs()
    plain = NystromAttention(0.0, HEADS, 5)(*inputs)
    module = NystromAttention(0.0, HEADS, 5, conv_kernel_size=3)
    assert list(module.state_dict()) == ["skip_connection.weight"]
    assert module.skip_connection.weight.shape == (HEADS, 1, 3, 1)
    values = inputs[2].unflatten(0, (-1, HEADS))
    torch.testing.assert_close(module(*inputs), plain + module.skip_connection(values).flatten(0, 1))
    doubled = NystromAttention(0.0, HEADS, 5, v_skip_connection=nn.Identity(), conv_kernel_size=3)
    torch.testing.assert_close(doubled(*inputs), plain + inputs[2])
    pooled = NystromAttention(0.0, HEADS, 5, landmark_pooling=nn.AdaptiveAvgPool2d((5, None)))
    assert relative_error(pooled(*_inputs(35)), plain[:, :35]) > 1e-3


def test_dropout_and_unknown_settings() -> None:
    module = NystromAttention(dropout=0.5, num_heads=HEADS, num_landmarks=5, seq_len=37, attention="nystrom")
    inputs = _inputs()
    assert (module(*inputs) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(module.eval()(*inputs), module(*inputs, att_mask=None))


def test_gradcheck_and_copies() -> None:
    module = NystromAttention(0.0, HEADS, 4, conv_kernel_size=3).double()
    inputs = [x.requires_grad_() for x in _inputs(11, dtype=torch.float64)]
    assert torch.autograd.gradcheck(module, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(module, inputs, fast_mode=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*inputs), module(*inputs))
    state = NystromAttention(0.0, HEADS, 4, conv_kernel_size=3).double().state_dict()
    module.load_state_dict(state)
    other = torch.func.functional_call(twin, state, tuple(inputs))
    assert torch.equal(other, module(*inputs))


def test_compiles_whole() -> None:
    torch.compiler.reset()
    module, inputs = NystromAttention(0.0, HEADS, 5, conv_kernel_size=3), _inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    mask = ~padding_mask([37, 20], 37)
    torch.testing.assert_close(compiled(*inputs, mask), module(*inputs, mask))


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"causal must be False.*got True"):
        NystromAttention(0.0, HEADS, causal=True)
    with pytest.raises(ValueError, match="conv_kernel_size must be odd, got 4"):
        NystromAttention(0.0, HEADS, conv_kernel_size=4)
    module, inputs = NystromAttention(0.0, HEADS, 5), _inputs()
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 37\), \(6, 37\) or .* got \(4, 37\)"):
        module(*inputs, torch.ones(4, 37, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="key_padding_mask must be bool, or hold 0 and -inf alone"):
        module(*inputs, torch.rand(2, 37))
    with pytest.raises(ValueError, match=f"v must have a multiple of num_heads {HEADS} as rows, got 1"):
        NystromAttention(0.0, HEADS, 5, conv_kernel_size=3)(*(x[:1] for x in inputs))
    with pytest.raises(ValueError, match="q axis 1 must be 37"):
        module(inputs[0][:, :9], *inputs[1:], torch.ones(2, 37, dtype=torch.bool))
