"""What follows F W: gamma * (F W + a depthwise convolution of the values) + residual."""

from typing import NamedTuple

import torch
from torch import Tensor

from nystromgan.ops.nystrom_attention.convolution import depthwise_convolution


class Epilogue(NamedTuple):
    """The tensors that enter the output beside F W; what is None is left out."""

    conv_weight: Tensor | None = None  # (H, kernel_size)
    gamma: Tensor | None = None  # ()
    residual: Tensor | None = None  # (B, H, N, E)


def finished(attended: Tensor, value: Tensor, key_padding_mask: Tensor | None, epilogue: Epilogue) -> Tensor:
    """gamma * (attended + convolution) + residual, (B, H, N, E) in attended's dtype: the definition."""
    conv_weight, gamma, residual = epilogue
    if conv_weight is not None:
        attended = attended + _conv_residual(value, conv_weight, key_padding_mask)
    if gamma is None:
        return attended if residual is None else attended + residual
    gamma = gamma.to(attended.dtype)
    return gamma * attended if residual is None else torch.addcmul(residual, gamma, attended)


def _conv_residual(value: Tensor, weight: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Depthwise convolution along the tokens of value (B, H, S, E) with weight (H, kernel_size), zero outside."""
    if key_padding_mask is not None:
        value = value.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    return depthwise_convolution(value, weight.to(value.dtype))
