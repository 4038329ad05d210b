"""The torch.library ops under `nystrom_attention` and `cluster_landmarks`: schemas, fake kernels, derivatives."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nystromgan import _library
from nystromgan.ops.nystrom_attention import reference
from nystromgan.ops.nystrom_attention.epilogue import Epilogue, finished
from nystromgan.ops.nystrom_attention.landmarks import Layout, Plan, indexed, masked_landmarks

OP = "nystrom_attention"

TENSORS = "Tensor query, Tensor key, Tensor value"
PLAN = (
    "Tensor? query_landmarks, Tensor? key_landmarks, Tensor? query_index, Tensor? key_index, "
    "Tensor? key_padding_mask, Tensor? query_landmark_mask, Tensor? key_landmark_mask, Tensor? exact_rows"
)
CONV_AND_GAMMA = "Tensor? conv_weight, Tensor? gamma"  # of an epilogue; the backward needs no residual
LAYOUT = "SymInt[] query_grid, SymInt[] key_grid, SymInt[] landmark_grid"
# token_major: outputs, of the backward too, are laid out as (B, H, N, E), else as (B, H, E, N).
# keep_iterates: the cpu's forward gives its backward what it made of A; others make it again.
OPTIONS = (
    "SymInt num_landmarks, float scale, int pinv_iterations, bool global_init, bool token_major, bool keep_iterates"
)
# What the backward needs beside the inputs, float32: landmarks (B, H, M, D), G V and Z (G V) (B, H, M, E), the
# logarithm of G's row sums (B, H, M), and the iterates of the pseudo-inverse, `_iterates_shape`.
SAVED = "Tensor query_means, Tensor key_means, Tensor context, Tensor mixed, Tensor logsumexp, Tensor iterates"
NUM_SAVED = SAVED.count("Tensor")
FORWARD_RETURNS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
BACKWARD_RETURNS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

FUSED_EPILOGUE = ("cpu", "triton")  # the backends that take an epilogue and write channel-first maps too
MASKING = ("cpu", "triton")  # those that make an index of a padding mask
NUM_PLAN = len(Plan._fields)
MOST_AXES = 3  # of a grid whose blocks the backends work out
Outputs = tuple[Tensor, ...]


class Options(NamedTuple):
    """The arguments of a call that are not tensors."""

    query_grid: Sequence[int]
    key_grid: Sequence[int]
    landmark_grid: Sequence[int]
    num_landmarks: int
    scale: float
    pinv_iterations: int
    global_init: bool
    token_major: bool
    keep_iterates: bool
    backend: str

    @property
    def layout(self) -> Layout:
        return Layout(*self[:3])


def _run(name: str, arguments: Sequence[Any], tensors: int, epilogue: int) -> Outputs:
    """Calls `name` on its backend; they work out blocks of up to three axes, grids of more go by an index."""
    if len(arguments[tensors + NUM_PLAN + epilogue]) > MOST_AXES:
        first, plan, last, options = _split(arguments, tensors, epilogue)
        plan = indexed(plan, options.layout, first[0].device)
        arguments = (*first, *plan, *last, *options._replace(query_grid=[], key_grid=[], landmark_grid=[]))
    return _library.kernel(OP, name, arguments[-1])(*arguments[:-1])


def _split(arguments: Sequence[Any], tensors: int, epilogue: int) -> tuple[Sequence[Any], Plan, Sequence[Any], Options]:
    """An op's arguments by their kinds: so many tensors, the plan, so much of an epilogue, the options."""
    after_plan = tensors + NUM_PLAN
    after_epilogue = after_plan + epilogue
    return (
        arguments[:tensors],
        Plan(*arguments[tensors:after_plan]),
        arguments[after_plan:after_epilogue],
        Options(*arguments[after_epilogue:]),
    )


def _forward(*arguments: Any) -> Outputs:
    return _run(OP, arguments, 3, 3)


def _backward(*arguments: Any) -> Outputs:
    return _run(f"{OP}_backward", arguments, 4 + NUM_SAVED, 2)


