"""power_iteration: torch's spectral norm, many matrices in one call. Properties first, then numbers, then refusals."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _SpectralNorm

import nystromgan
from nystromgan import UnsupportedError, power_iteration
from nystromgan.ops.power_iteration import spectral_normalize
from nystromgan.testing import (
    TOLERANCES,
    assert_same,
    backends_of,
    device_of,
    native_backends_of,
    normal,
    relative_error,
)

BACKENDS = backends_of("power_iteration")
NATIVE = native_backends_of("power_iteration")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_native_backends = pytest.mark.parametrize("backend", NATIVE)
SHAPES = [(5, 7), (1, 33), (33, 1), (1, 1), (64, 27), (70, 5000), (3000, 130), (16, 16), (37, 100)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Problem = tuple[list[Tensor], list[Tensor], list[Tensor]]


def problem(
    shapes: list[tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    vectors: torch.dtype | None = None,
) -> Problem:
    """Matrices of a known largest singular value's order, and unit vectors in `vectors` (default: dtype)."""
    weights = [normal(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]

    def unit(size: int, seed: int) -> Tensor:
        x = normal(size, dtype=torch.float64, seed=seed)
        return (x / x.norm()).to(device, vectors or dtype)

    return (
        weights,
        [unit(s[0], 50 + i) for i, s in enumerate(shapes)],
        [unit(s[1], 99 + i) for i, s in enumerate(shapes)],
    )


def copies(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype, copy=True) for t in tensors]


def exact(weights: list[Tensor], u: list[Tensor], v: list[Tensor], **options: object) -> tuple[Tensor, Problem]:
    """sigma and the vectors by the reference in float64."""
    wide = tuple(copies(x, torch.float64) for x in (weights, u, v))
    return power_iteration(*wide, **options, backend="reference"), wide  # type: ignore[arg-type, return-value]


