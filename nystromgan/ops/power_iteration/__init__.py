"""Largest singular values by power iteration, of many matrices in one call."""

from nystromgan.ops.power_iteration.op import normalize_by, power_iteration, power_iteration_step, spectral_normalize

__all__ = ["normalize_by", "power_iteration", "power_iteration_step", "spectral_normalize"]
