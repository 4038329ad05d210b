"""Modules: parameters plus one functional call each."""

from nystromgan.nn.nystrom_attention import NystromAttention
from nystromgan.nn.replace import replace_attention
from nystromgan.nn.self_attention import SelfAttention2d, SelfAttention3d

__all__ = ["NystromAttention", "SelfAttention2d", "SelfAttention3d", "replace_attention"]