class TestProperties:
    @on_every_backend
    def test_many_steps_give_the_largest_singular_value_and_its_vectors(self, backend: str) -> None:
        left, right = (torch.linalg.qr(normal(24, 5, seed=seed)).Q for seed in (1, 2))
        weight = (left @ torch.diag(torch.tensor([3.0, 2, 1, 1, 0.5])) @ right.mT).to(device_of(backend))
        u, v = normal(24, device=device_of(backend)), normal(24, device=device_of(backend))
        sigma = power_iteration(weight, u, v, iterations=40, backend=backend)
        assert sigma.shape == (1,)
        assert sigma.item() == pytest.approx(3, rel=1e-5)
        assert u.norm().item() == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(weight @ v, 3 * u, rtol=1e-4, atol=1e-4)

    @on_every_backend
    def test_it_follows_torchs_parametrization_step_by_step(self, backend: str) -> None:
        weights, _, _ = problem(device=device_of(backend))
        modules = [_SpectralNorm(weight).train() for weight in weights]
        u, v = [m._u.clone() for m in modules], [m._v.clone() for m in modules]
        for _ in range(4):
            normalized = spectral_normalize(weights, u, v, backend=backend)
            for i, (module, weight) in enumerate(zip(modules, weights, strict=True)):
                assert relative_error(normalized[i], module(weight)) < 1e-5
                assert relative_error(u[i], module._u) < 1e-5
                assert relative_error(v[i], module._v) < 1e-5

    @on_every_backend
    def test_no_iterations_leave_the_vectors(self, backend: str) -> None:
        weights, u, v = problem(device=device_of(backend))
        before = copies(u), copies(v)
        sigma = power_iteration(weights, u, v, iterations=0, backend=backend)
        for i in range(len(weights)):
            assert torch.equal(u[i], before[0][i])
            assert torch.equal(v[i], before[1][i])
            torch.testing.assert_close(sigma[i], u[i] @ (weights[i] @ v[i]), rtol=1e-5, atol=1e-5)

    @on_every_backend
    def test_steps_compose(self, backend: str) -> None:
        weights, u, v = problem(device=device_of(backend))
        others = copies(u), copies(v)
        power_iteration(weights, u, v, iterations=2, backend=backend)
        power_iteration(weights, *others, iterations=5, backend=backend)
        sigma = power_iteration(weights, u, v, iterations=3, backend=backend)
        assert relative_error(sigma, power_iteration(weights, *others, iterations=0, backend=backend)) < 1e-5
        for ours, expected in zip(u + v, others[0] + others[1], strict=True):
            assert relative_error(ours, expected) < 1e-5

    @on_every_backend
    def test_each_matrix_is_alone(self, backend: str) -> None:
        weights, u, v = problem(device=device_of(backend))
        others = copies(u), copies(v)
        together = power_iteration(weights, u, v, backend=backend)
        for i, weight in enumerate(weights):
            alone = power_iteration(weight, others[0][i], others[1][i], backend=backend)
            assert torch.equal(together[i : i + 1], alone)
            assert torch.equal(u[i], others[0][i])
            assert torch.equal(v[i], others[1][i])

    @on_native_backends
    def test_bits_do_not_depend_on_threads(self, backend: str) -> None:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            weights, u, v = problem(device=device_of(backend))
            sigma = power_iteration(weights, u, v, iterations=2, backend=backend)
            results.append([sigma, *u, *v, *spectral_normalize(weights, u, v, iterations=3, backend=backend), *u, *v])
        assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))

    @on_native_backends
    @pytest.mark.parametrize("iterations", [0, 1, 3])
    def test_a_step_and_the_division_at_once_or_in_turn(self, backend: str, iterations: int) -> None:
        weights, u, v = problem(device=device_of(backend))
        others = copies(u), copies(v)
        together = spectral_normalize(weights, u, v, iterations=iterations, backend=backend)
        power_iteration(weights, *others, iterations=iterations, backend=backend)
        in_turn = spectral_normalize(weights, *others, iterations=0, backend=backend)
        for one, other in zip(u + v, others[0] + others[1], strict=True):
            assert torch.equal(one, other)
        for one, other in zip(together, in_turn, strict=True):
            assert relative_error(one, other) < 1e-6  # of sigma: as |W^T u|, or as u^T W v

    @on_every_backend
    def test_a_zero_matrix_gives_zero_and_finite_vectors(self, backend: str) -> None:
        _, u, v = problem([(5, 7)], device=device_of(backend))
        sigma = power_iteration(torch.zeros(5, 7, device=device_of(backend)), u[0], v[0], backend=backend)
        assert sigma.item() == 0
        assert torch.equal(u[0], torch.zeros_like(u[0]))
        assert torch.equal(v[0], torch.zeros_like(v[0]))

    @on_every_backend
    def test_nan_stays_in_its_weight(self, backend: str) -> None:
        weights, u, v = problem(device=device_of(backend))
        weights[5][10, 100] = torch.nan
        sigma = power_iteration(weights, u, v, backend=backend)
        assert sigma.isnan().tolist() == [i == 5 for i in range(len(weights))]
        assert all((x.isnan().any().item(), x.isnan().all().item()) == (i == 5,) * 2 for i, x in enumerate(u))
        assert all((x.isnan().any().item(), x.isnan().all().item()) == (i == 5,) * 2 for i, x in enumerate(v))

    @on_every_backend
    def test_no_matrices(self, backend: str) -> None:
        assert power_iteration([], [], [], backend=backend).shape == (0,)
        assert spectral_normalize([], [], [], backend=backend) == []

    @on_every_backend
    def test_nothing_returned_aliases(self, backend: str) -> None:
        weights, u, v = problem(device=device_of(backend))
        sigma = power_iteration(weights, u, v, backend=backend)
        outputs = spectral_normalize(weights, u, v, iterations=0, backend=backend)
        pointers = [x.untyped_storage().data_ptr() for x in [sigma, *outputs, *weights, *u, *v]]
        assert len(set(pointers)) == len(pointers)

    @on_every_backend
    def test_autocast_does_not_lower_it(self, backend: str) -> None:
        weights, u, v = problem(device=device_of(backend))
        others = copies(u), copies(v)
        sigma = power_iteration(weights, u, v, backend=backend)
        with torch.autocast(device_of(backend), dtype=torch.bfloat16):
            cast = power_iteration(weights, *others, backend=backend)
        assert cast.dtype == torch.float32
        assert torch.equal(sigma, cast)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: w.mT.contiguous().mT,
    "rows_apart": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "columns_apart": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    "permuted": lambda w: torch.stack([w, w]).permute(1, 2, 0).contiguous().permute(2, 0, 1)[1],
}


