"""Which tokens a landmark stands for: segments, blocks of a grid, Lloyd steps, and how close each comes to exact."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from nystromgan import nystrom_attention
from nystromgan.ops.nystrom_attention import library
from nystromgan.ops.nystrom_attention.landmarks import (
    grid_index,
    landmark_grid,
    masked_landmarks,
    near_cubic_counts,
)
from nystromgan.testing import assert_same, attention_inputs, backends_of, device_of, normal, relative_error
from nystromgan.zoo.data import hela

on_every_backend = pytest.mark.parametrize("backend", backends_of("nystrom_attention"))


def block_means(tokens: Tensor, grid: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
    """Means over the blocks of a grid, by splitting every axis as torch.tensor_split does: (B, H, M, D)."""
    blocks = [tokens.unflatten(2, grid)]
    for axis, count in enumerate(counts):
        blocks = [part for block in blocks for part in block.tensor_split(count, dim=2 + axis)]
    return torch.stack([block.flatten(2, -2).mean(2) for block in blocks], dim=2)


class TestCounts:
    @pytest.mark.parametrize(
        ("num_landmarks", "grid", "counts"),
        [
            (64, (8, 16, 16), (4, 4, 4)),  # blocks of 2 x 4 x 4
            (64, (16, 16), (8, 8)),
            (64, (1000,), (64,)),
            (64, (4, 4, 4), (4, 4, 4)),
            (1, (7, 9), (1, 1)),
            (100, (3, 4), (3, 4)),
        ],
    )
    def test_are_chosen_for_near_cubic_blocks(self, num_landmarks, grid, counts) -> None:
        assert landmark_grid(num_landmarks, grid) == counts

    @pytest.mark.parametrize("grid", [(8, 16, 16), (16, 64, 64), (3, 50, 7), (1, 32, 32), (31, 37), (2, 2, 200)])
    @pytest.mark.parametrize("num_landmarks", [1, 2, 7, 13, 64, 97, 256, 509])
    def test_fit_the_grid_and_come_close_to_what_was_asked(self, num_landmarks: int, grid: tuple[int, ...]) -> None:
        counts = landmark_grid(num_landmarks, grid)
        assert all(1 <= count <= size for count, size in zip(counts, grid, strict=True))
        reachable = [
            math.prod(candidate)
            for candidate in itertools.product(*(range(1, min(size, num_landmarks) + 1) for size in grid))
            if math.prod(candidate) <= num_landmarks
        ]
        assert min(max(reachable), num_landmarks - num_landmarks // 8) <= math.prod(counts) <= num_landmarks

    def test_a_prime_count_does_not_make_strips(self) -> None:
        assert max(near_cubic_counts(61, (16, 16))) <= 10

    def test_are_clipped_to_the_grid_when_given_per_axis(self) -> None:
        assert landmark_grid((2, 9, 4), (8, 5, 4)) == (2, 5, 4)


class TestIndex:
    @pytest.mark.parametrize(("tokens", "count"), [(10, 3), (7, 7), (64, 8), (11, 2)])
    def test_the_first_segments_are_the_longer_ones(self, tokens: int, count: int) -> None:
        index = grid_index((tokens,), (count,), torch.device("cpu")).flatten()
        sizes = index.bincount(minlength=count).tolist()
        assert index.tolist() == sorted(index.tolist())
        assert sizes == [tokens // count + (i < tokens % count) for i in range(count)]

    def test_blocks_are_row_major(self) -> None:
        index = grid_index((3, 4), (2, 2), torch.device("cpu")).reshape(3, 4)
        assert index.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]]


@pytest.mark.parametrize("backend", [name for name in backends_of("nystrom_attention") if name != "reference"])
@pytest.mark.parametrize(("grid", "counts"), [((67,), (8,)), ((5, 13), (2, 4)), ((3, 5, 7), (3, 2, 2))])
@pytest.mark.parametrize("laid_out", [(True, True), (False, True), (True, False)])
def test_an_op_works_out_the_blocks_or_is_told_them(
    backend: str, grid: tuple[int, ...], counts: tuple[int, ...], laid_out: tuple[bool, bool]
) -> None:
    device = device_of(backend)
    inputs = attention_inputs(queries=math.prod(grid), device=device)
    index = grid_index(grid, counts, torch.device(device))
    results = []
    for indices in ((index, index), tuple(None if alone else index for alone in laid_out)):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        plan, epilogue = (None, None, *indices, *(None,) * 4), (None,) * 3
        options = (grid, grid, counts, math.prod(counts), 0.3, 2, False, True, False, backend)
        output, *saved = torch.ops.nystromgan.nystrom_attention(*leaves, *plan, *epilogue, *options)
        results.append([output, *saved, *torch.autograd.grad(output.square().sum(), leaves)])
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < 2e-6


@pytest.mark.skipif("cpu" not in backends_of("nystrom_attention"), reason="the cpu alone keeps iterates")
@pytest.mark.parametrize("pinv_iterations", [0, 1, 4])
@pytest.mark.parametrize(("count", "value_dim"), [(9, 5), (40, 12), (70, 8), (130, 16)])
def test_a_backward_finds_the_iterates_or_makes_them_again(count: int, value_dim: int, pinv_iterations: int) -> None:
    inputs = attention_inputs(queries=200, value_dim=value_dim)
    results = []
    for keep in (True, False):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        options = ((200,), (200,), (count,), count, 0.3, pinv_iterations, False, True, keep, "cpu")
        output, *saved = torch.ops.nystromgan.nystrom_attention(*leaves, *(None,) * 8, *(None,) * 3, *options)
        assert (saved[-1].numel() > 0) == keep
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert all(map(torch.equal, *results))


@pytest.mark.skipif("cpu" not in backends_of("nystrom_attention"), reason="the cpu alone keeps iterates")
def test_the_iterates_of_a_row_without_a_pseudo_inverse_are_zero() -> None:
    """Its landmarks are its own tokens; what it keeps must not be what lay in memory."""
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[1, 5:] = True
    index, absent, exact = masked_landmarks(mask, (40,), (9,))
    plan, options = (None, None, index, index, mask, absent, absent, exact), ((), (), (), 9, 0.3, 2, False, True, True)
    inputs = attention_inputs(2, 1, queries=40)
    *_, iterates = torch.ops.nystromgan.nystrom_attention(*inputs.values(), *plan, *(None,) * 3, *options, "cpu")
    assert iterates[0].any()
    assert not iterates[1].any()


def masks(tokens: int) -> Tensor:
    """Padding at the end, at the beginning, anywhere, everywhere and nowhere."""
    mask = normal(5, tokens, seed=3) > 0.5
    mask[0] = torch.arange(tokens) >= tokens // 3
    mask[1] = torch.arange(tokens) < tokens // 2
    mask[3], mask[4] = True, False
    return mask


@pytest.mark.skipif("cpu" not in backends_of("nystrom_attention"), reason="of the native library")
class TestMasked:
    """The index that the native library makes of a mask."""

    @pytest.mark.parametrize(
        ("grid", "counts"),
        [
            ((61,), (7,)),
            ((61,), (1,)),
            ((30,), (29,)),
            ((7, 9), (3, 4)),
            ((4, 3, 5), (2, 3, 1)),
            ((2, 3, 3, 4), (2, 1, 3, 2)),
        ],
    )
    def test_it_is_that_of_torchs_operations(self, grid: tuple[int, ...], counts: tuple[int, ...]) -> None:
        for mask in (masks(math.prod(grid)), masks(2 * math.prod(grid))[:, ::2]):
            expected = masked_landmarks(mask, grid, counts)
            for ours, theirs in zip(library.masked(mask, grid, counts, "cpu"), expected, strict=True):
                assert (ours is None) == (theirs is None)
                if theirs is not None:
                    assert ours.dtype == theirs.dtype
                    assert torch.equal(ours, theirs)

    def test_opcheck(self) -> None:
        torch.library.opcheck(torch.ops.nystromgan.masked_landmarks.default, (masks(30), [5, 6], [2, 3], "cpu"))


@on_every_backend
def test_long_padding_is_left_out(backend: str) -> None:
    """Whole blocks of padding, whatever is in them: the definition's answer and gradients, and none for them."""
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("takes minutes under the interpreter")
    mask = masks(700)[:3].to(device_of(backend))
    inputs = attention_inputs(3, 2, queries=700, value_dim=5, device=device_of(backend))
    padded = mask[:, None, :, None]
    filled = {name: x if name == "query" else x.masked_fill(padded, torch.nan) for name, x in inputs.items()}
    filled["query"] = inputs["query"].masked_fill(padded, 0)
    weight, direction = normal(2, 5, seed=8, device=device_of(backend)), normal(3, 2, 700, 5, device=device_of(backend))
    results = []
    for chosen, tensors in (("reference", {name: x.double() for name, x in filled.items()}), (backend, filled)):
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        output = nystrom_attention(
            **leaves,
            num_landmarks=9,
            key_padding_mask=mask,
            conv_weight=weight.to(leaves["value"].dtype),
            backend=chosen,
        )
        grads = torch.autograd.grad((output * direction.to(output.dtype)).sum(), list(leaves.values()))
        results.append((output, *grads))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert relative_error(ours, expected) < 1e-5
    for grad in results[1][2:]:
        assert not grad.masked_select(padded).any()


