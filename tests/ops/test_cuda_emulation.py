"""The CUDA kernels and their bindings, emulated on a CPU, against the definition.

The library takes the place of the CPU's, so the tests run in a process of their own and name the backend `cpu`.
"""

import os
import pathlib
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nystromgan import _env, iterative_pinv, power_iteration
from nystromgan.ops.power_iteration import spectral_normalize
from nystromgan.testing import assert_matches_reference, normal, relative_error

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "build" / "emulation"
BACKEND = "cpu"

if _env.native_library_dir() != str(FOLDER):

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation switches stacks of x86-64 alone")
    def test_emulated() -> None:
        build = [sys.executable, "setup.py", "-q", "build_native"]
        subprocess.run(build, cwd=ROOT, env={**os.environ, "NYSTROMGAN_BUILD": "emulation"}, check=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "NYSTROMGAN_LIBRARY_DIR": str(FOLDER)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

else:

    def matrices(*shape: int) -> Tensor:
        """Matrices of which no two rows or columns have the same sum: a maximum's gradient has one place to go."""
        return normal(*shape, seed=5).abs()

    class TestIterativePinv:
        @pytest.mark.parametrize("size", [1, 17, 40, 66])
        @pytest.mark.parametrize("init", ["per_matrix", "global_max"])
        def test_sizes(self, size: int, init: str) -> None:
            inputs = {"matrix": matrices(2, size, size).mT}
            assert_matches_reference(iterative_pinv, inputs, BACKEND, iterations=2, init=init)

        def test_through_memory(self) -> None:
            matrix = matrices(1, 130, 130)
            expected = iterative_pinv(matrix, iterations=1, backend="reference")
            assert relative_error(iterative_pinv(matrix, iterations=1, backend=BACKEND), expected) < 1e-6

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
            results = []
            for order in ("forward", "reverse"):
                monkeypatch.setenv("NYSTROMGAN_EMULATION_ORDER", order)
                matrix = matrices(1, size, size).requires_grad_()
                inverse = iterative_pinv(matrix, iterations=1, backend=BACKEND)
                results += [inverse.detach(), *torch.autograd.grad(inverse.square().sum(), matrix)]
            assert torch.equal(results[0], results[2])
            assert torch.equal(results[1], results[3])

    class TestPowerIteration:
        SHAPES = ((5, 3), (64, 27), (33, 40), (3, 1100), (1, 1), (150, 16))

        def problem(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
            """Weights of many shapes, one of them transposed; vectors of another dtype than most weights, some strided."""
            weights = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(self.SHAPES)]
            weights.append(normal(24, 17, dtype=torch.float16, seed=7).mT)
            u = [normal(2 * len(x), seed=20 + i)[::2] for i, x in enumerate(weights)]
            v = [normal(x.shape[1], seed=40 + i) for i, x in enumerate(weights)]
            return weights, u, [x / x.norm() for x in v]

        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
        @pytest.mark.parametrize("iterations", [0, 1, 3])
        def test_against_float64(self, dtype: torch.dtype, iterations: int) -> None:
            weights, u, v = self.problem(dtype)
            wide = [[x.double() for x in tensors] for tensors in (weights, u, v)]
            sigma = power_iteration(weights, u, v, iterations=iterations, backend=BACKEND)
            exact = power_iteration(*wide, iterations=iterations, backend="reference")
            for x, y in zip((sigma, *u, *v), (exact, *wide[1], *wide[2]), strict=True):
                assert relative_error(x, y) < 2e-6
            normalized = spectral_normalize(weights, u, v, iterations=0, backend=BACKEND)
            for x, y in zip(normalized, spectral_normalize(*wide, iterations=0, backend="reference"), strict=True):
                assert relative_error(x, y) < (2e-6 if x.dtype == torch.float32 else 4e-3)

        def test_more_weights_than_one_launch_takes(self) -> None:
            weights = [normal(4, 3, seed=i) for i in range(130)]
            u, v = [torch.ones(4) for _ in weights], [torch.ones(3) for _ in weights]
            together = power_iteration(weights, u, v, backend=BACKEND)
            last = power_iteration(weights[-1], torch.ones(4), torch.ones(3), backend=BACKEND)
            assert torch.equal(together[-1:], last)
