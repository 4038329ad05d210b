"""The model that is shipped: an average of the trained weights, or a copy of them."""

import copy

import torch
from torch import nn


class Average:
    """A copy of a model, in eval mode, whose parameters follow the model's.

        average <- d * average + (1 - d) * model,  d = min(decay, (1 + t) / (10 + t)) at update t

    Buffers are copied: the mean of spectral norm's unit vectors u and v is no unit vector, and running statistics are
    averages already. With decay 0 parameters are copied too.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, count: int) -> None:
        """Takes in the weights after update `count`, from 0."""
        decay = min(self.decay, (1 + count) / (10 + count))
        for mean, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(parameter, 1 - decay)
        for kept, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
