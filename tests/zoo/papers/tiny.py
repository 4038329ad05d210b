"""A paper that exists for the tests: a small GAN with everything that makes resuming hard, on synthetic clips."""

import dataclasses
import fnmatch
import os
import resource
import signal
import sys

import torch
from torch import Tensor, nn

from nystromgan.nn import spectral_norm
from nystromgan.zoo.training.contract import Objective, Player, Stage, Step

GRID = (4, 8, 8)
RECIPE = """
[model]
preset = "tiny"

[data]
source = "blobs"

[train]
steps = 9
batch = 4
ema = 0.9
save_every = 3
sample_every = 4
log_every = 1
"""


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    width: int = 8
    latent_dim: int = 4
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


class Tiny(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(
            spectral_norm(nn.Linear(config.latent_dim, config.width, bias=False)),
            nn.BatchNorm1d(config.width),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, 256),
            nn.Tanh(),
        )

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent).unflatten(1, (1, *GRID))

    @torch.no_grad()
    def sample(self, n: int, *, seed: int | None = None) -> Tensor:
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        return self(torch.randn((n, self.config.latent_dim), generator=generator).to(self.layers[3].weight))


class TinyObjective(Objective):
    """A critic with a gradient penalty, and the generator; with two stages, the second trains the generator alone."""

    def __init__(self, model: Tiny, *, penalty: float = 1.0, num_stages: int = 1, nan_at: int = -1) -> None:
        super().__init__()
        self.model, self.penalty, self.num_stages, self.nan_at = model, penalty, num_stages, nan_at
        self.critic = nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(256, 8)), nn.Tanh(), nn.Linear(8, 1))
        self.register_buffer("pool", torch.zeros(4, 256))
        self.begin_stage(Stage("0"), None)

    def stages(self) -> list[Stage]:
        return [Stage(str(number)) for number in range(self.num_stages)]

    def begin_stage(self, stage: Stage, data: object) -> None:
        generator = Player((self.model,), optimizer={"learning_rate": 1e-2, "betas": (0.0, 0.9)})
        critic = Player((self.critic,), steps=2, optimizer={"name": "rmsprop", "learning_rate": 1e-2})
        self.players = {"critic": critic, "generator": generator} if stage.name == "0" else {"generator": generator}

    def loss(self, player: str, batch: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        device = step.generator.device
        latent = torch.randn((len(batch), 4), generator=step.generator, device=device)
        if step.index == self.nan_at:
            latent = latent * float("nan")
        fake = self.model(latent)
        if player == "generator":
            return -self.critic(fake).mean(), {"spread": fake.std()}
        self.pool.copy_(torch.cat((self.pool[1:], fake[:1].detach().flatten(1))))
        between = (0.5 * fake + 0.5 * batch).detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        distance = (
            self.critic(batch).mean() - self.critic(torch.cat((fake.detach(), self.pool.view(4, 1, *GRID)))).mean()
        )
        return self.penalty * penalty - distance, {"distance": distance}


class Blobs(torch.utils.data.Dataset[Tensor]):
    """Clip i: a square at a place and of a brightness that depend on (seed, i)."""

    def __init__(self, length: int = 20, seed: int = 0) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        clip = torch.full((1, *GRID), -1.0)
        top, left = torch.randint(0, 4, (2,), generator=generator).tolist()
        clip[:, :, top : top + 4, left : left + 4] = torch.rand(1, generator=generator).item()
        return clip


TASK = "video"
MODEL = Tiny
OBJECTIVE = TinyObjective
PRESETS = {"tiny": TinyConfig(), "tiny-wide": TinyConfig(width=16)}


def register(papers: dict[str, str], sources: dict[str, str]) -> None:
    papers["tiny"] = "tiny"
    sources["blobs"] = "tiny:Blobs"


def main(arguments: list[str], environment: dict[str, str], kill_in_sync: tuple[str, int], largest_file: int) -> None:
    """The command `nystromgan` in a process of its own, with this paper in the registry."""
    from nystromgan import cli
    from nystromgan.zoo import data, registry

    os.environ.update(environment)
    torch.set_num_threads(1)
    register(registry.PAPERS, data.SOURCES)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    _kill_in_sync(*kill_in_sync)
    sys.exit(cli.main(arguments))


def _kill_in_sync(pattern: str, number: int) -> None:
    """The process kills itself in its fsync number `number` of a path that matches, with half of the file gone."""
    real, count = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        count += fnmatch.fnmatch(path, pattern)
        if count == number:
            if not os.path.isdir(path):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync
