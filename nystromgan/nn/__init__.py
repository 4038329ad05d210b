"""Modules: parameters plus one functional call each."""

from nystromgan.nn.self_attention import SelfAttention2d, SelfAttention3d

__all__ = ["SelfAttention2d", "SelfAttention3d"]
