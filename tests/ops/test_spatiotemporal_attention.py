"""spatiotemporal_attention: exact attention straight from channel-first maps. Properties, numbers, refusals."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nystromgan import UnsupportedError, spatiotemporal_attention
from nystromgan._library import vjp_of_vjp
from nystromgan.ops.spatiotemporal_attention import reference
from nystromgan.ops.spatiotemporal_attention.reference import Cotangents
from nystromgan.testing import (
    NATIVE_DTYPES,
    assert_matches_reference,
    assert_same,
    backends_of,
    device_of,
    eager_spatiotemporal_attention,
    map_inputs,
    native_backends_of,
    normal,
    relative_error,
)

on_every_backend = pytest.mark.parametrize("backend", backends_of("spatiotemporal_attention"))
in_every_dtype = pytest.mark.parametrize("dtype", NATIVE_DTYPES)


def run(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, ...]:
    """Output and gradients, against a direction that is the same for the same row."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    output = spatiotemporal_attention(**leaves, **options)  # type: ignore[arg-type]
    direction = normal(*output.shape[1:], dtype=output.dtype, device=output.device.type).expand_as(output)
    return output.detach(), *torch.autograd.grad(output, list(leaves.values()), direction)


@on_every_backend
class TestProperties:
    def test_is_the_formula_position_by_position(self, backend: str) -> None:
        inputs = map_inputs(1, 4, (2, 3), (2, 2), 6, device=device_of(backend))
        output = spatiotemporal_attention(**inputs, num_heads=2, scale=0.7, backend=backend).double()
        query, key, value = (x.double().unflatten(1, (2, -1)) for x in inputs.values())
        for head in range(2):
            for row, column in ((0, 0), (1, 2)):
                logits = torch.stack([query[0, head, :, row, column] @ k for k in key[0, head].flatten(1).T])
                expected = (0.7 * logits).softmax(0) @ value[0, head].flatten(1).T
                assert relative_error(output.unflatten(1, (2, -1))[0, head, :, row, column], expected) < 1e-6

    @pytest.mark.parametrize("grid", [(7,), (5, 3), (2, 3, 4)])
    def test_grids_of_one_to_three_axes_are_their_flat_positions(self, backend: str, grid: tuple[int, ...]) -> None:
        inputs = map_inputs(grid=grid, device=device_of(backend))
        flat = {name: x.flatten(2) for name, x in inputs.items()}
        output = spatiotemporal_attention(**inputs, backend=backend)
        assert output.shape == (2, 8, *grid)
        assert_same(output.flatten(2), spatiotemporal_attention(**flat, backend=backend), backend)

    def test_the_order_of_the_keys_does_not_matter(self, backend: str) -> None:
        inputs = map_inputs(grid=(60,), device=device_of(backend))
        order = normal(60).argsort().to(device_of(backend))
        shuffled = {**inputs, "key": inputs["key"][:, :, order], "value": inputs["value"][:, :, order]}
        output = spatiotemporal_attention(**shuffled, backend=backend)
        assert relative_error(output, spatiotemporal_attention(**inputs, backend=backend)) < 1e-6

    def test_heads_are_consecutive_channels(self, backend: str) -> None:
        inputs = map_inputs(channels=6, value_channels=9, device=device_of(backend))
        together = spatiotemporal_attention(**inputs, num_heads=3, backend=backend)
        apart = [
            spatiotemporal_attention(*parts, backend=backend)
            for parts in zip(*(x.chunk(3, dim=1) for x in inputs.values()), strict=True)
        ]
        assert_same(together, torch.cat(apart, dim=1), backend)

    def test_one_key_gives_its_value(self, backend: str) -> None:
        inputs = map_inputs(grid=(3, 5), key_grid=(1, 1), device=device_of(backend))
        output = spatiotemporal_attention(**inputs, backend=backend)
        torch.testing.assert_close(output, inputs["value"].expand_as(output), rtol=1e-6, atol=0)

    def test_huge_logits_do_not_overflow(self, backend: str) -> None:
        inputs = map_inputs(device=device_of(backend))
        inputs["query"] = inputs["query"] * 1e4
        picked = (inputs["query"].flatten(2).mT @ inputs["key"].flatten(2)).argmax(-1)  # (B, N)
        expected = inputs["value"].flatten(2).gather(2, picked[:, None].expand(-1, 8, -1))
        output = spatiotemporal_attention(**inputs, backend=backend)
        assert relative_error(output.flatten(2), expected) < 1e-3

    @in_every_dtype
    def test_a_row_does_not_see_its_batch_mates_nor_their_order(self, backend: str, dtype: torch.dtype) -> None:
        inputs = map_inputs(4, dtype=dtype, device=device_of(backend))
        together = run(inputs, num_heads=2, backend=backend)
        order = [2, 0, 3, 1]
        shuffled = run({name: x[order] for name, x in inputs.items()}, num_heads=2, backend=backend)
        for value, expected in zip(shuffled, together, strict=True):
            assert_same(value, expected[order], backend)
        for i in range(4):
            alone = run({name: x[i : i + 1] for name, x in inputs.items()}, num_heads=2, backend=backend)
            for value, expected in zip(together, alone, strict=True):
                assert_same(value[i : i + 1], expected, backend)

    @in_every_dtype
    @pytest.mark.parametrize("grid", [(5, 7), (31, 33)])
    def test_two_runs_and_any_number_of_threads_give_the_same_bits(
        self, backend: str, dtype: torch.dtype, grid: tuple[int, ...]
    ) -> None:
        inputs = map_inputs(1, grid=grid, dtype=dtype, device=device_of(backend))
        inputs["gamma"] = torch.tensor(0.5, device=device_of(backend))
        first, second = (run(inputs, backend=backend) for _ in range(2))
        assert all(map(torch.equal, first, second))
        torch.set_num_threads(1)
        for value, expected in zip(run(inputs, backend=backend), first, strict=True):
            assert_same(value, expected, backend)

    def test_nan_stays_where_the_formula_takes_it(self, backend: str) -> None:
        inputs = map_inputs(2, grid=(4, 5), device=device_of(backend))
        clean = spatiotemporal_attention(**inputs, num_heads=2, backend=backend)
        for name, where in (("query", (1, slice(4, 8), 2, 3)), ("value", (1, 5)), ("key", (1, slice(4, 8)))):
            dirty_inputs = {**inputs, name: inputs[name].clone()}
            dirty_inputs[name][1, 5, 2, 3] = torch.nan
            dirty = spatiotemporal_attention(**dirty_inputs, num_heads=2, backend=backend)
            touched = torch.zeros_like(clean, dtype=torch.bool)
            touched[where] = True
            assert torch.equal(dirty.isnan(), touched)
            assert_same(dirty[~touched], clean[~touched], backend)

    def test_strides_do_not_matter(self, backend: str) -> None:
        device = device_of(backend)
        packed = normal(2, 24, 4, 5, 6, device=device)
        views = [
            dict(zip(("query", "key", "value"), packed.split(8, 1), strict=True)),  # channels of one projection
            dict.fromkeys(("query", "key", "value"), packed.contiguous(memory_format=torch.channels_last_3d)),
            dict.fromkeys(("query", "key", "value"), packed.transpose(2, 4)),
            dict.fromkeys(("query", "key", "value"), packed[:, ::3, :, 1:, ::2]),
            dict.fromkeys(("query", "key", "value"), packed[:1, :, :, :1].expand(2, 24, 4, 5, 6)),
        ]
        for inputs in views:
            expected = run({name: x.contiguous() for name, x in inputs.items()}, backend=backend)
            for value, other in zip(run(inputs, backend=backend), expected, strict=True):
                assert_same(value, other, backend)


