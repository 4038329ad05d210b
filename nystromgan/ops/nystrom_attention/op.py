"""`nystrom_attention`: the public function. It checks, plans the landmarks, chooses a backend and calls the op."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nystromgan import _backend, _check, _library
from nystromgan.ops.iterative_pinv import PINV_INITS
from nystromgan.ops.nystrom_attention import library, reference
from nystromgan.ops.nystrom_attention.epilogue import Epilogue, finished
from nystromgan.ops.nystrom_attention.landmarks import (
    Layout,
    Plan,
    indexed,
    landmark_grid,
)
from nystromgan.ops.spatiotemporal_attention.op import attention, check_epilogue

OP = "nystrom_attention"

# The largest sizes whose tiles the kernels of triton and cuda hold.
GPU_HEAD_DIM = 256
GPU_LANDMARKS = 512


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_landmarks: int | Sequence[int] = 64,
    grid: Sequence[int] | Sequence[Sequence[int]] | None = None,
    query_landmarks: Tensor | None = None,
    key_landmarks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    conv_weight: Tensor | None = None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float | None = None,
    cluster_iterations: int = 0,
    pinv_iterations: int = 6,
    pinv_init: str = "per_matrix",
    backend: str = "auto",
) -> Tensor:
    """Softmax attention through landmarks, in time and memory linear in the number of tokens.

        F = softmax(s Q K~^T)    A = softmax(s Q~ K~^T)    G = softmax(s Q~ K^T)
        output = gamma * (F Z (G V) + convolution) + residual

    where Q~ and K~ are M landmark queries and keys, and Z is `pinv_iterations` steps of `iterative_pinv` on A.
    With at least as many landmarks as queries or keys, and none given, the result is exact attention.

    Args:
        query: (B, H, N, D), any floating-point dtype, any strides.
        key: (B, H, S, D), as query.
        value: (B, H, S, E), as query.
        num_landmarks: M, or one count per axis of `grid`. With an int and a grid, counts per axis are chosen to keep
            blocks near cubic; their product may then fall short of M by up to an eighth.
        grid: the tokens' shape, for example (T, H, W), row-major: landmarks are block means in space-time. Without it
            they are means of equal segments of the sequence. For other keys, a pair (query_grid, key_grid).
        query_landmarks: (B, H, M, D) given by the caller, with key_landmarks; differentiable; then nothing is pooled.
        key_landmarks: (B, H, M, D).
        key_padding_mask: (B, S) bool, True = ignore. Segments are laid over the valid tokens, so a padded row gives the
            answer of the same row alone. A row with no valid key gives zeros.
        query_padding_mask: (B, N) bool, True = not in any landmark. Where it is not given and N = S, queries and keys
            are taken for the same tokens and it is key_padding_mask.
        conv_weight: (H, kernel_size), kernel_size odd: adds a depthwise convolution of value along the tokens.
        gamma: scalar tensor multiplied in; 1 without it.
        residual: (B, H, N, E) added; nothing without it.
        scale: s, D ** -0.5 unless given.
        cluster_iterations: Lloyd steps that move the landmarks from those means towards their tokens; 2 is the advice.
            Gradients flow through the last means with the assignment fixed.
        pinv_iterations: steps of the pseudo-inverse.
        pinv_init: "per_matrix", or "global_max" to match checkpoints of libraries that scale by the batch's maximum.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (B, H, N, E) in query's dtype; like value's, its strides may be those of channel-first maps.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        UnsupportedError: a named backend cannot run this input.

    Differentiable to any order: the first by the backend's backward, higher ones through the definition, which stores
    N x M factors. Under autocast, inputs are cast to its dtype; A, Z and G V are float32 at least.
    Source: Xiong et al., "Nyströmformer", 2021, eq. 13; clustering after Zhang, Tsang and Kwok, 2008.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check.tensor(name, tensor, 4)
    query, key, value = _library.autocast_inputs(query, key, value)
    _check_inputs(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else _check.finite("scale", scale)
    _check.at_least("cluster_iterations", cluster_iterations, 0)
    _check.at_least("pinv_iterations", pinv_iterations, 0)
    _check.one_of("pinv_init", pinv_init, PINV_INITS)
    _check_masks(query, key, key_padding_mask, query_padding_mask)
    if conv_weight is not None:
        _check_conv(query, key, conv_weight)
    check_epilogue(query, (*query.shape[:3], value.shape[3]), gamma, residual)
    if query_padding_mask is None and query.shape[2] == key.shape[2]:
        query_padding_mask = key_padding_mask

    chosen = _backend.choose(
        OP,
        backend,
        (query, key, value),
        lambda name: _op_reasons(name, query, value, query_landmarks, num_landmarks),
    )
    with _library.without_autocast(query.device.type):
        epilogue = Epilogue(
            conv_weight,
            None if gamma is None else gamma.reshape(()),
            None if residual is None else residual.to(query.dtype),
        )
        if query_landmarks is not None or key_landmarks is not None:
            for name, option in (("grid", grid), ("cluster_iterations", cluster_iterations or None)):
                if option is not None:
                    raise ValueError(f"{name} must not be given with landmarks, got {option}")
            _check_landmarks(query, query_landmarks, key_landmarks)
            plan, layout = Plan(query_landmarks, key_landmarks, key_padding_mask=key_padding_mask), None
        else:
            layout = _layout(query.shape[2], key.shape[2], num_landmarks, grid)
            plan = _pooled_plan(query_padding_mask, key_padding_mask, layout, chosen)
        if layout is not None and math.prod(layout.landmark_grid) >= min(query.shape[2], key.shape[2]):
            return _attend_exactly(query, key, value, key_padding_mask, epilogue, scale, chosen)
        if cluster_iterations:
            assert layout is not None
            plan, layout = _clustered_plan(query, key, plan, layout, cluster_iterations, chosen), None
        return _attend(query, key, value, plan, layout, epilogue, scale, pinv_iterations, pinv_init, chosen)


def _op_reasons(
    backend: str, query: Tensor, value: Tensor, query_landmarks: Tensor | None, num_landmarks: int | Sequence[int]
) -> list[str]:
    """Why a backend cannot take these sizes."""
    if backend not in ("cuda", "triton"):
        return []
    widest = max(query.shape[3], value.shape[3])
    reasons = [f"takes head dims up to {GPU_HEAD_DIM}, got {widest}"] if widest > GPU_HEAD_DIM else []
    if query_landmarks is not None:
        count = query_landmarks.shape[-2]
    else:
        count = math.prod(num_landmarks) if isinstance(num_landmarks, Sequence) else num_landmarks
        if count >= min(query.shape[2], value.shape[2]):
            return reasons  # exact attention, whose own kernels run
    return reasons + ([f"takes up to {GPU_LANDMARKS} landmarks, got {count}"] if count > GPU_LANDMARKS else [])


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    alike = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    (batch, heads, queries, head_dim), (*_, keys, _), value_dim = query.shape, key.shape, value.shape[3]
    fit = key.shape == (batch, heads, keys, head_dim) and value.shape == (batch, heads, keys, value_dim)
    if alike and fit and queries > 0 and keys > 0 and head_dim > 0 and value_dim > 0:
        return  # all that the rest makes sure of, in a quarter of its 10 us
    for name, tensor in (("key", key), ("value", value)):
        _check.same(name, tensor, "query", query, "device", "dtype")
        _check.size(name, tensor, 0, query.shape[0], "query's batch")
        _check.size(name, tensor, 1, query.shape[1], "query's heads")
    _check.size("key", key, 3, query.shape[3], "query's head dim D")
    _check.size("value", value, 2, key.shape[2], "key's tokens S")
    _check.at_least("query's tokens N", query.shape[2], 1)
    _check.at_least("key's tokens S", key.shape[2], 1)
    _check.at_least("query's head dim D", query.shape[3], 1)
    _check.at_least("value's head dim E", value.shape[3], 1)


def _check_masks(query: Tensor, key: Tensor, key_mask: Tensor | None, query_mask: Tensor | None) -> None:
    if key_mask is not None:
        _check.padding_mask("key_padding_mask", key_mask, key.shape[0], key.shape[2], key.device)
    if query_mask is not None:
        _check.padding_mask("query_padding_mask", query_mask, query.shape[0], query.shape[2], query.device)


def _check_conv(query: Tensor, key: Tensor, weight: Tensor) -> None:
    _check.tensor("conv_weight", weight, 2)
    _check.same("conv_weight", weight, "query", query, "device")
    _check.size("conv_weight", weight, 0, query.shape[1], "query's heads")
    if weight.shape[1] % 2 != 1:
        raise ValueError(f"conv_weight must have an odd kernel size, got {weight.shape[1]}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"conv_weight needs N = S, got {query.shape[2]} queries and {key.shape[2]} keys")


def _check_landmarks(query: Tensor, query_landmarks: Tensor | None, key_landmarks: Tensor | None) -> None:
    if query_landmarks is None or key_landmarks is None:
        missing = "query_landmarks" if query_landmarks is None else "key_landmarks"
        raise ValueError(f"query_landmarks and key_landmarks must be given together, got no {missing}")
    for name, landmarks in (("query_landmarks", query_landmarks), ("key_landmarks", key_landmarks)):
        _check.tensor(name, landmarks, 4)
        _check.same(name, landmarks, "query", query, "device")
        for axis, reason in ((0, "query's batch"), (1, "query's heads"), (3, "query's head dim D")):
            _check.size(name, landmarks, axis, query.shape[axis], reason)
    _check.at_least("query_landmarks' count M", query_landmarks.shape[2], 1)
    _check.size("key_landmarks", key_landmarks, 2, query_landmarks.shape[2], "query_landmarks' count M")


def _layout(
    queries: int,
    keys: int,
    num_landmarks: int | Sequence[int],
    grid: Sequence[int] | Sequence[Sequence[int]] | None,
) -> Layout:
    """Grids of the queries, the keys and the landmarks; one axis where no grid is given."""
    if grid is None:
        if isinstance(num_landmarks, Sequence):
            raise ValueError(f"num_landmarks must be an integer without grid, got {tuple(num_landmarks)}")
        _check.at_least("num_landmarks", num_landmarks, 1)
        return Layout((queries,), (keys,), (num_landmarks,))
    query_grid, key_grid = _grid_pair(grid)
    for name, axes, tokens in (("query", query_grid, queries), ("key", key_grid, keys)):
        for size in axes:
            _check.at_least("grid's sizes", size, 1)
        if math.prod(axes) != tokens:
            raise ValueError(f"grid {axes} must have as many positions as {name} has tokens, {tokens}")
    if len(query_grid) != len(key_grid):
        raise ValueError(f"grid must have as many axes for queries as for keys, got {query_grid} and {key_grid}")
    smallest = tuple(min(sizes) for sizes in zip(query_grid, key_grid, strict=True))
    return Layout(query_grid, key_grid, landmark_grid(num_landmarks, smallest))


def _grid_pair(grid: Sequence[int] | Sequence[Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The grids of queries and of keys: a pair as given, or one grid for both."""
    if not isinstance(grid, Sequence):
        raise TypeError(f"grid must be a shape, or a pair (query_grid, key_grid), got {grid!r}")
    pairs = [isinstance(axes, Sequence) for axes in grid]
    if not grid or (any(pairs) and not (all(pairs) and len(grid) == 2)):
        raise ValueError(f"grid must be a shape, or a pair (query_grid, key_grid), got {grid!r}")
    query_grid, key_grid = grid if any(pairs) else (grid, grid)
    return tuple(query_grid), tuple(key_grid)  # type: ignore[arg-type]


def _pooled_plan(query_mask: Tensor | None, key_mask: Tensor | None, layout: Layout, backend: str) -> Plan:
    counts = layout.landmark_grid
    key_index, key_landmark_mask, exact_rows = library.masked(key_mask, layout.key_grid, counts, backend)
    if query_mask is key_mask:
        query_index, query_landmark_mask = key_index, key_landmark_mask
    else:
        query_index, query_landmark_mask, _ = library.masked(query_mask, layout.query_grid, counts, backend)
    return Plan(
        query_index=query_index,
        key_index=key_index,
        key_padding_mask=key_mask,
        query_landmark_mask=query_landmark_mask,
        key_landmark_mask=key_landmark_mask,
        exact_rows=exact_rows,
    )


def _clustered_plan(query: Tensor, key: Tensor, plan: Plan, layout: Layout, iterations: int, backend: str) -> Plan:
    """The plan after Lloyd steps on queries and on keys; nothing here is differentiated."""
    plan = indexed(plan, layout, query.device)
    assert plan.query_index is not None
    assert plan.key_index is not None
    count = math.prod(layout.landmark_grid)
    cluster = reference.cluster_landmarks if backend == "reference" else library.cluster(backend)
    with torch.no_grad():
        query_landmarks, query_index = cluster(
            query.detach(), plan.query_index, plan.query_landmark_mask, plan.exact_rows, count, iterations
        )
        key_landmarks, key_index = cluster(
            key.detach(), plan.key_index, plan.key_landmark_mask, plan.exact_rows, count, iterations
        )
    return plan._replace(
        query_landmarks=query_landmarks, key_landmarks=key_landmarks, query_index=query_index, key_index=key_index
    )


def _is_token_major(value: Tensor) -> bool:
    """Whether the values lie as (B, H, N, E), and not as channel-first maps."""
    return value.stride(2) != 1 or value.stride(3) == 1


def _repays_keeping(query: Tensor, value: Tensor, landmarks: int, tensors: Sequence[Tensor | None]) -> bool:
    """Whether a backward is to find the iterates of the pseudo-inverse: where they take some of its time to make again.

    To make them takes about 25 M^2 / (14 N (D + E)) of a training step's other products, and to keep them, 4 a step,
    10 M^2 / (N (D + E)) of its memory. With 64 landmarks of 16384 tokens of 64 channels that is 0.4 and 2%.
    """
    if torch.compiler.is_compiling():  # where a comparison of sizes would tie the graph to them
        repays = landmarks >= 256
    else:
        repays = 64 * landmarks**2 >= query.shape[2] * (query.shape[3] + value.shape[3])
    return repays and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _attend_exactly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    epilogue: Epilogue,
    scale: float,
    backend: str,
) -> Tensor:
    inputs = (query, key, value, key_padding_mask, scale, backend, _is_token_major(value))
    if epilogue.conv_weight is None:
        return attention(*inputs, epilogue.gamma, epilogue.residual)
    return finished(attention(*inputs), value, key_padding_mask, epilogue)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    layout: Layout | None,
    epilogue: Epilogue,
    scale: float,
    pinv_iterations: int,
    pinv_init: str,
    backend: str,
) -> Tensor:
    global_init = pinv_init == "global_max"
    if layout is None:
        assert plan.query_landmarks is not None
        count, grids = plan.query_landmarks.shape[2], Layout((), (), ())
    else:
        count, grids = math.prod(layout.landmark_grid), layout
    if backend == "reference":
        plan = plan if layout is None else indexed(plan, layout, query.device)
        attended = reference.nystrom_attention(query, key, value, plan, count, scale, pinv_iterations, global_init)
        return finished(attended, value, plan.key_padding_mask, epilogue)
    fused = backend in library.FUSED_EPILOGUE
    within = epilogue if fused else Epilogue()
    keep_iterates = backend == "cpu" and _repays_keeping(query, value, count, (query, key, value, *plan, *within))
    token_major = not fused or _is_token_major(value)
    options = (*grids, count, scale, pinv_iterations, global_init, token_major, keep_iterates, backend)
    output = torch.ops.nystromgan.nystrom_attention(query, key, value, *plan, *within, *options)[0]
    return output if fused else finished(output, value, plan.key_padding_mask, epilogue)
