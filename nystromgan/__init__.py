"""Landmark attention, exact spatio-temporal attention, spectral norm: fused kernels and modules for PyTorch."""

from nystromgan._backend import UnsupportedError, available_backends
from nystromgan._recycled import empty_cache
from nystromgan.functional import (
    iterative_pinv,
    nystrom_attention,
    power_iteration,
    spatiotemporal_attention,
)
from nystromgan.nn import (
    NystromAttention,
    SelfAttention2d,
    SelfAttention3d,
    fuse_spectral_norm,
    replace_attention,
    spectral_norm,
)

__version__ = "0.1.0"

__all__ = [
    "NystromAttention",
    "SelfAttention2d",
    "SelfAttention3d",
    "UnsupportedError",
    "__version__",
    "available_backends",
    "empty_cache",
    "fuse_spectral_norm",
    "iterative_pinv",
    "nystrom_attention",
    "power_iteration",
    "replace_attention",
    "spatiotemporal_attention",
    "spectral_norm",
]
