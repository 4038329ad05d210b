"""(W / sigma) x as W (x / sigma): in one step a layer's input is often far smaller than its weight."""

from typing import Any

import torch
from torch import Tensor

PLAIN = (
    torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d,
    torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d,
)  # fmt: skip


class ScaledInput(torch.autograd.Function):
    """x, W -> x / sigma, W: what a layer that is linear in both makes W x / sigma of.

        dx = dx' / sigma,  dW = dW' - <x', dx'> / sigma u v^T,   x' = x / sigma, d sigma / d W = u v^T

    Args:
        x: the layer's input; of the weight's dtype.
        weight: W; its rows (O, I) are along `dim`.
        sigma: (), and u (O,) and v (I,) that gave it.

    Differentiable to any order, with u and v as constants.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor, dim: int
    ) -> tuple[Tensor, Tensor]:
        ctx.dim, scaled = dim, x / sigma
        ctx.save_for_backward(scaled, weight, sigma, u, v)  # the layer keeps x' too; x would be a second copy
        return scaled, weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_scaled: Tensor, grad_weight: Tensor) -> tuple:
        scaled, weight, sigma, u, v = ctx.saved_tensors
        if torch.is_grad_enabled():  # so that a second derivative sees how sigma depends on the weight
            matrix = weight.movedim(ctx.dim, 0).flatten(1)
            sigma = torch.ops.nystromgan.singular_value([matrix], sigma[None], torch.cat([u, v]))[0]
        if ctx.needs_input_grad[1]:
            along = -torch.dot(grad_scaled.flatten(), scaled.flatten()) / sigma
            grad_weight = _add_outer(grad_weight, u * along, v, ctx.dim)
        return grad_scaled / sigma, grad_weight, None, None, None, None


def _add_outer(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """weight + u v^T, where u runs along `dim` and v along the others."""
    rest = [size for axis, size in enumerate(weight.shape) if axis != dim]
    if dim == 0:
        return torch.addr(weight.flatten(1), u, v).view(weight.shape)
    shape = [-1 if axis == dim else 1 for axis in range(weight.ndim)]
    return torch.addcmul(weight, u.view(shape), v.view(rest).unsqueeze(dim))