@on_every_backend
class TestEpilogue:
    def test_is_gamma_times_attention_plus_residual(self, backend: str) -> None:
        device = device_of(backend)
        inputs = map_inputs(value_channels=12, device=device)
        residual, gamma = normal(2, 12, 3, 4, 5, device=device, seed=9), torch.tensor(0.3, device=device)
        plain = spatiotemporal_attention(**inputs, backend=backend)
        for options, expected in (
            ({"gamma": gamma}, 0.3 * plain),
            ({"residual": residual}, plain + residual),
            ({"gamma": gamma, "residual": residual}, 0.3 * plain + residual),
            ({"gamma": gamma.reshape(1), "residual": residual}, 0.3 * plain + residual),
        ):
            fused = spatiotemporal_attention(**inputs, **options, backend=backend)
            torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)

    def test_gamma_zero_gives_the_residual_and_gammas_gradient(self, backend: str) -> None:
        """The block starts there, and must leave it."""
        device = device_of(backend)
        inputs = map_inputs(device=device)
        residual = normal(2, 8, 3, 4, 5, device=device, seed=9)
        gamma = torch.zeros((), device=device, requires_grad=True)
        output = spatiotemporal_attention(**inputs, gamma=gamma, residual=residual, backend=backend)
        assert torch.equal(output.detach(), residual)
        direction = normal(*output.shape, device=device, seed=10)
        (grad,) = torch.autograd.grad(output, gamma, direction)
        attended = spatiotemporal_attention(**inputs, backend=backend)
        assert grad.item() == pytest.approx((direction * attended).sum().item(), rel=1e-4)

    @in_every_dtype
    @pytest.mark.parametrize("names", [("gamma",), ("residual",), ("gamma", "residual")])
    def test_against_float64(self, backend: str, dtype: torch.dtype, names: tuple[str, ...]) -> None:
        device = device_of(backend)
        inputs = map_inputs(grid=(5, 9), dtype=dtype, device=device)
        extra = {"gamma": torch.tensor(-0.7, dtype=dtype, device=device)}
        extra["residual"] = normal(2, 8, 5, 9, dtype=dtype, device=device, seed=9)
        inputs |= {name: extra[name] for name in names}
        assert_matches_reference(spatiotemporal_attention, inputs, backend, num_heads=2)

    def test_gamma_in_float32_beside_half_precision_maps(self, backend: str) -> None:
        device = device_of(backend)
        inputs = map_inputs(dtype=torch.bfloat16, device=device) | {"gamma": torch.tensor(0.7, device=device)}
        _, *grads = run(inputs, backend=backend)
        assert [grad.dtype for grad in grads] == [torch.bfloat16] * 3 + [torch.float32]
        assert_matches_reference(spatiotemporal_attention, inputs, backend)


