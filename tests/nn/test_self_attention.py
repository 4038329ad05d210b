"""SelfAttention2d and SelfAttention3d: what they compute, and that they behave as modules."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nystromgan.nn import SelfAttention2d, SelfAttention3d

GRID = (4, 6, 5)
KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "grid": {"num_landmarks": (2, 3, 1)},
    "clustered": {"num_landmarks": 6, "cluster_iterations": 2},
    "segment": {"num_landmarks": 7, "landmarks": "segment"},
    "random": {"num_landmarks": 7, "landmarks": "random"},
    "heads": {"num_landmarks": 6, "num_heads": 2, "query_channels": 6, "value_channels": 10},
    "pooled": {"pool": 2, "value_channels": 8},
    "pooled landmarks": {"pool": 2, "num_landmarks": (2, 2, 2)},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def _block(kind: str = "exact", dtype: torch.dtype = torch.float32, **changes: Any) -> SelfAttention3d:
    """A block of 16 channels whose attention shows: gamma is not 0."""
    block = SelfAttention3d(16, **{**KINDS[kind], **changes}, dtype=dtype)
    nn.init.constant_(block.gamma, 0.7)
    return block


def _video(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 16, *GRID, dtype=dtype)


def _tokens(block: SelfAttention3d, num_tokens: int) -> Tensor:
    """The random landmarks' tokens."""
    assert block.landmark_draw is not None
    return block._random_tokens(block.landmark_draw, num_tokens)


def _plain_exact(block: SelfAttention3d, x: Tensor) -> Tensor:
    """The block as SAGAN writes it: transposed maps and the whole N x N matrix."""
    query, key, value = (conv(x).flatten(2) for conv in (block.query, block.key, block.value))  # (B, C, N)
    weights = (query.mT @ key / query.shape[1] ** 0.5).softmax(-1)  # (B, N, N)
    attended = (value @ weights.mT).reshape(x.shape)
    return x + block.gamma * attended


def _plain_random(block: SelfAttention3d, x: Tensor, index: Tensor) -> Tensor:
    """The block as SAVGAN writes it: random tokens as landmarks, six steps of the pseudo-inverse."""
    query, key, value = (conv(x).flatten(2).mT for conv in (block.query, block.key, block.value))  # (B, N, C)
    query_landmarks, key_landmarks = query[:, index], key[:, index]  # (B, M, C)
    scale = query.shape[-1] ** -0.5
    left = (scale * query @ key_landmarks.mT).softmax(-1)
    core = (scale * query_landmarks @ key_landmarks.mT).softmax(-1)
    right = (scale * query_landmarks @ key.mT).softmax(-1)
    eye = torch.eye(core.shape[-1], dtype=x.dtype)
    norms = core.abs().sum(-1).amax(-1) * core.abs().sum(-2).amax(-1)
    inverse = core.mT / norms[:, None, None]
    for _ in range(6):
        product = core @ inverse
        inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    attended = (left @ (inverse @ (right @ value))).mT.reshape(x.shape)
    return x + block.gamma * attended


def _assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


@every_kind
def test_starts_as_the_identity(kind: str) -> None:
    x = _video()
    block = SelfAttention3d(16, **KINDS[kind])
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("kind", ["exact", "grid", "clustered", "segment", "pooled landmarks"])
def test_batch_mates_do_not_matter(kind: str) -> None:
    x, block = _video(batch=3), _block(kind)
    for i in range(3):
        torch.testing.assert_close(block(x)[i : i + 1], block(x[i : i + 1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("landmarks", ["grid", "segment", "random"])
def test_as_many_landmarks_as_tokens_is_exact(landmarks: str) -> None:
    x, exact = _video(torch.float64), _block(dtype=torch.float64)
    block = _block(num_landmarks=120, landmarks=landmarks, dtype=torch.float64)
    block.load_state_dict(exact.state_dict())
    torch.testing.assert_close(block(x), exact(x))


def test_exact_is_plain_attention() -> None:
    x, block = _video(torch.float64), _block(dtype=torch.float64)
    torch.testing.assert_close(block(x), _plain_exact(block, x))


def test_image_is_a_video_of_one_frame() -> None:
    x, video_block = _video()[:, :, :1], _block()
    image_block = SelfAttention2d(16)
    state = {name: v.squeeze(-1) if v.ndim == 5 else v for name, v in video_block.state_dict().items()}
    image_block.load_state_dict(state)
    torch.testing.assert_close(image_block(x[:, :, 0]), video_block(x)[:, :, 0], rtol=1e-5, atol=1e-6)


def test_random_landmarks_are_savgan() -> None:
    x, block = _video(torch.float64), _block("random", dtype=torch.float64).eval()
    torch.testing.assert_close(block(x), _plain_random(block, x, _tokens(block, 120)))


def test_random_tokens_are_distinct_and_spread_evenly() -> None:
    block = _block("random")
    draws = [_tokens(block, 40) for _ in range(2000)]
    assert all(len(set(draw.tolist())) == 7 and draw.min() >= 0 and draw.max() < 40 for draw in draws)
    counts = torch.cat(draws).bincount(minlength=40)
    assert counts.sum() == 14000
    assert 0.7 * 350 < counts[1:-1].min() <= counts[1:-1].max() < 1.3 * 350


def test_random_landmarks_follow_the_generator_in_training_and_the_checkpoint_in_eval() -> None:
    x, block = _video(), _block("random")
    torch.manual_seed(5)
    first, second = block(x), block(x)
    torch.manual_seed(5)
    assert torch.equal(block(x), first)
    assert not torch.equal(first, second)
    block.eval()
    assert torch.equal(block(x), block(x))
    restored = _block("random").eval()
    restored.load_state_dict(block.state_dict())
    assert torch.equal(restored(x), block(x))


def test_pooled_keys_are_maxima() -> None:
    x, block = _video(torch.float64), _block(pool=(1, 2, 3), dtype=torch.float64)
    keys = block._pooled(block.key(x))
    assert keys.shape[2:] == (4, 3, 2)  # a smaller block at the far edge keeps every position
    torch.testing.assert_close(keys[..., 0, 0], block.key(x)[..., :2, :3].amax((-1, -2)))


def test_scale_is_that_of_the_logits() -> None:
    x, block, unscaled = _video(torch.float64), _block(dtype=torch.float64), _block(scale=1.0, dtype=torch.float64)
    unscaled.load_state_dict(block.state_dict())
    with torch.no_grad():
        unscaled.query.weight *= 2**-0.5  # query_channels is 16 // 8
        unscaled.query.bias *= 2**-0.5
    torch.testing.assert_close(unscaled(x), block(x))


@every_kind
@pytest.mark.parametrize("other", ["exact", "random", "grid"])
def test_checkpoints_move_between_kinds(kind: str, other: str) -> None:
    widths = {name: KINDS[kind][name] for name in ("query_channels", "value_channels") if name in KINDS[kind]}
    source, target = _block(kind), _block(other, **widths)
    target.load_state_dict(source.state_dict())
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name))
    source.load_state_dict(target.state_dict())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1, 1)])
