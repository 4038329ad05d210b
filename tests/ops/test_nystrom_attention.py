"""nystrom_attention against float64: outputs and gradients of every kind of call, in every dtype."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nystromgan import iterative_pinv, nystrom_attention
from nystromgan.ops.nystrom_attention.convolution import depthwise_convolution
from nystromgan.testing import (
    FINISHING,
    NATIVE_DTYPES,
    NO_TOLERANCE,
    TOLERANCES,
    assert_matches_reference,
    assert_same,
    attention_inputs,
    backends_of,
    device_of,
    eager_nystrom_attention,
    errors_of,
    finishing,
    large,
    normal,
    padding_mask,
    relative_error,
    smooth,
)

BACKENDS = backends_of("nystrom_attention")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", NATIVE_DTYPES)


def check(backend: str, num_landmarks: int, *, compare_eager: bool = True, tolerance=None, **sizes: object) -> None:
    """Plain segment means, against float64 and, but for the definition, which is eager itself, against eager."""
    inputs = attention_inputs(**sizes, device=device_of(backend))  # type: ignore[arg-type]
    compare_eager = compare_eager and backend != "reference"
    eager = functools.partial(eager_nystrom_attention, num_landmarks=num_landmarks) if compare_eager else None
    assert_matches_reference(
        nystrom_attention, inputs, backend, num_landmarks=num_landmarks, tolerance=tolerance, eager=eager
    )


class TestFormula:
    def test_reference_is_the_formula_of_the_docstring(self) -> None:
        """F Z (G V) from three softmaxes, one token, landmark and head at a time."""
        inputs = attention_inputs(1, 2, 7, 9, 3, 4, dtype=torch.float64)
        output = nystrom_attention(**inputs, num_landmarks=2, scale=0.7)
        for head in range(2):
            query, key, value = (tensor[0, head] for tensor in inputs.values())
            query_landmarks = torch.stack([query[:4].mean(0), query[4:].mean(0)])  # 7 = 4 + 3
            key_landmarks = torch.stack([key[:5].mean(0), key[5:].mean(0)])  # 9 = 5 + 4
            core = torch.softmax(0.7 * query_landmarks @ key_landmarks.T, 1)
            context = torch.softmax(0.7 * query_landmarks @ key.T, 1) @ value
            query_factor = torch.softmax(0.7 * query @ key_landmarks.T, 1)
            expected = query_factor @ (iterative_pinv(core) @ context)
            assert relative_error(output[0, head], expected) < 1e-14

    def test_scale_defaults_to_the_inverse_root_of_the_head_dim(self) -> None:
        inputs = attention_inputs(head_dim=9, dtype=torch.float64)
        assert torch.equal(nystrom_attention(**inputs), nystrom_attention(**inputs, scale=1 / 3))

    def test_sixty_four_landmarks_are_the_default(self) -> None:
        inputs = attention_inputs(queries=150)
        assert torch.equal(nystrom_attention(**inputs), nystrom_attention(**inputs, num_landmarks=64))

    @pytest.mark.parametrize("iterations", [0, 3, 9])  # after 12, rounding alone gives 4e-6 to 2e-5
    @on_every_backend
    def test_pinv_iterations(self, backend: str, iterations: int) -> None:
        inputs = attention_inputs(device=device_of(backend))
        options = {"num_landmarks": 8, "pinv_iterations": iterations}
        assert_matches_reference(nystrom_attention, inputs, backend, **options)  # type: ignore[arg-type]


@on_every_backend
class TestAgainstFloat64:
    # M and E of values that go through all, some and none of the last steps of the pseudo-inverse
    @pytest.mark.parametrize("iterations", [0, 1, 2, 3, 6, 8])
    @pytest.mark.parametrize(
        ("num_landmarks", "value_dim"), [(40, 20), (60, 7), (64, 8), (131, 3), (131, 16), (131, 40)]
    )
    def test_numbers_of_values_and_of_steps(
        self, backend: str, num_landmarks: int, value_dim: int, iterations: int
    ) -> None:
        sizes = {"queries": 400, "head_dim": 12, "value_dim": value_dim}
        inputs = attention_inputs(1, 1, **sizes, device=device_of(backend))
        options = {"num_landmarks": num_landmarks, "pinv_iterations": iterations}
        eager = functools.partial(eager_nystrom_attention, **options)
        exact = None if backend == "reference" else eager
        assert_matches_reference(nystrom_attention, inputs, backend, eager=exact, **options)

    @in_every_dtype
    @pytest.mark.parametrize("tokens", [normal, smooth, large])
    def test_kinds_of_tokens(self, backend: str, dtype: torch.dtype, tokens) -> None:
        tolerance = TOLERANCES[dtype] if tokens is normal else NO_TOLERANCE
        check(backend, 32, queries=300, head_dim=32, tokens=tokens, dtype=dtype, tolerance=tolerance)

    @in_every_dtype
    @pytest.mark.parametrize(("tokens", "num_landmarks"), [(2, 1), (5, 2), (31, 7), (128, 16), (129, 16), (1000, 64)])
    def test_numbers_of_tokens(self, backend: str, dtype: torch.dtype, tokens: int, num_landmarks: int) -> None:
        check(backend, num_landmarks, queries=tokens, dtype=dtype)

    @in_every_dtype
    @pytest.mark.parametrize(
        ("head_dim", "value_dim"),
        [
            (1, 1),
            (1, 5),
            (2, 2),
            (4, 32),
            (8, 64),
            (15, 17),
            (16, 1),
            (33, 16),
            (64, 64),
            (80, 100),
            (256, 130),
            (256, 256),
        ],
    )
    def test_head_dims(self, backend: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
        check(backend, 12, batch=1, queries=101, head_dim=head_dim, value_dim=value_dim, dtype=dtype)

    @in_every_dtype
    @pytest.mark.parametrize("num_landmarks", [1, 2, 3, 15, 17, 33, 63, 65, 100, 128])
    def test_numbers_of_landmarks(self, backend: str, dtype: torch.dtype, num_landmarks: int) -> None:
        check(backend, num_landmarks, batch=1, queries=301, dtype=dtype)

    @pytest.mark.parametrize(("num_landmarks", "value_dim"), [(64, 64), (96, 64), (128, 128), (160, 16), (160, 64)])
    def test_median_error_is_no_worse_than_eagers(self, backend: str, num_landmarks: int, value_dim: int) -> None:
        """Over draws, where what the order of sums does to a single one averages out."""
        ours = functools.partial(nystrom_attention, num_landmarks=num_landmarks, backend=backend)
        exact = functools.partial(nystrom_attention, num_landmarks=num_landmarks, backend="reference")
        eager = functools.partial(eager_nystrom_attention, num_landmarks=num_landmarks)
        sizes = {"batch": 2, "heads": 2, "queries": 3 * num_landmarks, "head_dim": 64, "value_dim": value_dim}

        def median_errors(form: Callable[..., Tensor]) -> Tensor:
            draws = (attention_inputs(**sizes, device=device_of(backend), seed=seed) for seed in range(7))
            found = [errors_of(form, exact, inputs) for inputs in draws]
            return torch.tensor([[each.output, *each.gradients.values()] for each in found]).median(0).values

        measured, bound = median_errors(ours), 1.1 * median_errors(eager)  # of the output, dQ, dK, dV
        assert (measured <= bound).all(), f"{measured.tolist()} > {bound.tolist()}"

    @pytest.mark.parametrize("num_landmarks", [256, 511, 512])
    def test_many_landmarks(self, backend: str, num_landmarks: int) -> None:
        check(backend, num_landmarks, batch=1, heads=1, queries=1100, dtype=torch.float32)

    @in_every_dtype
    @pytest.mark.parametrize(("queries", "keys"), [(50, 170), (170, 50), (33, 34), (9, 1000)])
    def test_cross_attention(self, backend: str, dtype: torch.dtype, queries: int, keys: int) -> None:
        check(backend, 8, queries=queries, keys=keys, dtype=dtype)

    @in_every_dtype
    def test_global_max_init(self, backend: str, dtype: torch.dtype) -> None:
        inputs = attention_inputs(3, dtype=dtype, device=device_of(backend))
        options = {"num_landmarks": 8, "pinv_init": "global_max"}
        assert_matches_reference(nystrom_attention, inputs, backend, **options)  # type: ignore[arg-type]

    @in_every_dtype
    @pytest.mark.parametrize("kernel_size", [1, 3, 33, 149])
    def test_conv_residual(self, backend: str, dtype: torch.dtype, kernel_size: int) -> None:
        inputs = attention_inputs(value_dim=5, dtype=dtype, device=device_of(backend))
        inputs["conv_weight"] = normal(2, kernel_size, dtype=dtype, device=device_of(backend)) / kernel_size**0.5
        assert_matches_reference(nystrom_attention, inputs, backend, num_landmarks=8)

    @in_every_dtype
    @pytest.mark.parametrize("names", [("gamma",), ("residual",), ("gamma", "residual"), FINISHING], ids="+".join)
    @pytest.mark.parametrize("count", [8, 67])
    def test_gamma_and_residual(self, backend: str, dtype: torch.dtype, names: tuple[str, ...], count: int) -> None:
        inputs = attention_inputs(value_dim=5, dtype=dtype, device=device_of(backend))
        inputs |= finishing(inputs, names)
        assert_matches_reference(nystrom_attention, inputs, backend, num_landmarks=count)

    @in_every_dtype
    @pytest.mark.parametrize("scattered", [False, True])
    def test_padding(self, backend: str, dtype: torch.dtype, scattered: bool) -> None:
        device = device_of(backend)
        inputs = attention_inputs(5, queries=50, dtype=dtype, device=device)
        inputs["key_padding_mask"] = padding_mask([50, 31, 12, 3, 0], 50, scattered=scattered, device=device)
        assert_matches_reference(nystrom_attention, inputs, backend, num_landmarks=12)

    @in_every_dtype
    def test_padding_of_queries_and_keys(self, backend: str, dtype: torch.dtype) -> None:
        device = device_of(backend)
        inputs = attention_inputs(3, queries=40, keys=70, dtype=dtype, device=device)
        inputs["key_padding_mask"] = padding_mask([70, 31, 5], 70, scattered=True, device=device)
        inputs["query_padding_mask"] = padding_mask([12, 40, 7], 40, scattered=True, device=device)
        assert_matches_reference(nystrom_attention, inputs, backend, num_landmarks=8)

    @in_every_dtype
    @pytest.mark.parametrize("num_landmarks", [12, (2, 3, 2)])
    def test_grid(self, backend: str, dtype: torch.dtype, num_landmarks: int | tuple[int, ...]) -> None:
        inputs = attention_inputs(queries=5 * 6 * 7, dtype=dtype, device=device_of(backend))
        options = {"num_landmarks": num_landmarks, "grid": (5, 6, 7)}
        assert_matches_reference(nystrom_attention, inputs, backend, **options)  # type: ignore[arg-type]

    @in_every_dtype
    def test_grids_of_queries_and_keys_with_padding(self, backend: str, dtype: torch.dtype) -> None:
        device = device_of(backend)
        inputs = attention_inputs(queries=4 * 9, keys=3 * 5, dtype=dtype, device=device)
        inputs["key_padding_mask"] = padding_mask([15, 4], 15, device=device)
        options = {"num_landmarks": (3, 2), "grid": ((4, 9), (3, 5))}
        assert_matches_reference(nystrom_attention, inputs, backend, **options)  # type: ignore[arg-type]

    @in_every_dtype
    def test_given_landmarks(self, backend: str, dtype: torch.dtype) -> None:
        device = device_of(backend)
        inputs = attention_inputs(queries=45, keys=80, dtype=dtype, device=device)
        inputs["query_landmarks"] = normal(2, 2, 9, 16, dtype=dtype, device=device, seed=7)
        inputs["key_landmarks"] = normal(2, 2, 9, 16, dtype=dtype, device=device, seed=8)
        assert_matches_reference(nystrom_attention, inputs, backend)

    @in_every_dtype
    @pytest.mark.parametrize("grid", [None, (3, 5, 6)])
    def test_clustered_landmarks(self, backend: str, dtype: torch.dtype, grid: tuple[int, ...] | None) -> None:
        """On well separated clusters, where rounding moves no token to another landmark."""
        device = device_of(backend)
        inputs = attention_inputs(2, 2, 90, dtype=dtype, device=device)
        centres = 2 * normal(2, 2, 6, 16, dtype=dtype, device=device, seed=9)
        which = torch.arange(90, device=device) // 15
        inputs["query"] = (0.1 * inputs["query"] + centres[:, :, which]).detach()
        inputs["key"] = (0.1 * inputs["key"] + centres[:, :, which]).detach()
        options = {"num_landmarks": 6, "grid": grid, "cluster_iterations": 2}
        assert_matches_reference(nystrom_attention, inputs, backend, **options)  # type: ignore[arg-type]


@on_every_backend
class TestStrides:
    """Inputs are taken as they lie."""

    @staticmethod
    def assert_strides_do_not_matter(inputs: dict[str, Tensor], backend: str, **options: object) -> None:
        for name, tensor in inputs.items():
            assert not tensor.is_contiguous(), name
        plain = {name: tensor.contiguous() for name, tensor in inputs.items()}
        results = []
        for tensors in (inputs, plain):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
            output = nystrom_attention(*leaves, num_landmarks=8, backend=backend, **options)  # type: ignore[arg-type]
            grads = torch.autograd.grad(output, leaves, normal(*output.shape, device=output.device.type))
            results.append((output.detach(), *grads))
        for strided, expected in zip(*results, strict=True):
            assert_same(strided, expected, backend)

    @pytest.mark.parametrize("options", [{}, {"cluster_iterations": 2}, {"grid": (6, 10)}])
    def test_heads_inside_channels(self, backend: str, options: dict[str, object]) -> None:
        """(B, N, H, D) transposed, which is what a projection gives."""
        tokens = normal(3, 2, 60, 3, 8, device=device_of(backend)).transpose(2, 3)
        self.assert_strides_do_not_matter(dict(zip(("query", "key", "value"), tokens, strict=True)), backend, **options)

    def test_channel_first(self, backend: str) -> None:
        maps = normal(3, 2, 3, 8, 60, device=device_of(backend)).mT
        self.assert_strides_do_not_matter(dict(zip(("query", "key", "value"), maps, strict=True)), backend)

    def test_slices(self, backend: str) -> None:
        packed = normal(2, 3, 120, 48, device=device_of(backend))
        query, key, value = packed[:, :, ::2].split(16, -1)
        self.assert_strides_do_not_matter(
            {"query": query, "key": key[:, :, 1:], "value": value[:, :, 1:, ::2]}, backend
        )

    def test_expanded(self, backend: str) -> None:
        device = device_of(backend)
        query, key = (normal(1, 3, 60, 8, device=device, seed=i).expand(2, 3, 60, 8) for i in range(2))
        value = normal(2, 1, 1, 8, device=device).expand(2, 3, 60, 8)
        self.assert_strides_do_not_matter({"query": query, "key": key, "value": value}, backend)


@on_every_backend
@pytest.mark.parametrize("count", [8, 67])
def test_the_end_is_gamma_times_attention_and_convolution_plus_residual(backend: str, count: int) -> None:
    inputs = attention_inputs(value_dim=5, device=device_of(backend))
    conv_weight, gamma, residual = finishing(inputs).values()
    function = functools.partial(nystrom_attention, **inputs, num_landmarks=count, backend=backend)
    expected = gamma * function(conv_weight=conv_weight) + residual
    output = function(conv_weight=conv_weight, gamma=gamma, residual=residual)
    assert relative_error(output, expected) < 1e-6
    nothing = function(conv_weight=conv_weight, gamma=torch.zeros_like(gamma), residual=residual)
    assert torch.equal(nothing, residual)


@on_every_backend
@pytest.mark.parametrize("count", [8, 67])
def test_channel_first_values_give_what_others_give(backend: str, count: int) -> None:
    inputs = attention_inputs(value_dim=5, device=device_of(backend))
    inputs |= finishing(inputs)
    maps = {name: x.mT.contiguous().mT if x.ndim == 4 else x for name, x in inputs.items()}
    results = []
    for tensors in (inputs, maps):
        leaves = {name: x.clone(memory_format=torch.preserve_format).requires_grad_() for name, x in tensors.items()}
        output = nystrom_attention(**leaves, num_landmarks=count, backend=backend)
        direction = normal(*output.shape, device=output.device.type, seed=3)
        results.append([output, *torch.autograd.grad(output, list(leaves.values()), direction)])
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < 2e-6


@on_every_backend
@pytest.mark.parametrize("masked", [False, True])
def test_conv_residual_is_a_correlation_along_the_tokens(backend: str, masked: bool) -> None:
    device = device_of(backend)
    inputs = attention_inputs(queries=21, device=device)
    mask = padding_mask([21, 9], 21, scattered=True, device=device) if masked else None
    weight = normal(2, 5, device=device)
    options = {"num_landmarks": 4, "key_padding_mask": mask, "backend": backend}
    plain = nystrom_attention(**inputs, **options)  # type: ignore[arg-type]
    added = nystrom_attention(**inputs, **options, conv_weight=weight) - plain  # type: ignore[arg-type]
    value = inputs["value"] if mask is None else inputs["value"].masked_fill(mask[:, None, :, None], 0)
    expected = torch.zeros_like(added)
    for token in range(21):
        for tap in range(5):
            source = token + tap - 2
            if 0 <= source < 21:
                expected[:, :, token] += weight[:, tap, None] * value[:, :, source]
    assert relative_error(added, expected) < 1e-5


@pytest.mark.parametrize("taps", [1, 5, 33, 65, 149])
@pytest.mark.parametrize("tokens", [1, 64, 600])
def test_convolution_has_the_values_and_gradients_of_conv2d_in_float64(taps: int, tokens: int) -> None:
    inputs = [normal(2, 3, tokens, 5), normal(3, taps, seed=1), normal(2, 3, tokens, 5, seed=2)]

    def values_and_gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        value, weight, direction = (x.to(dtype) for x in inputs)
        output, pullback = torch.func.vjp(function, value, weight)
        return [output, *pullback(direction)]

    def torch_convolution(value: Tensor, weight: Tensor) -> Tensor:
        return torch.conv2d(value, weight[:, None, :, None], padding=(taps // 2, 0), groups=3)

    expected = values_and_gradients(torch_convolution, torch.float64)
    for one, other in zip(values_and_gradients(depthwise_convolution, torch.float32), expected, strict=True):
        assert relative_error(one, other) < 1e-6


@on_every_backend
def test_global_max_is_the_formula_with_the_batch_maxima(backend: str) -> None:
    inputs = attention_inputs(3, device=device_of(backend))
    inputs["query"][0] *= 3  # a louder neighbour
    landmarks = [torch.stack([s.mean(2) for s in inputs[name].tensor_split(8, 2)], 2) for name in ("query", "key")]
    query_landmarks, key_landmarks = landmarks
    core = (query_landmarks @ key_landmarks.mT / 4).softmax(-1)
    context = (query_landmarks @ inputs["key"].mT / 4).softmax(-1) @ inputs["value"]
    query_factor = (inputs["query"] @ key_landmarks.mT / 4).softmax(-1)
    expected = query_factor @ iterative_pinv(core, init="global_max", backend="reference") @ context
    output = nystrom_attention(**inputs, num_landmarks=8, pinv_init="global_max", backend=backend)
    assert relative_error(output, expected) < 1e-5
    alone = {name: tensor[1:] for name, tensor in inputs.items()}
    output_alone = nystrom_attention(**alone, num_landmarks=8, pinv_init="global_max", backend=backend)
    assert relative_error(output_alone, output[1:]) > 1e-4  # the batch is coupled, as in those libraries
