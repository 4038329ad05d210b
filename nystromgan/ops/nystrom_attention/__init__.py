"""Nyström landmark attention."""

from nystromgan.ops.nystrom_attention.op import nystrom_attention

__all__ = ["nystrom_attention"]
