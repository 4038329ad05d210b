"""What nystrom_attention must keep whatever the numbers: rows alone, padding, exactness, order, NaN, the same bits."""

import pytest
import torch
from torch import Tensor

from nystromgan import nystrom_attention
from nystromgan.testing import (
    NATIVE_DTYPES,
    assert_same,
    attention_inputs,
    backends_of,
    device_of,
    normal,
    padding_mask,
    relative_error,
)

pytestmark = pytest.mark.parametrize("backend", backends_of("nystrom_attention"))
in_every_dtype = pytest.mark.parametrize("dtype", NATIVE_DTYPES)
KINDS = pytest.mark.parametrize(
    "options",
    [
        {"num_landmarks": 8},
        {"num_landmarks": (2, 4), "grid": (5, 13)},
        {"num_landmarks": 8, "cluster_iterations": 2},
        {"num_landmarks": 65},  # exact
    ],
    ids=["segments", "grid", "clustered", "exact"],
)


def run(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, ...]:
    """Output and gradients, against a direction that is the same for the same row."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    output = nystrom_attention(**leaves, **options)  # type: ignore[arg-type]
    direction = normal(*output.shape[1:], dtype=output.dtype, device=output.device.type).expand_as(output)
    differentiated = [x for x in leaves.values() if x.requires_grad]
    return output.detach(), *torch.autograd.grad(output, differentiated, direction)


def rows(inputs: dict[str, Tensor], index: slice | list[int]) -> dict[str, Tensor]:
    return {name: x[index] for name, x in inputs.items()}


@KINDS
class TestBatch:
    @in_every_dtype
    def test_a_row_does_not_see_its_batch_mates(self, backend: str, options: dict, dtype: torch.dtype) -> None:
        inputs = attention_inputs(4, queries=65, dtype=dtype, device=device_of(backend))
        inputs["query"][1] *= 3  # a louder neighbour
        together = run(inputs, **options, backend=backend)
        for i in range(4):
            alone = run(rows(inputs, slice(i, i + 1)), **options, backend=backend)
            for value, expected in zip(together, alone, strict=True):
                assert_same(value[i : i + 1], expected, backend)

    def test_a_head_does_not_see_the_others(self, backend: str, options: dict) -> None:
        inputs = attention_inputs(2, 3, queries=65, device=device_of(backend))
        together = nystrom_attention(**inputs, **options, backend=backend)
        for head in range(3):
            alone = {name: x[:, head : head + 1] for name, x in inputs.items()}
            expected = nystrom_attention(**alone, **options, backend=backend)
            assert_same(together[:, head : head + 1], expected, backend)

    def test_the_order_of_a_batch_does_not_matter(self, backend: str, options: dict) -> None:
        inputs = attention_inputs(5, queries=65, device=device_of(backend))
        order = [3, 0, 4, 2, 1]
        expected = run(inputs, **options, backend=backend)
        for value, other in zip(run(rows(inputs, order), **options, backend=backend), expected, strict=True):
            assert_same(value, other[order], backend)

    @in_every_dtype
    def test_two_runs_and_any_number_of_threads_give_the_same_bits(
        self, backend: str, options: dict, dtype: torch.dtype
    ) -> None:
        inputs = attention_inputs(1, 3, queries=65, dtype=dtype, device=device_of(backend))
        first, second = (run(inputs, **options, backend=backend) for _ in range(2))
        assert all(map(torch.equal, first, second))
        torch.set_num_threads(1)
        for value, expected in zip(run(inputs, **options, backend=backend), first, strict=True):
            assert_same(value, expected, backend)


@pytest.mark.parametrize("heads", [1, 3])
def test_long_sequences_give_the_same_bits_on_any_number_of_threads(backend: str, heads: int) -> None:
    """Long enough that the work over the tokens of one head is split; of three, two threads share one."""
    inputs = attention_inputs(1, heads, queries=5001, keys=4003, device=device_of(backend))
    options = {"num_landmarks": 16, "cluster_iterations": 1, "backend": backend}
    two = run(inputs, **options)
    torch.set_num_threads(1)
    for value, expected in zip(run(inputs, **options), two, strict=True):
        assert_same(value, expected, backend)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("num_landmarks", "value_dim"), [(128, 8), (150, 40), (130, 60)])
def test_matrices_that_threads_share_have_the_bits_of_those_they_do_not(
    backend: str, batch: int, num_landmarks: int, value_dim: int
) -> None:
    """Of one or three pseudo-inverses two threads share each, of two each thread has its own."""
    inputs = attention_inputs(batch, 1, queries=300, value_dim=value_dim, device=device_of(backend))
    options = {"num_landmarks": num_landmarks, "backend": backend}
    two = run(inputs, **options)
    torch.set_num_threads(1)
    for value, expected in zip(run(inputs, **options), two, strict=True):
        assert_same(value, expected, backend)


@in_every_dtype
def test_what_is_written_past_the_cache_is_what_is_written_through_it(backend: str, dtype: torch.dtype) -> None:
    """As outputs and gradients from 16 MiB on are on the CPU; those of one row are smaller."""
    if backend == "reference":
        pytest.skip("it leaves writing to torch")
    inputs = attention_inputs(8, 1, queries=16384, head_dim=64, dtype=dtype, device=device_of(backend))
    inputs["value"][2] = torch.nan
    together = run(inputs, backend=backend)
    for i in (0, 2, 7):
        for value, expected in zip(together, run(rows(inputs, slice(i, i + 1)), backend=backend), strict=True):
            assert_same(value[i : i + 1], expected, backend)


class TestPadding:
    LENGTHS = (40, 23, 8, 5, 1)  # all, some, exactly as many as landmarks, fewer, one

    @pytest.mark.parametrize("cluster_iterations", [0, 2])
    @pytest.mark.parametrize("scattered", [False, True])
    @pytest.mark.parametrize("filling", [100.0, torch.nan])
    def test_a_padded_row_is_the_row_alone(
        self, backend: str, cluster_iterations: int, scattered: bool, filling: float
    ) -> None:
        """Whatever the padding holds; gradients too, and those of padding are zero."""
        device = device_of(backend)
        inputs = attention_inputs(len(self.LENGTHS), queries=40, value_dim=5, device=device)
        mask = padding_mask(self.LENGTHS, 40, scattered=scattered, device=device)
        for name in ("key", "value") if filling != filling else ("query", "key", "value"):
            inputs[name][mask[:, None, :, None].expand_as(inputs[name])] = filling
        options = {"num_landmarks": 8, "cluster_iterations": cluster_iterations, "backend": backend}
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        output = nystrom_attention(*leaves, **options, key_padding_mask=mask)  # type: ignore[arg-type]
        direction = normal(*output.shape, device=device).masked_fill(mask[:, None, :, None], 0)
        results = (output.detach(), *torch.autograd.grad(output, leaves, direction))
        for i in range(len(self.LENGTHS)):
            alone = [x[i : i + 1, :, ~mask[i]].detach().requires_grad_() for x in inputs.values()]
            expected = nystrom_attention(*alone, **options)  # type: ignore[arg-type]
            grads = torch.autograd.grad(expected, alone, direction[i : i + 1, :, ~mask[i]])
            for value, other in zip(results, (expected, *grads), strict=True):
                torch.testing.assert_close(value[i : i + 1, :, ~mask[i]], other, rtol=1e-4, atol=1e-5)
            for grad in results[1:]:
                assert not grad[i, :, mask[i]].any()

    @pytest.mark.parametrize("options", [{}, {"cluster_iterations": 2}, {"grid": (5, 8)}, {"num_landmarks": 64}])
    def test_a_row_with_no_valid_key_gives_zeros(self, backend: str, options: dict) -> None:
        device = device_of(backend)
        inputs = attention_inputs(2, queries=40, device=device)
        inputs["key"][1] = inputs["value"][1] = torch.nan
        inputs["key_padding_mask"] = padding_mask([40, 0], 40, device=device)
        results = run(inputs, **{"num_landmarks": 8, **options}, backend=backend)
        for value in results:
            assert value[0].isfinite().all()
            assert value[0].any()
            assert not value[1].any()

    def test_an_empty_block_of_a_grid_is_left_out(self, backend: str) -> None:
        """Masking the last two columns of an 8 x 8 grid leaves an 8 x 6 grid, where blocks are 2 x 2."""
        device = device_of(backend)
        inputs = attention_inputs(1, queries=64, device=device)
        valid = torch.arange(64, device=device) % 8 < 6
        inputs_alone = {name: x[:, :, valid] for name, x in inputs.items()}
        padded = nystrom_attention(
            **inputs, num_landmarks=(4, 4), grid=(8, 8), key_padding_mask=~valid[None], backend=backend
        )
        alone = nystrom_attention(**inputs_alone, num_landmarks=(4, 3), grid=(8, 6), backend=backend)
        torch.testing.assert_close(padded[:, :, valid], alone, rtol=1e-5, atol=1e-5)

    def test_no_padding_is_no_mask(self, backend: str) -> None:
        device = device_of(backend)
        inputs = attention_inputs(device=device)
        mask = torch.zeros(2, 67, dtype=torch.bool, device=device)
        plain = nystrom_attention(**inputs, num_landmarks=8, backend=backend)
        masked = nystrom_attention(**inputs, num_landmarks=8, key_padding_mask=mask, backend=backend)
        torch.testing.assert_close(masked, plain, rtol=1e-6, atol=1e-6)


class TestExactness:
    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (9, 9), (16, 16), (5, 40), (40, 5)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_as_many_landmarks_as_tokens_give_exact_attention(
        self, backend: str, queries: int, keys: int, masked: bool
    ) -> None:
        device = device_of(backend)
        inputs = attention_inputs(2, 3, queries, keys, 8, 5, device=device)
        mask = padding_mask([keys, keys // 2 + 1], keys, device=device) if masked else None
        output = nystrom_attention(**inputs, num_landmarks=16, key_padding_mask=mask, scale=0.3, backend=backend)
        logits = 0.3 * inputs["query"].double() @ inputs["key"].double().mT
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None], -torch.inf)
        assert relative_error(output, logits.softmax(-1) @ inputs["value"].double()) < 1e-6

    @pytest.mark.parametrize("options", [{"grid": (3, 4, 5), "num_landmarks": (3, 4, 5)}, {"grid": (3, 4, 5)}])
    def test_a_whole_grid_of_landmarks_is_exact_too(self, backend: str, options: dict) -> None:
        inputs = attention_inputs(queries=60, device=device_of(backend))
        exact = nystrom_attention(**inputs, num_landmarks=60, backend=backend)
        assert torch.equal(nystrom_attention(**inputs, **options, backend=backend), exact)

    @pytest.mark.parametrize("grid", [None, (4, 5, 6)])
    def test_a_linear_map_commutes_with_pooling(self, backend: str, grid: tuple[int, ...] | None) -> None:
        """f(pool(x)) == pool(f(x)): SAVGAN's landmark queries are the pooled queries."""
        device = device_of(backend)
        tokens = normal(2, 1, 120, 24, dtype=torch.float64)
        maps = [normal(24, 8, dtype=torch.float64, seed=seed) / 5 for seed in (1, 2, 3)]
        query, key, value = ((tokens @ linear).float().to(device) for linear in maps)
        counts = (2, 5, 2) if grid else (20,)
        blocks = tokens.reshape(2, 1, *((2, 2, 5, 1, 2, 3) if grid else (20, 6)), 24)  # axis = count x block side
        pooled = blocks.mean((3, 5, 7)).flatten(2, 4) if grid else blocks.mean(3)  # (B, 1, 20, 24)
        landmarks = [(pooled @ linear).float().to(device) for linear in maps[:2]]
        pool_last = nystrom_attention(
            query, key, value, num_landmarks=counts if grid else 20, grid=grid, backend=backend
        )
        pool_first = nystrom_attention(
            query, key, value, query_landmarks=landmarks[0], key_landmarks=landmarks[1], backend=backend
        )
        assert relative_error(pool_last, pool_first) < 1e-5


