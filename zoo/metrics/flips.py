"""Flips per sequence: how often the digit that a classifier sees changes along a clip."""

from torch import Tensor

from nystromgan.zoo.metrics import estimate, networks

WINDOW = 10  # frames, as SAVGAN's


def flips_values(clips: Tensor, window: int = WINDOW) -> Tensor:
    """(B, 1, T, H, W) in [-1, 1] -> (B,): changes of the predicted digit along the first `window` frames, at most 9.

    Digits are predicted by this repository's own classifier (`networks.facts("digit_resnet18")`).

    Source: SAVGAN (ISBI 2023), whose classifier is not published: values are not comparable with its own.
    """
    predicted = frame_outputs(clips, window, "forward").argmax(2)  # (B, T)
    return (predicted.diff(dim=1) != 0).sum(1)


def flips(clips: Tensor, splits: int = 10) -> estimate.Estimate:
    """The mean of `flips_values`; 0 is best, and real clips say what the classifier itself adds."""
    return estimate.mean(flips_values(clips), splits)


def frame_outputs(clips: Tensor, window: int, method: str) -> Tensor:
    """(B, 1, T, H, W) -> (B, window, D): a method of the frame classifier on each of the first `window` frames.

    Raises:
        ValueError: clips of another number of channels, or with fewer than two frames.
    """
    if clips.ndim != 5 or clips.shape[1] != 1 or clips.shape[2] < 2:
        raise ValueError(f"clips must be (B, 1, T, H, W) with at least two frames, got {tuple(clips.shape)}")
    frames = clips[:, :, :window].transpose(1, 2)  # (B, T, 1, H, W)
    outputs = networks.batched(getattr(networks.load_network("digit_resnet18"), method), frames.flatten(0, 1).float())
    return outputs.unflatten(0, frames.shape[:2])
