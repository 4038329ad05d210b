"""Exact attention over all positions in plain PyTorch: the definition that every backend is tested against."""

import torch
from torch import Tensor


def spatiotemporal_attention(
    query: Tensor,  # (B, H, C, N)
    key: Tensor,  # (B, H, C, S)
    value: Tensor,  # (B, H, E, S)
    key_padding_mask: Tensor | None,  # (B, S), True = ignore
    gamma: Tensor | None,  # ()
    residual: Tensor | None,  # (B, H, E, N)
    scale: float,
) -> Tensor:
    """gamma softmax(scale Q^T K) V^T + residual, (B, H, E, N) in query's dtype; zeros where every key is masked."""
    dtype = query.dtype
    if dtype != torch.float64:
        query, key, value = query.float(), key.float(), value.float()
    if key_padding_mask is None:
        output = value @ (scale * key.mT @ query).softmax(-2)
    else:
        mask = key_padding_mask[:, None, :, None]  # (B, 1, S, 1)
        key, value = key.masked_fill(mask.mT, 0.0), value.masked_fill(mask.mT, 0.0)
        logits = (scale * key.mT @ query).masked_fill(mask, torch.finfo(query.dtype).min)
        output = value @ logits.softmax(-2).masked_fill(mask, 0.0)
    if gamma is not None:
        output = gamma.to(output.dtype) * output
    if residual is not None:
        output = output + residual
    return output.to(dtype)
