"""Modules: parameters plus one functional call each."""

from nystromgan.nn.fuse_spectral_norm import convert_legacy_state_dict, fuse_spectral_norm, spectral_norm_buffers
from nystromgan.nn.nystrom_attention import NystromAttention
from nystromgan.nn.replace import replace_attention
from nystromgan.nn.self_attention import SelfAttention2d, SelfAttention3d
from nystromgan.nn.spectral_norm import spectral_norm

__all__ = [
    "NystromAttention",
    "SelfAttention2d",
    "SelfAttention3d",
    "convert_legacy_state_dict",
    "fuse_spectral_norm",
    "replace_attention",
    "spectral_norm",
    "spectral_norm_buffers",
]
