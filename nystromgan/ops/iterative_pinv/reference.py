"""The iterative Moore-Penrose inverse in plain PyTorch: the definition that every backend is tested against."""

import torch
from torch import Tensor


def initial_scale(matrix: Tensor, global_init: bool) -> Tensor:
    """|A|_1 |A|_inf of (..., M, M): one value per matrix (..., 1, 1), or the batch's maxima multiplied; 1 for A = 0."""
    magnitude = matrix.abs()
    column = magnitude.sum(-2).max(-1).values  # (...)
    row = magnitude.sum(-1).max(-1).values  # (...)
    scale = column.max() * row.max() if global_init else (column * row)[..., None, None]
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def iterative_pinv(matrix: Tensor, iterations: int, global_init: bool) -> Tensor:
    """Z <- 1/4 Z (13 I - AZ (15 I - AZ (7 I - AZ))) from Z = A^T / (|A|_1 |A|_inf), in matrix's dtype."""
    if matrix.numel() == 0:
        return matrix.clone()
    inverse = matrix.mT / initial_scale(matrix, global_init)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return inverse