class TestNaN:
    """NaN in stays NaN out, and only in the rows that it touches by the formula."""

    @pytest.mark.parametrize("name", ["query", "key", "value"])
    def test_a_token_reaches_its_head_only(self, backend: str, name: str) -> None:
        inputs = attention_inputs(2, 3, device=device_of(backend))
        clean = nystrom_attention(**inputs, num_landmarks=8, backend=backend)
        inputs[name][1, 2, 30, 1] = torch.nan
        dirty = nystrom_attention(**inputs, num_landmarks=8, backend=backend)
        touched = torch.zeros_like(clean, dtype=torch.bool)
        if name == "value":
            touched[1, 2, :, 1] = True
        else:
            touched[1, 2] = True
        assert torch.equal(dirty.isnan(), touched)
        assert_same(dirty[~touched], clean[~touched], backend)

    def test_a_query_that_is_no_landmark_s_reaches_its_row_only(self, backend: str) -> None:
        inputs = attention_inputs(device=device_of(backend))
        landmarks = {
            f"{name}_landmarks": normal(2, 2, 8, 16, device=device_of(backend), seed=i)
            for i, name in enumerate(("query", "key"))
        }
        clean = nystrom_attention(**inputs, **landmarks, backend=backend)
        inputs["query"][0, 1, 33] = torch.nan
        dirty = nystrom_attention(**inputs, **landmarks, backend=backend)
        assert dirty[0, 1, 33].isnan().all()
        dirty[0, 1, 33] = clean[0, 1, 33]
        assert_same(dirty, clean, backend)

    def test_clustering_keeps_it_in_its_head(self, backend: str) -> None:
        inputs = attention_inputs(2, 3, device=device_of(backend))
        inputs["query"][1, 2, 30, 1] = torch.nan
        output = nystrom_attention(**inputs, num_landmarks=8, cluster_iterations=2, backend=backend)
        assert output[1, 2].isnan().all()
        assert output.isnan().sum() == output[1, 2].numel()

    def test_infinite_logits_do_not_hide(self, backend: str) -> None:
        inputs = attention_inputs(1, 2, device=device_of(backend))
        inputs["key"][0, 0, 3, 0] = torch.inf
        output = nystrom_attention(**inputs, num_landmarks=8, backend=backend)
        assert output[0, 0].isnan().all()
        assert output[0, 1].isfinite().all()

    def test_masked_nan_never_shows(self, backend: str) -> None:
        device = device_of(backend)
        inputs = attention_inputs(1, device=device)
        mask = padding_mask([50], 67, device=device)
        clean = nystrom_attention(**inputs, num_landmarks=8, key_padding_mask=mask, backend=backend)
        inputs["key"][:, :, 50:] = inputs["value"][:, :, 50:] = torch.nan
        dirty = nystrom_attention(**inputs, num_landmarks=8, key_padding_mask=mask, backend=backend)
        assert_same(dirty, clean, backend)
