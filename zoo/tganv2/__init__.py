"""TGANv2: video from a latent by a ConvLSTM, trained sparsely at four resolutions."""

from nystromgan.zoo.tganv2.model import TGANv2, TGANv2Config
from nystromgan.zoo.tganv2.objective import TGANv2Objective

TASK = "video"
MODEL = TGANv2
OBJECTIVE = TGANv2Objective
PRESETS = {
    "tganv2": TGANv2Config(),
    "tganv2-192": TGANv2Config(size=192, image_channels=3),
    "tganv2-small": TGANv2Config(size=32, doublings=5, width=8, lstm_channels=64, latent_dim=128),
}
