"""Landmark attention as the packages nystrom-attention and transformers ship it, between their projections.

Both scale the pseudo-inverse by a maximum over the whole batch, so their definition is pinv_init="global_max". Neither
runs in half precision: identity matrices are float32. D = E, and N a multiple of the number of landmarks.
"""

import functools
import importlib.util
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor, nn

Form = Callable[..., Tensor]


def installed() -> dict[str, Callable[[int, int, int], Form]]:
    """The packages found here, as functions of heads, head dim and landmarks."""
    made = {"nystrom_attention": nystrom_attention, "transformers": transformers}
    names = {"nystrom_attention": "nystrom-attention package", "transformers": "transformers' Nyströmformer"}
    return {names[name]: make for name, make in made.items() if importlib.util.find_spec(name)}


def nystrom_attention(heads: int, head_dim: int, num_landmarks: int) -> Form:
    """nystrom_attention.NystromAttention with identities for its projections, which so costs what is between them."""
    from nystrom_attention import NystromAttention

    width = heads * head_dim
    module = NystromAttention(width, head_dim, heads, num_landmarks, residual=False)
    module.to_qkv, module.to_out = nn.Identity(), nn.Identity()

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        joined = torch.cat([_merged(x) for x in (query, key, value)], -1)  # (B, N, 3 H D), as its projection makes it
        return _split(module(joined), heads)

    return form


def transformers(heads: int, head_dim: int, num_landmarks: int) -> Form:
    """transformers' NystromformerSelfAttention with its projections giving query, key and value."""
    make_torchvision_importable()
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_landmarks=num_landmarks,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = NystromformerSelfAttention(config).eval()
    module.conv_kernel_size = None  # its convolution; the config, in newer versions, takes numbers alone
    module.query, module.key, module.value = picks = [_Given() for _ in range(3)]

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for pick, given in zip(picks, (query, key, value), strict=True):
            pick.given = _merged(given)
        module.seq_len = query.shape[2]  # its one length, of which the memory of a call is measured at two
        return _split(module(picks[0].given)[0], heads)

    return form


@functools.cache
def make_torchvision_importable() -> torch.library.Library | None:
    """To be called before what imports torchvision, as timm does, and transformers where it is installed.

    PyPI's torchvision is built for CUDA's torch: beside torch's CPU build its own ops are missing, and its import ends
    at the first two that it mentions. They are defined here, for as long as the result is kept, and compute nothing.
    """
    if torch.version.cuda or not importlib.util.find_spec("torchvision") or "+" in metadata.version("torchvision"):
        return None
    ops = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return ops


class _Given(nn.Module):
    """A projection whose result is given."""

    given: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.given


def _merged(tokens: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H D)."""
    return tokens.transpose(1, 2).flatten(2)


def _split(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, H D) -> (B, H, N, D)."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)
