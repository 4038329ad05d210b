"""The modules of the package nystrom-attention on these kernels."""

from typing import TypeVar

import nystrom_attention as package
import torch
from torch import Tensor, nn
from torch.nn import functional

from nystromgan.ops.nystrom_attention import nystrom_attention

Model = TypeVar("Model", bound=nn.Module)


class AcceleratedNystromAttention(package.NystromAttention):
    """nystrom_attention.NystromAttention with its own parameters and answers, its attention computed by one op."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_attn: bool = False, return_attn_matrices: bool = False
    ) -> Tensor:
        """(B, N, dim) -> (B, N, dim); mask (B, N) bool, True = keep. The original runs where weights are asked for."""
        if return_attn or return_attn_matrices or (mask is not None and self._leaves_a_segment_empty(mask)):
            return super().forward(x, mask, return_attn, return_attn_matrices)
        tokens = x.shape[1]
        missing = -tokens % self.num_landmarks
        x = functional.pad(x, (0, 0, missing, 0))  # in front, and attended to without a mask, as the original has it
        query, key, value = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        if mask is not None:
            mask = functional.pad(mask, (missing, 0))
            query, key, value = (heads * mask[:, None, :, None] for heads in (query, key, value))
        output = nystrom_attention(
            query,
            key,
            value,
            # Given, so that as many landmarks as tokens are still the original's approximation.
            query_landmarks=self._means(query, mask),
            key_landmarks=self._means(key, mask),
            key_padding_mask=None if mask is None else ~mask,
            conv_weight=self.res_conv.weight[:, 0, :, 0] if self.residual else None,
            scale=self.scale,
            pinv_iterations=self.pinv_iterations,
            pinv_init="global_max",
        )
        return self.to_out(output.transpose(1, 2).flatten(2))[:, -tokens:]

    def _means(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Means (B, H, M, D) of equal segments, of the tokens that the mask keeps."""
        segments = tokens.unflatten(2, (self.num_landmarks, -1))  # (B, H, M, N / M, D)
        if mask is None:
            return segments.mean(3)
        counts = mask.unflatten(1, (self.num_landmarks, -1)).sum(2)  # (B, M)
        return segments.sum(3) / (counts[:, None, :, None] + self.eps)

    def _leaves_a_segment_empty(self, mask: Tensor) -> bool:
        """Whether a landmark has no token: the original then gives it uniform weights, which the op does not."""
        segments = functional.pad(mask, (-mask.shape[1] % self.num_landmarks, 0)).unflatten(1, (self.num_landmarks, -1))
        return torch.compiler.is_compiling() or not bool(segments.any(2).all())


def accelerate(model: Model) -> Model:
    """Runs every nystrom_attention.NystromAttention of a model on these kernels, with the same weights and answers.

    The original scales every pseudo-inverse by the largest sums of the whole batch, and so does this
    (`pinv_init="global_max"`): outputs of one sample depend on its batch-mates. It pads in front to a multiple of
    num_landmarks and, without a mask, attends to the padding; so does this.

    Args:
        model: any module that holds such modules, for example a nystrom_attention.Nystromformer; changed in place.

    Returns:
        The model. Its parameters and state dict are the same objects under the same names.

    Raises:
        ValueError: the model holds none, or one whose residual_conv_kernel is even, with which the original fails.

    The original's code runs where attention weights are asked for, where a mask leaves a landmark without a token, and
    where a call with a mask is compiled.
    """
    found = [module for module in model.modules() if type(module) is package.NystromAttention]
    if not found:
        name = type(model).__name__
        raise ValueError(f"model must contain a nystrom_attention.NystromAttention, got {name} without one")
    for module in found:
        kernel_size = module.get_parameter("res_conv.weight").shape[2] if module.residual else 1
        if kernel_size % 2 != 1:
            raise ValueError(f"residual_conv_kernel must be odd, got {kernel_size}")
    for module in found:
        module.__class__ = AcceleratedNystromAttention
    return model
