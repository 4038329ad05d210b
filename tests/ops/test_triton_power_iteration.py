"""The Triton kernels of power_iteration against the definition: natively on a GPU, else under the interpreter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nystromgan import _env
from nystromgan.ops.power_iteration import reference
from nystromgan.testing import TOLERANCES, normal, relative_error

DEVICE = "cuda" if torch.cuda.is_available() and not _env.triton_interpret() else "cpu"
SHAPES = [(5, 27), (40, 72), (17, 50), (1, 1), (40, 16)]

if DEVICE == "cpu" and not _env.triton_interpret():

    def test_under_the_interpreter(interpreted: Callable[[str], None]) -> None:
        interpreted(__file__)

else:
    from nystromgan.ops.power_iteration import triton as kernels

    def problem(
        dtype: torch.dtype = torch.float32, vectors: torch.dtype | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Matrices of several strides, and unit vectors."""
        weights = [normal(*shape, dtype=dtype, device=DEVICE, seed=i) for i, shape in enumerate(SHAPES)]
        weights[2] = weights[2].T.contiguous().T
        weights[3] = normal(1, 9, dtype=dtype, device=DEVICE)[:, 4:5]
        u = [normal(shape[0], device=DEVICE, seed=50 + i) for i, shape in enumerate(SHAPES)]
        v = [normal(shape[1], device=DEVICE, seed=90 + i) for i, shape in enumerate(SHAPES)]
        u, v = ([(x / x.norm()).to(vectors or dtype) for x in side] for side in (u, v))
        u[1] = torch.stack([u[1], u[1]], 1)[:, 0]
        return weights, u, v

    @pytest.mark.parametrize(
        ("dtype", "iterations"), [(torch.float32, 0), (torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 2)]
    )
    def test_sigma_and_vectors(dtype: torch.dtype, iterations: int) -> None:
        weights, u, v = problem(dtype)
        before = [x.clone() for x in (*u, *v)]
        wide = [[x.double() for x in side] for side in (weights, u, v)]
        sigma, uv = kernels.power_iteration(weights, u, v, iterations, 1e-12)
        expected = reference.power_iteration(*wide, iterations, 1e-12)
        assert relative_error(sigma, expected) < 2e-6
        assert relative_error(uv, torch.cat([*wide[1], *wide[2]])) < 2e-6
        for x, y in zip((*u, *v), (*wide[1], *wide[2]) if iterations else before, strict=True):
            assert relative_error(x, y) <= (TOLERANCES[dtype].output if iterations else 0.0)

    def test_a_weight_gives_the_same_bits_alone_and_among_others() -> None:
        weights, u, v = problem()
        sigma, uv = kernels.power_iteration(weights, [x.clone() for x in u], [x.clone() for x in v], 1, 1e-12)
        split = uv.split([vector.shape[0] for vector in (*u, *v)])
        for i in (0, 2, 4):
            alone, own = kernels.power_iteration(weights[i : i + 1], u[i : i + 1], v[i : i + 1], 1, 1e-12)
            assert torch.equal(alone, sigma[i : i + 1])
            assert torch.equal(own, torch.cat([split[i], split[len(u) + i]]))

    def test_new_memory_behind_the_same_list_is_seen() -> None:
        weights, u, v = problem()
        kernels.power_iteration(weights, u, v, 1, 1e-12)
        weights[0] = 3 * weights[0]
        expected = reference.power_iteration(*[[x.double() for x in side] for side in (weights, u, v)], 1, 1e-12)
        sigma, _ = kernels.power_iteration(weights, u, v, 1, 1e-12)
        assert relative_error(sigma, expected) < 2e-6

    def test_dtypes_may_differ_from_weight_to_weight() -> None:
        weights, u, v = problem(vectors=torch.float32)
        weights[1] = weights[1].bfloat16()
        wide = [[x.double() for x in side] for side in (weights, u, v)]
        sigma, _ = kernels.power_iteration(weights, u, v, 1, 1e-12)
        assert relative_error(sigma, reference.power_iteration(*wide, 1, 1e-12)) < 2e-6

    def test_a_weight_of_zeros_gives_zero_not_nan() -> None:
        weights, u, v = (
            [torch.zeros(9, 16, device=DEVICE)],
            [torch.ones(9, device=DEVICE)],
            [torch.ones(16, device=DEVICE)],
        )
        sigma, uv = kernels.power_iteration(weights, u, v, 1, 1e-12)
        assert not sigma.any()
        assert not uv.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_spectral_normalize_divides_every_weight(dtype: torch.dtype) -> None:
        weights, _, _ = problem(dtype)
        sigma = 1.5 + torch.arange(len(weights), device=DEVICE)
        outputs = [weight.new_empty(weight.shape) for weight in weights]
        kernels.spectral_normalize(weights, sigma, outputs)
        for output, weight, divisor in zip(outputs, weights, sigma, strict=True):
            assert relative_error(output, weight.double() / divisor) <= TOLERANCES[dtype].output

    @pytest.mark.parametrize("parts", [2, kernels.PARTS])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_gradient_of_every_normalized_weight(
        dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Against the formula in float64; where two parts are added at once, one weight has more."""
        monkeypatch.setattr(kernels, "PARTS", parts)
        shapes = [*SHAPES, (130, 70)]
        outputs, grads = (
            [normal(*x, dtype=dtype, device=DEVICE, seed=k + i) for i, x in enumerate(shapes)] for k in (0, 50)
        )
        u, v = (
            [normal(x[axis], device=DEVICE, seed=100 * axis + i) for i, x in enumerate(shapes)] for axis in range(2)
        )
        sigma = 1.5 + torch.arange(len(shapes), device=DEVICE)
        results = [torch.full_like(x, torch.nan) for x in outputs]
        kernels.spectral_normalize_backward(grads, outputs, sigma, torch.cat([*u, *v]), results)
        for result, grad, output, divisor, left, right in zip(results, grads, outputs, sigma, u, v, strict=True):
            along = (grad.double() * output.double()).sum()
            expected = (grad.double() - along * torch.outer(left.double(), right.double())) / divisor
            assert relative_error(result, expected) <= TOLERANCES[dtype].output
