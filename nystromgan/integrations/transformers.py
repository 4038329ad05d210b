"""Hugging Face's Nyströmformer on these kernels."""

from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.models.nystromformer.modeling_nystromformer import (
    NystromformerIntermediate,
    NystromformerSelfAttention,
)

from nystromgan.ops.nystrom_attention import nystrom_attention
from nystromgan.ops.nystrom_attention.convolution import depthwise_convolution

Model = TypeVar("Model", bound=nn.Module)


class AcceleratedSelfAttention(NystromformerSelfAttention):
    """NystromformerSelfAttention with its own parameters and answers, its attention computed by one op."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        """(B, N, C) -> ((B, N, C),), as the original's forward, which runs where attention weights are asked for."""
        if output_attentions:
            return super().forward(hidden_states, attention_mask, output_attentions)
        batch, tokens, _ = hidden_states.shape
        self._check_length(tokens)
        heads = (batch, tokens, self.num_attention_heads, self.attention_head_size)
        query, key, value = (
            linear(hidden_states).view(heads).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        landmarks = (None, None) if self.num_landmarks == self.seq_len else (self._means(query), self._means(key))
        output = nystrom_attention(
            query,
            key,
            value,
            num_landmarks=self.num_landmarks,
            query_landmarks=landmarks[0],
            key_landmarks=landmarks[1],
            key_padding_mask=None if attention_mask is None else _padding(attention_mask, batch, tokens),
            pinv_init="global_max" if self.init_option == "original" else "per_matrix",
        )
        if self.conv_kernel_size is not None:
            output = output + depthwise_convolution(value, self.conv.weight[:, 0, :, 0])
        return (output.transpose(1, 2).flatten(2),)

    def _check_length(self, tokens: int) -> None:
        """The original has no such check: other lengths fail in a reshape, or mix samples of the batch in silence."""
        if self.num_landmarks != self.seq_len and tokens != self.seq_len:
            raise ValueError(
                f"hidden_states must have config.segment_means_seq_len {self.seq_len} tokens, got {tokens}"
            )

    def _means(self, tokens: Tensor) -> Tensor:
        """Segment means (B, H, M, D) of every token, padding included, as the original's."""
        return tokens.unflatten(2, (self.num_landmarks, -1)).mean(-2)


def accelerate(model: Model) -> Model:
    """Runs the attention of a Hugging Face Nyströmformer on these kernels, with the same weights and answers.

    The original scales every pseudo-inverse by the largest column sum of the whole batch, and so does this
    (`pinv_init="global_max"`): outputs of one sample depend on its batch-mates. A softmax has rows that sum to 1, so
    the row maximum that `global_max` multiplies in is 1.

    Args:
        model: any module that holds NystromformerSelfAttention modules; changed in place.

    Returns:
        The model. Its parameters and state dict are the same objects under the same names. Feed-forward layers with
        "gelu_new", the default, compute that formula by torch.nn.GELU("tanh").

    Raises:
        ValueError: the model holds none, or one whose conv_kernel_size is even, with which the original fails. Later,
            in forward: a mask that is not one of padding, or a number of tokens other than
            config.segment_means_seq_len.

    Where output_attentions is asked for, the original's code runs. Where num_landmarks is segment_means_seq_len, which
    is the default configuration, the original computes exact attention, and so does this.
    """
    found = [module for module in model.modules() if type(module) is NystromformerSelfAttention]
    if not found:
        raise ValueError(f"model must contain a NystromformerSelfAttention, got {type(model).__name__} without one")
    for module in found:
        if module.conv_kernel_size is not None and module.conv_kernel_size % 2 != 1:
            raise ValueError(f"config.conv_kernel_size must be odd, got {module.conv_kernel_size}")
    for module in found:
        module.__class__ = AcceleratedSelfAttention
    for layer in model.modules():
        if isinstance(layer, NystromformerIntermediate) and type(layer.intermediate_act_fn) is NewGELUActivation:
            layer.intermediate_act_fn = nn.GELU("tanh")  # the same formula in one pass; eager takes eight
    return model


def _padding(mask: Tensor, batch: int, tokens: int) -> Tensor:
    """(B, N) bool, True = ignore, of the model's (B, 1, 1 or N, N) mask: bool, True = keep, or 0 and large negative."""
    keep = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if keep.ndim != 4 or keep.shape[1] != 1 or keep.shape[3] != tokens:
        raise ValueError(f"attention_mask must have shape (B, 1, 1 or N, {tokens}), got {tuple(mask.shape)}")
    rows = keep[:, 0]  # (B, 1 or N, N)
    torch._assert_async((rows == rows[:, :1]).all(), "attention_mask must be one of padding, the same for every query")
    if mask.is_floating_point():
        torch._assert_async(((mask == 0) | ~keep).all(), "attention_mask must hold 0 and large negative values alone")
    return ~rows[:, 0].expand(batch, tokens)
