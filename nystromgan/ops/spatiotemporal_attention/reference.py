"""Exact attention over all positions in plain PyTorch: the definition, and the second derivative of every backend."""

from typing import NamedTuple

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
        output = value @ _weights(scale * key.mT @ query, None)
    else:
        mask = key_padding_mask[:, None, :, None]  # (B, 1, S, 1)
        key, value = key.masked_fill(mask.mT, 0.0), value.masked_fill(mask.mT, 0.0)
        output = value @ _weights(scale * key.mT @ query, mask)
    if gamma is not None:
        output = gamma.to(output.dtype) * output
    if residual is not None:
        output = output + residual
    return output.to(dtype)


# Elements of a (B, H, S, n) matrix of the second derivative, of which about ten are held at once: on a CPU they stay in
# cache. n is LEAST_QUERIES at least, since products of few columns are slow: over 8 x 16384 keys, 4 took twice as long.
MOST_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}
LEAST_QUERIES = 64


class Cotangents(NamedTuple):
    """What the gradients of query, key, value and gamma are each multiplied with; None for zeros."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    gamma: Tensor | None


def second_derivative(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
    gamma: Tensor | None, scale: float, cotangents: Cotangents,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of L = sum(gradient * cotangent) for grad_output G (B, H, E, N), query, key, value and gamma.

    The other arguments are those of `spatiotemporal_attention`, of which this differentiates the backward; results have
    their shapes and dtypes, sums are float32 at least. Differentiable to any order. With weights P (S, N), R = V^T G,
    the cotangents A, B, C, c of the four gradients, T = scale (K^T A + B^T Q), and < > for the sum of a column:

        dlogits = gamma P (R - <P R>)                 L = sum(dlogits T + gamma P (C^T G) + c P R)
        U = P (T - <P T>)                             dL / dR = gamma U + c P
        W = gamma (U R - <P R> P T + P (C^T G)) + c P R
        dL / dlogits = W - P <W>

    Takes blocks of the queries, so that no N x S matrix is held.
    """
    dtypes = [x.dtype for x in (grad_output, query, key, value)]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grad_output, query, key, value = (x.to(wide) for x in (grad_output, query, key, value))
    of_query, of_key, of_value = (
        torch.zeros_like(x) if cotangent is None else cotangent.to(wide)
        for x, cotangent in zip((query, key, value), cotangents[:3], strict=True)
    )
    of_gamma = None if cotangents.gamma is None else cotangents.gamma.to(wide)
    mask = None
    if key_padding_mask is not None:
        mask = key_padding_mask[:, None, :, None]  # (B, 1, S, 1)
        key, value, of_key, of_value = (x.masked_fill(mask.mT, 0.0) for x in (key, value, of_key, of_value))
    both = torch.cat([key, of_key], 2)  # (B, H, 2 C, S)

    def times_gamma(x: Tensor) -> Tensor:
        return x if gamma is None else gamma.to(wide) * x

    def plus(x: Tensor, y: Tensor) -> Tensor:  # x + c y
        return x if of_gamma is None else x + of_gamma * y

    batch, heads, _, tokens = query.shape
    size = max(LEAST_QUERIES, MOST_ELEMENTS["cpu" if query.is_cpu else "cuda"] // (batch * heads * key.shape[3]))
    grad_grads, grad_queries = [], []
    grad_key, grad_value, grad_gamma = torch.zeros_like(key), torch.zeros_like(value), query.new_zeros(())
    for start in range(0, tokens, size):
        q, a, g = (x[..., start : start + size] for x in (query, of_query, grad_output))  # (B, H, C or E, n)
        p = _weights(scale * (key.mT @ q), mask)  # (B, H, S, n), as all that follow
        r, c_g = value.mT @ g, of_value.mT @ g
        p_r, p_t = p * r, p * (scale * (both.mT @ torch.cat([a, q], 2)))
        mean = p_r.sum(-2, keepdim=True)
        u = p_t - p * p_t.sum(-2, keepdim=True)
        w = plus(times_gamma(u * r - mean * p_t + p * c_g), p_r)
        grad_logits = scale * (w - p * w.sum(-2, keepdim=True))
        scores = times_gamma(scale * (p_r - p * mean))
        of_r = plus(times_gamma(u), p)
        grad_grads.append(value @ of_r + times_gamma(of_value @ p))
        grad_queries.append(key @ grad_logits + of_key @ scores)
        grad_key = grad_key + q @ grad_logits.mT + a @ scores.mT
        grad_value = grad_value + g @ of_r.mT
        if gamma is not None:
            grad_gamma = grad_gamma + (u * r + p * c_g).sum()
    grads = torch.cat(grad_grads, -1), torch.cat(grad_queries, -1), grad_key, grad_value
    grad_output, query, key, value = (x.to(dtype) for x, dtype in zip(grads, dtypes, strict=True))
    return grad_output, query, key, value, None if gamma is None else grad_gamma.to(gamma.dtype)


def _weights(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the keys, (B, H, S, n); zeros where masked."""
    if mask is None:
        return logits.softmax(-2)
    return logits.masked_fill(mask, torch.finfo(logits.dtype).min).softmax(-2).masked_fill(mask, 0.0)