def _laid_out(like: Tensor, shape: Sequence[int], token_major: bool) -> Tensor:
    *outer, tokens, dim = shape
    return like.new_empty(shape) if token_major else like.new_empty(*outer, dim, tokens).mT


def _fake_forward(*arguments: Any) -> Outputs:
    (query, _, value), _, _, options = _split(arguments, 3, 3)
    batch, heads, queries, head_dim = query.shape
    value_dim = value.shape[3]
    small = (batch, heads, options.num_landmarks)
    return (
        _laid_out(query, (batch, heads, queries, value_dim), options.token_major),
        *(query.new_empty(*small, dim, dtype=torch.float32) for dim in (head_dim, head_dim, value_dim, value_dim)),
        query.new_empty(small, dtype=torch.float32),
        query.new_empty(_iterates_shape(batch, heads, value_dim, options), dtype=torch.float32),
    )


def _iterates_shape(batch: int, heads: int, value_dim: int, options: Options) -> tuple[int, ...]:
    """Room for what the cpu's forward keeps; csrc/cpu/pinv_plan.h says the same."""
    if not options.keep_iterates or options.backend != "cpu":
        return (0,)
    count, steps = options.num_landmarks, options.pinv_iterations
    whole, powers, runs = steps, 0, 1
    if steps > 0 and 3 * value_dim < count:
        powers = 2 if steps >= 4 and count >= 96 and 8 * value_dim <= count else 0
        whole, runs = steps - 1 - powers, 4
    squares = 4 * whole + 1 + max(2 * powers - 1, 0)
    thin = runs * ((value_dim + 15) // 16 * 16)
    row = squares * ((count + 31) // 16 * 16) + powers * (3 * thin + 16) + 2 * (thin + 16)
    return batch, heads, count * row


def _fake_backward(*arguments: Any) -> Outputs:
    tensors, plan, (conv_weight, gamma), options = _split(arguments, 4 + NUM_SAVED, 2)
    query_means = tensors[4]

    def new(present: bool, shape: Sequence[int]) -> Tensor:
        return query_means.new_empty(shape if present else (0,))

    return (
        *(_laid_out(x, x.shape, options.token_major) for x in tensors[1:4]),
        new(_is_given(plan, "query"), query_means.shape),
        new(_is_given(plan, "key"), query_means.shape),
        new(conv_weight is not None, () if conv_weight is None else conv_weight.shape),
        new(gamma is not None, ()),
    )


FORWARD = f"{TENSORS}, {PLAN}, {CONV_AND_GAMMA}, Tensor? residual, {LAYOUT}, {OPTIONS}"
BACKWARD = f"Tensor grad_output, {TENSORS}, {SAVED}, {PLAN}, {CONV_AND_GAMMA}, {LAYOUT}, {OPTIONS}"

_library.define(f"nystrom_attention({FORWARD}, str backend) -> {FORWARD_RETURNS}", _forward, _fake_forward)
_library.define(f"nystrom_attention_backward({BACKWARD}, str backend) -> {BACKWARD_RETURNS}", _backward, _fake_backward)
_library.define_native(f"nystrom_attention_native({FORWARD}) -> {FORWARD_RETURNS}".replace("SymInt", "int"))
_library.define_native(f"nystrom_attention_backward_native({BACKWARD}) -> {BACKWARD_RETURNS}".replace("SymInt", "int"))


def _save_forward(ctx, inputs, output):
    tensors, plan, epilogue, ctx.options = _split(inputs, 3, 3)
    ctx.has_residual = epilogue[2] is not None
    ctx.save_for_backward(*tensors, *output[1:], *plan, *epilogue[:2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx, grad_output, *_):
    rest = (None,) * len(ctx.options)
    if grad_output is None:
        return (None,) * (3 + NUM_PLAN + 3) + rest
    saved = ctx.saved_tensors  # once: under torch.utils.checkpoint a second look raises
    (conv_weight, gamma), plan = saved[-2:], Plan(*saved[3 + NUM_SAVED : -2])
    grads = torch.ops.nystromgan.nystrom_attention_backward(grad_output, *saved, *ctx.options)
    differentiated = (
        plan.query_landmarks if _is_given(plan, "query") else None,
        plan.key_landmarks if _is_given(plan, "key") else None,
        conv_weight,
        gamma,
    )
    landmarks_and_epilogue = [
        None if x is None else grad.to(x.dtype) for x, grad in zip(differentiated, grads[3:], strict=True)
    ]
    return (
        *grads[:3],
        *landmarks_and_epilogue[:2],
        *(None,) * (NUM_PLAN - 2),
        *landmarks_and_epilogue[2:],
        grad_output if ctx.has_residual else None,
        *rest,
    )


def _is_given(plan: Plan, side: str) -> bool:
    """Whether that side's landmarks are the caller's own, so that gradients go to them and not to tokens."""
    return getattr(plan, f"{side}_landmarks") is not None and getattr(plan, f"{side}_index") is None


def _save_backward(ctx, inputs, output):
    tensors, plan, epilogue, ctx.options = _split(inputs, 4 + NUM_SAVED, 2)
    ctx.save_for_backward(*tensors[:4], *plan, *epilogue)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx, *grad_grads):
    grad_output, query, key, value, *fields, conv_weight, gamma = ctx.saved_tensors
    options = ctx.options
    plan = indexed(Plan(*fields), options.layout, query.device)
    given = [fields[i] if _is_given(plan, side) else None for i, side in enumerate(("query", "key"))]

    def definition(query, key, value, query_landmarks, key_landmarks, conv_weight, gamma):
        chosen = plan
        if query_landmarks is not None:
            chosen = chosen._replace(query_landmarks=query_landmarks)
        if key_landmarks is not None:
            chosen = chosen._replace(key_landmarks=key_landmarks)
        attended = reference.nystrom_attention(
            query, key, value, chosen, options.num_landmarks, options.scale, options.pinv_iterations,
            options.global_init,
        )  # fmt: skip
        return finished(attended, value, plan.key_padding_mask, Epilogue(conv_weight, gamma))

    inputs = [query, key, value, *given, conv_weight, gamma]
    second, firsts = _library.vjp_of_vjp(definition, inputs, grad_output, grad_grads)
    saved, masks = (None,) * NUM_SAVED, (None,) * (NUM_PLAN - 2)
    return (second, *firsts[:3], *saved, *firsts[3:5], *masks, *firsts[5:], *(None,) * len(options))


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


MASKED = "Tensor padding_mask, {int}[] grid, {int}[] counts"


def _masked(padding_mask, grid, counts, backend):
    return _library.kernel(OP, "masked_landmarks", backend)(padding_mask, grid, counts)


def _fake_masked(padding_mask, grid, counts, backend):
    batch, tokens = padding_mask.shape
    index = padding_mask.new_empty(batch, 1, tokens, dtype=torch.int32)
    return index, padding_mask.new_empty(batch, math.prod(counts)), padding_mask.new_empty(batch)


_library.define(
    f"masked_landmarks({MASKED.format(int='SymInt')}, str backend) -> (Tensor, Tensor, Tensor)", _masked, _fake_masked
)
_library.define_native(f"masked_landmarks_native({MASKED.format(int='int')}) -> (Tensor, Tensor, Tensor)")


def masked(
    padding_mask: Tensor | None, grid: Sequence[int], counts: Sequence[int], backend: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`masked_landmarks` on `backend`: by a kernel where it has one, in the place of a dozen of torch's operations."""
    if padding_mask is None or backend not in MASKING or len(grid) > MOST_AXES:
        return masked_landmarks(padding_mask, grid, counts)
    index, absent, exact_rows = torch.ops.nystromgan.masked_landmarks(padding_mask, grid, counts, backend)
    return index, absent, exact_rows if len(grid) == 1 else None
