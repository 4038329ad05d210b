"""Moore-Penrose inverse by iteration."""

from nystromgan.ops.iterative_pinv.op import PINV_INITS, iterative_pinv

__all__ = ["PINV_INITS", "iterative_pinv"]
