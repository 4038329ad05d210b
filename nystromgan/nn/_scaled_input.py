"""(W / sigma) x as W (x / sigma): in one step a layer's input is often far smaller than its weight.

    x' = x / sigma,  dx = dx' / sigma,  dW = dW' - <x', dx'> / sigma u v^T,  d sigma / d W = u v^T

Two functions, so that a gradient of the input alone, as a gradient penalty takes, does not find the weight's too.
"""

from typing import Any

import torch
from torch import Tensor

PLAIN = (
    torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d,
    torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d,
)  # fmt: skip


def scaled_input(x: Tensor, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x, W -> x / sigma, W: what a layer that is linear in both makes W x / sigma of.

    Args:
        x: the layer's input; of the weight's dtype.
        weight: W; its rows (O, I) are along `dim`.
        sigma: (), and u (O,) and v (I,) that gave it.

    Differentiable to any order, with u and v as constants.
    """
    weight, sigma = _WithSigma.apply(weight, sigma, u, v, dim)
    return _Divide.apply(x, sigma), weight


class _WithSigma(torch.autograd.Function):
    """W, and sigma as a function of it: both gradients meet in one addition to the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        ctx.dim, ctx.shape = dim, weight.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, v)
        return weight.view_as(weight), sigma.view_as(sigma)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor | None, grad_sigma: Tensor | None) -> tuple:
        if grad_sigma is not None:
            u, v = ctx.saved_tensors
            grad_weight = u.new_zeros(ctx.shape) if grad_weight is None else grad_weight
            grad_weight = _add_outer(grad_weight, u * grad_sigma, v, ctx.dim)
        return grad_weight, None, None, None, None


class _Divide(torch.autograd.Function):
    """x / sigma, which keeps the quotient: the layer does too, and x would be a second copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sigma: Tensor) -> Tensor:
        scaled = x / sigma
        ctx.save_for_backward(scaled, sigma)
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        scaled, sigma = ctx.saved_tensors
        along = -torch.dot(grad.flatten(), scaled.flatten()) / sigma if ctx.needs_input_grad[1] else None
        return grad / sigma if ctx.needs_input_grad[0] else None, along


def _add_outer(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """weight + u v^T, where u runs along `dim` and v along the others."""
    rest = [size for axis, size in enumerate(weight.shape) if axis != dim]
    if dim == 0:
        return torch.addr(weight.flatten(1), u, v).view(weight.shape)
    shape = [-1 if axis == dim else 1 for axis in range(weight.ndim)]
    return torch.addcmul(weight, u.view(shape), v.view(rest).unsqueeze(dim))
