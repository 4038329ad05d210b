"""KID of images, by torchmetrics: the squared maximum mean discrepancy with a cubic kernel; unbiased, unlike FID."""

import os
import warnings

import torch
from torch import Tensor

from nystromgan.zoo.metrics.estimate import Estimate, jackknife
from nystromgan.zoo.metrics.fid import AsFeatures, Network, inception
from nystromgan.zoo.metrics.networks import batched


def kernel_distance_of_images(real: Tensor, fake: Tensor, network: Network, splits: int = 10) -> Estimate:
    """MMD^2 of images (N, C, H, W) and (M, C, H, W) in [-1, 1] in the features (B, D) of `network`, all images at once.

    It is KID with `inception`, and with another network another metric, to be called by the network's name.

    Source: Binkowski et al., "Demystifying MMD GANs", 2018, equation 4; the estimate is torchmetrics'.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    def distance(features: Tensor, other: Tensor) -> float:
        size = min(len(features), len(other))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it keeps the features, which are here already
            metric = KernelInceptionDistance(feature=AsFeatures(features.shape[1]), subsets=1, subset_size=size)
        metric = metric.set_dtype(torch.float64)
        metric.update(features, real=True)
        metric.update(other, real=False)
        return metric.compute()[0].item()

    return jackknife(distance, *(batched(network, images).double() for images in (real, fake)), splits=splits)


def kid(real: Tensor, fake: Tensor, weights: str | os.PathLike, splits: int = 10) -> Estimate:
    """KID with Inception's weights from a local file; of clips, take their frames."""
    return kernel_distance_of_images(real, fake, inception(weights), splits)
