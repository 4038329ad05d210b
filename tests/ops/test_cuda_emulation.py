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

from nystromgan import _env, iterative_pinv
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
