"""iterative_pinv: a fixed recurrence, one matrix at a time. Properties first, then numbers, then refusals."""

import pytest
import torch
from torch import Tensor

from nystromgan import iterative_pinv
from nystromgan.testing import (
    assert_matches_reference,
    assert_same,
    backends_of,
    device_of,
    normal,
    relative_error,
    smooth,
)

BACKENDS = backends_of("iterative_pinv")
INITS = ("per_matrix", "global_max")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def pinv_of_softmax(logits: Tensor, **options: object) -> Tensor:
    """The inverse of a row-stochastic matrix, which is what attention inverts.

    Its rows all have the largest sum, so the gradient of |A|_inf alone is ambiguous; through the softmax it is not.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return iterative_pinv(wide.softmax(-1), **options)  # type: ignore[arg-type]


def recurrence(matrix: Tensor, scale: Tensor | float, iterations: int) -> Tensor:
    """The formula of the docstring, in float64, for one matrix."""
    matrix = matrix.double().cpu()
    inverse, eye = matrix.mT / scale, torch.eye(matrix.shape[-1], dtype=torch.float64)
    for _ in range(iterations):
        step = matrix @ inverse
        inverse = inverse @ (13 * eye - step @ (15 * eye - step @ (7 * eye - step))) / 4
    return inverse


def norms(matrix: Tensor) -> Tensor:
    """|A|_1 |A|_inf of each matrix."""
    magnitude = matrix.double().cpu().abs()
    return magnitude.sum(-2).amax(-1) * magnitude.sum(-1).amax(-1)


class TestProperties:
    @on_every_backend
    @pytest.mark.parametrize("iterations", [0, 1, 6, 9])
    def test_it_is_the_recurrence(self, backend: str, iterations: int) -> None:
        matrices = normal(3, 11, 11, device=device_of(backend))
        inverses = iterative_pinv(matrices, iterations=iterations, backend=backend)
        for matrix, inverse in zip(matrices, inverses, strict=True):
            assert relative_error(inverse, recurrence(matrix, norms(matrix), iterations)) < 1e-5

    @on_every_backend
    @pytest.mark.parametrize("iterations", [6, 8, 12])
    def test_many_steps_on_a_large_matrix_round_as_plain_products_do(self, backend: str, iterations: int) -> None:
        """Rounding in the null space grows 13/4 times a step, so what is done to A Z shows here first."""
        cores = [(normal(130, 4, seed=seed) @ normal(4, 130, seed=seed + 9) / 2).softmax(-1) for seed in range(3)]
        found = iterative_pinv(torch.stack(cores).to(device_of(backend)), iterations=iterations, backend=backend)
        plain = iterative_pinv(torch.stack(cores), iterations=iterations, backend="reference")
        for core, inverse, other in zip(cores, found, plain, strict=True):
            expected = recurrence(core, norms(core), iterations)
            assert relative_error(inverse, expected) < 3 * relative_error(other, expected) + 1e-6

    @on_every_backend
    def test_enough_steps_give_the_moore_penrose_inverse(self, backend: str) -> None:
        left, right = (torch.linalg.qr(normal(24, 5, seed=seed)).Q for seed in (1, 2))
        matrix = (left @ torch.diag(torch.tensor([1.0, 2, 2, 3, 4])) @ right.mT).to(device_of(backend))  # rank 5
        inverse = iterative_pinv(matrix, iterations=8, backend=backend)
        assert relative_error(inverse, torch.linalg.pinv(matrix.double(), rtol=1e-5)) < 1e-4

    @on_every_backend
    def test_six_steps_damp_small_singular_values(self, backend: str) -> None:
        small = 1e-4
        matrix = torch.diag(torch.tensor([1.0, small], device=device_of(backend)))
        inverse = iterative_pinv(matrix, backend=backend)
        assert inverse[0, 0].item() == pytest.approx(1, rel=1e-6)
        assert inverse[1, 1].item() == pytest.approx((13 / 4) ** 6 * small, rel=1e-3)  # far below 1 / small

    @on_every_backend
    @pytest.mark.parametrize("init", INITS)
    def test_zero_matrix_gives_zeros_and_zero_gradient(self, backend: str, init: str) -> None:
        matrix = torch.zeros(2, 5, 5, device=device_of(backend), requires_grad=True)
        inverse = iterative_pinv(matrix, init=init, backend=backend)
        inverse.sum().backward()
        assert torch.equal(inverse, torch.zeros_like(inverse))
        assert matrix.grad is not None
        assert matrix.grad.isfinite().all()

    @on_every_backend
    def test_one_by_one(self, backend: str) -> None:
        matrix = torch.tensor([[[0.25]], [[-8.0]], [[0.0]]], device=device_of(backend))
        assert iterative_pinv(matrix, backend=backend).flatten().tolist() == pytest.approx([4, -0.125, 0], rel=1e-6)

    @on_every_backend
    @pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (2, 0, 3)])
    def test_batch_axes_are_free(self, backend: str, batch: tuple[int, ...]) -> None:
        matrix = normal(*batch, 7, 7, device=device_of(backend)).requires_grad_()
        inverse = iterative_pinv(matrix, backend=backend)
        (grad,) = torch.autograd.grad(inverse.sum(), matrix)
        assert inverse.shape == grad.shape == (*batch, 7, 7)
        flat = iterative_pinv(matrix.detach().reshape(-1, 7, 7), backend=backend)
        assert_same(inverse.detach().reshape(-1, 7, 7), flat, backend)

    @on_every_backend
    @pytest.mark.parametrize("size", [3, 64, 65])
    def test_a_matrix_does_not_see_its_batch_mates(self, backend: str, size: int) -> None:
        loudness = torch.tensor([1.0, 30.0, 1e-3, 1.0], device=device_of(backend))
        matrices = normal(4, size, size, device=device_of(backend)) * loudness[:, None, None]
        together = iterative_pinv(matrices, backend=backend)
        for i in range(4):
            assert_same(together[i], iterative_pinv(matrices[i], backend=backend), backend)

    @on_every_backend
    def test_global_max_scales_by_the_largest_norms_of_the_batch(self, backend: str) -> None:
        matrices = normal(2, 3, 9, 9, device=device_of(backend)) * 5
        matrices[0, 0] *= 0.1
        magnitude = matrices.double().cpu().abs()
        scale = magnitude.sum(-2).max() * magnitude.sum(-1).max()
        coupled = iterative_pinv(matrices, init="global_max", iterations=2, backend=backend)
        assert relative_error(coupled, recurrence(matrices, scale, 2)) < 1e-5
        assert relative_error(coupled, iterative_pinv(matrices, iterations=2, backend=backend)) > 0.1

    @on_every_backend
    def test_nan_stays_in_its_matrix(self, backend: str) -> None:
        matrices = normal(3, 8, 8, device=device_of(backend))
        clean = iterative_pinv(matrices, backend=backend)
        matrices[1, 2, 3] = torch.nan
        dirty = iterative_pinv(matrices, backend=backend)
        assert dirty[1].isnan().all()
        assert_same(dirty[[0, 2]], clean[[0, 2]], backend)

    @on_every_backend
    @pytest.mark.parametrize("size", [5, 64, 130])
    def test_two_runs_and_any_number_of_threads_give_the_same_bits(self, backend: str, size: int) -> None:
        matrices = normal(3, size, size, device=device_of(backend)).requires_grad_()

        def run() -> tuple[Tensor, Tensor]:
            inverse = iterative_pinv(matrices, backend=backend)
            return inverse, torch.autograd.grad(inverse, matrices, normal(*inverse.shape, device=device_of(backend)))[0]

        first, second = run(), run()
        assert all(map(torch.equal, first, second))
        torch.set_num_threads(1)
        for value, expected in zip(run(), first, strict=True):
            assert_same(value.detach(), expected.detach(), backend)

    @on_every_backend
    def test_strides_do_not_matter(self, backend: str) -> None:
        matrices = normal(2, 4, 14, 14, device=device_of(backend))
        views = [matrices.mT, matrices[..., ::2, 1:8], matrices.transpose(0, 1), matrices[:1].expand(3, 4, 14, 14)]
        for view in views:
            contiguous = iterative_pinv(view.contiguous(), backend=backend)
            assert_same(iterative_pinv(view, backend=backend), contiguous, backend)

    @on_every_backend
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_inverted_in_float32(self, backend: str, dtype: torch.dtype) -> None:
        matrix = normal(2, 9, 9, dtype=dtype, device=device_of(backend)).requires_grad_()
        inverse = iterative_pinv(matrix, backend=backend)
        (grad,) = torch.autograd.grad(inverse.sum(), matrix)
        assert (inverse.dtype, grad.dtype) == (torch.float32, dtype)
        assert torch.equal(inverse, iterative_pinv(matrix.float(), backend=backend))

    def test_float64_stays_float64(self) -> None:
        assert iterative_pinv(normal(4, 4, dtype=torch.float64)).dtype == torch.float64


class TestNumbers:
    @on_every_backend
    @pytest.mark.parametrize("size", [1, 2, 3, 8, 15, 16, 17, 33, 64, 100, 128, 129, 256])
    @pytest.mark.parametrize("init", INITS)
    def test_against_float64(self, backend: str, size: int, init: str) -> None:
        logits = normal(2, size, size, device=device_of(backend))
        eager = lambda logits: pinv_of_softmax(logits, init=init, backend="reference")  # noqa: E731
        assert_matches_reference(pinv_of_softmax, {"logits": logits}, backend, eager=eager, init=init)

    @on_every_backend
    def test_against_float64_at_the_largest_size(self, backend: str) -> None:
        logits = {"logits": normal(512, 512, device=device_of(backend))}
        assert_matches_reference(pinv_of_softmax, logits, backend)

    @on_every_backend
    @pytest.mark.parametrize("init", INITS)
    def test_entries_of_either_sign(self, backend: str, init: str) -> None:
        matrix = {"matrix": normal(3, 21, 21, device=device_of(backend))}
        assert_matches_reference(iterative_pinv, matrix, backend, init=init)

    @on_every_backend
    def test_near_rank_one(self, backend: str) -> None:
        """Neighbouring landmarks of smooth tokens: the inverse's entries reach 1e2 and more."""
        tokens = smooth(2, 64, 16, device=device_of(backend))
        logits = {"logits": tokens @ tokens.mT / 4}
        assert_matches_reference(pinv_of_softmax, logits, backend)

    @pytest.mark.parametrize("init", INITS)
    def test_derivatives_of_every_order(self, init: str) -> None:
        matrix = normal(2, 4, 4, dtype=torch.float64).requires_grad_()
        function = lambda matrix: iterative_pinv(matrix, init=init)  # noqa: E731
        torch.autograd.gradcheck(function, matrix)
        torch.autograd.gradgradcheck(function, matrix)


