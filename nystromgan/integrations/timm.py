"""timm's Attention through landmarks, for `replace_attention`."""

from collections.abc import Sequence
from typing import TypedDict

import timm.layers.attention
from torch import Tensor

from nystromgan.nn.nystrom_attention import check_landmarks, refuse_masks
from nystromgan.ops.nystrom_attention import nystrom_attention


class Settings(TypedDict):
    """What `nystrom_attention` is told."""

    num_landmarks: int | tuple[int, ...]
    grid: tuple[int, ...] | None
    cluster_iterations: int
    pinv_iterations: int
    backend: str


class NystromAttention(timm.layers.attention.Attention):
    """timm.layers.Attention with its own projections, norms and gate, and landmarks between them.

    A dropout of attention weights acts on what the heads give: the weights do not exist here.
    """

    settings: Settings

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, dim) -> (B, N, dim_out)."""
        refuse_masks(attn_mask, is_causal)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        heads = nystrom_attention(self.q_norm(query), self.k_norm(key), value, scale=self.scale, **self.settings)
        output = self.norm(self.attn_drop(heads).transpose(1, 2).flatten(2))
        if self.gate is not None:
            output = output * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(output))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def convert(
    module: timm.layers.attention.Attention,
    num_landmarks: int | Sequence[int] = 64,
    *,
    grid: Sequence[int] | None = None,
    cluster_iterations: int = 0,
    pinv_iterations: int = 6,
    backend: str = "auto",
) -> NystromAttention:
    """A `NystromAttention` with everything that `module` holds: its parameters, submodules, hooks and mode."""
    counts = tuple(num_landmarks) if isinstance(num_landmarks, Sequence) else num_landmarks
    axes = None if grid is None else tuple(grid)
    check_landmarks(counts, axes, cluster_iterations, pinv_iterations)
    new: NystromAttention = object.__new__(NystromAttention)
    new.__dict__.update(module.__dict__)
    new.settings = {
        "num_landmarks": counts,
        "grid": axes,
        "cluster_iterations": cluster_iterations,
        "pinv_iterations": pinv_iterations,
        "backend": backend,
    }
    return new
