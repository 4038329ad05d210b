"""Power iteration in plain PyTorch: the definition that every backend is tested against."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 where any tensor has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def singular_vectors(weight: Tensor, u: Tensor, v: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """u <- W v / max(|W v|, eps), v <- W^T u / max(|W^T u|, eps), `iterations` times; returns new (O,) and (I,)."""
    for _ in range(iterations):
        u = F.normalize(weight @ v, dim=0, eps=eps)
        v = F.normalize(weight.mT @ u, dim=0, eps=eps)
    return u.clone(), v.clone()


def power_iteration(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], iterations: int, eps: float
) -> Tensor:
    """sigma_i = u_i^T W_i v_i (len,) after the iterations; u_i and v_i, updated in place, count as constants."""
    dtype = compute_dtype([*weights, *u, *v])
    sigmas = []
    for weight, left, right in zip(weights, u, v, strict=True):
        matrix = weight.to(dtype)
        with torch.no_grad():
            new_left, new_right = singular_vectors(matrix, left.to(dtype), right.to(dtype), iterations, eps)
            if iterations:
                left.copy_(new_left)
                right.copy_(new_right)
        sigmas.append(new_left @ (matrix @ new_right))
    return torch.stack(sigmas)