@on_every_backend
class TestAgainstFloat64:
    """N(0, 1) inputs; with one head no worse than eager either."""

    @in_every_dtype
    @pytest.mark.parametrize(
        ("channels", "value_channels"),
        [(1, 1), (1, 7), (4, 32), (8, 64), (16, 128), (15, 17), (32, 5), (64, 64), (100, 80), (256, 256)],
    )
    def test_channels(self, backend: str, dtype: torch.dtype, channels: int, value_channels: int) -> None:
        inputs = map_inputs(1, channels, (5, 21), None, value_channels, dtype=dtype, device=device_of(backend))
        assert_matches_reference(spatiotemporal_attention, inputs, backend, eager=eager_spatiotemporal_attention)

    @in_every_dtype
    @pytest.mark.parametrize(
        ("grid", "key_grid"),
        [
            ((1,), (1,)),
            ((1,), (9,)),
            ((2,), (300,)),
            ((300,), (2,)),
            ((17,), (65,)),
            ((129,), (31,)),
            ((33, 31), (33, 31)),
            ((16, 16), (8, 8)),
            ((4, 8, 8), (2, 4, 4)),
        ],
    )
    def test_grids(self, backend: str, dtype: torch.dtype, grid: tuple[int, ...], key_grid: tuple[int, ...]) -> None:
        inputs = map_inputs(2, 8, grid, key_grid, 16, dtype=dtype, device=device_of(backend))
        assert_matches_reference(spatiotemporal_attention, inputs, backend, eager=eager_spatiotemporal_attention)

    @in_every_dtype
    @pytest.mark.parametrize("num_heads", [2, 3, 6])
    def test_heads(self, backend: str, dtype: torch.dtype, num_heads: int) -> None:
        inputs = map_inputs(2, 12, (7, 9), (5, 4), 18, dtype=dtype, device=device_of(backend))
        assert_matches_reference(spatiotemporal_attention, inputs, backend, num_heads=num_heads)


