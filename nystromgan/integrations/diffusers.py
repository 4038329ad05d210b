"""diffusers' attention processors through landmarks, for `set_attn_processor`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, _get_qkv_projections
from torch import Tensor

from nystromgan.nn.nystrom_attention import check_landmarks, refuse_masks
from nystromgan.ops.nystrom_attention import nystrom_attention

MOST_LEVELS = 8  # of a U-Net


class _Landmarks:
    """What a processor is told of its landmarks.

    Args:
        num_landmarks: M, or one count per axis of grid. Layers of at most M tokens attend exactly.
        grid: the tokens' shape, for example (T, H, W). In a U-Net that of its first level: a layer with fewer tokens
            takes this grid with its sides halved, the frames kept, until the tokens fit. Segments of the flattened
            tokens unless given.
        cluster_iterations, pinv_iterations, backend: as for `nystrom_attention`.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value. In a forward: a mask over a self-attention,
            or a number of tokens that no level of the grid has.
    """

    def __init__(
        self,
        num_landmarks: int | Sequence[int] = 64,
        *,
        grid: Sequence[int] | None = None,
        cluster_iterations: int = 0,
        pinv_iterations: int = 6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_landmarks = tuple(num_landmarks) if isinstance(num_landmarks, Sequence) else num_landmarks
        self.grid = None if grid is None else tuple(grid)
        check_landmarks(self.num_landmarks, self.grid, cluster_iterations, pinv_iterations)
        self.options: dict[str, Any] = {
            "cluster_iterations": cluster_iterations,
            "pinv_iterations": pinv_iterations,
            "backend": backend,
        }

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(B, H, N, D) three times -> (B, N, H * D)."""
        counts = self.num_landmarks
        most = math.prod(counts) if isinstance(counts, tuple) else counts
        tokens = query.shape[2]
        landmarks: dict[str, Any] = {"num_landmarks": most}
        if tokens > most and self.grid is not None:
            landmarks = {"num_landmarks": counts, "grid": _level(self.grid, tokens)}
        output = nystrom_attention(query, key, value, scale=scale, **landmarks, **self.options)
        return output.transpose(1, 2).flatten(2)


class NystromAttnProcessor(_Landmarks, AttnProcessor2_0):
    """For diffusers' `Attention` where AttnProcessor2_0 serves: self-attention through landmarks.

    Cross-attention stays exact, since its keys are few; so does a layer that gets an attention mask with it.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """(B, N, C) or (B, C, H, W) -> the same shape."""
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        refuse_masks(attention_mask, is_causal=False)
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        maps = x.shape if x.ndim == 4 else None
        if maps is not None:
            x = x.flatten(2).mT  # (B, N, C)
        if attn.group_norm is not None:
            x = attn.group_norm(x.mT).mT
        query, key, value = (
            linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        # AttnProcessor2_0 has this scale whatever attn.scale is.
        output = self.attend(query, key, value, query.shape[-1] ** -0.5)
        for module in attn.to_out:
            output = module(output)
        if maps is not None:
            output = output.mT.reshape(maps[0], -1, *maps[2:])
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor


class WanNystromAttnProcessor(_Landmarks, WanAttnProcessor):
    """For WanTransformer3DModel: attention over all voxels of a video through landmarks.

    grid is (T, H, W) after patches. Cross-attention to the text and the first image stays exact.
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        refuse_masks(attention_mask, is_causal=False)
        query, key, value = _get_qkv_projections(attn, hidden_states, None)  # type: ignore[arg-type]
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(query), attn.norm_k(key), value))
        if rotary_emb is not None:
            query, key = _rotated(query, *rotary_emb), _rotated(key, *rotary_emb)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, N, D)
        output = self.attend(query, key, value, query.shape[-1] ** -0.5)
        for module in attn.to_out:
            output = module(output)
        return output


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Pairs of channels of (B, N, H, D) turned by their angles, whose (1, N, 1, D) cosines and sines come twice."""
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosines[..., ::2], sines[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2).type_as(heads)


def _level(grid: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """The grid of a U-Net's level with that many tokens: the last two sides halved, rounding up as convolutions do."""
    level = grid
    for _ in range(MOST_LEVELS):
        if math.prod(level) == tokens:
            return level
        level = (*level[:-2], *(-(-side // 2) for side in level[-2:]))
    raise ValueError(f"grid {grid} must have {tokens} tokens, or its sides halved must, as those of this layer")
