"""`power_iteration`: the public function, its torch.library ops and their derivatives."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nystromgan import _backend, _check, _library, _recycled
from nystromgan.ops.power_iteration import reference

OP = "power_iteration"
Matrices = Tensor | Sequence[Tensor]


def power_iteration(
    weights: Matrices, u: Matrices, v: Matrices, *, iterations: int = 1, eps: float = 1e-12, backend: str = "auto"
) -> Tensor:
    """The largest singular value of every matrix, estimated by power iteration, all in one call.

        u <- W v / max(|W v|, eps),  v <- W^T u / max(|W^T u|, eps)      `iterations` times, in place
        sigma = u^T W v

    Args:
        weights: one matrix (O, I) or a sequence of matrices (O_i, I_i), any floating-point dtypes, any strides.
        u: the left vectors (O_i,), one for every weight, given as weights are; updated in place, in their own dtype.
        v: the right vectors (I_i,), likewise.
        iterations: number of steps, >= 0; 0 leaves u and v as they are.
        eps: the smallest norm that u and v are divided by, > 0.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        sigma (len(weights),), float32, or float64 where any argument is float64; (1,) for one matrix.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        UnsupportedError: a named backend cannot run this input.

    Differentiable to any order in weights, with u and v as constants: d sigma / d W = u v^T, for the u and v that this
    call left, even if a later call changes them before the backward pass.
    Source: Miyato et al., "Spectral normalization for generative adversarial networks", 2018, algorithm 1.
    """
    chosen, weights, u, v = _checked(weights, u, v, iterations, eps, backend)
    if not weights:
        return torch.empty(0)
    with _library.without_autocast(weights[0].device.type):
        if chosen == "reference":
            return reference.power_iteration(weights, u, v, iterations, eps)
        sigma, uv = _run(weights, u, v, iterations, eps, chosen)
        return torch.ops.nystromgan.singular_value(weights, sigma, uv) if _tracked(weights) else sigma


def spectral_normalize(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    iterations: int = 1,
    eps: float = 1e-12,
    backend: str = "auto",
) -> list[Tensor]:
    """W_i / sigma_i for every matrix, with sigma = power_iteration(weights, u, v).

    Takes and raises what `power_iteration` does; returns new contiguous matrices (O_i, I_i) in the weights' dtypes.
    Differentiable to any order in weights: dW = (dW_sn - <dW_sn, W_sn> u v^T) / sigma.
    """
    chosen, weights, u, v = _checked(weights, u, v, iterations, eps, backend)
    if not weights:
        return []
    with _library.without_autocast(weights[0].device.type):
        if chosen == "reference":
            sigma = reference.power_iteration(weights, u, v, iterations, eps)
            return [(weight / sigma[i]).to(weight.dtype).contiguous() for i, weight in enumerate(weights)]
        if chosen != "cpu":
            sigma, uv = _run(weights, u, v, iterations, eps, chosen)
            return torch.ops.nystromgan.spectral_normalize(weights, sigma, uv, chosen)
        outputs, _, uv = torch.ops.nystromgan.spectral_step(weights, u, v, iterations, eps)
        if iterations > 0:
            torch._foreach_copy_([*u, *v], uv.split([vector.shape[0] for vector in (*u, *v)]))
        return outputs


def power_iteration_step(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], *, iterations: int = 1, eps: float = 1e-12
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """sigma (), u and v of every matrix after a step, as constants that no later step changes.

    Takes and raises what `power_iteration` does.
    """
    with torch.no_grad():
        chosen, weights, u, v = _checked(weights, u, v, iterations, eps, "auto")
        if chosen == "reference":
            sigma = reference.power_iteration(weights, u, v, iterations, eps)
            return [(s, left.clone(), right.clone()) for s, left, right in zip(sigma, u, v, strict=True)]
        sigma, uv = _run(weights, u, v, iterations, eps, chosen)
        pairs = _split(uv, [weight.shape for weight in weights])
        return [(s, *pair) for s, pair in zip(sigma.unbind(), pairs, strict=True)]


def normalize_by(weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """W / sigma (O, I), contiguous, for a step's sigma, u and v; differentiable as `spectral_normalize`."""
    chosen = _backend.choose(OP, "auto", [weight, u, v])
    if chosen == "reference":
        sigma = torch.dot(u, weight.to(u.dtype) @ v)
        return (weight / sigma).to(weight.dtype).contiguous()
    return torch.ops.nystromgan.spectral_normalize([weight], sigma[None], torch.cat([u, v]), chosen)[0]


def _checked(
    weights: Any, u: Any, v: Any, iterations: Any, eps: Any, backend: str
) -> tuple[str, list[Tensor], list[Tensor], list[Tensor]]:
    """The backend and the three arguments as lists, after every check."""
    single = isinstance(weights, Tensor)
    weights, u, v = (_as_list(name, x, single) for name, x in (("weights", weights), ("u", u), ("v", v)))
    for name, x in (("u", u), ("v", v)):
        if len(x) != len(weights):
            raise ValueError(f"{name} must have one vector for each of the {len(weights)} weights, got {len(x)}")
    _check.at_least("iterations", iterations, 0)
    if _check.finite("eps", eps) <= 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    for i, group in enumerate(zip(weights, u, v, strict=True)):
        if not _fit(*group, weights[0]):
            _explain("" if single else f"[{i}]", *group, weights[0])
    chosen = _backend.choose(OP, backend, [*weights, *u, *v])
    return chosen, weights, u, v