class TestNumbers:
    @on_every_backend
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("iterations", [0, 1, 3])
    def test_every_dtype_is_close_to_float64(self, backend: str, dtype: torch.dtype, iterations: int) -> None:
        weights, u, v = problem(dtype=dtype, device=device_of(backend), vectors=torch.float32)
        expected, wide = exact(weights, u, v, iterations=iterations)
        sigma = power_iteration(weights, u, v, iterations=iterations, backend=backend)
        assert sigma.dtype == torch.float32  # sums and vectors are float32 whatever the weights are
        torch.testing.assert_close(sigma.double(), expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(u + v, wide[1] + wide[2], strict=True):
            assert relative_error(ours, theirs) < 1e-5

    @on_every_backend
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_vectors_keep_their_own_dtype(self, backend: str, dtype: torch.dtype) -> None:
        weights, u, v = problem(dtype=dtype, device=device_of(backend))
        expected, wide = exact(weights, u, v)
        sigma = power_iteration(weights, u, v, backend=backend)
        assert relative_error(sigma, expected) < 1e-5
        for ours, theirs in zip(u + v, wide[1] + wide[2], strict=True):
            assert ours.dtype == dtype
            assert relative_error(ours, theirs) < TOLERANCES[dtype].output

    @on_every_backend
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_do_not_matter(self, backend: str, dtype: torch.dtype, layout: str) -> None:
        weights, u, v = problem(dtype=dtype, device=device_of(backend), vectors=torch.float32)
        laid_out = [LAYOUTS[layout](weight) for weight in weights]
        others = copies(u), copies(v)
        expected = power_iteration(weights, u, v, iterations=2, backend=backend)
        sigma = power_iteration(laid_out, *others, iterations=2, backend=backend)
        assert relative_error(sigma, expected) < 1e-5
        for ours, theirs in zip(
            spectral_normalize(laid_out, *others, backend=backend),
            spectral_normalize(weights, u, v, backend=backend),
            strict=True,
        ):
            assert ours.is_contiguous()
            assert relative_error(ours, theirs) < TOLERANCES[dtype].output

    @on_every_backend
    def test_strided_vectors(self, backend: str) -> None:
        weights, u, v = problem(device=device_of(backend))
        spread_u, spread_v = ([torch.stack([x, x], 1)[:, 0] for x in xs] for xs in (u, v))
        sigma = power_iteration(weights, spread_u, spread_v, backend=backend)
        assert_same(sigma, power_iteration(weights, u, v, backend=backend), backend)
        for ours, expected in zip(spread_u + spread_v, u + v, strict=True):
            assert_same(ours, expected, backend)

    @on_every_backend
    @pytest.mark.parametrize("scale", [1e-8, 1e8])
    def test_scale_of_the_weights(self, backend: str, scale: float) -> None:
        weights, u, v = problem(device=device_of(backend))
        weights = [weight * scale for weight in weights]
        expected, wide = exact(weights, u, v, iterations=2)
        assert relative_error(power_iteration(weights, u, v, iterations=2, backend=backend), expected) < 1e-5
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(u + v, wide[1] + wide[2], strict=True))

    @on_native_backends
    def test_mixed_dtypes(self, backend: str) -> None:
        weights, u, v = problem([(5, 7), (40, 30), (9, 9)], device=device_of(backend))
        weights = [weight.to(dtype) for weight, dtype in zip(weights, DTYPES, strict=True)]
        expected, _ = exact(weights, u, v)
        assert relative_error(power_iteration(weights, u, v, backend=backend), expected) < 1e-5


