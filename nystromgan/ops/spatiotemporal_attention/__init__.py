"""Exact attention over the positions of channel-first maps."""

from nystromgan.ops.spatiotemporal_attention.op import spatiotemporal_attention

__all__ = ["spatiotemporal_attention"]
