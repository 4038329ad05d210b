"""The Nyström attention that xformers had until 0.0.28, for projects that import it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nystromgan import _check
from nystromgan.ops.nystrom_attention import nystrom_attention


class NystromAttention(nn.Module):
    """xformers.components.attention.NystromAttention: same constructor, forward, parameters and answers.

    Args:
        dropout: rate on the output, in training.
        num_heads: of q, k, v, whose first axis is batch times heads.
        num_landmarks: M. With M >= the number of keys, attention is exact.
        landmark_pooling: a module (B * H, N, D) -> (B * H, M, D); even segments' means unless given.
        causal: must be False: the original was not causal either, whatever it was told.
        use_razavi_pinverse: the iterative inverse; else torch.linalg.pinv, which stores N x M factors.
        pinverse_original_init: scales every inverse by the batch's maximum, so that samples of a batch depend on each
            other; else each by its own.
        inv_iterations: steps of the iterative inverse.
        v_skip_connection: a module of v (B, H, N, E), added to the output.
        conv_kernel_size: odd; makes v_skip_connection a depthwise convolution along the tokens, where none is given.
        kwargs: ignored, as by the original, which was built from configurations shared by all its attentions.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """

    def __init__(
        self,
        dropout: float,
        num_heads: int,
        num_landmarks: int = 64,
        landmark_pooling: nn.Module | None = None,
        causal: bool = False,
        use_razavi_pinverse: bool = True,
        pinverse_original_init: bool = False,
        inv_iterations: int = 6,
        v_skip_connection: nn.Module | None = None,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _check.at_least("num_heads", num_heads, 1)
        _check.at_least("num_landmarks", num_landmarks, 1)
        _check.at_least("inv_iterations", inv_iterations, 0)
        if causal:
            raise ValueError(f"causal must be False, since landmarks see later tokens, got {causal}")
        self.num_heads = num_heads
        self.num_landmarks = num_landmarks
        self.use_razavi_pinverse = use_razavi_pinverse
        self.pinverse_original_init = pinverse_original_init
        self.inv_iterations = inv_iterations
        self.attn_drop = nn.Dropout(dropout)
        self.landmark_pooling = EvenSegments(num_landmarks) if landmark_pooling is None else landmark_pooling
        self.skip_connection = v_skip_connection
        if v_skip_connection is None and conv_kernel_size is not None:
            self.skip_connection = _depthwise(num_heads, conv_kernel_size)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """q (B * H, N, D), k (B * H, S, D), v (B * H, S, E) -> (B * H, N, E).

        Of tensors with more axes, tokens are the last but one, as in the original: of UniDepth's (B, N, H, D), heads
        of one position attend to each other.

        key_padding_mask (B, S), (B * H, S) or (B * H, 1, S), with N = S: bool, True = keep as in xformers, or 0 and
        -inf. Padded tokens enter the landmarks as zeros, as they did. Other arguments are ignored, as they were.
        """
        if isinstance(q, Tensor) and q.ndim > 3:
            return self._over_more_axes(q, k, v, key_padding_mask)
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            _check.tensor(name, tensor, 3)
        if self.skip_connection is not None and v.shape[0] % self.num_heads:
            raise ValueError(f"v must have a multiple of num_heads {self.num_heads} as rows, got {v.shape[0]}")
        mask = None
        if key_padding_mask is not None:
            _check.size("q", q, 1, k.shape[1], "k's tokens, with key_padding_mask")
            mask = self._padding(key_padding_mask, *k.shape[:2])
            q, k = q.masked_fill(mask[..., None], 0), k.masked_fill(mask[..., None], 0)
        x = _exact(q, k, v, mask) if self.num_landmarks >= k.shape[1] else self._approximate(q, k, v, mask)
        if self.skip_connection is not None:
            x = x + self.skip_connection(v.unflatten(0, (-1, self.num_heads))).flatten(0, 1)
        return self.attn_drop(x)

    def _over_more_axes(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        if key_padding_mask is not None:
            raise ValueError(f"key_padding_mask must be None with q of more than 3 axes, got q of {q.ndim}")
        for name, tensor in (("k", k), ("v", v)):
            _check.tensor(name, tensor, q.ndim)
            for axis in range(q.ndim - 2):
                _check.size(name, tensor, axis, q.shape[axis], "q's")
        return self.forward(*(tensor.flatten(0, -3) for tensor in (q, k, v))).unflatten(0, q.shape[:-2])

    def _approximate(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q_landmarks, k_landmarks = self.landmark_pooling(q), self.landmark_pooling(k)
        if not self.use_razavi_pinverse:
            core = (q_landmarks @ k_landmarks.mT * q.shape[-1] ** -0.5).softmax(-1)  # A (B * H, M, M)
            mixed = torch.linalg.pinv(core) @ _exact(q_landmarks, k, v, mask)  # W (B * H, M, E)
            return _exact(q, k_landmarks, mixed, None)
        heads = [tensor[:, None] for tensor in (q, k, v)]  # one head a sample: masks are per row
        output = nystrom_attention(
            *heads,
            query_landmarks=q_landmarks[:, None],
            key_landmarks=k_landmarks[:, None],
            key_padding_mask=mask,
            pinv_iterations=self.inv_iterations,
            pinv_init="global_max" if self.pinverse_original_init else "per_matrix",
        )
        return output[:, 0]

    def _padding(self, mask: Tensor, rows: int, tokens: int) -> Tensor:
        """(B * H, S) bool, True = ignore."""
        flat = mask.squeeze(1) if mask.ndim == 3 else mask
        if flat.shape[0] * self.num_heads == rows:
            flat = flat.repeat_interleave(self.num_heads, 0)
        if flat.shape != (rows, tokens):
            raise ValueError(
                f"key_padding_mask must have shape ({rows // self.num_heads}, {tokens}), ({rows}, {tokens}) or "
                f"({rows}, 1, {tokens}), got {tuple(mask.shape)}"
            )
        if flat.dtype == torch.bool:
            return ~flat
        ignored = flat == -torch.inf
        torch._assert_async((ignored | (flat == 0)).all(), "key_padding_mask must be bool, or hold 0 and -inf alone")
        return ignored


class EvenSegments(nn.Module):
    """Means (B, M, D) of M segments of the tokens (B, N, D); the last N mod M segments have one token more."""

    def __init__(self, num_landmarks: int) -> None:
        super().__init__()
        self.num_landmarks = num_landmarks

    def forward(self, x: Tensor) -> Tensor:
        size, longer = divmod(x.shape[1], self.num_landmarks)
        short, long = x.split([(self.num_landmarks - longer) * size, longer * (size + 1)], dim=1)
        means = short.unflatten(1, (-1, size)).mean(2)
        return torch.cat([means, long.unflatten(1, (-1, size + 1)).mean(2)], 1) if longer else means


def _depthwise(num_heads: int, kernel_size: int) -> nn.Conv2d:
    _check.at_least("conv_kernel_size", kernel_size, 1)
    if kernel_size % 2 != 1:
        raise ValueError(f"conv_kernel_size must be odd, got {kernel_size}")
    padding = (kernel_size // 2, 0)
    return nn.Conv2d(num_heads, num_heads, (kernel_size, 1), padding=padding, bias=False, groups=num_heads)


def _exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N, D), (B, S, D), (B, S, E) -> (B, N, E), without the keys where mask (B, S) is True."""
    keep = None if mask is None else ~mask[:, None]
    return functional.scaled_dot_product_attention(query, key, value, keep)
