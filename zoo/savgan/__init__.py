"""SAVGAN and 3DGAN: video from a latent, with Nyström self-attention in the generator, and without."""

import dataclasses

from nystromgan.zoo.savgan.model import SAVGAN, SAVGANConfig
from nystromgan.zoo.savgan.objective import SAVGANObjective

TASK = "video"
MODEL = SAVGAN
OBJECTIVE = SAVGANObjective
SMALL = SAVGANConfig(frames=16, size=32, width=16, num_landmarks=(16, 64))
PRESETS = {
    "savgan": SAVGANConfig(),
    "savgan-paper": SAVGANConfig(latent="uniform", activation="leaky_relu"),
    "savgan-code": SAVGANConfig(num_landmarks=(512, 512), attention_scale=1.0),
    "savgan-small": SMALL,
    "3dgan": SAVGANConfig(attention="none"),
    "3dgan-small": dataclasses.replace(SMALL, attention="none"),
}
