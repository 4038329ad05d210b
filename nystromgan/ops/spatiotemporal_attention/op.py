"""`spatiotemporal_attention`: the public function, its torch.library ops and their derivatives."""

import torch
from torch import Tensor

from nystromgan import _backend, _check, _library
from nystromgan.ops.spatiotemporal_attention import reference

OP = "spatiotemporal_attention"
CUDA_CHANNELS = 256  # of a head: the most whose tiles the cuda kernels hold in shared memory


def spatiotemporal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Exact softmax attention over every position of images, videos or sequences, straight from channel-first maps.

        output[:, n] = gamma * sum_s softmax_s(scale * query[:, n] . key[:, s]) value[:, s] + residual[:, n]

    Args:
        query: (B, C, *grid), any floating-point dtype, any strides; grids of 1 to 3 axes.
        key: (B, C, *key_grid), on the same or another grid (pooled keys, cross-attention).
        value: (B, E, *key_grid).
        num_heads: divides C and E; heads are consecutive channels.
        scale: (C / num_heads) ** -0.5 unless given.
        gamma: scalar tensor multiplied in; 1 without it.
        residual: (B, E, *grid) added; nothing without it.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (B, E, *grid) in query's dtype. Sums are float32 at least; nothing of N x S is stored.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        UnsupportedError: a named backend cannot run this input.

    Differentiable to any order: the first by the backend's backward, the second in blocks of queries, both without an
    N x S matrix; higher ones store it. Under autocast, inputs are cast to its dtype.
    Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2019, eq. 1 to 3.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check.tensor(name, tensor)
    query, key, value = _library.autocast_inputs(query, key, value)
    _check_inputs(query, key, value, num_heads)
    scale = (query.shape[1] // num_heads) ** -0.5 if scale is None else _check.finite("scale", scale)
    batch, value_channels, grid = value.shape[0], value.shape[1], query.shape[2:]
    check_epilogue(query, (batch, value_channels, *grid), gamma, residual)
    residual = None if residual is None else residual.to(query.dtype)
    widest = max(query.shape[1], value.shape[1]) // num_heads
    chosen = _backend.choose(OP, backend, (query, key, value), lambda name: _op_reasons(name, widest))
    with _library.without_autocast(query.device.type):
        output = _attend(
            _split_heads(query, num_heads),
            _split_heads(key, num_heads),
            _split_heads(value, num_heads),
            None,
            gamma,
            None if residual is None else _split_heads(residual, num_heads),
            scale,
            False,
            chosen,
        )
    return output.reshape(batch, value_channels, *grid)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    backend: str,
    token_major: bool = True,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Exact attention of tokens: query (B, H, N, D), key (B, H, S, D), value (B, H, S, E) -> (B, H, N, E)."""
    maps = (query.mT, key.mT, value.mT, key_padding_mask, gamma, None if residual is None else residual.mT)
    return _attend(*maps, scale, token_major, backend).mT


def _op_reasons(backend: str, widest: int) -> list[str]:
    """Why a backend cannot take heads of so many channels."""
    wide = backend == "cuda" and widest > CUDA_CHANNELS
    return [f"takes up to {CUDA_CHANNELS} channels a head, got {widest}"] if wide else []


def _split_heads(maps: Tensor, num_heads: int) -> Tensor:
    """(B, H C, *grid) -> (B, H, C, N), a view wherever the strides allow."""
    return maps.flatten(2).unflatten(1, (num_heads, -1))


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> None:
    if not 3 <= query.ndim <= 5:
        raise ValueError(f"query must be (B, C, *grid) with a grid of 1 to 3 axes, got shape {tuple(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        _check.tensor(name, tensor, query.ndim)
        _check.same(name, tensor, "query", query, "device", "dtype")
        _check.size(name, tensor, 0, query.shape[0], "query's batch")
    _check.size("key", key, 1, query.shape[1], "query's channels")
    for axis in range(2, query.ndim):
        _check.size("value", value, axis, key.shape[axis], "key's grid")
    _check.at_least("num_heads", num_heads, 1)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        for axis in range(1, tensor.ndim):
            _check.at_least(f"{name}'s axis {axis}", tensor.shape[axis], 1)
        if tensor.shape[1] % num_heads:
            raise ValueError(f"num_heads must divide {name}'s {tensor.shape[1]} channels, got {num_heads}")


def check_epilogue(query: Tensor, shape: tuple[int, ...], gamma: Tensor | None, residual: Tensor | None) -> None:
    """gamma and residual fit an output of `shape`."""
    if gamma is not None:
        _check.tensor("gamma", gamma)
        _check.same("gamma", gamma, "query", query, "device")
        if gamma.numel() != 1:
            raise ValueError(f"gamma must have one element, got shape {tuple(gamma.shape)}")
    if residual is not None:
        _check.tensor("residual", residual)
        _check.same("residual", residual, "query", query, "device")
        if tuple(residual.shape) != shape:
            raise ValueError(f"residual must have the output's shape {shape}, got {tuple(residual.shape)}")


def _attend(query, key, value, key_padding_mask, gamma, residual, scale, token_major, backend):
    gamma = None if gamma is None else gamma.reshape(())
    if backend == "reference":
        return reference.spatiotemporal_attention(query, key, value, key_padding_mask, gamma, residual, scale)
    if gamma is None and residual is not None:  # the op saves its result for the backward only beside a gamma
        return residual + _attend(query, key, value, key_padding_mask, None, None, scale, token_major, backend)
    inputs = (query, key, value, gamma, residual)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return torch.ops.nystromgan.spatiotemporal_attention(
        query, key, value, key_padding_mask, gamma, residual, scale, token_major, save, backend
    )[0]


# The op: query (B, H, C, N), key (B, H, C, S), value (B, H, E, S) of any strides -> output (B, H, E, N), laid out as
# (B, H, N, E) where token_major; with save also the result before gamma and residual (empty when it is the output
# itself) and the log-sum-exp (B, H, N) float32, which are what the backward needs.
SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, Tensor? gamma, Tensor? residual, float scale, "
    "bool token_major, bool save"
)
BACKWARD_SCHEMA = (
    "Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, Tensor? gamma, "
    "Tensor attended, Tensor logsumexp, float scale, bool token_major"
)


def _forward(*arguments):
    *inputs, backend = arguments
    return _library.kernel(OP, OP, backend)(*inputs)


def _backward(*arguments):
    *inputs, backend = arguments
    return _library.kernel(OP, f"{OP}_backward", backend)(*inputs)


def _laid_out(like: Tensor, shape: tuple[int, ...], token_major: bool) -> Tensor:
    *outer, channels, tokens = shape
    return like.new_empty(*outer, tokens, channels).mT if token_major else like.new_empty(shape)


def _fake_forward(query, key, value, key_padding_mask, gamma, residual, scale, token_major, save, backend):
    batch, heads, _, tokens = query.shape
    shape = (batch, heads, value.shape[2], tokens)
    attended_shape = shape if save and gamma is not None else None
    attended = query.new_empty(0) if attended_shape is None else _laid_out(query, attended_shape, token_major)
    logsumexp = query.new_empty((batch, heads, tokens) if save else (0,), dtype=torch.float32)
    return _laid_out(query, shape, token_major), attended, logsumexp


def _fake_backward(grad_output, query, key, value, mask, gamma, attended, logsumexp, scale, token_major, backend):
    grads = tuple(_laid_out(x, x.shape, token_major) for x in (query, key, value))
    return *grads, query.new_empty((), dtype=torch.float32)


_library.define(f"{OP}({SCHEMA}, str backend) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward)
_library.define(
    f"{OP}_backward({BACKWARD_SCHEMA}, str backend) -> (Tensor, Tensor, Tensor, Tensor)", _backward, _fake_backward
)
_library.define_native(f"{OP}_native({SCHEMA}) -> (Tensor, Tensor, Tensor)")
_library.define_native(f"{OP}_backward_native({BACKWARD_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)")


def _save_forward(ctx, inputs, output):  # torch calls it by these names
    query, key, value, mask, gamma, residual, ctx.scale, ctx.token_major, _, ctx.backend = inputs
    result, attended, logsumexp = output
    attended = result if gamma is None else attended
    ctx.has_residual = residual is not None
    ctx.save_for_backward(query, key, value, mask, gamma, attended, logsumexp)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * 10
    *tensors, attended, logsumexp = ctx.saved_tensors
    grads = torch.ops.nystromgan.spatiotemporal_attention_backward(
        grad_output, *tensors, attended, logsumexp, ctx.scale, ctx.token_major, ctx.backend
    )
    gamma = tensors[4]
    grad_gamma = None if gamma is None else grads[3].to(gamma.dtype)
    grad_residual = grad_output if ctx.has_residual else None
    return *grads[:3], None, grad_gamma, grad_residual, None, None, None, None


def _save_backward(ctx, inputs, output):
    grad_output, query, key, value, mask, gamma, _, _, ctx.scale, _, _ = inputs
    ctx.save_for_backward(grad_output, query, key, value, mask, gamma)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx, *grad_grads):
    if all(grad is None for grad in grad_grads):
        return (None,) * 11
    grad_output, query, key, value, mask, gamma = ctx.saved_tensors
    of_query, of_key, of_value, of_gamma = grad_grads
    cotangents = reference.Cotangents(of_query, of_key, of_value, None if gamma is None else of_gamma)
    with _library.without_autocast(query.device.type):
        *grads, grad_gamma = reference.second_derivative(
            grad_output, query, key, value, mask, gamma, ctx.scale, cotangents
        )
    return *grads, None, grad_gamma, None, None, None, None, None


_library.register_autograd(OP, _save_forward, _differentiate_forward)
_library.register_autograd(f"{OP}_backward", _save_backward, _differentiate_backward)
