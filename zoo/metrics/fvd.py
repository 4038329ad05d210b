"""FVD: the Fréchet distance of clips in the 400 logits of I3D, trained on Kinetics-400. The weights are the user's."""

import os

from torch import Tensor
from torch.nn import functional

from nystromgan.zoo.metrics.estimate import Estimate
from nystromgan.zoo.metrics.frechet import frechet_estimate
from nystromgan.zoo.metrics.i3d import load_i3d
from nystromgan.zoo.metrics.networks import batched

SIZE = 224


def i3d_features(clips: Tensor, weights: str | os.PathLike) -> Tensor:
    """(B, 1 or 3, T, H, W) in [-1, 1], T at least 9 -> (B, 400); grey is repeated, frames are resized to 224 x 224.

    Args:
        weights: safetensors that `python -m nystromgan.zoo.metrics.i3d` makes of the public TorchScript file.

    Raises:
        ValueError: clips of another number of channels, too few frames, or weights of another network.
    """
    if clips.ndim != 5 or clips.shape[1] not in (1, 3):
        raise ValueError(f"clips must be (B, 1 or 3, T, H, W), got {tuple(clips.shape)}")
    network = load_i3d(weights)

    def features(part: Tensor) -> Tensor:
        frames = part.float().expand(-1, 3, -1, -1, -1).transpose(1, 2).flatten(0, 1)  # (B T, 3, H, W)
        frames = functional.interpolate(frames, (SIZE, SIZE), mode="bilinear")
        return network(frames.unflatten(0, (len(part), -1)).transpose(1, 2))

    return batched(features, clips, batch_size=4)


def fvd(real: Tensor, fake: Tensor, weights: str | os.PathLike, splits: int = 10) -> Estimate:
    """Of real and fake clips (N, C, T, H, W) and (M, C, T, H, W).

    With fewer clips than 400 the covariances are singular and the value is far too high: compare equal numbers alone
    (SAVGAN: 256 and 256).

    Source: Unterthiner et al., "Towards accurate generative models of video: a new metric and challenges", 2018.
    """
    return frechet_estimate(i3d_features(real, weights), i3d_features(fake, weights), splits)
