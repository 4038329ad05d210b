"""TGANv2's training problem: four discriminators, one a level, against clips that get sharper and sparser."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from nystromgan.zoo.tganv2.discriminators import LevelDiscriminator
from nystromgan.zoo.tganv2.model import LEVELS, TGANv2
from nystromgan.zoo.training.contract import Objective, Player, Step
from nystromgan.zoo.training.penalties import r1_penalty


class TGANv2Objective(Objective):
    """Two players: the four discriminators together, and the generator.

        discriminators: mean over clips and levels of softplus(-D(real)) + softplus(D(fake)), + penalty_weight * R1
        generator:      mean over clips and levels of softplus(-D(fake)),                      R1 summed over levels

    Args:
        model: the generator.
        penalty_weight: of R1, the mean over clips of the squared gradient at real ones. The authors' code sums over
            clips with a weight of 0.5: at its 32 clips a GPU the same as 16.
        discriminator_width: channels of a discriminator's first block; twice the generator's width unless given.

    Source: TGANv2 (2020), section 3.3; the four outputs count alike.
    """

    model: TGANv2

    def __init__(self, model: TGANv2, *, penalty_weight: float = 16.0, discriminator_width: int | None = None) -> None:
        super().__init__()
        config = model.config
        width = 2 * config.width if discriminator_width is None else discriminator_width
        self.model = model
        self.discriminators = nn.ModuleList(
            LevelDiscriminator(image_channels=config.image_channels, width=width) for _ in range(LEVELS)
        )
        self.penalty_weight = penalty_weight
        adam = {"learning_rate": 1e-4, "betas": (0.0, 0.9), "eps": 8e-8, "schedule": "linear"}
        self.players = {
            "discriminators": Player(tuple(self.discriminators), 1, adam),
            "generator": Player((model,), 1, adam),
        }

    def loss(self, player: str, batch: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` is clips (B, C, T, H, W) in [-1, 1], of the last level's size."""
        phases = torch.randint(2, (LEVELS - 1,), generator=step.generator, device=step.generator.device).tolist()
        latent = self.model.draw_latent(len(batch), step.generator)
        if player == "generator":
            logits = self._logits(self.model.levels(latent, phases))
            adversarial = functional.softplus(-logits).mean()
            return adversarial, {"fake_logits": logits.mean()}
        with torch.no_grad():
            fakes = [fake.to(batch) for fake in self.model.levels(latent, phases)]
        reals = real_levels(batch, phases)
        real_logits, fake_logits = self._logits(reals), self._logits(fakes)
        adversarial = functional.softplus(-real_logits).mean() + functional.softplus(fake_logits).mean()
        penalties = [r1_penalty(critic, real) for critic, real in zip(self.discriminators, reals, strict=True)]
        penalty = torch.stack(penalties).sum()
        logs = {"adversarial": adversarial, "penalty": penalty, "gap": real_logits.mean() - fake_logits.mean()}
        return adversarial + self.penalty_weight * penalty, logs

    def _logits(self, levels: list[Tensor]) -> Tensor:
        """(4, B) float32."""
        return torch.stack([critic(clips) for critic, clips in zip(self.discriminators, levels, strict=True)]).float()


def real_levels(clips: Tensor, phases: list[int]) -> list[Tensor]:
    """(B, C, T, H, W) -> what the four discriminators see of real clips: the generator's sizes and frames."""
    levels = []
    for level in range(LEVELS):
        if level:
            clips = clips[:, :, phases[level - 1] :: 2]
        factor = 2 ** (LEVELS - 1 - level)
        levels.append(functional.avg_pool3d(clips, (1, factor, factor)) if factor > 1 else clips)
    return levels