class TestErrors:
    @pytest.mark.parametrize(
        ("matrix", "options", "error", "message"),
        [
            ([[1.0]], {}, TypeError, "matrix must be a tensor, got list"),
            (
                torch.ones(2, 2, dtype=torch.int64),
                {},
                TypeError,
                "matrix must have a floating-point dtype, got torch.int64",
            ),
            (torch.ones(3), {}, ValueError, r"matrix must be square in its last two axes, got shape \(3,\)"),
            (torch.ones(2, 3), {}, ValueError, r"matrix must be square in its last two axes, got shape \(2, 3\)"),
            (torch.ones(2, 0, 0), {}, ValueError, "matrix's size M must be at least 1, got 0"),
            (torch.ones(2, 2), {"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
            (torch.ones(2, 2), {"iterations": 2.0}, TypeError, "iterations must be an integer, got 2.0"),
            (torch.ones(2, 2), {"iterations": True}, TypeError, "iterations must be an integer, got True"),
            (
                torch.ones(2, 2),
                {"init": "max"},
                ValueError,
                r"init must be one of \('per_matrix', 'global_max'\), got 'max'",
            ),
            (torch.ones(2, 2), {"backend": "gpu"}, ValueError, r"backend must be one of \('auto', .*\), got 'gpu'"),
        ],
    )
    def test_names_argument_rule_and_value(self, matrix, options, error, message) -> None:
        with pytest.raises(error, match=message):
            iterative_pinv(matrix, **options)