def _as_list(name: str, value: Any, single: bool) -> list[Tensor]:
    if single:
        return [value]
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        wanted = "a matrix or a sequence of matrices" if name == "weights" else "a sequence as weights is"
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
    return list(value)


def _fit(weight: Any, left: Any, right: Any, first: Any) -> bool:
    """Whether `_explain` would find nothing, in half its time: it takes 0.1 ms for 20 weights, whose step takes 4."""
    if not (isinstance(weight, Tensor) and isinstance(left, Tensor) and isinstance(right, Tensor)):
        return False
    if not (weight.is_floating_point() and left.is_floating_point() and right.is_floating_point()):
        return False
    if left.requires_grad or right.requires_grad or not weight.device == left.device == right.device == first.device:
        return False
    return left.ndim == 1 == right.ndim and weight.shape == (left.shape[0], right.shape[0]) and weight.numel() > 0


def _explain(index: str, weight: Any, left: Any, right: Any, first: Tensor) -> None:
    """Raises what is wrong with a weight and its vectors."""
    _check.tensor(f"weights{index}", weight, 2)
    _check.same(f"weights{index}", weight, "weights[0]", first, "device")
    for axis in range(2):
        _check.at_least(f"weights{index} axis {axis}", weight.shape[axis], 1)
    _check_vector(f"u{index}", left, f"weights{index}", weight, 0)
    _check_vector(f"v{index}", right, f"weights{index}", weight, 1)


def _check_vector(name: str, value: Any, weight_name: str, weight: Tensor, axis: int) -> None:
    """`value` is a constant vector as long as the weight's `axis`, on its device."""
    _check.tensor(name, value, 1)
    _check.size(name, value, 0, weight.shape[axis], f"{weight_name} axis {axis}")
    _check.same(name, value, weight_name, weight, "device")
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad, since it is updated in place, got requires_grad=True")


