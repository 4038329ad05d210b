"""Modules as functions of their input and parameters, and the attention modules that people have."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Form = Callable[..., Tensor]


def bound(module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)) -> Form:
    """A function of x and of every parameter by name; they are put in place when they are others than last time."""
    last: list[Tensor] = []

    def form(x: Tensor, **parameters: Tensor) -> Tensor:
        given = list(parameters.values())
        if len(last) != len(given) or any(one is not other for one, other in zip(last, given, strict=True)):
            module.to(device=x.device, dtype=x.dtype)  # buffers
            for name, parameter in parameters.items():
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._parameters[leaf] = parameter
            last[:] = given
        return call(module, x)

    return form


class EagerSelfAttention(nn.Module):
    """The block of SAGAN and SAVGAN as they write it, or on tokens: y = gamma * attention(x) + x; convolutions 1 x 1.

    Parameters are named as SelfAttention2d's and 3d's; `attend` takes maps query, key and value.
    """

    def __init__(self, channels: int, axes: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        convolution = nn.Conv2d if axes == 2 else nn.Conv3d
        self.query = convolution(channels, channels // 8, 1)
        self.key = convolution(channels, channels // 8, 1)
        self.value = convolution(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.attend(self.query(x), self.key(x), self.value(x)) + x


def on_maps(form: Form) -> Form:
    """A form of tokens (B, 1, N, C) as one of maps (B, C, *grid)."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = (x.flatten(2).mT.unsqueeze(1) for x in (query, key, value))
        return form(*tokens).squeeze(1).mT.unflatten(2, query.shape[2:])

    return attend


class EagerNystromAttention(nn.Module):
    """Multi-head attention with a form of tokens between its projections; parameters named as MultiheadAttention's."""

    def __init__(self, embed_dim: int, num_heads: int, form: Form) -> None:
        super().__init__()
        self.num_heads, self.form = num_heads, form
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        joined = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3 H D)
        tokens = joined.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        return self.out_proj(self.form(*tokens.unbind(0)).transpose(1, 2).flatten(2))