class TestGradients:
    @on_every_backend
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradient_is_the_outer_product(self, backend: str, dtype: torch.dtype) -> None:
        weights, u, v = problem(dtype=dtype, device=device_of(backend), vectors=torch.float32)
        leaves = [weight.requires_grad_() for weight in weights]
        factors = normal(len(weights), seed=7, device=device_of(backend))
        grads = torch.autograd.grad(power_iteration(leaves, u, v, backend=backend) @ factors, leaves)
        for i, grad in enumerate(grads):
            assert grad.dtype == dtype
            assert relative_error(grad, factors[i] * torch.outer(u[i], v[i])) < TOLERANCES[dtype].gradient

    @on_every_backend
    def test_two_forwards_before_a_backward(self, backend: str) -> None:
        """As in loss = D(real) - D(fake): each call's gradient has the vectors of that call."""
        weights, u, v = problem(device=device_of(backend))
        leaf = weights[0].requires_grad_()
        first = power_iteration(leaf, u[0], v[0], backend=backend)
        then = torch.outer(u[0], v[0])
        second = power_iteration(leaf, u[0], v[0], backend=backend)
        (grad,) = torch.autograd.grad(2 * first - second, leaf)
        assert relative_error(grad, 2 * then - torch.outer(u[0], v[0])) < 1e-5

    @on_every_backend
    def test_normalized_gradients_match_torchs(self, backend: str) -> None:
        weights, _, _ = problem(device=device_of(backend))
        modules = [_SpectralNorm(weight.double()).train() for weight in weights]
        u, v = [m._u.float() for m in modules], [m._v.float() for m in modules]
        for i, module in enumerate(modules):
            leaf, wide = weights[i].requires_grad_(), weights[i].detach().double().requires_grad_()
            (ours,) = spectral_normalize([leaf], [u[i]], [v[i]], backend=backend)
            theirs, direction = module(wide), normal(*leaf.shape, seed=9, device=leaf.device.type)
            (grad,) = torch.autograd.grad((ours * direction).square().sum(), leaf, create_graph=True)
            (expected,) = torch.autograd.grad((theirs * direction).square().sum(), wide, create_graph=True)
            scale = 1 if leaf.numel() > 1 else expected.abs().item() + 1  # of one number, the gradient vanishes
            assert (grad - expected).norm() / scale < 5e-5 * max(expected.norm().item(), 1)
            (second,) = torch.autograd.grad(grad.square().sum(), leaf)
            (expected,) = torch.autograd.grad(expected.square().sum(), wide)
            assert (second - expected).norm() / scale < 5e-4 * max(expected.norm().item(), 1)

    def test_frozen_weights_get_no_graph(self) -> None:
        weights, u, v = problem([(5, 7)])
        assert not power_iteration(weights, u, v).requires_grad
        with torch.no_grad():
            assert not power_iteration([weights[0].requires_grad_()], u, v).requires_grad

    @pytest.mark.parametrize("function", [power_iteration, lambda *a, **k: spectral_normalize(*a, **k)[0]])
    def test_reference_has_derivatives_to_second_order(self, function: Callable[..., Tensor]) -> None:
        (weight,), u, v = problem([(4, 6)], torch.float64)
        at = [lambda w: function([w], u, v, iterations=0, backend="reference")]
        assert torch.autograd.gradcheck(at[0], weight.requires_grad_())
        assert torch.autograd.gradgradcheck(at[0], weight)

    def test_library_ops_have_derivatives_to_second_order(self) -> None:
        """The derivatives of the native path, in float64: its own forward is float32, a difference quotient is not."""
        (weight,), u, v = problem([(4, 6)], torch.float64)
        uv = torch.cat([*u, *v])
        weight.requires_grad_()

        def singular_value(w: Tensor) -> Tensor:
            value = torch.ops.nystromgan.singular_value([w], (u[0] @ w @ v[0]).detach()[None], uv)
            return value * value

        assert torch.autograd.gradcheck(singular_value, weight)
        assert torch.autograd.gradgradcheck(singular_value, weight)

    @on_native_backends
    def test_transforms_of_torch_func_give_the_same(self, backend: str) -> None:
        weights, u, v = problem([(5, 7), (3, 4)], device=device_of(backend))

        def loss(*weights: Tensor) -> Tensor:
            outputs = spectral_normalize(list(weights), u, v, iterations=0, backend=backend)
            sigma = power_iteration(list(weights), u, v, iterations=0, backend=backend)
            return sum((out.pow(3).sum() for out in outputs), sigma.square().sum())

        def penalty(*weights: Tensor) -> Tensor:
            return sum(
                (g.square().sum() for g in torch.func.grad(loss, (0, 1))(*weights)),
                torch.zeros((), device=device_of(backend)),
            )

        leaves = [w.clone().requires_grad_() for w in weights]
        firsts = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        seconds = torch.autograd.grad(sum(g.square().sum() for g in firsts), leaves)
        found = torch.func.grad(loss, (0, 1))(*weights), torch.func.grad(penalty, (0, 1))(*weights)
        for grads, expected in zip(found, (firsts, seconds), strict=True):
            torch.testing.assert_close(grads, tuple(x.detach() for x in expected))