def test_gamma_loads_from_any_shape_of_one_number(shape: tuple[int, ...]) -> None:
    block = _block()
    block.load_state_dict({**_block().state_dict(), "gamma": torch.full(shape, 0.3)})
    assert torch.equal(block.gamma, torch.tensor([0.3]))


def test_a_checkpoint_of_another_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for query\.weight"):
        _block(query_channels=4).load_state_dict(_block("random").state_dict())


@every_kind
def test_gradient_penalty_is_that_of_float64(kind: str) -> None:
    """WGAN-GP through the block, second derivatives included, in float32 against float64."""

    def penalty_gradients(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(1)
        x = _video(torch.float64).to(dtype).requires_grad_()
        block = _block(kind, dtype=torch.float64).to(dtype).eval()
        score = block(x).square().flatten(1).mean(1).sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().sum()
        return list(torch.autograd.grad(penalty, [x, *block.parameters()]))

    for actual, expected in zip(penalty_gradients(torch.float32), penalty_gradients(torch.float64), strict=True):
        # The bias of the keys shifts every logit of a row alike, so its gradient is 0 but for rounding.
        assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-7


@pytest.mark.parametrize("kind", ["exact", "random"])
def test_gradient_penalty_is_that_of_plain_pytorch(kind: str) -> None:
    block = _block(kind, dtype=torch.float64).eval()

    def plain(x: Tensor) -> Tensor:
        return _plain_exact(block, x) if kind == "exact" else _plain_random(block, x, _tokens(block, 120))

    def penalty_gradients(function: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        x = _video(torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().sum()
        return torch.autograd.grad(penalty, [x, *block.parameters()])

    for actual, expected in zip(penalty_gradients(block), penalty_gradients(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:num_landmarks=. takes")
@pytest.mark.parametrize("kind", ["exact", "clustered", "random", "pooled landmarks"])
def test_gradcheck(kind: str) -> None:
    # Three query channels: with one, clustering empties a landmark, which then is a constant to the derivative.
    block = SelfAttention3d(4, query_channels=3, **KINDS[kind], dtype=torch.float64).eval()
    nn.init.constant_(block.gamma, 0.7)
    x = torch.randn(1, 4, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)
    assert torch.autograd.gradgradcheck(block, x, fast_mode=True)


@every_kind
def test_autocast_keeps_the_dtype_of_x(kind: str) -> None:
    x, block = _video(), _block(kind).eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float32
    _assert_close(y, block(x), 2e-2)


@every_kind
def test_bfloat16_module(kind: str) -> None:
    x, block = _video(), _block(kind).eval()
    expected = block(x)
    y = block.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    _assert_close(y.float(), expected, 2e-2)


@pytest.mark.parametrize(
    ("kind", "training"),
    [("exact", True), ("clustered", True), ("random", True), ("random", False), ("heads", True), ("pooled", True)],
)
def test_compiles_whole(kind: str, training: bool) -> None:
    torch.compiler.reset()
    block = _block(kind).train(training)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = _video(batch=batch)
        results = []
        for module in (compiled, block):
            torch.manual_seed(0)
            block.zero_grad()
            y = module(x)
            y.square().sum().backward()
            results.append([y, *(parameter.grad.clone() for parameter in block.parameters())])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_kind
def test_exports_with_any_batch(kind: str) -> None:
    block = _block(kind).eval()
    program = torch.export.export(block, (_video(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = _video(batch=5)
    torch.testing.assert_close(program.module()(x), block(x))


@every_kind
def test_copies(kind: str) -> None:
    x, block = _video(), _block(kind).eval()
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
        twin.load_state_dict(block.state_dict())


@every_kind
def test_functional_call(kind: str) -> None:
    x, block, other = _video(), _block(kind).eval(), _block(kind).eval()
    assert torch.equal(torch.func.functional_call(other, block.state_dict(), x), block(x))


@every_kind
def test_made_on_meta_then_filled(kind: str) -> None:
    block = SelfAttention3d(16, **KINDS[kind], device="meta")
    assert {tensor.device.type for tensor in block.state_dict().values()} == {"meta"}
    block.to_empty(device="cpu")
    source = _block(kind).eval()
    block.load_state_dict(source.state_dict())
    x = _video()
    assert torch.equal(block.eval()(x), source(x))


def test_frozen_parts_get_no_gradient() -> None:
    block = _block("grid")
    block.query.requires_grad_(False)
    block(_video()).sum().backward()
    assert block.query.weight.grad is None
    assert block.key.weight.grad is not None


def test_gradient_checkpointing_draws_the_same_landmarks() -> None:
    x, block = _video().requires_grad_(), _block("random")
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    (actual,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_channels_last_and_sliced_inputs() -> None:
    block = _block("clustered")
    x = _video()
    expected = block(x)
    _assert_close(block(x.to(memory_format=torch.channels_last_3d)), expected, 1e-5)
    _assert_close(block(torch.cat([x, x], -1)[..., : x.shape[-1]]), expected, 1e-5)


def test_repr_shows_the_settings() -> None:
    shown = repr(SelfAttention2d(64, num_heads=2, pool=2, num_landmarks=(4, 4), cluster_iterations=2, scale=1.0))
    for setting in ("channels=64", "num_heads=2", "query_channels=8", "pool=(2, 2)", "num_landmarks=(4, 4)"):
        assert setting in shown
    for setting in ("landmarks='grid'", "cluster_iterations=2", "scale=1.0", "backend='auto'"):
        assert setting in shown


def test_warns_once_where_landmarks_are_dearer_than_exact_attention() -> None:
    x = torch.randn(1, 16, 5, 5, 5)
    block = SelfAttention3d(16, num_landmarks=64)
    with pytest.warns(UserWarning, match=r"num_landmarks=64 takes .* over 125 x 125 positions"):
        block(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block(x)
    block(x)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
        ({"channels": 16.0}, TypeError, "channels must be an integer, got 16.0"),
        ({"num_heads": 3}, ValueError, "num_heads must divide query_channels 2, got 3"),
        ({"query_channels": 0}, ValueError, "query_channels must be at least 1, got 0"),
        ({"num_heads": 2, "value_channels": 5}, ValueError, "num_heads must divide value_channels 5, got 2"),
        ({"pool": (2, 2)}, ValueError, r"pool must be one integer or 3, one per axis, got \(2, 2\)"),
        ({"pool": 0}, ValueError, "pool must be at least 1, got 0"),
        ({"num_landmarks": 0}, ValueError, "num_landmarks must be at least 1, got 0"),
        ({"num_landmarks": 2.5}, TypeError, "num_landmarks must be an integer, got 2.5"),
        ({"num_landmarks": (2, 2)}, ValueError, r"num_landmarks must be one integer or 3.*got \(2, 2\)"),
        ({"num_landmarks": 8, "landmarks": "strided"}, ValueError, "landmarks must be one of .*got 'strided'"),
        ({"num_landmarks": (2, 2, 2), "landmarks": "segment"}, ValueError, "must be one integer with landmarks='seg"),
        ({"landmarks": "random"}, ValueError, "num_landmarks must be an integer with landmarks='random', got None"),
        (
            {"landmarks": "random", "num_landmarks": 8, "cluster_iterations": 2},
            ValueError,
            "cluster_iterations must be 0 with landmarks='random'.*got 2",
        ),
        ({"landmarks": "random", "num_landmarks": 8, "pool": 2}, ValueError, "pool must be 1 with landmarks='random'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"cluster_iterations": -1}, ValueError, "cluster_iterations must be at least 0, got -1"),
    ],
)
def test_refuses_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SelfAttention3d(**{"channels": 16, **settings})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 16, 6, 5), r"x must have 5 axes, got shape \(2, 16, 6, 5\)"),
        ((2, 8, 4, 6, 5), r"x axis 1 must be 16 \(channels\), got shape \(2, 8, 4, 6, 5\)"),
    ],
)
def test_refuses_bad_inputs(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfAttention3d(16)(torch.randn(shape))


def test_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        SelfAttention3d(16, backend="gpu")(_video())
