"""Penalties on a discriminator's gradients; they differentiate the discriminator twice."""

from collections.abc import Callable

import torch
from torch import Tensor


def interpolated(real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    """e real + (1 - e) fake with e uniform in [0, 1), one for each of the B samples."""
    shape = (len(real), *(1,) * (real.ndim - 1))
    share = torch.rand(shape, generator=generator, device=generator.device).to(real)
    return torch.lerp(fake, real, share)


def gradient_norms(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """|d score(x)_b / d x_b|_2, (B,), differentiable in score's parameters; score maps (B, ...) to (B,).

    In float32, of a float64 x in float64. Computed without autocast: squares of gradients leave float16's range.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        (gradient,) = torch.autograd.grad(score(x).sum(), x, create_graph=True)
        return gradient.flatten(1).norm(dim=1)


def gradient_penalty(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """mean_b (|d score(x)_b / d x_b|_2 - 1)^2, Gulrajani et al., "Improved training of Wasserstein GANs", eq. 3."""
    return (gradient_norms(score, x) - 1).square().mean()


def r1_penalty(score: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """mean_b |d score(real)_b / d real_b|_2^2, Mescheder et al., "Which training methods for GANs ...", 2018, eq. 9."""
    return gradient_norms(score, real).square().mean()