@on_every_backend
class TestPooled:
    @pytest.mark.parametrize(
        ("grid", "counts"), [((67,), (8,)), ((5, 13), (2, 4)), ((3, 5, 7), (3, 2, 2)), ((2, 3, 3, 4), (2, 1, 3, 2))]
    )
    def test_landmarks_are_block_means(self, backend: str, grid: tuple[int, ...], counts: tuple[int, ...]) -> None:
        inputs = attention_inputs(queries=math.prod(grid), device=device_of(backend))
        pooled = nystrom_attention(**inputs, num_landmarks=counts, grid=grid, backend=backend)
        landmarks = {f"{name}_landmarks": block_means(inputs[name], grid, counts) for name in ("query", "key")}
        assert relative_error(pooled, nystrom_attention(**inputs, **landmarks, backend=backend)) < 1e-5

    def test_grids_of_queries_and_of_keys(self, backend: str) -> None:
        inputs = attention_inputs(queries=6 * 7, keys=4 * 9, device=device_of(backend))
        pooled = nystrom_attention(**inputs, num_landmarks=(3, 2), grid=((6, 7), (4, 9)), backend=backend)
        landmarks = {
            "query_landmarks": block_means(inputs["query"], (6, 7), (3, 2)),
            "key_landmarks": block_means(inputs["key"], (4, 9), (3, 2)),
        }
        assert relative_error(pooled, nystrom_attention(**inputs, **landmarks, backend=backend)) < 1e-5

    def test_a_grid_of_one_axis_is_a_sequence(self, backend: str) -> None:
        inputs = attention_inputs(device=device_of(backend))
        sequence = nystrom_attention(**inputs, num_landmarks=8, backend=backend)
        assert torch.equal(nystrom_attention(**inputs, num_landmarks=8, grid=(67,), backend=backend), sequence)

    def test_gradients_reach_given_landmarks_and_not_the_pool(self, backend: str) -> None:
        """Landmarks given as the means have the value of pooling; pooling adds their gradient to the tokens'."""
        inputs = {name: x.requires_grad_() for name, x in attention_inputs(device=device_of(backend)).items()}
        pooled = nystrom_attention(**inputs, num_landmarks=8, backend=backend)
        landmarks = {f"{name}_landmarks": block_means(inputs[name], (67,), (8,)) for name in ("query", "key")}
        given = nystrom_attention(**inputs, **landmarks, backend=backend)
        direction = normal(*pooled.shape, device=device_of(backend))
        grads = torch.autograd.grad(pooled, list(inputs.values()), direction)
        # Through block_means, autograd adds what the landmarks got.
        for grad, expected in zip(grads, torch.autograd.grad(given, list(inputs.values()), direction), strict=True):
            assert relative_error(grad, expected) < 2e-5


