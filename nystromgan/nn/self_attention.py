"""The self-attention block of SAGAN (images) and SAVGAN (video), exact or through landmarks."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nystromgan import _check
from nystromgan.nn._cost import warn_if_dearer_than_exact
from nystromgan.ops.nystrom_attention import nystrom_attention
from nystromgan.ops.spatiotemporal_attention import spatiotemporal_attention

LANDMARKS = ("grid", "segment", "random")


class _SelfAttention(nn.Module):
    """The block for any number of axes; the public classes say which."""

    axes: int
    conv: type[nn.Conv2d] | type[nn.Conv3d]
    landmark_draw: Tensor | None

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        query_channels: int | None = None,
        value_channels: int | None = None,
        pool: int | Sequence[int] = 1,
        num_landmarks: int | Sequence[int] | None = None,
        landmarks: str = "grid",
        cluster_iterations: int = 0,
        pinv_iterations: int = 6,
        scale: float | None = None,
        bias: bool = True,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.at_least("channels", channels, 1)
        self.channels = channels
        self.num_heads = num_heads
        self.query_channels = max(channels // 8, 1) if query_channels is None else query_channels
        self.value_channels = channels if value_channels is None else value_channels
        self.pool = _per_axis("pool", pool, self.axes)
        self.num_landmarks = num_landmarks
        self.landmarks = landmarks
        self.cluster_iterations = cluster_iterations
        self.pinv_iterations = pinv_iterations
        self.scale = None if scale is None else _check.finite("scale", scale)
        self.backend = backend
        self._check_settings()

        convolution = functools.partial(self.conv, kernel_size=1, bias=bias, device=device, dtype=dtype)
        self.query = convolution(channels, self.query_channels)
        self.key = convolution(channels, self.query_channels)
        self.value = convolution(channels, self.value_channels)
        self.output = convolution(self.value_channels, channels) if self.value_channels != channels else nn.Identity()
        # One axis, since FSDP2 takes no parameter without.
        self.gamma = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        draw = torch.empty(self._landmark_count(), dtype=torch.int64, device=device)
        self.register_buffer("landmark_draw", draw if landmarks == "random" else None)
        self.register_load_state_dict_pre_hook(_fit_state)
        self.reset_parameters()

    def _check_settings(self) -> None:
        _check.at_least("num_heads", self.num_heads, 1)
        for name in ("query_channels", "value_channels"):
            channels = getattr(self, name)
            _check.at_least(name, channels, 1)
            if channels % self.num_heads:
                raise ValueError(f"num_heads must divide {name} {channels}, got {self.num_heads}")
        _check.one_of("landmarks", self.landmarks, LANDMARKS)
        _check.at_least("cluster_iterations", self.cluster_iterations, 0)
        _check.at_least("pinv_iterations", self.pinv_iterations, 0)
        self._check_landmarks()

    def _check_landmarks(self) -> None:
        if isinstance(self.num_landmarks, Sequence):
            self.num_landmarks = _per_axis("num_landmarks", self.num_landmarks, self.axes)
            if self.landmarks != "grid":
                raise ValueError(
                    f"num_landmarks must be one integer with landmarks={self.landmarks!r}, got {self.num_landmarks}"
                )
        elif self.num_landmarks is not None:
            _check.at_least("num_landmarks", self.num_landmarks, 1)
        if self.landmarks != "random":
            return
        if self.num_landmarks is None:
            raise ValueError("num_landmarks must be an integer with landmarks='random', got None")
        if self.cluster_iterations:
            raise ValueError(
                f"cluster_iterations must be 0 with landmarks='random', which are tokens and not means, "
                f"got {self.cluster_iterations}"
            )
        if set(self.pool) != {1}:
            raise ValueError(f"pool must be 1 with landmarks='random', got {self.pool}: pooled keys are other tokens")

    def _landmark_count(self) -> int:
        """M; 0 for exact attention."""
        if isinstance(self.num_landmarks, Sequence):
            return math.prod(self.num_landmarks)
        return self.num_landmarks or 0

    def reset_parameters(self) -> None:
        """Sets gamma to 0, so that the block starts as the identity, and draws random landmarks."""
        nn.init.zeros_(self.gamma)
        if self.landmark_draw is not None:
            self.landmark_draw.random_()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, *grid) -> the same shape."""
        self._check_input(x)
        query, key, value = self.query(x), self._pooled(self.key(x)), self._pooled(self.value(x))
        attend = self._attend_exactly if self.num_landmarks is None else self._attend_landmarks
        # Fused where nothing comes between; under autocast x keeps its own, wider dtype.
        if isinstance(self.output, nn.Identity) and x.dtype == query.dtype:
            return attend(query, key, value, self.gamma[0], x)
        return torch.addcmul(x, self.gamma, self.output(attend(query, key, value, None, None)))

    def _attend_exactly(
        self, query: Tensor, key: Tensor, value: Tensor, gamma: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        return spatiotemporal_attention(
            query,
            key,
            value,
            num_heads=self.num_heads,
            scale=self.scale,
            gamma=gamma,
            residual=residual,
            backend=self.backend,
        )

    def _attend_landmarks(
        self, query: Tensor, key: Tensor, value: Tensor, gamma: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """(B, C, *grid), (B, C, *key_grid), (B, E, *key_grid) -> (B, E, *grid)."""
        grid, key_grid = query.shape[2:], key.shape[2:]
        tokens = [self._tokens(maps) for maps in (query, key, value)]
        attended = nystrom_attention(
            *tokens,
            **self._landmark_options(tokens[0], tokens[1], grid, key_grid),
            gamma=gamma,
            residual=None if residual is None else self._tokens(residual),
            scale=self.scale,
            pinv_iterations=self.pinv_iterations,
            backend=self.backend,
        )
        return attended.mT.reshape(-1, self.value_channels, *grid)

    def _tokens(self, maps: Tensor) -> Tensor:
        """(B, H D, *grid) -> (B, H, N, D), a view wherever the strides allow."""
        return maps.flatten(2).unflatten(1, (self.num_heads, -1)).mT

    def _landmark_options(self, query: Tensor, key: Tensor, grid: torch.Size, key_grid: torch.Size) -> dict[str, Any]:
        """What `nystrom_attention` is told about the landmarks."""
        pooled = {"num_landmarks": self.num_landmarks, "cluster_iterations": self.cluster_iterations}
        if self.landmarks == "segment":
            return pooled
        if self.landmarks == "grid":
            return {**pooled, "grid": (tuple(grid), tuple(key_grid))}
        if self.landmark_draw is None or self._landmark_count() >= query.shape[2]:
            return pooled  # every token is a landmark, which is exact attention
        index = self._random_tokens(self.landmark_draw, query.shape[2])
        return {"query_landmarks": query[:, :, index], "key_landmarks": key[:, :, index]}

    def _random_tokens(self, draw: Tensor, num_tokens: int) -> Tensor:
        """(M,) distinct tokens in rising order, drawn anew in training and the last drawn in eval.

        The buffer holds integers, which neither the number of tokens nor a change of the module's dtype touches. Sorted
        draws from N - M + 1 values, plus 0, 1, ..., M - 1, are distinct and below N.
        """
        if self.training:
            with torch.no_grad():
                draw.copy_(torch.randint_like(draw, 2**62))
        count = draw.shape[0]
        sorted_draw = torch.remainder(draw, num_tokens - count + 1).sort().values
        return sorted_draw + torch.arange(count, device=sorted_draw.device)

    def _pooled(self, maps: Tensor) -> Tensor:
        """Maxima over blocks of `pool` positions, smaller ones at the far edges."""
        if set(self.pool) == {1}:
            return maps
        max_pool = functional.max_pool2d if self.axes == 2 else functional.max_pool3d
        return max_pool(maps, self.pool, ceil_mode=True).to(maps.dtype)  # autocast on the CPU pools in float32

    def _check_input(self, x: Tensor) -> None:
        _check.tensor("x", x, self.axes + 2)
        _check.size("x", x, 1, self.channels, "channels")
        if self.num_landmarks is not None and not torch.compiler.is_compiling():
            tokens = math.prod(x.shape[2:])
            keys = math.prod(-(-size // block) for size, block in zip(x.shape[2:], self.pool, strict=True))
            dims = (self.query_channels + self.value_channels) // self.num_heads
            warn_if_dearer_than_exact(tokens, keys, dims, self._landmark_count(), self.pinv_iterations)

    def extra_repr(self) -> str:
        names = ["channels", "num_heads", "query_channels", "value_channels", "pool"]
        if self.num_landmarks is not None:
            names += ["num_landmarks", "landmarks", "cluster_iterations", "pinv_iterations"]
        settings = [f"{name}={getattr(self, name)!r}" for name in [*names, "scale", "backend"]]
        return ", ".join(settings)


class SelfAttention2d(_SelfAttention):
    """y = gamma * attention(x) + x over the positions of images, (B, channels, H, W) -> (B, channels, H, W).

    `query`, `key` and `value` are 1x1 convolutions; `gamma` is one number that starts at 0. Parameters and their names
    do not depend on the landmarks: a checkpoint of the exact block loads in the Nyström one, and the reverse.

    Args:
        channels: of x.
        num_heads: divides query_channels and value_channels.
        query_channels: of queries and keys; channels // 8, at least 1.
        value_channels: channels unless given; with another number, a 1x1 convolution `output` leads back to channels.
        pool: keys and values are maxima over blocks of this many positions, an int or one per axis (SAGAN: 2).
        num_landmarks: None for exact attention; an int, or one count per axis, for Nyström attention.
        landmarks: "grid", means of blocks in space (and time); "segment", means of strips of the flattened positions;
            "random", the same random tokens for queries and keys, drawn in every forward of training from torch's
            generator and kept in the buffer `landmark_draw`, which eval uses.
        cluster_iterations: Lloyd steps that move "grid" or "segment" landmarks towards their tokens; 2 is the advice.
        pinv_iterations: steps of the pseudo-inverse.
        scale: of the logits. (query_channels / num_heads) ** -0.5 unless given, as SAVGAN's paper has it; 1.0 for
            SAGAN and for SAVGAN's released code.
        bias: of the convolutions.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Warns once for a size at which the pseudo-inverse makes landmarks dearer than exact attention. Under autocast the
    attention runs in its dtype and the sum with x in x's. Differentiable to any order.
    Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2019; with landmarks, SAVGAN (ISBI).
    """

    axes = 2
    conv = nn.Conv2d


class SelfAttention3d(_SelfAttention):
    """y = gamma * attention(x) + x over the positions of videos, (B, channels, T, H, W) -> (B, channels, T, H, W).

    As `SelfAttention2d`, with 1x1x1 convolutions and a third axis.
    """

    axes = 3
    conv = nn.Conv3d


def _per_axis(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One integer per axis, each at least 1."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name} must be one integer or {axes}, one per axis, got {values}")
    for item in values:
        _check.at_least(name, item, 1)
    return values


def _fit_state(module: _SelfAttention, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Lets a checkpoint load whatever its kind of landmarks: a missing or ill-fitting draw leaves the module's own.

    A gamma of no axes or more than one, as other code has it, loads too.
    """
    gamma = state_dict.get(f"{prefix}gamma")
    if gamma is not None and gamma.numel() == 1:
        state_dict[f"{prefix}gamma"] = gamma.reshape(1)
    name, own = f"{prefix}landmark_draw", module.landmark_draw
    if own is None:
        state_dict.pop(name, None)
    elif name not in state_dict or state_dict[name].shape != own.shape:
        state_dict[name] = own
