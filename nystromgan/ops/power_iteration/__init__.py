"""Largest singular values by power iteration, of many matrices in one call."""

from nystromgan.ops.power_iteration.op import power_iteration, spectral_normalize

__all__ = ["power_iteration", "spectral_normalize"]