def lloyd(tokens: Tensor, index: Tensor, count: int, steps: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm for (N, D) by brute force, one token and one landmark at a time, in float64."""
    tokens, index = tokens.double(), index.clone()
    landmarks = torch.stack([tokens[index == m].mean(0) for m in range(count)])
    for _ in range(steps):
        for n, token in enumerate(tokens):
            index[n] = (token - landmarks).square().sum(-1).argmin()
        for m in range(count):
            if (index == m).any():  # an empty one keeps its place
                landmarks[m] = tokens[index == m].mean(0)
    return landmarks, index


def given_lloyd(inputs: dict[str, Tensor], count: int, steps: int) -> dict[str, Tensor]:
    """The landmarks of one batch entry and head, as means with their gradient, assignments fixed."""
    given = {}
    for name in ("query", "key"):
        tokens = inputs[name][0, 0]
        start = grid_index((len(tokens),), (count,), tokens.device).flatten().long()
        landmarks, index = lloyd(tokens.detach(), start, count, steps)
        means = [
            tokens[index == m].mean(0) if (index == m).any() else landmarks[m].to(tokens.dtype) for m in range(count)
        ]
        given[f"{name}_landmarks"] = torch.stack(means)[None, None]
    return given


@on_every_backend
class TestClustered:
    @pytest.mark.parametrize("steps", [1, 2, 8])
    def test_is_lloyds_algorithm_and_its_gradient(self, backend: str, steps: int) -> None:
        inputs = attention_inputs(1, 1, 67, 50, device=device_of(backend))
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        clustered = nystrom_attention(**leaves, num_landmarks=7, cluster_iterations=steps, backend=backend)
        expected = nystrom_attention(**leaves, **given_lloyd(leaves, 7, steps), backend=backend)
        assert relative_error(clustered, expected) < 1e-5
        direction = normal(*clustered.shape, device=device_of(backend))
        grads = [torch.autograd.grad(x, list(leaves.values()), direction) for x in (clustered, expected)]
        for grad, other in zip(*grads, strict=True):
            assert relative_error(grad, other) < 5e-5

    def test_an_empty_landmark_keeps_its_place_and_gets_no_gradient(self, backend: str) -> None:
        """Three segments; the last one's tokens are nearer to the means of the other two."""
        ends = torch.tensor([[1.5, 0.5], [-0.5, 1.0]], device=device_of(backend))
        tokens = torch.cat([ends[0].expand(4, 2), ends[1].expand(4, 2), ends.repeat(2, 1)]) + 0.1 * normal(
            12, 2, device=device_of(backend)
        )
        inputs = {name: tokens.clone()[None, None] for name in ("query", "key")}
        inputs["value"] = normal(1, 1, 12, 3, device=device_of(backend))
        _, index = lloyd(tokens, torch.arange(12) // 4, 3, 2)
        assert not (index == 2).any()
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        clustered = nystrom_attention(**leaves, num_landmarks=3, cluster_iterations=2, backend=backend)
        expected = nystrom_attention(**leaves, **given_lloyd(leaves, 3, 2), backend=backend)
        assert relative_error(clustered, expected) < 1e-5
        grads = [torch.autograd.grad(x.sum(), list(leaves.values())) for x in (clustered, expected)]
        for grad, other in zip(*grads, strict=True):
            assert relative_error(grad, other) < 5e-5

    def test_equal_tokens_go_to_the_first_landmark(self, backend: str) -> None:
        """All distances tie: every landmark but the first is empty, and stays where it was."""
        inputs = attention_inputs(1, 1, 24, device=device_of(backend))
        inputs["query"] = inputs["key"] = torch.ones_like(inputs["query"])
        options = {"num_landmarks": 4, "backend": backend}
        clustered = nystrom_attention(**inputs, **options, cluster_iterations=2)  # type: ignore[arg-type]
        assert_same(clustered, nystrom_attention(**inputs, **options), backend)  # type: ignore[arg-type]

    def test_each_head_has_its_own_clusters(self, backend: str) -> None:
        inputs = attention_inputs(2, 3, device=device_of(backend))
        options = {"num_landmarks": 7, "cluster_iterations": 3, "backend": backend}
        together = nystrom_attention(**inputs, **options)  # type: ignore[arg-type]
        for row, head in itertools.product(range(2), range(3)):
            alone = {name: x[row : row + 1, head : head + 1] for name, x in inputs.items()}
            assert (
                relative_error(
                    together[row, head], nystrom_attention(**alone, **given_lloyd(alone, 7, 3), backend=backend)[0, 0]
                )
                < 1e-5
            )


def video_features(seed: int) -> Tensor:
    """Tokens (8 * 16 * 16, 64) of a real clip: a two-layer random 3-D convolution, standardised."""
    clip = hela.video()[:16, 318:382, 518:582].double()  # (16, 64, 64), the middle
    clip = (clip - clip.mean()) / clip.std()
    first = normal(32, 1, 3, 3, 3, dtype=torch.float64, seed=seed) / 27**0.5
    second = normal(64, 32, 3, 3, 3, dtype=torch.float64, seed=seed + 100) / (32 * 27) ** 0.5
    hidden = torch.conv3d(clip[None, None], first, stride=(1, 2, 2), padding=1).relu()
    features = torch.conv3d(hidden, second, stride=2, padding=1)[0]
    return ((features - features.mean()) / features.std()).flatten(1).mT


def video_inputs(seed: int, device: str) -> dict[str, Tensor]:
    """Random projections of the features to D = 16; the logits have a standard deviation of 0.4."""
    tokens = video_features(seed)
    query, key = (tokens @ normal(64, 16, dtype=torch.float64, seed=seed + part) / 8 for part in (200, 300))
    shrink = ((query @ key.mT / 4).std() / 0.4).sqrt()
    inputs = {"query": query / shrink, "key": key / shrink, "value": tokens}
    return {name: x[None, None].float().to(device) for name, x in inputs.items()}


@on_every_backend
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_lloyd_steps_halve_the_error_of_segment_means_on_real_video(backend: str, seed: int) -> None:
    """64 landmarks; the error is the distance from exact attention, over that of the plain mean of the values."""
    inputs = video_inputs(seed, device_of(backend))
    exact = nystrom_attention(**inputs, num_landmarks=2048, backend=backend)
    mean = inputs["value"].mean(2, keepdim=True)

    def error(**options: object) -> float:
        output = nystrom_attention(**inputs, num_landmarks=64, backend=backend, **options)  # type: ignore[arg-type]
        return ((output - exact).norm() / (exact - mean).norm()).item()

    segments = error()
    assert error(cluster_iterations=2) <= 0.5 * segments
    assert error(cluster_iterations=2, grid=(8, 16, 16)) <= 0.5 * segments
    assert segments < 1  # better than the mean, or halving it would say nothing
