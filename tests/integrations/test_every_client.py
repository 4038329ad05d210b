"""What the attention of every client keeps: derivatives, copies, autocast, export, functional_call, checkpointing."""

import copy
import pickle
from collections.abc import Callable

import nystrom_attention as package
import pytest
import timm
import torch
import transformers
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from nystromgan.integrations import nystrom_attention, xformers
from nystromgan.integrations import transformers as accelerated
from nystromgan.integrations.diffusers import NystromAttnProcessor, WanNystromAttnProcessor
from nystromgan.nn import replace_attention
from nystromgan.testing import relative_error

TOKENS, WIDTH, HEADS, LANDMARKS = 12, 16, 2, 3


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


class SelfAttention(nn.Module):
    """One tensor as query, key and value."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, x, x)


def _nystromformer() -> nn.Module:
    config = transformers.NystromformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_landmarks=LANDMARKS, segment_means_seq_len=TOKENS,
        conv_kernel_size=3, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return First(accelerated.accelerate(nn.Sequential(NystromformerSelfAttention(config)))[0])


def _encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, activation=nn.Softplus(), batch_first=True)
    return replace_attention(layer, LANDMARKS)


CLIENTS: dict[str, Callable[[], nn.Module]] = {
    "torch": _encoder_layer,
    "timm": lambda: replace_attention(timm.layers.Attention(WIDTH, HEADS, qk_norm=True, norm_layer=nn.LayerNorm), 3),
    "diffusers": lambda: Attention(
        WIDTH, heads=HEADS, dim_head=8, norm_num_groups=4, processor=NystromAttnProcessor(LANDMARKS)
    ),
    "diffusers Wan": lambda: WanAttention(
        WIDTH, HEADS, 8, processor=WanNystromAttnProcessor((2, 1, 1), grid=(2, 2, 3), cluster_iterations=1)
    ),
    "transformers": _nystromformer,
    "nystrom-attention": lambda: nystrom_attention.accelerate(
        nn.Sequential(package.NystromAttention(WIDTH, 8, HEADS, LANDMARKS, residual_conv_kernel=3))
    ),
    "xformers": lambda: SelfAttention(xformers.NystromAttention(0.0, HEADS, LANDMARKS, conv_kernel_size=3)),
}
every_client = pytest.mark.parametrize("client", CLIENTS)


def _module(client: str) -> tuple[nn.Module, Tensor]:
    """A client's module, and tokens (B, N, C) for it."""
    torch.manual_seed(0)
    return CLIENTS[client](), torch.randn(2, TOKENS, WIDTH)


@every_client
def test_derivatives(client: str) -> None:
    module, x = _module(client)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(module.double(), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(module, x, fast_mode=True)
    names = [name for name, _ in module.named_parameters()]

    def of_parameters(*values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x.detach())

    parameters = [parameter.detach().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(of_parameters, parameters, fast_mode=True)
    assert torch.autograd.gradgradcheck(of_parameters, parameters, fast_mode=True)


@every_client
def test_copies_and_checkpointing(client: str) -> None:
    module, x = _module(client)
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected)
    other = torch.func.functional_call(_module(client)[0], module.state_dict(), x)
    assert torch.equal(other, expected)
    x.requires_grad_()
    grads = [
        torch.autograd.grad(y.square().sum(), x)[0]
        for y in (module(x), torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False))
    ]
    assert torch.equal(*grads)


@every_client
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's, of Wan's RMSNorm
def test_autocast_and_export(client: str) -> None:
    module, x = _module(client)
    expected = module.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(module(x), expected) < 0.05
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), expected)
