"""The Triton kernels of spatiotemporal_attention against the definition: natively on a GPU, else under the interpreter.

The interpreter wants its variable before triton is imported, so without a GPU the tests run in a process of their own.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nystromgan import _env
from nystromgan.ops.spatiotemporal_attention import reference
from nystromgan.testing import TOLERANCES, normal, padding_mask, relative_error

DEVICE = "cuda" if torch.cuda.is_available() and not _env.triton_interpret() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Case = tuple[int, int, int, int, int, int]  # B, H, C, E, N, S
CASES = [(1, 1, 1, 1, 1, 1), (2, 2, 4, 32, 33, 70), (1, 1, 8, 64, 65, 65), (1, 2, 16, 16, 64, 32), (1, 1, 24, 3, 7, 99)]

if DEVICE == "cpu" and not _env.triton_interpret():

    def test_under_the_interpreter(interpreted: Callable[[str], None]) -> None:
        interpreted(__file__)

else:
    from nystromgan.ops.spatiotemporal_attention import triton as kernels

    def operands(case: Case, dtype: torch.dtype, token_major: bool = False) -> list[Tensor]:
        """query, key, value and the gradient of the output."""
        batch, heads, channels, values, queries, keys = case
        shapes = [(channels, queries), (channels, keys), (values, keys), (values, queries)]
        maps = [normal(batch, heads, *shape, dtype=dtype, device=DEVICE, seed=i) for i, shape in enumerate(shapes)]
        return [x.mT.contiguous().mT for x in maps] if token_major else maps

    def run(  # type: ignore[no-untyped-def]
        tensors, mask=None, gamma=None, residual=None, scale=0.3, token_major=False
    ) -> dict[str, Tensor]:
        """What the kernels give: the output and every gradient."""
        *inputs, grad = tensors
        output, attended, lse = kernels.spatiotemporal_attention(
            *inputs, mask, gamma, residual, scale, token_major, True
        )
        saved = output if gamma is None else attended
        grads = kernels.spatiotemporal_attention_backward(grad, *inputs, mask, gamma, saved, lse, scale, token_major)
        results = dict(zip(("output", "query", "key", "value"), (output, *grads[:3]), strict=True))
        return results if gamma is None else {**results, "gamma": grads[3]}

    def expected(tensors, mask=None, gamma=None, residual=None, scale=0.3) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
        """The same by the definition, in float64."""
        *inputs, grad = [x.double() for x in tensors]
        if mask is not None:
            inputs[1:] = [x.masked_fill(mask[:, None, None], 0.0) for x in inputs[1:]]
        leaves = [x.requires_grad_() for x in inputs]
        factor = None if gamma is None else gamma.detach().double().requires_grad_()
        extra = None if residual is None else residual.double()
        output = reference.spatiotemporal_attention(*leaves, mask, factor, extra, scale)
        names = ["query", "key", "value"] + ([] if factor is None else ["gamma"])
        grads = torch.autograd.grad(output, leaves + ([] if factor is None else [factor]), grad)
        return {"output": output.detach(), **dict(zip(names, grads, strict=True))}

    def assert_close(results: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
        assert results.keys() == exact.keys()
        for name, result in results.items():
            tolerance = TOLERANCES[dtype]
            limit = tolerance.output if name == "output" else tolerance.gradient
            assert relative_error(result, exact[name]) <= limit, name

    class TestProperties:
        def test_masked_keys_may_hold_nan_and_do_not_enter(self) -> None:
            tensors = operands((2, 1, 8, 12, 20, 40), torch.float32)
            mask = padding_mask([23, 31], 40, scattered=True, device=DEVICE)
            poisoned = [x.masked_fill(mask[:, None, None], float("nan")) if x.shape[-1] == 40 else x for x in tensors]
            for token_major in (False, True):
                results = run(poisoned, mask, token_major=token_major)
                assert_close(results, expected(tensors, mask), torch.float32)
                for name in ("key", "value"):
                    assert not results[name].masked_select(mask[:, None, None]).any()

        def test_a_row_of_masked_keys_gives_zeros_and_zero_gradients(self) -> None:
            mask = padding_mask([0, 33], 33, device=DEVICE)
            gamma = torch.tensor(2.0, device=DEVICE)
            results = run(operands((2, 1, 4, 8, 17, 33), torch.float32), mask, gamma)
            for name in ("output", "query", "key", "value"):
                assert not results[name][0].any(), name
                assert results[name][1].any(), name

        def test_a_sample_alone_gives_the_same_bits(self) -> None:
            tensors = operands((2, 2, 8, 16, 40, 33), torch.bfloat16)
            together = run(tensors)
            alone = run([x[1:] for x in tensors])
            for name, result in alone.items():
                assert torch.equal(result, together[name][1:]), name

        def test_the_layout_does_not_change_the_numbers_and_outputs_have_their_own(self) -> None:
            """Under the interpreter not a bit; a GPU's kernels are compiled for the strides, and may add otherwise."""
            most = 1e-6 if DEVICE == "cuda" else 0.0
            tensors = operands((1, 2, 8, 24, 40, 33), torch.float32)
            channel_major = run(tensors)
            strided = [torch.stack([x, x], -1)[..., 0] for x in tensors]
            token_major = run(operands((1, 2, 8, 24, 40, 33), torch.float32, token_major=True), token_major=True)
            for name, result in channel_major.items():
                assert result.is_contiguous(), name
                assert token_major[name].mT.is_contiguous(), name
                assert relative_error(token_major[name], result) <= most, name
                assert relative_error(run(strided)[name], result) <= most, name

        def test_gamma_of_zero_leaves_the_residual_and_still_learns(self) -> None:
            tensors = operands((1, 1, 4, 8, 33, 33), torch.float32)
            gamma, residual = torch.zeros((), device=DEVICE), normal(1, 1, 8, 33, device=DEVICE)
            results = run(tensors, None, gamma, residual)
            assert torch.equal(results["output"], residual)
            assert_close(results, expected(tensors, None, gamma, residual), torch.float32)

        def test_without_save_only_the_output_is_made(self) -> None:
            query, key, value, _ = operands((1, 1, 4, 8, 33, 33), torch.float32)
            output, attended, lse = kernels.spatiotemporal_attention(
                query, key, value, None, None, None, 0.5, False, False
            )
            assert attended.numel() == lse.numel() == 0
            assert relative_error(output, expected([query, key, value, value], scale=0.5)["output"]) < 1e-5

    class TestNumbers:
        @pytest.mark.parametrize("dtype", DTYPES)
        @pytest.mark.parametrize(
            "case",
            [
                (1, 1, 1, 1, 1, 1),
                (2, 2, 4, 32, 33, 70),
                (1, 1, 8, 64, 65, 65),
                (1, 2, 16, 16, 64, 32),
                (1, 1, 24, 3, 7, 99),
            ],
            ids=str,
        )
        def test_output_and_gradients(self, case: Case, dtype: torch.dtype) -> None:
            tensors = operands(case, dtype)
            gamma = torch.tensor(0.7, device=DEVICE)
            residual = normal(*tensors[3].shape, dtype=dtype, device=DEVICE, seed=9)
            for scale in (0.3, -0.2):
                exact = expected(tensors, None, gamma, residual, scale)
                assert_close(run(tensors, None, gamma, residual, scale), exact, dtype)

        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
        @pytest.mark.parametrize("dims", [(70, 100), (130, 20), (16, 150), (128, 128), (256, 256)], ids=str)
        def test_wide_heads(self, dims: tuple[int, int], dtype: torch.dtype) -> None:
            tensors = operands((1, 1, *dims, 33, 35), dtype)
            mask = padding_mask([30], 35, scattered=True, device=DEVICE)
            assert_close(run(tensors, scale=0.05), expected(tensors, scale=0.05), dtype)
            assert_close(run(tensors, mask, scale=0.05), expected(tensors, mask, scale=0.05), dtype)

        def test_large_logits_do_not_overflow(self) -> None:
            tensors = operands((1, 1, 8, 8, 40, 40), torch.float32)
            assert_close(run(tensors, scale=40.0), expected(tensors, scale=40.0), torch.float32)