class TestNormalizeBackward:
    """The first derivative of W / sigma, an op of its own, against the definition in float64."""

    @on_native_backends
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradients(self, backend: str, dtype: torch.dtype) -> None:
        weights, u, v = problem(dtype=dtype, device=device_of(backend), vectors=torch.float32)
        grads = [normal(*w.shape, dtype=dtype, device=device_of(backend), seed=7) for w in weights]
        results = []
        for wide in (False, True):
            cast = torch.float64 if wide else None
            leaves = [w.requires_grad_() for w in copies(weights, cast)]
            outputs = spectral_normalize(
                leaves, copies(u, cast), copies(v, cast), backend="reference" if wide else backend
            )
            results.append(torch.autograd.grad(outputs, leaves, copies(grads, cast)))
        for i, (actual, expected) in enumerate(zip(*results, strict=True)):
            assert actual.dtype == dtype
            # Of one number the gradient is 0: all of grad / sigma lies along W_sn and is taken away.
            size = expected.norm() + grads[i].double().norm() / weights[i].double().norm()
            assert (actual.double() - expected).norm() / size < (1e-5 if dtype == torch.float32 else 2e-2), SHAPES[i]

    @on_native_backends
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_of_gradients(self, backend: str, layout: str) -> None:
        weights, u, v = problem(device=device_of(backend))
        leaves = [w.requires_grad_() for w in weights]
        grads = [normal(*w.shape, device=device_of(backend), seed=7) for w in weights]
        outputs = spectral_normalize(leaves, u, v, backend=backend)
        expected = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        actual = torch.autograd.grad(outputs, leaves, [LAYOUTS[layout](grad) for grad in grads])
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class TestRecycledMemory:
    """Outputs reuse the memory of outputs that are gone, and of no others."""

    SHAPES = ((512, 100), (300, 400))

    def step(self, weights: list[Tensor], u: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        return spectral_normalize(weights, u, v, iterations=0, backend="cpu")

    @pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not built")
    def test_memory_comes_back_once_nobody_holds_it(self) -> None:
        weights, u, v = problem(list(self.SHAPES))
        first = self.step(weights, u, v)
        places = {x.data_ptr() for x in first}
        views, values = [x[1:].detach() for x in first], [x[1:].clone() for x in first]
        del first
        second = self.step([2 * w for w in weights], u, v)  # other weights
        third = self.step(weights, u, v)  # the same weights, while views of the first outputs live
        assert not places & {x.data_ptr() for x in (*second, *third)}
        assert all(torch.equal(view, value) for view, value in zip(views, values, strict=True))
        del views
        assert {x.data_ptr() for x in self.step(weights, u, v)} == places

    @pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not built")
    def test_gradients_that_are_kept_stay(self) -> None:
        weights, u, v = problem(list(self.SHAPES))
        leaves = [w.requires_grad_() for w in weights]
        for _ in range(6):
            sum(x.square().sum() for x in self.step(leaves, u, v)).backward()
        kept = [w.grad.clone() for w in leaves]
        expected = [x.clone() for x in self.step(leaves, u, v)]
        held = [self.step(leaves, copies(u), copies(v)) for _ in range(6)]
        assert all(torch.equal(w.grad, grad) for w, grad in zip(leaves, kept, strict=True))
        for outputs in held:
            assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))


def native_arguments(backend: str) -> tuple[Problem, Tensor, Tensor]:
    weights, u, v = problem([(5, 7), (40, 30)], device=device_of(backend))
    sigma = power_iteration(weights, u, v, backend=backend)
    return (weights, u, v), sigma, torch.cat([*u, *v])


