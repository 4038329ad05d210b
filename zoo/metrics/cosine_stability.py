"""Res18-cosTS: how alike a classifier finds successive frames."""

from torch import Tensor
from torch.nn import functional

from nystromgan.zoo.metrics import estimate
from nystromgan.zoo.metrics.flips import WINDOW, frame_outputs


def cosine_stability_values(clips: Tensor, window: int = WINDOW) -> Tensor:
    """(B, 1, T, H, W) in [-1, 1] -> (B,): mean over t of cos(f_t, f_{t+1}), f_t what the last layer sees of frame t.

    f is of this repository's own narrow ResNet-18 (`networks.facts("digit_resnet18")`), with 128 features.

    Source: SAVGAN (ISBI 2023), whose ResNet-18 has 512 and is not published: values are not comparable with its own.
    """
    features = frame_outputs(clips, window, "features")  # (B, T, D)
    return functional.cosine_similarity(features[:, :-1], features[:, 1:], dim=2).mean(1)


def cosine_stability(clips: Tensor, splits: int = 10) -> estimate.Estimate:
    """The mean of `cosine_stability_values`; higher is steadier, at most 1."""
    return estimate.mean(cosine_stability_values(clips), splits)
