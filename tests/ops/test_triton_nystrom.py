"""The Triton kernels of iterative_pinv and nystrom_attention against the definition: on a GPU, else interpreted.

The interpreter wants its variable before triton is imported, so without a GPU the tests run in a process of their own.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nystromgan import _env, iterative_pinv, nystrom_attention
from nystromgan.ops.nystrom_attention import reference
from nystromgan.ops.nystrom_attention.landmarks import grid_index, masked_landmarks
from nystromgan.testing import (
    EAGER_NOISE,
    FINISHING,
    assert_matches_reference,
    attention_inputs,
    eager_nystrom_attention,
    errors_of,
    finishing,
    normal,
    padding_mask,
    relative_error,
    smooth,
)

EAGER_FACTOR = 1.5  # a kernel rounds at other places than eager, and 70 tokens average little of it out
DEVICE = "cuda" if torch.cuda.is_available() and not _env.triton_interpret() else "cpu"

# The dtypes that are compared with eager: the interpreter cuts bfloat16 off where a GPU rounds it.
ROUNDED = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

if DEVICE == "cpu" and not _env.triton_interpret():

    def test_under_the_interpreter(interpreted: Callable[[str], None]) -> None:
        interpreted(__file__)

else:
    from nystromgan.ops.iterative_pinv import tuning as pinv_tuning
    from nystromgan.ops.nystrom_attention import triton as kernels

    def matrices(*shape: int) -> Tensor:
        """Matrices of which no two rows or columns have the same sum: a maximum's gradient has one place to go."""
        return normal(*shape, seed=5).to(DEVICE).abs()

    class TestIterativePinv:
        @pytest.mark.parametrize("size", [1, 2, 17, 40])
        @pytest.mark.parametrize("init", ["per_matrix", "global_max"])
        def test_sizes(self, size: int, init: str) -> None:
            inputs = {"matrix": matrices(2, 1, size, size).mT}
            assert_matches_reference(iterative_pinv, inputs, "triton", iterations=2, init=init)

        def test_no_worse_than_eager_after_six_steps(self) -> None:
            matrix = matrices(2, 16, 16).softmax(-1)
            exact, eager = (iterative_pinv(x, backend="reference") for x in (matrix.double(), matrix))
            error = relative_error(iterative_pinv(matrix, backend="triton"), exact)
            assert error <= EAGER_FACTOR * relative_error(eager, exact) + 2e-7

        def test_tiles_through_memory_agree_with_those_on_chip(self, monkeypatch: pytest.MonkeyPatch) -> None:
            matrix = matrices(2, 20, 20)
            on_chip = iterative_pinv(matrix, iterations=3, backend="triton")
            monkeypatch.setattr(pinv_tuning, "CHIP_MOST", dict.fromkeys(pinv_tuning.CHIP_MOST, 0))
            assert relative_error(iterative_pinv(matrix, iterations=3, backend="triton"), on_chip) < 1e-6

        @pytest.mark.parametrize("most", [0, 64])
        def test_the_gradient_on_chip_and_through_memory(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
            """After six steps of a core: the error is that of eager's way back."""
            monkeypatch.setattr(pinv_tuning, "CHIP_MOST_BACKWARD", dict.fromkeys(pinv_tuning.CHIP_MOST_BACKWARD, most))
            logits, direction = (normal(2, 33, 33, seed=seed).to(DEVICE) for seed in (1, 2))

            def gradient(x: Tensor, backend: str) -> Tensor:
                x = x.requires_grad_()
                inverse = iterative_pinv(x.softmax(-1), backend=backend)
                return torch.autograd.grad(inverse, x, direction.to(x.dtype))[0]

            exact, eager = (gradient(x, "reference") for x in (logits.double(), logits.clone()))
            error = relative_error(gradient(logits.clone(), "triton"), exact)
            assert error <= EAGER_FACTOR * relative_error(eager, exact) + 2e-7

        def test_more_rows_than_one_program_holds(self) -> None:
            results = []
            for backend in ("reference", "triton"):
                matrix = matrices(1, 130, 130).requires_grad_()
                inverse = iterative_pinv(matrix, iterations=1, backend=backend)
                (grad,) = torch.autograd.grad(inverse, matrix, normal(1, 130, 130, seed=3).to(DEVICE))
                results.append((inverse.detach(), grad))
            for expected, found in zip(*results, strict=True):
                assert relative_error(found, expected) < 1e-6

        @pytest.mark.parametrize("magnitude", [0.0, 1e-12, 1e12])
        def test_magnitudes(self, magnitude: float) -> None:
            matrix = magnitude * matrices(1, 5, 5)
            expected = iterative_pinv(matrix, backend="reference")
            assert relative_error(iterative_pinv(matrix, backend="triton"), expected) < 1e-5

    def check(inputs: dict[str, Tensor], **options: object) -> None:
        """Against float64; two steps of the pseudo-inverse, for each costs the interpreter seconds."""
        assert_matches_reference(nystrom_attention, inputs, "triton", **{"pinv_iterations": 2, **options})

    def check_against_eager(inputs: dict[str, Tensor], num_landmarks: int) -> None:
        """Errors of outputs and gradients are at most EAGER_FACTOR times those of eager PyTorch in the same dtype."""
        options = {"num_landmarks": num_landmarks, "pinv_iterations": 2}
        exact = functools.partial(nystrom_attention, **options, backend="reference")
        errors = errors_of(functools.partial(nystrom_attention, **options, backend="triton"), exact, inputs)
        bound = errors_of(functools.partial(eager_nystrom_attention, **options), exact, inputs)
        noise = EAGER_NOISE[inputs["query"].dtype]
        assert errors.output <= EAGER_FACTOR * bound.output + noise
        for name, error in errors.gradients.items():
            assert error <= EAGER_FACTOR * bound.gradients[name] + noise, name

    class TestNystromAttention:
        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
        @pytest.mark.parametrize(("head_dim", "value_dim"), [(4, 32), (17, 3)])
        def test_segments(self, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
            inputs = attention_inputs(1, 1, 70, 45, head_dim, value_dim, dtype=dtype, device=DEVICE)
            check(inputs, num_landmarks=7)
            if dtype in ROUNDED:
                check_against_eager(inputs, 7)

        @pytest.mark.parametrize("dtype", ROUNDED[1:])
        def test_tokens_that_resemble_their_neighbours(self, dtype: torch.dtype) -> None:
            check_against_eager(attention_inputs(1, 1, 100, tokens=smooth, dtype=dtype, device=DEVICE), 8)

        def test_six_steps(self) -> None:
            check(attention_inputs(1, 1, 33, head_dim=3, device=DEVICE), num_landmarks=5, pinv_iterations=6)

        def test_several_splits_of_the_tokens(self) -> None:
            inputs = attention_inputs(1, 1, 600, head_dim=3, device=DEVICE)
            check(inputs, num_landmarks=5)

        def test_several_tiles_of_landmarks(self) -> None:
            inputs = attention_inputs(1, 1, 150, head_dim=5, device=DEVICE)
            check(inputs, num_landmarks=70, pinv_iterations=1)

        def test_more_landmarks_than_one_program_inverts(self) -> None:
            inputs = attention_inputs(1, 1, 150, head_dim=5, device=DEVICE)
            check(inputs, num_landmarks=130, pinv_iterations=1)

        @pytest.mark.parametrize(
            "options",
            [
                {"num_landmarks": (1, 2, 3), "grid": (3, 4, 5)},
                {"num_landmarks": (1, 2, 1, 3), "grid": (3, 2, 2, 5)},
                {"num_landmarks": 6, "pinv_init": "global_max"},
                {"num_landmarks": 6, "cluster_iterations": 2},
            ],
            ids=["grid", "four axes", "global_max", "clustered"],
        )
        def test_kinds_of_landmarks(self, options: dict) -> None:
            inputs = attention_inputs(2, 1, 60, head_dim=8, value_dim=5, device=DEVICE)
            check(inputs, **options)

        @pytest.mark.parametrize("options", [{}, {"grid": (5, 10)}], ids=["segments", "grid"])
        def test_padding(self, options: dict) -> None:
            inputs = attention_inputs(4, 1, 50, head_dim=8, device=DEVICE)
            inputs["key_padding_mask"] = padding_mask([50, 31, 3, 0], 50, scattered=True, device=DEVICE)
            check(inputs, num_landmarks=8, **options)

        @pytest.mark.parametrize("names", [("gamma",), ("residual",), FINISHING], ids="+".join)
        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
        def test_the_end(self, names: tuple[str, ...], dtype: torch.dtype) -> None:
            inputs = attention_inputs(1, 2, 70, head_dim=8, value_dim=5, dtype=dtype, device=DEVICE)
            check(inputs | finishing(inputs, names, taps=3), num_landmarks=7)

        def test_the_end_of_padded_rows(self) -> None:
            inputs = attention_inputs(3, 1, 50, head_dim=8, value_dim=5, device=DEVICE)
            inputs["key_padding_mask"] = padding_mask([31, 3, 0], 50, scattered=True, device=DEVICE)
            check(inputs | finishing(inputs, taps=3), num_landmarks=8)

        @pytest.mark.parametrize("taps", [1, 149])
        def test_a_convolution_over_some_and_over_all_tokens(self, taps: int) -> None:
            inputs = attention_inputs(1, 1, 70, head_dim=4, dtype=torch.float16, device=DEVICE)
            check(inputs | finishing(inputs, taps=taps), num_landmarks=7, pinv_iterations=1)

        def test_the_end_with_several_tiles_of_landmarks(self) -> None:
            inputs = attention_inputs(1, 1, 150, head_dim=5, device=DEVICE)
            check(inputs | finishing(inputs, taps=3), num_landmarks=70, pinv_iterations=1)

        @pytest.mark.parametrize("names", [(), FINISHING], ids=["plain", "finished"])
        def test_channel_first_maps_are_read_and_written_as_they_lie(self, names: tuple[str, ...]) -> None:
            tokens = attention_inputs(1, 2, 50, head_dim=8, value_dim=5, device=DEVICE)
            tokens |= finishing(tokens, names)
            maps = {name: x.mT.contiguous().mT if x.ndim == 4 else x for name, x in tokens.items()}
            results = []
            for inputs in (tokens, maps):
                leaves = {name: x.requires_grad_() for name, x in inputs.items()}
                output = nystrom_attention(**leaves, num_landmarks=6, pinv_iterations=1, backend="triton")
                grads = torch.autograd.grad(output.square().sum(), list(leaves.values()))
                results.append([output, *grads])
            for expected, value in zip(*results, strict=True):
                assert relative_error(value, expected) < 1e-6
            assert all(x.mT.is_contiguous() for x in results[1][:4])

        def test_landmarks_of_the_caller_have_gradients(self) -> None:
            inputs = attention_inputs(1, 2, 40, 33, 4, 7, device=DEVICE)
            inputs |= {f"{side}_landmarks": normal(1, 2, 5, 4, device=DEVICE, seed=9) for side in ("query", "key")}
            check(inputs)

        def test_masked_tokens_may_hold_nan_and_do_not_enter(self) -> None:
            inputs = attention_inputs(2, 1, 40, head_dim=8, device=DEVICE)
            mask = padding_mask([23, 31], 40, scattered=True, device=DEVICE)
            options = {"num_landmarks": 6, "pinv_iterations": 2, "key_padding_mask": mask, "backend": "triton"}
            expected = nystrom_attention(**inputs, **options)
            for name in ("key", "value"):
                inputs[name] = inputs[name].masked_fill(mask[:, None, :, None], float("nan"))
            assert torch.equal(nystrom_attention(**inputs, **options), expected)

        def test_a_row_does_not_see_its_batch_mates(self) -> None:
            inputs = attention_inputs(2, 2, 50, head_dim=8, device=DEVICE)
            leaves = {name: x.requires_grad_() for name, x in inputs.items()}
            together = nystrom_attention(**leaves, num_landmarks=6, pinv_iterations=2, backend="triton")
            grads = torch.autograd.grad(together.square().sum(), list(leaves.values()))
            rows = {name: x.detach()[1:].requires_grad_() for name, x in inputs.items()}
            alone = nystrom_attention(**rows, num_landmarks=6, pinv_iterations=2, backend="triton")
            assert torch.equal(together[1:], alone)
            for grad, row in zip(grads, torch.autograd.grad(alone.square().sum(), list(rows.values())), strict=True):
                assert torch.equal(grad[1:], row)

        def test_strides_do_not_matter(self) -> None:
            inputs = attention_inputs(2, 2, 40, head_dim=8, device=DEVICE)
            expected = nystrom_attention(**inputs, num_landmarks=6, pinv_iterations=2, backend="triton")
            strided = {name: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for name, x in inputs.items()}
            output = nystrom_attention(**strided, num_landmarks=6, pinv_iterations=2, backend="triton")
            # A GPU's kernels are compiled for the strides, and may add in another order; the interpreter has one.
            assert relative_error(output, expected) <= (1e-6 if DEVICE == "cuda" else 0.0)

        def test_rows_that_lie_far_apart(self) -> None:
            """Further than 32 bits count within a tile of the largest size."""
            inputs = attention_inputs(1, 1, 40, head_dim=2, device=DEVICE)
            expected = nystrom_attention(**inputs, num_landmarks=6, pinv_iterations=1, backend="triton")
            room = torch.empty(3, 2**22 + 50, device=DEVICE)
            for row, (name, x) in zip(room, list(inputs.items()), strict=True):
                inputs[name] = row.as_strided(x.shape, (0, 0, 1, 2**22 + 1), row.storage_offset()).copy_(x)
            output = nystrom_attention(**inputs, num_landmarks=6, pinv_iterations=1, backend="triton")
            assert torch.equal(output, expected)

        @pytest.mark.parametrize(
            ("grid", "counts"), [((60,), (7,)), ((5, 12), (3, 5)), ((3, 4, 5), (2, 3, 2))], ids=str
        )
        def test_a_layout_and_its_index_agree(self, grid: tuple[int, ...], counts: tuple[int, ...]) -> None:
            inputs = attention_inputs(1, 2, 60, head_dim=8, device=DEVICE)
            index, number = grid_index(grid, counts, torch.device(DEVICE)), math.prod(counts)
            results = []
            for indices in ((index, index), (None, None)):
                plan, options = (
                    (None, None, *indices, *(None,) * 4),
                    (grid, grid, counts, number, 0.3, 1, False, True, False),
                )
                output, *saved = kernels.nystrom_attention(*inputs.values(), *plan, *(None,) * 3, *options)
                grads = kernels.nystrom_attention_backward(
                    output, *inputs.values(), *saved, *plan, *(None,) * 2, *options
                )
                results.append([output, *saved, *grads])
            for value, expected in zip(*results, strict=True):
                assert relative_error(value, expected) < 2e-6

    class TestMasked:
        @pytest.mark.parametrize(
            ("grid", "counts"), [((60,), (7,)), ((60,), (600,)), ((5, 12), (3, 5)), ((3, 4, 5), (2, 3, 2))], ids=str
        )
        def test_an_index_is_that_of_torchs_operations(self, grid: tuple[int, ...], counts: tuple[int, ...]) -> None:
            mask = padding_mask([60, 59, 31, 7, 3, 0], 60, scattered=True, device=DEVICE)
            *ours, exact = kernels.masked_landmarks(mask, grid, counts)
            *expected, expected_exact = masked_landmarks(mask, grid, counts)
            assert all(map(torch.equal, ours, expected))
            assert not exact.any() if expected_exact is None else torch.equal(exact, expected_exact)

        def test_more_tokens_than_a_turn(self) -> None:
            mask = (normal(2, 5000) > 0.3).to(DEVICE)
            for ours, expected in zip(
                kernels.masked_landmarks(mask, (5000,), (70,)), masked_landmarks(mask, (5000,), (70,)), strict=True
            ):
                assert torch.equal(ours, expected)

    class TestClusterLandmarks:
        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
        @pytest.mark.parametrize(("tokens", "count"), [(90, 8), (150, 70), (300, 130)])
        def test_steps(self, dtype: torch.dtype, tokens: int, count: int) -> None:
            x = normal(2, 1, tokens, 4, dtype=dtype, device=DEVICE)
            index = grid_index((tokens,), (count,), torch.device(DEVICE))
            landmarks, assigned = kernels.cluster_landmarks(x, index, None, None, count, 2)
            expected, expected_index = reference.cluster_landmarks(x, index, None, None, count, 2)
            assert relative_error(landmarks, expected) < 1e-6
            assert torch.equal(assigned, expected_index)

        def test_masks_and_frozen_rows(self) -> None:
            mask = padding_mask([50, 23, 4, 0], 50, scattered=True, device=DEVICE)
            x = normal(4, 2, 50, 5, device=DEVICE).masked_fill(mask[:, None, :, None], float("nan"))
            index, landmark_mask, exact_rows = masked_landmarks(mask, (50,), (6,))
            options = (x, index, landmark_mask, exact_rows, 6, 2)
            landmarks, assigned = kernels.cluster_landmarks(*options)
            expected, expected_index = reference.cluster_landmarks(*options)
            assert relative_error(landmarks, expected) < 1e-6
            assert torch.equal(assigned, expected_index)
