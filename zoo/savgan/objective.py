"""SAVGAN's training problem: Wasserstein critics of clips and frames with gradient penalties, and the generator."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nystromgan.zoo.savgan.discriminators import ImageDiscriminator, VideoDiscriminator
from nystromgan.zoo.savgan.model import SAVGAN
from nystromgan.zoo.training.contract import Objective, Player, Step
from nystromgan.zoo.training.penalties import gradient_penalty, interpolated

FRAME_CHOICES = ("clip", "batch")
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda logits: logits.mean(1),
    "sum": lambda logits: logits.sum(1),
}


class SAVGANObjective(Objective):
    """Two players: both critics together, who see the same fakes and share no parameter, and the generator.

        critics:    sum over D in (D_V, D_I) of  mean D(fake) - mean D(real) + penalty_weight * penalty(D)
        generator:  - mean D_V(fake) - image_weight * mean D_I(a frame of fake)

    Args:
        model: the generator.
        penalty_weight: of the gradient penalty of either critic, at points between real and fake.
        image_weight: of the critic of frames in the generator's loss.
        discriminator_steps: turns of the critics in each step.
        discriminator_norm: of the critic of clips, "none" or "instance".
        discriminator_activation: of the critic of clips, "leaky_relu" or "relu".
        frame_choice: which frame the critic of frames sees: one drawn for each "clip", or one for the whole "batch".
        penalty_reduction: of the patches' logits whose gradient is penalised, "mean" or "sum".

    Source: SAVGAN (ISBI 2023), equations 1 to 3; README.md says where the released code differs.
    """

    model: SAVGAN
    video_discriminator: VideoDiscriminator
    image_discriminator: ImageDiscriminator

    def __init__(
        self,
        model: SAVGAN,
        *,
        penalty_weight: float = 10.0,
        image_weight: float = 50.0,
        discriminator_steps: int = 5,
        discriminator_norm: str = "none",
        discriminator_activation: str = "leaky_relu",
        frame_choice: str = "clip",
        penalty_reduction: str = "mean",
    ) -> None:
        super().__init__()
        if frame_choice not in FRAME_CHOICES:
            raise ValueError(f"frame_choice must be one of {FRAME_CHOICES}, got {frame_choice!r}")
        if penalty_reduction not in REDUCTIONS:
            raise ValueError(f"penalty_reduction must be one of {tuple(REDUCTIONS)}, got {penalty_reduction!r}")
        config = model.config
        self.model = model
        self.video_discriminator = VideoDiscriminator(
            image_channels=config.image_channels,
            frames=config.frames,
            size=config.size,
            width=config.width,
            norm=discriminator_norm,
            activation=discriminator_activation,
            attention=config.attention != "none",
            attention_scale=config.attention_scale,
            normalised=config.spectral_norm,
        )
        self.image_discriminator = ImageDiscriminator(image_channels=config.image_channels, width=2 * config.width)
        self.penalty_weight, self.image_weight = penalty_weight, image_weight
        self.frame_choice, self.reduce = frame_choice, REDUCTIONS[penalty_reduction]
        critics = (self.video_discriminator, self.image_discriminator)
        self.players = {
            "discriminators": Player(critics, discriminator_steps, {"learning_rate": 4e-4, "betas": (0.0, 0.9)}),
            "generator": Player((model,), 1, {"learning_rate": 1e-4, "betas": (0.0, 0.9)}),
        }

    def loss(self, player: str, batch: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` is clips (B, C, T, H, W) in [-1, 1]."""
        latent = self.model.draw_latent(len(batch), step.generator)
        if player == "generator":
            return self._generator_loss(self.model(latent), step)
        with torch.no_grad():
            fake = self.model(latent)
        video, video_logs = self._critic_loss(self.video_discriminator, batch, fake.to(batch), step)
        real_frames, fake_frames = self._frames(batch, step), self._frames(fake.to(batch), step)
        image, image_logs = self._critic_loss(self.image_discriminator, real_frames, fake_frames, step)
        logs = {f"video_{name}": value for name, value in video_logs.items()}
        return video + image, logs | {f"image_{name}": value for name, value in image_logs.items()}

    def _generator_loss(self, fake: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        video = -self.video_discriminator(fake).float().mean()
        image = -self.image_discriminator(self._frames(fake, step)).float().mean()
        logs = {"video": video, "image": image}
        logs |= {f"gamma_{i}": gamma for i, gamma in enumerate(self.model.gammas(), 1)}
        return video + self.image_weight * image, logs

    def _critic_loss(
        self, critic: nn.Module, real: Tensor, fake: Tensor, step: Step
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 1; `gap`, mean D(real) - mean D(fake), estimates the Wasserstein distance."""
        real_logits, fake_logits = critic(torch.cat([real, fake])).float().chunk(2)
        gap = real_logits.mean() - fake_logits.mean()
        penalty = gradient_penalty(lambda x: self.reduce(critic(x).float()), interpolated(real, fake, step.generator))
        return self.penalty_weight * penalty - gap, {"gap": gap, "penalty": penalty}

    def _frames(self, clips: Tensor, step: Step) -> Tensor:
        """(B, C, T, H, W) -> (B, C, H, W): a frame of each clip."""
        count = len(clips) if self.frame_choice == "clip" else 1
        generator = step.generator
        index = torch.randint(clips.shape[2], (count,), generator=generator, device=generator.device).to(clips.device)
        return clips[torch.arange(len(clips), device=clips.device), :, index.expand(len(clips))]
