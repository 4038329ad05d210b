"""Inputs of the benchmark: on the CPU those of `testing`, elsewhere drawn where they are used, which is far faster."""

import functools

import torch
from torch import Tensor

from nystromgan import testing


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """N(0, 1); the same numbers on every call, and others on every kind of device."""
    if device == "cpu":
        return testing.normal(*shape, dtype=dtype, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def tokens(
    batch: int, heads: int, count: int, head_dim: int, value_dim: int, *, dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Tensor]:
    """query and key (B, H, N, D), and value (B, H, N, E)."""
    widths = {"query": head_dim, "key": head_dim, "value": value_dim}
    return {
        name: normal(batch, heads, count, width, dtype=dtype, device=device, seed=3 * seed + i)
        for i, (name, width) in enumerate(widths.items())
    }


@functools.cache
def padding(batch: int, count: int, device: torch.device) -> Tensor:
    """(B, N) bool, True = ignore: of the first row the second half, of the next ones less and less of their end."""
    valid = count // 2 + torch.arange(batch, device=device) * count // (2 * batch)
    return torch.arange(count, device=device) >= valid[:, None]


def maps(
    batch: int, channels: int, grid: tuple[int, ...], value_channels: int, *, dtype: torch.dtype, device: str,
    seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """query and key (B, C, *grid), and value (B, E, *grid)."""
    widths = {"query": channels, "key": channels, "value": value_channels}
    return {
        name: normal(batch, width, *grid, dtype=dtype, device=device, seed=3 * seed + i)
        for i, (name, width) in enumerate(widths.items())
    }
