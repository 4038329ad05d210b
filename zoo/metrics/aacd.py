"""AACD: how much the brightness of a clip flickers."""

from torch import Tensor

from nystromgan.zoo.metrics import estimate


def aacd_values(clips: Tensor) -> Tensor:
    """(B, C, T, H, W) in [-1, 1] -> (B,): mean over t of |a_{t+1} - a_t|_2, a_t the frame's mean colour from 0 to 255.

    Raises:
        ValueError: fewer than two frames.

    Source: SAVGAN (ISBI 2023), the average content distance of MoCoGAN (Tulyakov et al., 2018) on mean intensities. The
    scale is not stated; the published values, up to 2.26, are possible on 0 to 255 alone.
    """
    if clips.ndim != 5 or clips.shape[2] < 2:
        raise ValueError(f"clips must be (B, C, T, H, W) with at least two frames, got {tuple(clips.shape)}")
    colours = (clips.double().mean((3, 4)) + 1) * 127.5  # (B, C, T)
    return colours.diff(dim=2).norm(dim=1).mean(1)


def aacd(clips: Tensor, splits: int = 10) -> estimate.Estimate:
    """The mean of `aacd_values`; lower is steadier, and a frozen clip has 0, so compare it with real clips'."""
    return estimate.mean(aacd_values(clips), splits)
