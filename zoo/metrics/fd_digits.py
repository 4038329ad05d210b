"""FD-digits: the Fréchet distance of clips in the features of a small network that knows moving digits.

It stands in for FVD where I3D's weights are not at hand. It is another number: only values of the same network compare.
"""

from torch import Tensor

from nystromgan.zoo.metrics import networks
from nystromgan.zoo.metrics.estimate import Estimate
from nystromgan.zoo.metrics.frechet import frechet_estimate

LEAST_FRAMES = 8


def digit_features(clips: Tensor) -> Tensor:
    """(B, 1, T, H, W) in [-1, 1] -> (B, 128), of `networks.DigitVideoNet`.

    Raises:
        ValueError: clips of another number of channels, or with fewer than 8 frames.
    """
    if clips.ndim != 5 or clips.shape[1] != 1 or clips.shape[2] < LEAST_FRAMES:
        raise ValueError(f"clips must be (B, 1, T, H, W) with T at least {LEAST_FRAMES}, got {tuple(clips.shape)}")
    return networks.batched(networks.load_network("digit_video").features, clips.float())


def fd_digits(real: Tensor, fake: Tensor, splits: int = 10) -> Estimate:
    """Of real and fake clips; falls with more samples, so compare equal numbers."""
    return frechet_estimate(digit_features(real), digit_features(fake), splits)
