"""Multi-head attention through landmarks, in the place of torch.nn.MultiheadAttention."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nystromgan import _check
from nystromgan.nn._cost import warn_if_dearer_than_exact
from nystromgan.ops.nystrom_attention import nystrom_attention


class NystromAttention(nn.Module):
    """out_proj(nystrom_attention(query W_q, key W_k, value W_v)), with torch.nn.MultiheadAttention's parameters.

    Parameters, their names and forward's arguments are those of torch.nn.MultiheadAttention, whose checkpoints load
    here and the reverse. It works as `self_attn` of torch.nn.TransformerEncoderLayer.

    Args:
        embed_dim: of query, key, value and output.
        num_heads: divides embed_dim.
        num_landmarks: M, or one count per axis of grid. With M >= the number of tokens, attention is exact.
        grid: the tokens' shape, for example (T, H, W); landmarks are then block means in space-time.
        cluster_iterations: Lloyd steps that move the landmarks towards their tokens; 2 is the advice.
        pinv_iterations: steps of the pseudo-inverse.
        conv_kernel_size: odd; adds Nyströmformer's depthwise convolution of the values, whose `conv_weight` (num_heads,
            conv_kernel_size) starts at 0.
        bias: of the projections.
        dropout: rate, in training, on what the heads give: the weights that torch drops do not exist here.
        batch_first: inputs are (B, N, embed_dim), or else (N, B, embed_dim). torch's default is False.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        RuntimeError: a floating-point key_padding_mask holds other biases than 0 and -inf.

    Warns once for a size at which the pseudo-inverse makes landmarks dearer than exact attention. Differentiable to any
    order. Source: Xiong et al., "Nyströmformer", 2021.
    """

    # TransformerEncoder and its layer ask for this before they take a path that computes exact attention from the
    # parameters, past this module's forward. False keeps them off it.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_landmarks: int | Sequence[int] = 64,
        grid: Sequence[int] | None = None,
        cluster_iterations: int = 0,
        pinv_iterations: int = 6,
        conv_kernel_size: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        batch_first: bool = True,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_landmarks = tuple(num_landmarks) if isinstance(num_landmarks, Sequence) else num_landmarks
        self.grid = None if grid is None else tuple(grid)
        self.cluster_iterations = cluster_iterations
        self.pinv_iterations = pinv_iterations
        self.conv_kernel_size = conv_kernel_size
        self.dropout = dropout
        self.batch_first = batch_first
        self.backend = backend
        self._check_settings()
        self.head_dim = embed_dim // num_heads

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.in_proj_weight = parameter(3 * embed_dim, embed_dim)
        self.in_proj_bias = parameter(3 * embed_dim) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.conv_weight = None if conv_kernel_size is None else parameter(num_heads, conv_kernel_size)
        self.reset_parameters()

    def _check_settings(self) -> None:
        _check.at_least("embed_dim", self.embed_dim, 1)
        _check.at_least("num_heads", self.num_heads, 1)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim {self.embed_dim}, got {self.num_heads}")
        check_landmarks(self.num_landmarks, self.grid, self.cluster_iterations, self.pinv_iterations)
        if self.conv_kernel_size is not None:
            _check.at_least("conv_kernel_size", self.conv_kernel_size, 1)
            if self.conv_kernel_size % 2 != 1:
                raise ValueError(f"conv_kernel_size must be odd, got {self.conv_kernel_size}")
        if not 0 <= _check.finite("dropout", self.dropout) <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {self.dropout}")

    def reset_parameters(self) -> None:
        """Draws the weights as torch.nn.MultiheadAttention does, and sets biases and conv_weight to 0."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        for zero in (self.in_proj_bias, self.out_proj.bias, self.conv_weight):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """(output, None): the weights do not exist.

        Args:
            query: (B, N, embed_dim) with batch_first, else (N, B, embed_dim); (N, embed_dim) alone.
            key: as query, with S tokens. As many as query's are taken for the same tokens where a mask is given.
            value: as key.
            key_padding_mask: (B, S), or (S,) alone; bool, True = ignore; or floating point, 0 = keep and -inf = ignore.
            need_weights: must be False, which is the default, unlike torch's.
            attn_mask: must be None.
            average_attn_weights: without effect, as with torch when need_weights is False.
            is_causal: must be False.
        """
        _refuse(need_weights, attn_mask, is_causal)
        self._check_inputs(query, key, value)
        self._warn_of_cost(query, key)
        if query.ndim == 2:
            mask = None if key_padding_mask is None else key_padding_mask[None]
            query, key, value = _each(lambda x: x[None], query, key, value)
            return self._attend(query, key, value, mask)[0], None
        if self.batch_first:
            return self._attend(query, key, value, key_padding_mask), None
        query, key, value = _each(lambda x: x.transpose(0, 1), query, key, value)
        return self._attend(query, key, value, key_padding_mask).transpose(0, 1), None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """(B, N, C), (B, S, C), (B, S, C) -> (B, N, C)."""
        heads = nystrom_attention(
            *self._project(query, key, value),
            num_landmarks=self.num_landmarks,
            grid=self.grid,
            key_padding_mask=None if key_padding_mask is None else _as_bool(key_padding_mask),
            conv_weight=self.conv_weight,
            cluster_iterations=self.cluster_iterations,
            pinv_iterations=self.pinv_iterations,
            backend=self.backend,
        )
        output = heads.transpose(1, 2).flatten(2)  # (B, N, C)
        return self.out_proj(functional.dropout(output, self.dropout, self.training))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Heads (B, H, N, D), by one product where the three are one tensor."""
        if query is key and key is value:
            merged = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
            return merged.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(
            functional.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if isinstance(x, Tensor) and x.is_nested:
                raise ValueError(
                    f"{name} must not be a nested tensor: give key_padding_mask, and set use_nested_tensor = False on "
                    f"the torch.nn.TransformerEncoder, as replace_attention does"
                )
            _check.tensor(name, x)
            if x.ndim not in (2, 3) or x.ndim != query.ndim:
                raise ValueError(f"{name} must have 3 axes, or 2 as query, key and value, got shape {tuple(x.shape)}")
            _check.size(name, x, x.ndim - 1, self.embed_dim, "embed_dim")

    def _warn_of_cost(self, query: Tensor, key: Tensor) -> None:
        if not torch.compiler.is_compiling():
            axis = 1 if self.batch_first and query.ndim == 3 else 0
            tokens, keys = query.shape[axis], key.shape[axis]
            counts = self.num_landmarks
            landmarks = math.prod(counts) if isinstance(counts, tuple) else counts
            warn_if_dearer_than_exact(tokens, keys, 2 * self.head_dim, landmarks, self.pinv_iterations)

    def extra_repr(self) -> str:
        names = ["num_heads", "num_landmarks", "grid", "cluster_iterations", "pinv_iterations", "conv_kernel_size"]
        settings = [f"{name}={getattr(self, name)!r}" for name in [*names, "dropout", "batch_first", "backend"]]
        return ", ".join([str(self.embed_dim), *settings])


def check_landmarks(
    num_landmarks: int | tuple[int, ...], grid: tuple[int, ...] | None, cluster_iterations: int, pinv_iterations: int
) -> None:
    """The settings of landmarks fit each other."""
    for name, counts in (("num_landmarks", num_landmarks), ("grid", grid)):
        for count in counts if isinstance(counts, tuple) else () if counts is None else (counts,):
            _check.at_least(name, count, 1)
    if isinstance(num_landmarks, tuple) and (grid is None or len(grid) != len(num_landmarks)):
        raise ValueError(f"num_landmarks {num_landmarks} must have one count per axis of grid, got {grid}")
    _check.at_least("cluster_iterations", cluster_iterations, 0)
    _check.at_least("pinv_iterations", pinv_iterations, 0)


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raises for masks other than padding, which landmarks cannot honour."""
    if attn_mask is not None:
        raise ValueError(
            f"attn_mask must be None, since landmarks mix all tokens, got one of shape {tuple(attn_mask.shape)}; "
            f"key_padding_mask is honoured"
        )
    if is_causal:
        raise ValueError(f"is_causal must be False, since landmarks see later tokens, got {is_causal}")


def _refuse(need_weights: bool, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raises for what torch.nn.MultiheadAttention does and landmarks cannot."""
    if need_weights:
        raise ValueError(f"need_weights must be False, since landmarks give no N x S weights, got {need_weights}")
    refuse_masks(attn_mask, is_causal)


def _each(function: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """`function` of the three, which stay one tensor where they are one."""
    if query is key and key is value:
        return (function(query),) * 3
    return function(query), function(key), function(value)


def _as_bool(mask: Tensor) -> Tensor:
    """A padding mask as bool: torch's own layers turn True into -inf before they pass it on."""
    if not mask.is_floating_point():
        return mask
    ignored = mask == -torch.inf
    # An assertion in the graph: reading the values here would wait for the device, and not compile.
    torch._assert_async(
        (ignored | (mask == 0)).all(),
        "key_padding_mask must be bool, or hold 0 and -inf alone: other biases would be lost",
    )
    return ignored