class SpectralLinear(torch.nn.Module):
    """A linear layer that normalises its weight with our op."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(normal(12, 9))
        for name, size in (("u", 12), ("v", 9)):
            self.register_buffer(name, torch.nn.functional.normalize(normal(size, seed=size), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        sigma = power_iteration([self.weight], [self.u], [self.v])
        (weight,) = spectral_normalize([self.weight], [self.u], [self.v])
        return x @ weight.mT * sigma


class TestTorch:
    @on_native_backends
    def test_opcheck(self, backend: str) -> None:
        (weights, u, v), sigma, uv = native_arguments(backend)
        leaves = [weight.requires_grad_() for weight in weights]
        ops = torch.ops.nystromgan
        torch.library.opcheck(ops.power_iteration_.default, (copies(weights), u, v, 2, 1e-12, backend))
        torch.library.opcheck(ops.singular_value.default, (leaves, sigma, uv))
        torch.library.opcheck(ops.spectral_normalize.default, (leaves, sigma, uv, backend))
        if backend == "cpu":
            torch.library.opcheck(ops.spectral_step.default, (leaves, u, v, 2, 1e-12))
        matrices = copies(weights)
        torch.library.opcheck(
            ops.spectral_normalize_backward.default, (matrices, copies(weights), matrices, sigma, uv, backend)
        )

    @on_every_backend
    def test_compile_updates_in_place(self, backend: str) -> None:
        torch._dynamo.reset()
        weights, u, v = problem([(5, 7), (40, 30)], device=device_of(backend))
        others = copies(u), copies(v)
        leaves = [weight.requires_grad_() for weight in weights]

        def loss(u: list[Tensor], v: list[Tensor]) -> Tensor:
            normalized = spectral_normalize(leaves, u, v, backend=backend)
            return power_iteration(leaves, u, v, backend=backend).sum() + sum(x.square().sum() for x in normalized)

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            ours, expected = compiled(u, v), loss(*others)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
            for a, b in zip(u + v, others[0] + others[1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_compile_as_the_first_call(self) -> None:
        code = (
            "import torch, nystromgan\n"
            "w, u, v = torch.ones(8, 9), torch.ones(8), torch.ones(9)\n"
            "f = torch.compile(lambda w, u, v: nystromgan.power_iteration(w, u, v), fullgraph=True)\n"
            "assert abs(f(w, u, v).item() - 72 ** 0.5) < 1e-4 and abs(u.norm().item() - 1) < 1e-5\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)

    def test_export(self) -> None:
        module, expected = SpectralLinear(), SpectralLinear()
        expected.load_state_dict(module.state_dict())
        x = normal(3, 9)
        program = torch.export.export(module, (x,)).module()
        for _ in range(2):
            torch.testing.assert_close(program(x), expected(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dict(program.named_buffers())["u"], expected.u, rtol=1e-5, atol=1e-6)


def refused(**changes: object) -> None:
    arguments: dict = dict(zip(("weights", "u", "v"), problem([(5, 7), (4, 3)]), strict=True))
    power_iteration(**{**arguments, **changes})


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"u": [torch.ones(5)]}, ValueError, "u must have one vector for each of the 2 weights, got 1"),
            ({"v": torch.ones(7)}, TypeError, "v must be a sequence as weights is, got Tensor"),
            ({"weights": 3}, TypeError, "weights must be a matrix or a sequence of matrices, got int"),
            ({"weights": [torch.ones(5, 7), None]}, TypeError, r"weights\[1\] must be a tensor, got NoneType"),
            (
                {"weights": [torch.ones(5, 7), torch.ones(4)]},
                ValueError,
                r"weights\[1\] must have 2 axes, got .*4",
            ),
            ({"weights": [torch.ones(5, 7), torch.ones(0, 3)]}, ValueError, r"weights\[1\] axis 0 must be at least 1"),
            ({"u": [torch.ones(5), torch.ones(4, 1)]}, ValueError, r"u\[1\] must have 1 axes, got shape \(4, 1\)"),
            ({"v": [torch.ones(7), torch.ones(4)]}, ValueError, r"v\[1\] axis 0 must be 3 \(weights\[1\] axis 1\)"),
            ({"u": [torch.ones(5), torch.ones(4).long()]}, TypeError, r"u\[1\] must have a floating.*int64"),
            ({"weights": [torch.ones(5, 7).int()] * 2}, TypeError, r"weights\[0\] must have a floating.*int32"),
            ({"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
            ({"iterations": 1.5}, TypeError, "iterations must be an integer, got 1.5"),
            ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
            ({"eps": float("nan")}, ValueError, "eps must be finite, got nan"),
            ({"u": [torch.ones(5), torch.ones(4).requires_grad_()]}, ValueError, r"u\[1\] must not require grad"),
            (
                {"v": [torch.ones(7), torch.ones(3, device="meta")]},
                ValueError,
                r"v\[1\] must have weights\[1\]'s",
            ),
            ({"backend": "quantum"}, ValueError, "backend must be one of .*quantum"),
        ],
    )
    def test_message_names_argument_rule_and_value(self, changes: dict, error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            refused(**changes)

    def test_float64_on_a_native_backend(self) -> None:
        weights, u, v = problem([(5, 7)], torch.float64)
        with pytest.raises(UnsupportedError, match="float64"):
            nystromgan.power_iteration(weights, u, v, backend="cpu")