@pytest.mark.parametrize("epilogue", [False, True])
def test_derivatives_of_every_order(epilogue: bool) -> None:
    wide = {name: x.requires_grad_() for name, x in map_inputs(1, 2, (3,), (2,), 2, dtype=torch.float64).items()}
    extra = [torch.tensor(0.5, dtype=torch.float64), normal(1, 2, 3, dtype=torch.float64)] if epilogue else []
    inputs = [*wide.values(), *(x.requires_grad_() for x in extra)]

    def function(*tensors: Tensor) -> Tensor:
        return spatiotemporal_attention(*tensors[:3], **dict(zip(("gamma", "residual"), tensors[3:], strict=False)))

    torch.autograd.gradcheck(function, inputs)
    torch.autograd.gradgradcheck(function, inputs)


class TestSecondDerivative:
    """What every backend differentiates its backward with, in float64 beside autograd's of the definition."""

    @staticmethod
    def problem(masked: bool, scaled: bool) -> tuple[list[Tensor | None], Cotangents]:
        """grad_output, query, key, value, mask and gamma; the cotangents of the gradients."""

        def draw(*shape: int, seed: int) -> Tensor:
            return normal(*shape, dtype=torch.float64, seed=seed)

        shapes = ((2, 3, 5, 6), (2, 3, 4, 6), (2, 3, 4, 7), (2, 3, 5, 7))
        tensors = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
        mask = normal(2, 7, seed=5) > 0.5
        mask[0] = True  # a row without a key
        gamma, of_gamma = (torch.tensor(x, dtype=torch.float64) if scaled else None for x in (0.7, 1.3))
        others = (draw(*x.shape, seed=10 + i) for i, x in enumerate(tensors[1:]))
        return [*tensors, mask if masked else None, gamma], Cotangents(*others, of_gamma)

    @pytest.mark.parametrize("elements", [1, 100, 2**20])
    @pytest.mark.parametrize("left_out", [(), (0,), (1,), (2,), (3,), (0, 1), (0, 2), (1, 2)])
    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_is_that_of_the_definition_in_blocks_of_any_size(
        self, masked: bool, scaled: bool, left_out: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(reference.MOST_ELEMENTS, "cpu", elements)
        monkeypatch.setattr(reference, "LEAST_QUERIES", 1)
        (grad_output, query, key, value, mask, gamma), cotangents = self.problem(masked, scaled)
        cotangents = Cotangents(*(None if i in left_out else x for i, x in enumerate(cotangents)))

        def definition(query: Tensor, key: Tensor, value: Tensor, gamma: Tensor | None) -> Tensor:
            return reference.spatiotemporal_attention(query, key, value, mask, gamma, None, 0.6)

        second, firsts = vjp_of_vjp(definition, [query, key, value, gamma], grad_output, cotangents)
        found = reference.second_derivative(grad_output, query, key, value, mask, gamma, 0.6, cotangents)
        for grad, expected in zip(found, [second, *firsts], strict=True):
            if grad is not None:
                torch.testing.assert_close(grad, torch.zeros_like(grad) if expected is None else expected)

    def test_has_derivatives_itself(self) -> None:
        (*tensors, mask, gamma), cotangents = self.problem(True, True)
        leaves = [x.requires_grad_() for x in (*tensors, gamma, *cotangents)]

        def function(*args: Tensor) -> tuple[Tensor, ...]:
            return reference.second_derivative(*args[:4], mask, args[4], 0.6, Cotangents(*args[5:]))

        torch.autograd.gradcheck(function, leaves, fast_mode=True)

    @pytest.mark.parametrize("backend", native_backends_of("spatiotemporal_attention"))
    def test_a_gradient_penalty_holds_no_matrix_of_all_pairs(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Largest(TorchDispatchMode):
            size = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                result = func(*args, **(kwargs or {}))
                for x in result if isinstance(result, (tuple, list)) else (result,):
                    self.size = max(self.size, x.numel()) if isinstance(x, Tensor) else self.size
                return result

        side = "cpu" if device_of(backend) == "cpu" else "cuda"
        monkeypatch.setitem(reference.MOST_ELEMENTS, side, 64 * 300)
        inputs = {name: x.requires_grad_() for name, x in map_inputs(1, 4, (300,), device=device_of(backend)).items()}
        grads = torch.autograd.grad(
            spatiotemporal_attention(**inputs, backend=backend).square().sum(), list(inputs.values()), create_graph=True
        )
        with Largest() as largest:
            torch.autograd.grad(sum(grad.square().sum() for grad in grads), list(inputs.values()))
        assert 0 < largest.size <= 64 * 300


T = torch.empty  # shapes of the wrong tensors below
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": 3.0}, TypeError, "query must be a tensor, got float"),
    ({"key": T(2, 8, 3, 4, dtype=torch.uint8)}, TypeError, "key must have a floating-point dtype, got torch.uint8"),
    ({"query": T(2, 8)}, ValueError, "query must be (B, C, *grid) with a grid of 1 to 3 axes, got shape (2, 8)"),
    ({"query": T(1, 1, 1, 1, 1, 1)}, ValueError, "query must be (B, C, *grid) with a grid of 1 to 3 axes, got shape"),
    ({"key": T(2, 8, 12)}, ValueError, "key must have 4 axes, got shape (2, 8, 12)"),
    ({"key": T(3, 8, 3, 4)}, ValueError, "key axis 0 must be 2 (query's batch), got shape (3, 8, 3, 4)"),
    ({"key": T(2, 6, 3, 4)}, ValueError, "key axis 1 must be 8 (query's channels), got shape (2, 6, 3, 4)"),
    ({"value": T(2, 8, 3, 5)}, ValueError, "value axis 3 must be 4 (key's grid), got shape (2, 8, 3, 5)"),
    ({"value": T(2, 8, 3, 4).half()}, ValueError, "value must have query's dtype torch.float32, got torch.float16"),
    ({"key": T(2, 8, 3, 4, device="meta")}, ValueError, "key must have query's device cpu, got meta"),
    ({"query": T(2, 8, 3, 0)}, ValueError, "query's axis 3 must be at least 1, got 0"),
    ({"value": T(2, 0, 3, 4)}, ValueError, "value's axis 1 must be at least 1, got 0"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an integer, got 2.0"),
    ({"num_heads": 3}, ValueError, "num_heads must divide query's 8 channels, got 3"),
    ({"num_heads": 4, "value": T(2, 6, 3, 4)}, ValueError, "num_heads must divide value's 6 channels, got 4"),
    ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ({"scale": torch.ones(())}, TypeError, "scale must be a real number, got tensor(1.)"),
    ({"gamma": 0.5}, TypeError, "gamma must be a tensor, got float"),
    ({"gamma": T(2)}, ValueError, "gamma must have one element, got shape (2,)"),
    ({"gamma": T((), device="meta")}, ValueError, "gamma must have query's device cpu, got meta"),
    ({"residual": T(2, 8, 4, 3)}, ValueError, "residual must have the output's shape (2, 8, 3, 4), got (2, 8, 4, 3)"),
    ({"residual": T(2, 8, 3, 4).int()}, TypeError, "residual must have a floating-point dtype, got torch.int32"),
    (
        {"backend": "flash"},
        ValueError,
        "backend must be one of ('auto', 'cuda', 'triton', 'cpu', 'reference'), got 'flash'",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_errors_name_argument_rule_and_value(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs: dict[str, Any] = map_inputs(grid=(3, 4))
    with pytest.raises(error, match=re.escape(message)):
        spatiotemporal_attention(**{**inputs, **wrong})


@pytest.mark.parametrize("backend", native_backends_of("spatiotemporal_attention"))
def test_a_named_backend_refuses_float64_and_never_falls_back(backend: str) -> None:
    with pytest.raises(UnsupportedError, match=f"backend '{backend}' cannot run .* got torch.float64"):
        spatiotemporal_attention(**map_inputs(dtype=torch.float64), backend=backend)


def test_an_empty_batch_is_no_error() -> None:
    inputs = {name: x.requires_grad_() for name, x in map_inputs(0).items()}
    output = spatiotemporal_attention(**inputs)
    assert torch.autograd.grad(output.sum(), inputs["key"])[0].shape == output.shape == (0, 8, 3, 4, 5)
