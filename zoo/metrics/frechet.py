"""The Fréchet distance of two Gaussians, the core of FID and FVD."""

import torch
from torch import Tensor

from nystromgan.zoo.metrics.estimate import Estimate, jackknife


def frechet_distance(features: Tensor, other: Tensor) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), m and C the means and covariances of (N, D) and (M, D).

    In float64, and with symmetric square roots alone, which exist where a covariance is singular (N <= D).

    Raises:
        ValueError: fewer than 2 samples, or unlike numbers of features.

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982, equation 4.
    """
    if features.ndim != 2 or other.ndim != 2 or features.shape[1] != other.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {tuple(features.shape)} and {tuple(other.shape)}")
    if min(len(features), len(other)) < 2:
        raise ValueError(f"features must be of at least 2 samples, got {len(features)} and {len(other)}")
    first, second = features.double(), other.double()
    covariance, other_covariance = first.T.cov(), second.T.cov()
    if first.shape[1] == 1:
        covariance, other_covariance = covariance.reshape(1, 1), other_covariance.reshape(1, 1)
    root = _square_root(covariance)
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    distance = (first.mean(0) - second.mean(0)).square().sum()
    distance = distance + covariance.trace() + other_covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)


def frechet_estimate(features: Tensor, other: Tensor, splits: int = 10) -> Estimate:
    """`frechet_distance` with an interval."""
    return jackknife(frechet_distance, features, other, splits=splits)


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