def _tracked(weights: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


def _run(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], iterations: int, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The mutable op on constants: sigma (len,), and uv, a flat copy of every u and then every v as used."""
    constants = [weight.detach() for weight in weights]
    return torch.ops.nystromgan.power_iteration_(constants, u, v, iterations, eps, backend)


def _split(uv: Tensor, shapes: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """The pairs (u_i, v_i) of uv, for weights of those shapes."""
    vectors = uv.split([shape[axis] for axis in range(2) for shape in shapes])
    return list(zip(vectors[: len(shapes)], vectors[len(shapes) :], strict=True))


def _fake_power_iteration(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], iterations: int, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype([*weights, *u, *v])
    length = sum(vector.shape[0] for vector in itertools.chain(u, v))
    return weights[0].new_empty(len(weights), dtype=dtype), weights[0].new_empty(length, dtype=dtype)


SCHEMA = "(Tensor[] weights, Tensor(a!)[] u, Tensor(b!)[] v, int iterations, float eps{backend}) -> (Tensor, Tensor)"
_library.define(
    f"power_iteration_{SCHEMA.format(backend=', str backend')}",
    lambda *arguments: _library.kernel(OP, OP, arguments[-1])(*arguments[:-1]),
    _fake_power_iteration,
)
_library.define_native(f"power_iteration_native{SCHEMA.format(backend='')}")


def _spectral_step(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], iterations: int, eps: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    outputs = [_recycled.empty_like(weight) for weight in weights]
    return outputs, *torch.ops.nystromgan.spectral_step_native(weights, u, v, iterations, eps, outputs)


def _fake_spectral_step(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], iterations: int, eps: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    outputs = [weight.new_empty(weight.shape) for weight in weights]
    return outputs, *_fake_power_iteration(weights, u, v, iterations, eps, "cpu")


# A step and W / sigma at once, which saves a read of W; it leaves u and v, since autograd takes no op that changes its
# arguments. Of the cpu backend alone: on a GPU the vectors' copies would be launches of their own.
_library.define(
    "spectral_step(Tensor[] weights, Tensor[] u, Tensor[] v, int iterations, float eps) -> (Tensor[], Tensor, Tensor)",
    _spectral_step,
    _fake_spectral_step,
)
_library.define_native(
    "spectral_step_native(Tensor[] weights, Tensor[] u, Tensor[] v, int iterations, float eps, Tensor(a!)[] outputs) "
    "-> (Tensor, Tensor)"
)

# sigma as a function of weights, at the u and v that gave it.
_library.define(
    "singular_value(Tensor[] weights, Tensor sigma, Tensor uv) -> Tensor",
    lambda weights, sigma, uv: sigma.clone(),
    lambda weights, sigma, uv: torch.empty_like(sigma),
)


def _normalized(weights: list[Tensor], sigma: Tensor, uv: Tensor, backend: str) -> list[Tensor]:
    outputs = [_recycled.empty_like(weight) for weight in weights]
    _library.kernel(OP, "spectral_normalize", backend)(weights, sigma, outputs)
    return outputs


def _normalized_backward(
    grad_outputs: list[Tensor], weights: list[Tensor], outputs: list[Tensor], sigma: Tensor, uv: Tensor, backend: str
) -> list[Tensor]:
    if backend != "cpu":  # whose kernel takes any strides
        grad_outputs = [grad.contiguous() for grad in grad_outputs]
    grad_weights = [_recycled.empty_like(weight) for weight in weights]
    kernel = _library.kernel(OP, "spectral_normalize_backward", backend)
    kernel(grad_outputs, outputs, sigma, uv, grad_weights)
    return grad_weights


_library.define(
    "spectral_normalize(Tensor[] weights, Tensor sigma, Tensor uv, str backend) -> Tensor[]",
    _normalized,
    lambda weights, sigma, uv, backend: [weight.new_empty(weight.shape) for weight in weights],
)
_library.define_native("spectral_normalize_native(Tensor[] weights, Tensor sigma, Tensor(a!)[] outputs) -> ()")
_library.define(
    "spectral_normalize_backward"
    "(Tensor[] grad_outputs, Tensor[] weights, Tensor[] outputs, Tensor sigma, Tensor uv, str backend) -> Tensor[]",
    _normalized_backward,
    lambda grad_outputs, weights, outputs, sigma, uv, backend: [weight.new_empty(weight.shape) for weight in weights],
)
_library.define_native(
    "spectral_normalize_backward_native"
    "(Tensor[] grad_outputs, Tensor[] outputs, Tensor sigma, Tensor uv, Tensor(a!)[] grad_weights) -> ()"
)


def _save_singular_value(ctx: Any, inputs: tuple, output: Any) -> None:
    weights, _, uv = inputs
    ctx.shapes = [weight.shape for weight in weights]
    ctx.dtypes = [weight.dtype for weight in weights]
    ctx.save_for_backward(uv)


def _differentiate_singular_value(ctx: Any, grad_sigma: Tensor) -> tuple:
    (uv,) = ctx.saved_tensors
    pairs = zip(grad_sigma.unbind(), _split(uv, ctx.shapes), ctx.dtypes, strict=True)
    return [torch.outer(grad * u, v).to(dtype) for grad, (u, v), dtype in pairs], None, None


def _save_spectral_normalize(ctx: Any, inputs: tuple, output: Any) -> None:
    weights, sigma, uv, ctx.backend = inputs
    ctx.save_for_backward(*weights, *output, sigma, uv)


def _differentiate_spectral_normalize(ctx: Any, grad_outputs: list[Tensor]) -> tuple:
    *tensors, sigma, uv = ctx.saved_tensors
    weights, outputs = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    if torch.is_grad_enabled():
        # Through singular_value, so that a second derivative sees how sigma depends on the weights.
        scales = torch.ops.nystromgan.singular_value(weights, sigma, uv).reciprocal()
        grads = _normalize_vjps(grad_outputs, outputs, scales, uv)
    else:
        arguments = (grad_outputs, weights, outputs, sigma, uv, ctx.backend)
        grads = torch.ops.nystromgan.spectral_normalize_backward(*arguments)
    return grads, None, None, None


def _normalize_vjps(grad_outputs: list[Tensor], outputs: list[Tensor], scales: Tensor, uv: Tensor) -> list[Tensor]:
    """The gradients of every weight, with scales = 1 / sigma."""
    pairs = _split(uv, [output.shape for output in outputs])
    return [_normalize_vjp(*group) for group in zip(grad_outputs, outputs, scales.unbind(), pairs, strict=True)]


def _normalize_vjp(grad_output: Tensor, output: Tensor, scale: Tensor, uv: tuple[Tensor, Tensor]) -> Tensor:
    """(dW_sn - <dW_sn, W_sn> u v^T) / sigma, with scale = 1 / sigma."""
    u, v = uv
    grad = grad_output.to(u.dtype)
    along = torch.dot(grad.flatten(), output.to(u.dtype).flatten())
    return torch.addr(grad * scale, u * (-along * scale), v).to(output.dtype)


def _save_spectral_step(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.backend = "cpu"
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[0], *output[0], *output[1:])


def _differentiate_spectral_step(ctx: Any, grad_outputs: list[Tensor], *_: Tensor) -> tuple:
    grads = _differentiate_spectral_normalize(ctx, grad_outputs)[0]
    return grads, None, None, None, None


_library.register_autograd("spectral_step", _save_spectral_step, _differentiate_spectral_step)
_library.register_autograd("singular_value", _save_singular_value, _differentiate_singular_value)
_library.register_autograd("spectral_normalize", _save_spectral_normalize, _differentiate_spectral_normalize)
