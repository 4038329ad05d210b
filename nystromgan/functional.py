"""Every public op on one page."""

from nystromgan.ops.iterative_pinv import iterative_pinv
from nystromgan.ops.nystrom_attention import nystrom_attention
from nystromgan.ops.power_iteration import power_iteration
from nystromgan.ops.spatiotemporal_attention import spatiotemporal_attention

__all__ = ["iterative_pinv", "nystrom_attention", "power_iteration", "spatiotemporal_attention"]
