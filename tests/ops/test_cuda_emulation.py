"""The CUDA kernels and their bindings, emulated on a CPU, against the definition.

The library takes the place of the CPU's, so the tests run in a process of their own and name the backend `cpu`.
"""

import ctypes
import functools
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nystromgan import _env, _native, iterative_pinv, nystrom_attention, power_iteration, spatiotemporal_attention
from nystromgan.ops.nystrom_attention import library
from nystromgan.ops.nystrom_attention.landmarks import grid_index
from nystromgan.ops.power_iteration import spectral_normalize
from nystromgan.ops.spatiotemporal_attention import reference as maps_reference
from nystromgan.testing import (
    TOLERANCES,
    assert_matches_reference,
    attention_inputs,
    large,
    map_inputs,
    normal,
    padding_mask,
    relative_error,
    smooth,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "build" / "emulation"
BACKEND = "cpu"

if _env.native_library_dir() != str(FOLDER):

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation switches stacks of x86-64 alone")
    def test_emulated() -> None:
        # Without a sanitizer's runtime, which takes the fibres' stacks for faults.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        build = [sys.executable, "setup.py", "-q", "build_native"]
        subprocess.run(build, cwd=ROOT, env={**environment, "NYSTROMGAN_BUILD": "emulation"}, check=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        environment["NYSTROMGAN_LIBRARY_DIR"] = str(FOLDER)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

else:

    def assert_same_in_any_order(
        monkeypatch: pytest.MonkeyPatch, function: Callable, inputs: dict[str, Tensor]
    ) -> None:
        """The bits of a result and its gradients, whichever thread runs first: a missing barrier shows."""
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        results = []
        for order in ("forward", "reverse"):
            monkeypatch.setenv("NYSTROMGAN_EMULATION_ORDER", order)
            output = function(**leaves)
            results.append([output, *torch.autograd.grad(output.float().square().sum(), list(leaves.values()))])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    def allow(path: str, allowed: int) -> None:
        """Whether the library may take "single_launch", "clusters" or "groups" where they apply; it may at first.

        2 allows the single launch for any number of tokens, and groups where threads must copy.
        """
        getattr(ctypes.CDLL(str(FOLDER / _native.CPU_LIBRARY)), f"nystromgan_cuda_allow_{path}")(int(allowed))

    def matrices(*shape: int) -> Tensor:
        """Matrices of which no two rows or columns have the same sum: a maximum's gradient has one place to go."""
        return normal(*shape, seed=5).abs()

    class TestIterativePinv:
        @pytest.mark.parametrize("size", [1, 17, 40])
        @pytest.mark.parametrize("init", ["per_matrix", "global_max"])
        def test_sizes(self, size: int, init: str) -> None:
            inputs = {"matrix": matrices(2, size, size).mT}
            assert_matches_reference(iterative_pinv, inputs, BACKEND, iterations=2, init=init)

        def test_through_memory(self) -> None:
            matrix = matrices(1, 130, 130)
            expected = iterative_pinv(matrix, iterations=1, backend="reference")
            assert relative_error(iterative_pinv(matrix, iterations=1, backend=BACKEND), expected) < 1e-6

        @pytest.mark.parametrize(
            ("size", "count", "iterations", "init"),
            [(40, 3, 6, "per_matrix"), (70, 2, 3, "per_matrix"), (128, 2, 1, "global_max"), (150, 1, 1, "per_matrix")],
        )
        def test_by_a_cluster_of_blocks(self, size: int, count: int, iterations: int, init: str) -> None:
            """As near to float64 as by one block or through memory, also of matrices whose rows are no weights."""
            uneven = 1e-3 * normal(count, size, size) * normal(count, size, 1, seed=1).exp()
            for matrix in (matrices(count, size, size), uneven):
                function = functools.partial(iterative_pinv, iterations=iterations, init=init)
                exact, clustered = function(matrix.double(), backend="reference"), function(matrix, backend=BACKEND)
                allow("clusters", False)
                try:
                    other = function(matrix, backend=BACKEND)
                finally:
                    allow("clusters", True)
                assert not torch.equal(clustered, other)  # or the same path ran twice
                assert relative_error(clustered, exact) <= 1.5 * relative_error(other, exact) + 2e-7

        @pytest.mark.parametrize("size", [40, 128, 130])
        def test_without_clusters(self, size: int) -> None:
            matrix = matrices(1, size, size)
            expected = iterative_pinv(matrix, iterations=1, backend="reference")
            allow("clusters", False)
            try:
                assert relative_error(iterative_pinv(matrix, iterations=1, backend=BACKEND), expected) < 1e-6
            finally:
                allow("clusters", True)

        def test_no_worse_than_eager_after_six_steps(self) -> None:
            matrix = matrices(2, 32, 32).softmax(-1)
            exact, eager = (iterative_pinv(x, backend="reference") for x in (matrix.double(), matrix))
            error = relative_error(iterative_pinv(matrix, backend=BACKEND), exact)
            assert error <= 1.5 * relative_error(eager, exact) + 2e-7

        def test_ties_of_a_shared_start_share_its_gradient(self) -> None:
            matrix = matrices(1, 5, 5).expand(3, 5, 5)
            assert_matches_reference(iterative_pinv, {"matrix": matrix}, BACKEND, iterations=2, init="global_max")

        @pytest.mark.parametrize("magnitude", [0.0, 1e-12, 1e12])
        def test_magnitudes(self, magnitude: float) -> None:
            matrix = magnitude * matrices(1, 5, 5)
            expected = iterative_pinv(matrix, backend="reference")
            assert relative_error(iterative_pinv(matrix, backend=BACKEND), expected) < 1e-5

        @pytest.mark.parametrize("size", [20, 66])
        def test_the_order_of_threads_does_not_matter(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
            function = functools.partial(iterative_pinv, iterations=1, backend=BACKEND)
            assert_same_in_any_order(monkeypatch, function, {"matrix": matrices(1, size, size)})

    class TestPowerIteration:
        SHAPES = ((5, 3), (64, 27), (33, 40), (3, 1100), (1, 1), (150, 16))

        def problem(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
            """Weights of many shapes, one of them transposed; float32 vectors, some of them strided."""
            weights = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(self.SHAPES)]
            weights.append(normal(24, 17, dtype=torch.float16, seed=7).mT)
            u = [normal(2 * len(x), seed=20 + i)[::2] for i, x in enumerate(weights)]
            v = [normal(x.shape[1], seed=40 + i) for i, x in enumerate(weights)]
            return weights, u, [x / x.norm() for x in v]

        def normalized(self, weights: list[Tensor], u: list[Tensor], v: list[Tensor]) -> list[Tensor]:
            """What `spectral_normalize` does on a GPU, where sigma has a launch of its own."""
            sigma, uv = torch.ops.nystromgan.power_iteration_([x.detach() for x in weights], u, v, 0, 1e-12, BACKEND)
            return torch.ops.nystromgan.spectral_normalize(weights, sigma, uv, BACKEND)

        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
        @pytest.mark.parametrize("iterations", [0, 1, 3])
        def test_against_float64(self, dtype: torch.dtype, iterations: int) -> None:
            weights, u, v = self.problem(dtype)
            wide = [[x.double() for x in tensors] for tensors in (weights, u, v)]
            sigma = power_iteration(weights, u, v, iterations=iterations, backend=BACKEND)
            exact = power_iteration(*wide, iterations=iterations, backend="reference")
            for x, y in zip((sigma, *u, *v), (exact, *wide[1], *wide[2]), strict=True):
                assert relative_error(x, y) < 2e-6
            normalized = self.normalized(weights, u, v)
            for x, y in zip(normalized, spectral_normalize(*wide, iterations=0, backend="reference"), strict=True):
                assert relative_error(x, y) < (2e-6 if x.dtype == torch.float32 else 4e-3)

        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
        def test_the_gradient_of_every_normalized_weight(self, dtype: torch.dtype) -> None:
            weights, u, v = self.problem(dtype)
            weights = [x.contiguous().requires_grad_() for x in weights]
            wide = [x.detach().double().requires_grad_() for x in weights]
            normalized = self.normalized(weights, u, v)
            exact = spectral_normalize(
                wide, [x.double() for x in u], [x.double() for x in v], iterations=0, backend="reference"
            )
            grads = [normal(*x.shape, dtype=x.dtype, seed=60 + i) for i, x in enumerate(normalized)]
            expected = torch.autograd.grad(exact, wide, [x.double() for x in grads])
            for x, y in zip(torch.autograd.grad(normalized, weights, grads), expected, strict=True):
                if x.numel() > 1:  # of one element it is 0
                    assert relative_error(x, y) < (5e-6 if x.dtype == torch.float32 else 8e-3)

        def test_more_weights_than_one_launch_takes(self) -> None:
            weights = [normal(4, 3, seed=i) for i in range(130)]
            u, v = [torch.ones(4) for _ in weights], [torch.ones(3) for _ in weights]
            together = power_iteration(weights, u, v, backend=BACKEND)
            last = power_iteration(weights[-1], torch.ones(4), torch.ones(3), backend=BACKEND)
            assert torch.equal(together[-1:], last)

    MAPS = (
        ((3, 5), (3, 5), 4, 32, 1),
        ((7, 11), (3, 3), 24, 40, 2),
        ((67,), (33,), 32, 128, 1),
        ((40,), (70,), 70, 200, 1),
        ((20, 10), (13, 10), 8, 64, 1),
    )

    @pytest.fixture(params=["groups of warps", "warps"])
    def products(request: pytest.FixtureRequest) -> Iterator[str]:
        allow("groups", 2 if request.param == "groups of warps" else 0)
        yield request.param
        allow("groups", 1)

    @pytest.mark.usefixtures("products")
    class TestSpatiotemporalAttention:
        @pytest.mark.parametrize("dtype", DTYPES)
        @pytest.mark.parametrize(("grid", "key_grid", "channels", "values", "heads"), MAPS)
        def test_sizes(self, grid, key_grid, channels, values, heads, dtype) -> None:
            inputs = map_inputs(1, channels, grid, key_grid, values, dtype=dtype)
            assert_matches_reference(spatiotemporal_attention, inputs, BACKEND, num_heads=heads)

        @pytest.mark.parametrize("dtype", DTYPES)
        @pytest.mark.parametrize(
            ("grid", "key_grid", "channels", "values", "heads"),
            [((8, 16), None, 16, 64, 1), ((9, 8), (5, 64), 40, 136, 2), ((200,), (8,), 32, 128, 1)],
        )
        def test_aligned_maps_are_copied_at_once(self, grid, key_grid, channels, values, heads, dtype) -> None:
            inputs = map_inputs(2, channels, grid, key_grid, values, dtype=dtype)
            assert_matches_reference(spatiotemporal_attention, inputs, BACKEND, num_heads=heads)

        def test_masked_keys_of_maps(self) -> None:
            """By the op under the public function; what is masked is NaN, and a row of the batch has no key at all."""
            query, key, value = map_inputs(2, 8, (40,), (72,), 24, dtype=torch.bfloat16).values()
            mask = padding_mask([50, 0], 72, scattered=True)
            key, value = (x.masked_fill(mask[:, None], torch.nan) for x in (key, value))
            maps = [x[:, None] for x in (query, key, value)]
            exact = maps_reference.spatiotemporal_attention(*(x.double() for x in maps), mask, None, None, 0.3)
            native = torch.ops.nystromgan.spatiotemporal_attention_native
            output, _, lse = native(*maps, mask, None, None, 0.3, False, True)
            assert relative_error(output, exact) < TOLERANCES[torch.bfloat16].output
            assert torch.isinf(lse[1]).all()

        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
        def test_gamma_and_residual(self, dtype: torch.dtype) -> None:
            inputs = map_inputs(2, 6, (4, 6), None, 4, dtype=dtype)
            inputs |= {"gamma": normal(1), "residual": normal(2, 4, 4, 6, seed=7, dtype=dtype)}
            assert_matches_reference(spatiotemporal_attention, inputs, BACKEND)

        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
        def test_masked_tokens(self, dtype: torch.dtype) -> None:
            """Exact attention of tokens; a row of the batch has no key at all, and what is masked is NaN."""
            inputs = attention_inputs(2, 2, 30, 37, 8, 6, dtype=dtype)
            mask = padding_mask([23, 0], 37, scattered=True)
            options = {"num_landmarks": 30, "key_padding_mask": mask}
            assert_matches_reference(nystrom_attention, inputs, BACKEND, **options)
            clean = nystrom_attention(**inputs, **options, backend=BACKEND)
            for name in ("key", "value"):
                inputs[name] = inputs[name].masked_fill(mask[:, None, :, None], torch.nan)
            assert torch.equal(nystrom_attention(**inputs, **options, backend=BACKEND), clean)

        def test_the_order_of_threads_does_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
            function = functools.partial(spatiotemporal_attention, backend=BACKEND)
            assert_same_in_any_order(monkeypatch, function, map_inputs(1, 8, (8, 10), None, 8, dtype=torch.bfloat16))

    def test_products_of_groups_are_others_than_those_of_warps() -> None:
        """Or one path ran twice: where the copy engine can bring everything, and only there unless all is allowed."""

        def outputs(tokens: int) -> list[Tensor]:
            inputs = map_inputs(1, 32, (tokens,), (40,), 128, dtype=torch.bfloat16)
            results = []
            for allowed in (0, 1, 2):
                allow("groups", allowed)
                results.append(spatiotemporal_attention(**inputs, backend=BACKEND))
            allow("groups", 1)
            return results

        warps, default, everywhere = outputs(64)
        assert torch.equal(default, everywhere)
        assert not torch.equal(default, warps)
        warps, default, everywhere = outputs(67)
        assert torch.equal(default, warps)
        assert not torch.equal(everywhere, warps)

    def given(dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            f"{name}_landmarks": normal(2, 2, 5, 16, seed=9 + i, dtype=dtype) for i, name in enumerate(("query", "key"))
        }

    # name: (sizes of attention_inputs, other options, dtypes)
    HALF = torch.bfloat16
    NYSTROM: dict[str, tuple[dict[str, object], dict[str, object], tuple[torch.dtype, ...]]] = {
        "segments": ({"batch": 1}, {"num_landmarks": 8}, DTYPES),
        "cross": (
            {"batch": 1, "queries": 300, "keys": 211, "head_dim": 8, "value_dim": 40, "tokens": smooth},
            {"num_landmarks": 16, "pinv_iterations": 2},
            DTYPES,
        ),
        "wide": (
            {"batch": 1, "queries": 70, "keys": 90, "head_dim": 20, "value_dim": 70},
            {"num_landmarks": 9, "pinv_iterations": 2},
            (torch.float32, HALF),
        ),
        "grid": (
            {"heads": 1, "queries": 60},
            {"num_landmarks": 4, "grid": (5, 12), "pinv_iterations": 2},
            (torch.float32,),
        ),
        "global": ({}, {"num_landmarks": 8, "pinv_init": "global_max", "pinv_iterations": 2}, (torch.float32,)),
        "many": (
            {"batch": 1, "heads": 1, "queries": 150, "tokens": smooth},
            {"num_landmarks": 70, "pinv_iterations": 1},
            (torch.float32, HALF),
        ),
        "padded": (
            {"batch": 3, "heads": 1},
            {
                "num_landmarks": 8,
                "key_padding_mask": padding_mask([50, 3, 0], 67, scattered=True),
                "pinv_iterations": 2,
            },
            DTYPES,
        ),
        "clustered": (
            {"batch": 1, "heads": 1},
            {"num_landmarks": 8, "cluster_iterations": 2, "pinv_iterations": 2},
            (torch.float32, HALF),
        ),
        "clustered and padded": (
            {"batch": 2, "heads": 1},
            {
                "num_landmarks": 8,
                "cluster_iterations": 1,
                "key_padding_mask": padding_mask([5, 61], 67, scattered=True),
                "pinv_iterations": 2,
            },
            (torch.float32, HALF),
        ),
        # Of the single launch: several steps and splits of pooling, of the keys and of the queries.
        "long": (
            {"batch": 1, "heads": 1, "queries": 1100, "keys": 700, "tokens": smooth},
            {"num_landmarks": 64, "pinv_iterations": 3},
            (HALF, torch.float16),
        ),
        "wide keys": (
            {"batch": 1, "queries": 70, "keys": 150, "head_dim": 100, "value_dim": 17},
            {"num_landmarks": 33, "pinv_iterations": 2},
            (HALF, torch.float16),
        ),
    }
    EACH = [(case, dtype) for case, (_, _, dtypes) in NYSTROM.items() for dtype in dtypes]

    @pytest.fixture(params=["one launch", "many launches", "groups of warps"])
    def launches(request: pytest.FixtureRequest) -> Iterator[str]:
        allow("single_launch", request.param == "one launch")
        allow("groups", 2 if request.param == "groups of warps" else 0)
        yield request.param
        allow("single_launch", 1)
        allow("groups", 1)

    @pytest.mark.usefixtures("launches")
    class TestNystromAttention:
        @pytest.mark.parametrize(("case", "dtype"), EACH)
        def test_against_float64(self, case: str, dtype: torch.dtype) -> None:
            sizes, options, _ = NYSTROM[case]
            assert_matches_reference(nystrom_attention, attention_inputs(**sizes, dtype=dtype), BACKEND, **options)

        def test_landmarks_given(self) -> None:
            inputs = attention_inputs(dtype=HALF) | given(HALF)
            assert_matches_reference(nystrom_attention, inputs, BACKEND, pinv_iterations=2)

        def test_a_grid_with_padding_and_empty_blocks(self) -> None:
            mask = padding_mask([40, 3, 0], 60, scattered=True)
            options = {"num_landmarks": 6, "grid": (5, 12), "key_padding_mask": mask, "pinv_iterations": 2}
            assert_matches_reference(nystrom_attention, attention_inputs(3, queries=60), BACKEND, **options)

        @pytest.mark.parametrize(("grid", "counts"), [((61,), (7,)), ((5, 13), (2, 4)), ((3, 5, 7), (3, 2, 2))])
        def test_blocks_of_a_grid_have_the_bits_of_its_index(
            self, grid: tuple[int, ...], counts: tuple[int, ...]
        ) -> None:
            inputs = attention_inputs(queries=math.prod(grid))
            index = grid_index(grid, counts, torch.device("cpu"))
            results = []
            for indices in ((index, index), (None, index), (None, None)):
                leaves = [x.detach().requires_grad_() for x in inputs.values()]
                plan, epilogue = (None, None, *indices, *(None,) * 4), (None,) * 3
                options = (grid, grid, counts, math.prod(counts), 0.3, 1, False, True, False, BACKEND)
                output, *saved = torch.ops.nystromgan.nystrom_attention(*leaves, *plan, *epilogue, *options)
                results.append([output, *saved, *torch.autograd.grad(output.square().sum(), leaves)])
            for told, partly, alone in zip(*results, strict=True):
                assert torch.equal(told, partly)
                assert torch.equal(told, alone)

        def test_a_row_has_the_same_bits_alone(self) -> None:
            inputs = attention_inputs(3, dtype=torch.bfloat16)
            function = functools.partial(nystrom_attention, num_landmarks=8, pinv_iterations=2, backend=BACKEND)
            together = function(**inputs)
            alone = function(**{name: x[1:2] for name, x in inputs.items()})
            assert torch.equal(together[1:2], alone)

        def test_the_order_of_threads_does_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
            function = functools.partial(
                nystrom_attention, num_landmarks=8, cluster_iterations=1, pinv_iterations=1, backend=BACKEND
            )
            assert_same_in_any_order(monkeypatch, function, attention_inputs(1, 1, dtype=torch.float16))

    class TestSingleLaunch:
        """What the single launch returns, also for the backward, beside the many launches."""

        @staticmethod
        def outputs(inputs: dict[str, Tensor], options: dict[str, object], allowed: int) -> tuple[Tensor, ...]:
            """Everything that the forward returns: O, the two means, G V, W and the logarithms of G's row sums."""
            kept = []
            run = torch.ops.nystromgan.nystrom_attention_native

            def keep(*arguments: object) -> tuple[Tensor, ...]:
                kept.append(run(*arguments))
                return kept[-1]

            with pytest.MonkeyPatch.context() as patch:
                kernel = library._library.kernel
                patch.setattr(
                    library._library, "kernel", lambda op, name, b: keep if name == op else kernel(op, name, b)
                )
                allow("single_launch", allowed)
                try:
                    nystrom_attention(**inputs, **options, backend=BACKEND)
                finally:
                    allow("single_launch", True)
            return kept[0]

        @pytest.mark.parametrize("dtype", DTYPES)
        @pytest.mark.parametrize("masked", [False, True])
        def test_all_that_it_returns(self, dtype: torch.dtype, masked: bool) -> None:
            inputs = attention_inputs(2, 2, 300, 300, 24, 40, tokens=smooth, dtype=dtype)
            mask = padding_mask([12, 260], 300, scattered=True)
            options = {"num_landmarks": 20, "pinv_iterations": 2} | ({"key_padding_mask": mask} if masked else {})
            one, many = self.outputs(inputs, options, True), self.outputs(inputs, options, False)
            assert not torch.equal(one[3], many[3])  # or the same path ran twice
            for x, y in zip(one, many, strict=True):
                assert torch.equal(x.isinf(), y.isinf())
                finite = torch.where(x.isinf(), 0, x), torch.where(y.isinf(), 0, y)
                assert relative_error(*finite) < TOLERANCES[dtype].output

        @pytest.mark.parametrize(("tokens", "allowed"), [(4100, 1), (8200, 2)])
        def test_more_splits_of_more_tokens(self, tokens: int, allowed: int) -> None:
            inputs = attention_inputs(1, 1, tokens, 100, 8, dtype=HALF)
            options = {"num_landmarks": 40, "pinv_iterations": 1}
            one, many = self.outputs(inputs, options, allowed), self.outputs(inputs, options, False)
            assert not torch.equal(one[3], many[3])
            assert relative_error(one[1], many[1]) < 1e-6
            assert relative_error(one[0], many[0]) < TOLERANCES[HALF].output

        @pytest.mark.parametrize("tokens", [normal, smooth, large])
        @pytest.mark.parametrize("steps", [0, 6])
        def test_its_inverse_is_no_worse(self, tokens: Callable[..., Tensor], steps: int) -> None:
            """In parts of float16 and not of tf32: in float32, where an error would show."""
            inputs = attention_inputs(1, 2, 200, 200, 32, 16, tokens=tokens)
            options = {"num_landmarks": 50, "pinv_iterations": steps}
            wide = {name: x.double() for name, x in inputs.items()}
            exact = nystrom_attention(**wide, **options, backend="reference")
            one, many = (self.outputs(inputs, options, allowed)[0] for allowed in (True, False))
            assert relative_error(one, exact) <= 1.5 * relative_error(many, exact) + 2e-7

        def test_its_inverse_of_equal_rows_and_of_many_steps(self) -> None:
            """A of rank one, and one whose inverse grows until rounding alone is left."""
            options = {"num_landmarks": 64, "backend": BACKEND}
            inputs = attention_inputs(1, 1, 130)
            same = {**inputs, "query": inputs["query"][:, :, :1].expand(-1, -1, 130, -1)}
            assert_matches_reference(nystrom_attention, same, BACKEND, num_landmarks=64)
            assert (
                nystrom_attention(**attention_inputs(1, 1, 130, tokens=smooth), pinv_iterations=40, **options)
                .isfinite()
                .all()
            )

        def test_a_nan_stays_in_its_head(self) -> None:
            inputs = attention_inputs(1, 2, 130, dtype=HALF)
            options = {"num_landmarks": 9, "pinv_iterations": 1, "backend": BACKEND}
            clean = nystrom_attention(**inputs, **options)
            inputs["key"][0, 1, 5, 3] = torch.nan
            output = nystrom_attention(**inputs, **options)
            assert torch.equal(output[:, 0], clean[:, 0])
            assert output[:, 1].isnan().all()

        def test_what_is_masked_does_not_enter(self) -> None:
            inputs = attention_inputs(2, 1, 300, dtype=HALF)
            mask = padding_mask([200, 7], 300, scattered=True)
            options = {"num_landmarks": 8, "key_padding_mask": mask, "pinv_iterations": 1, "backend": BACKEND}
            clean = nystrom_attention(**inputs, **options)
            hidden = mask[:, None, :, None]
            output = nystrom_attention(
                **{name: x.masked_fill(hidden, torch.nan) for name, x in inputs.items()}, **options
            )
            assert torch.equal(output.masked_fill(hidden, 0), clean.masked_fill(hidden, 0))

        def test_a_row_of_several_splits_has_the_same_bits_alone(self) -> None:
            inputs = attention_inputs(3, 1, 700, 500, dtype=HALF)
            function = functools.partial(nystrom_attention, num_landmarks=17, pinv_iterations=1, backend=BACKEND)
            alone = function(**{name: x[1:2] for name, x in inputs.items()})
            assert torch.equal(function(**inputs)[1:2], alone)

        @pytest.mark.parametrize("dtype", DTYPES)
        def test_the_order_of_threads_does_not_matter(
            self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
        ) -> None:
            options = {"num_landmarks": 20, "pinv_iterations": 1, "backend": BACKEND}
            options["key_padding_mask"] = padding_mask([12, 260], 300, scattered=True)
            function = functools.partial(nystrom_attention, **options)
            assert_same_in_any_order(monkeypatch, function, attention_inputs(2, 1, 300, dtype=dtype))
