"""The torch.library ops under `nystrom_attention` and `cluster_landmarks`: schemas, fake kernels, derivatives."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nystromgan import _library
from nystromgan.ops.nystrom_attention import reference
from nystromgan.ops.nystrom_attention.landmarks import Layout, Plan, indexed

OP = "nystrom_attention"

TENSORS = "Tensor query, Tensor key, Tensor value"
PLAN = (
    "Tensor? query_landmarks, Tensor? key_landmarks, Tensor? query_index, Tensor? key_index, "
    "Tensor? key_padding_mask, Tensor? query_landmark_mask, Tensor? key_landmark_mask, Tensor? exact_rows"
)
LAYOUT = "SymInt[] query_grid, SymInt[] key_grid, SymInt[] landmark_grid"
OPTIONS = "SymInt num_landmarks, float scale, int pinv_iterations, bool global_init"
# What the backward needs beside the inputs, float32: landmarks (B, H, M, D), G V and Z (G V) (B, H, M, E), and the
# logarithm of G's row sums (B, H, M).
SAVED = "Tensor query_means, Tensor key_means, Tensor context, Tensor mixed, Tensor logsumexp"
FORWARD_RETURNS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
BACKWARD_RETURNS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"

NUM_PLAN = len(Plan._fields)
MOST_AXES = 3  # of a grid whose blocks the backends work out
Outputs = tuple[Tensor, ...]
Grids = Sequence[list[int]]


def _run(
    backend: str, name: str, tensors: Sequence[Tensor], plan: Plan, grids: Grids, options: Sequence[Any]
) -> Outputs:
    """Calls `name` on `backend`; they work out blocks of up to three axes, grids of more go by an index."""
    if len(grids[0]) > MOST_AXES:
        plan, grids = indexed(plan, Layout(*grids), tensors[0].device), ([], [], [])
    return _library.kernel(OP, name, backend)(*tensors, *plan, *grids, *options)


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Outputs:
    *options, backend = rest
    plan, grids, options = Plan(*options[:NUM_PLAN]), options[NUM_PLAN : NUM_PLAN + 3], options[NUM_PLAN + 3 :]
    return _run(backend, OP, (query, key, value), plan, grids, options)


def _backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Outputs:
    *options, backend = rest
    saved, options = options[:5], options[5:]
    plan, grids, options = Plan(*options[:NUM_PLAN]), options[NUM_PLAN : NUM_PLAN + 3], options[NUM_PLAN + 3 :]
    return _run(backend, f"{OP}_backward", (grad_output, query, key, value, *saved), plan, grids, options)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Outputs:
    num_landmarks = rest[NUM_PLAN + 3]
    batch, heads, queries, head_dim = query.shape
    value_dim = value.shape[3]
    small = (batch, heads, num_landmarks)
    return (
        query.new_empty(batch, heads, queries, value_dim),
        *(query.new_empty(*small, dim, dtype=torch.float32) for dim in (head_dim, head_dim, value_dim, value_dim)),
        query.new_empty(small, dtype=torch.float32),
    )


def _fake_backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Outputs:
    query_means, plan = rest[0], Plan(*rest[5 : 5 + NUM_PLAN])

    def landmark_grad(landmarks: Tensor | None, index: Tensor | None) -> Tensor:
        given = landmarks is not None and index is None
        return query_means.new_empty(query_means.shape if given else (0,))

    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        landmark_grad(plan.query_landmarks, plan.query_index),
        landmark_grad(plan.key_landmarks, plan.key_index),
    )


_library.define(
    f"nystrom_attention({TENSORS}, {PLAN}, {LAYOUT}, {OPTIONS}, str backend) -> {FORWARD_RETURNS}",
    _forward,
    _fake_forward,
)
_library.define(
    f"nystrom_attention_backward(Tensor grad_output, {TENSORS}, {SAVED}, {PLAN}, {LAYOUT}, {OPTIONS}, str backend)"
    f" -> {BACKWARD_RETURNS}",
    _backward,
    _fake_backward,
)
NATIVE = f"{PLAN}, {LAYOUT}, {OPTIONS}".replace("SymInt", "int")
_library.define_native(f"nystrom_attention_native({TENSORS}, {NATIVE}) -> {FORWARD_RETURNS}")
_library.define_native(
    f"nystrom_attention_backward_native(Tensor grad_output, {TENSORS}, {SAVED}, {NATIVE}) -> {BACKWARD_RETURNS}"
)


def _save_forward(ctx, inputs, output):
    tensors, ctx.options = inputs[: 3 + NUM_PLAN], inputs[3 + NUM_PLAN :]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx, grad_output, *_):
    rest = (None,) * (NUM_PLAN - 2 + len(ctx.options))
    if grad_output is None:
        return (None,) * 5 + rest
    query, key, value, *others = ctx.saved_tensors
    plan, saved = Plan(*others[:NUM_PLAN]), others[NUM_PLAN:]
    grads = torch.ops.nystromgan.nystrom_attention_backward(grad_output, query, key, value, *saved, *plan, *ctx.options)
    return (*_returned(plan, grads), *rest)


def _returned(plan: Plan, grads: Outputs) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value and the two landmark tensors, None for what is not differentiated."""

    def of_landmarks(grad: Tensor, landmarks: Tensor | None, index: Tensor | None) -> Tensor | None:
        return grad.to(landmarks.dtype) if landmarks is not None and index is None else None

    return (
        *grads[:3],
        of_landmarks(grads[3], plan.query_landmarks, plan.query_index),
        of_landmarks(grads[4], plan.key_landmarks, plan.key_index),
    )


