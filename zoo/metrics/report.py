"""Every metric of video that the data allow, of a model's clips and of real ones beside them."""

import os
from typing import NamedTuple

from torch import Tensor

from nystromgan.zoo.metrics.aacd import aacd
from nystromgan.zoo.metrics.cosine_stability import cosine_stability
from nystromgan.zoo.metrics.estimate import Estimate
from nystromgan.zoo.metrics.fd_digits import fd_digits
from nystromgan.zoo.metrics.fid import frechet_of_images, given, inception
from nystromgan.zoo.metrics.flips import WINDOW, flips
from nystromgan.zoo.metrics.fvd import fvd
from nystromgan.zoo.metrics.kid import kernel_distance_of_images
from nystromgan.zoo.metrics.networks import batched


class Row(NamedTuple):
    """A metric's name, what is better, and its values of the model and of real clips."""

    metric: str
    better: str
    model: Estimate
    real: Estimate


def video_metrics(
    fake: Tensor,
    real: Tensor,
    other_real: Tensor,
    *,
    digits: bool = True,
    i3d_weights: str | os.PathLike | None = None,
    inception_weights: str | os.PathLike | None = None,
) -> list[Row]:
    """The metrics of clips (N, C, T, H, W) in [-1, 1], N at least 10, over their first 10 frames.

    Args:
        fake: the model's.
        real: the data's.
        other_real: as many others, between which and `real` a distance has the data's own value.
        digits: whether the clips show MNIST's digits, which three of the metrics know.
        i3d_weights: for FVD.
        inception_weights: for FID and KID, of frames.

    Raises:
        ValueError: clips of unlike channels, heights or widths, or numbers of frames to compare.
    """
    fake, real, other_real = (clips[:, :, :WINDOW] for clips in (fake, real, other_real))
    if not fake.shape[1:] == real.shape[1:] == other_real.shape[1:]:
        shapes = ", ".join(str(tuple(clips.shape[1:])) for clips in (fake, real, other_real))
        raise ValueError(f"the model's clips and both sets of real ones must have one shape (C, T, H, W), got {shapes}")
    rows = [Row("AACD", "lower", aacd(fake), aacd(real))]
    if digits:
        rows.append(Row("Flips/seq", "lower", flips(fake), flips(real)))
        rows.append(Row("Res18-cosTS", "higher", cosine_stability(fake), cosine_stability(real)))
        rows.append(Row("FD-digits", "lower", fd_digits(real, fake), fd_digits(real, other_real)))
    if i3d_weights is not None:
        rows.append(Row("FVD", "lower", fvd(real, fake, i3d_weights), fvd(real, other_real, i3d_weights)))
    if inception_weights is not None:
        rows += _image_metrics(fake, real, other_real, inception_weights)
    return rows


def _image_metrics(fake: Tensor, real: Tensor, other_real: Tensor, weights: str | os.PathLike) -> list[Row]:
    """Of all frames of the clips."""
    network, sets = inception(weights), (fake, real, other_real)
    drawn, known, other = (batched(network, clips.transpose(1, 2).flatten(0, 1)) for clips in sets)
    distances = {"FID": frechet_of_images, "KID": kernel_distance_of_images}
    return [Row(name, "lower", of(known, drawn, given), of(known, other, given)) for name, of in distances.items()]
