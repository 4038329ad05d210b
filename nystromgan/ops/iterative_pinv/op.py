"""`iterative_pinv`: the public function, its torch.library ops and their derivatives."""

import torch
from torch import Tensor

from nystromgan import _backend, _check, _library
from nystromgan.ops.iterative_pinv import reference

OP = "iterative_pinv"
PINV_INITS = ("per_matrix", "global_max")
CUDA_ROWS = 512  # the largest M that the cuda kernels take


def iterative_pinv(matrix: Tensor, *, iterations: int = 6, init: str = "per_matrix", backend: str = "auto") -> Tensor:
    """The Moore-Penrose inverse of square matrices by a fixed number of third-order steps.

        Z_0 = A^T / (|A|_1 |A|_inf)
        Z_{k+1} = 1/4 Z_k (13 I - A Z_k (15 I - A Z_k (7 I - A Z_k)))

    The recurrence is the definition: with six steps, singular values with sigma^2 below about |A|_1 / 1178 stay damped.

    Args:
        matrix: (..., M, M), any floating-point dtype, any strides; M >= 1.
        iterations: number of steps, >= 0.
        init: "per_matrix" scales each Z_0 by its own norms; "global_max" by the batch's largest norms, which couples
            the matrices of a batch and exists to match checkpoints of libraries that do so.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (..., M, M) float32, or float64 for a float64 matrix. A zero matrix gives zeros.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        UnsupportedError: a named backend cannot run this input.

    Differentiable to any order (the first by the backend's own backward, exact for the steps as they ran).
    Source: Razavi et al., "A new iterative method for finding approximate inverses of complex matrices", 2014, as used
    by Xiong et al., "Nyströmformer", 2021, eq. 11.
    """
    _check.tensor("matrix", matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must be square in its last two axes, got shape {tuple(matrix.shape)}")
    _check.at_least("matrix's size M", matrix.shape[-1], 1)
    _check.at_least("iterations", iterations, 0)
    _check.one_of("init", init, PINV_INITS)
    if matrix.dtype != torch.float64:
        matrix = matrix.float()
    chosen = _backend.choose(OP, backend, (matrix,), lambda name: _op_reasons(name, matrix.shape[-1]))
    with _library.without_autocast(matrix.device.type):
        if chosen == "reference":
            return reference.iterative_pinv(matrix, iterations, init == "global_max")
        return torch.ops.nystromgan.iterative_pinv(matrix, iterations, init == "global_max", chosen)


def _op_reasons(backend: str, size: int) -> list[str]:
    """Why a backend cannot take matrices of this size."""
    return [f"takes up to {CUDA_ROWS} rows, got {size}"] if backend == "cuda" and size > CUDA_ROWS else []


def _forward(matrix: Tensor, iterations: int, global_init: bool, backend: str) -> Tensor:
    return _library.kernel(OP, OP, backend)(matrix, iterations, global_init)


def _backward(grad_output: Tensor, matrix: Tensor, iterations: int, global_init: bool, backend: str) -> Tensor:
    return _library.kernel(OP, f"{OP}_backward", backend)(grad_output, matrix, iterations, global_init)


def _contiguous_like(matrix: Tensor) -> Tensor:
    return matrix.new_empty(matrix.shape)


_library.define(
    "iterative_pinv(Tensor matrix, int iterations, bool global_init, str backend) -> Tensor",
    _forward,
    lambda matrix, iterations, global_init, backend: _contiguous_like(matrix),
)
_library.define(
    "iterative_pinv_backward(Tensor grad_output, Tensor matrix, int iterations, bool global_init, str backend)"
    " -> Tensor",
    _backward,
    lambda grad_output, matrix, iterations, global_init, backend: _contiguous_like(matrix),
)
_library.define_native("iterative_pinv_native(Tensor matrix, int iterations, bool global_init) -> Tensor")
_library.define_native(
    "iterative_pinv_backward_native(Tensor grad_output, Tensor matrix, int iterations, bool global_init) -> Tensor"
)


def _save_forward(ctx, inputs, output):
    matrix, *ctx.options = inputs
    ctx.save_for_backward(matrix)


def _differentiate_forward(ctx, grad_output):
    (matrix,) = ctx.saved_tensors
    return torch.ops.nystromgan.iterative_pinv_backward(grad_output, matrix, *ctx.options), None, None, None


def _save_backward(ctx, inputs, output):
    grad_output, matrix, *ctx.options = inputs
    ctx.save_for_backward(grad_output, matrix)


def _differentiate_backward(ctx, grad_grad):
    grad_output, matrix = ctx.saved_tensors
    iterations, global_init, _ = ctx.options
    second, (first,) = _library.vjp_of_vjp(
        lambda matrix: reference.iterative_pinv(matrix, iterations, global_init), [matrix], grad_output, [grad_grad]
    )
    return second, first, None, None, None


_library.register_autograd(OP, _save_forward, _differentiate_forward)
_library.register_autograd(f"{OP}_backward", _save_backward, _differentiate_backward)
