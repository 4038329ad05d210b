"""FID of images, by torchmetrics: the Fréchet distance in Inception's features, or in those of a network of yours."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nystromgan.zoo.metrics.estimate import Estimate, jackknife
from nystromgan.zoo.metrics.networks import batched

Network = Callable[[Tensor], Tensor]


class AsFeatures(nn.Module):
    """Hands torchmetrics features (N, D) that are already there, where it expects a network of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def inception(weights: str | os.PathLike) -> Network:
    """FID's own Inception (2015-12-05), 2048 features, from a local file of torch-fidelity's weights.

    Raises:
        ModuleNotFoundError: torch-fidelity, which has the network, is not installed (`pip install nystromgan[fid]`).
        ValueError: the file is no state dict of tensors alone, or of another network.
        FileNotFoundError: there is none.
    """
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
    except OSError:
        raise
    except Exception as error:  # of bytes that are no pickle torch.load raises nearly anything, KeyError of text
        raise ValueError(f"{os.fspath(weights)} must be a state dict of Inception saved by torch: {error}") from error
    if "Mixed_7c.branch_pool.conv.weight" not in state:
        raise ValueError(
            f"{os.fspath(weights)} must be of torch-fidelity's Inception, got {', '.join(list(state)[:3])}"
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], os.fspath(weights))
    return lambda images: network(((images.clamp(-1, 1).expand(-1, 3, -1, -1) + 1) * 127.5).round().to(torch.uint8))


def given(features: Tensor) -> Tensor:
    """The network of images whose features (N, D) are already there."""
    return features


def frechet_of_images(real: Tensor, fake: Tensor, network: Network, splits: int = 10) -> Estimate:
    """The Fréchet distance of images (N, C, H, W) and (M, C, H, W) in [-1, 1] in the features (B, D) of `network`.

    It is FID with `inception`, and with another network another metric, to be called by the network's name.

    Source: Heusel et al., "GANs trained by a two time-scale update rule ...", 2017; the distance is torchmetrics'.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    def distance(features: Tensor, other: Tensor) -> float:
        metric = FrechetInceptionDistance(feature=AsFeatures(features.shape[1])).set_dtype(torch.float64)
        metric.update(features, real=True)
        metric.update(other, real=False)
        return metric.compute().item()

    return jackknife(distance, *(batched(network, images).double() for images in (real, fake)), splits=splits)


def fid(real: Tensor, fake: Tensor, weights: str | os.PathLike, splits: int = 10) -> Estimate:
    """FID with Inception's weights from a local file; of clips, take their frames."""
    return frechet_of_images(real, fake, inception(weights), splits)