def _is_given(plan: Plan, side: str) -> bool:
    """Whether that side's landmarks are the caller's own, so that gradients go to them and not to tokens."""
    return getattr(plan, f"{side}_landmarks") is not None and getattr(plan, f"{side}_index") is None


def _save_backward(ctx, inputs, output):
    grad_output, query, key, value = inputs[:4]
    plan, ctx.options = inputs[9 : 9 + NUM_PLAN], inputs[9 + NUM_PLAN :]
    ctx.save_for_backward(grad_output, query, key, value, *plan)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx, *grad_grads):
    grad_output, query, key, value, *fields = ctx.saved_tensors
    query_grid, key_grid, landmark_grid, count, scale, iterations, global_init, _ = ctx.options
    plan = indexed(Plan(*fields), Layout(query_grid, key_grid, landmark_grid), query.device)
    given = [_is_given(plan, "query"), _is_given(plan, "key")]

    def definition(query, key, value, query_landmarks, key_landmarks):
        chosen = plan
        if given[0]:
            chosen = chosen._replace(query_landmarks=query_landmarks)
        if given[1]:
            chosen = chosen._replace(key_landmarks=key_landmarks)
        return reference.nystrom_attention(query, key, value, chosen, count, scale, iterations, global_init)

    inputs = [query, key, value, *(fields[i] if given[i] else None for i in range(2))]
    second, firsts = _library.vjp_of_vjp(definition, inputs, grad_output, grad_grads)
    rest = (None,) * (NUM_PLAN - 2 + len(ctx.options))
    return (second, *firsts[:3], *(None,) * 5, *firsts[3:], *rest)


_library.register_autograd(OP, _save_forward, _differentiate_forward)
_library.register_autograd(f"{OP}_backward", _save_backward, _differentiate_backward)


CLUSTER = "Tensor tokens, Tensor index, Tensor? landmark_mask, Tensor? frozen_rows, {int} num_landmarks, int iterations"


def _cluster(tokens, index, landmark_mask, frozen_rows, num_landmarks, iterations, backend):
    run = _library.kernel(OP, "cluster_landmarks", backend)
    return run(tokens, index, landmark_mask, frozen_rows, num_landmarks, iterations)


def _fake_cluster(tokens, index, landmark_mask, frozen_rows, num_landmarks, iterations, backend):
    batch, heads, count, dim = tokens.shape
    landmarks = tokens.new_empty(batch, heads, num_landmarks, dim, dtype=torch.float32)
    return landmarks, tokens.new_empty(batch, heads, count, dtype=torch.int32)


_library.define(
    f"cluster_landmarks({CLUSTER.format(int='SymInt')}, str backend) -> (Tensor, Tensor)", _cluster, _fake_cluster
)
_library.define_native(f"cluster_landmarks_native({CLUSTER.format(int='int')}) -> (Tensor, Tensor)")


def cluster(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """`reference.cluster_landmarks` on `backend`."""
    return lambda *arguments: torch.ops.nystromgan.cluster_landmarks(*arguments, backend)
