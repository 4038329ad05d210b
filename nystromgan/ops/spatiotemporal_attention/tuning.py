"""Tile sizes of the Triton kernels, from one table: not yet measured on a GPU, chosen so that nothing spills."""

from typing import NamedTuple

KERNELS = ("forward", "grad_query", "grad_key_value")


class Config(NamedTuple):
    """Queries and keys of one tile, and how a program runs it."""

    BLOCK_N: int
    BLOCK_S: int
    num_warps: int
    num_stages: int


# The configurations that `candidates` measures: all powers of two, so that any of them is right for any input.
CONFIGS = {
    "small": Config(64, 32, 4, 2),
    "small_deep": Config(64, 32, 4, 3),
    "square": Config(64, 64, 4, 2),
    "square_deep": Config(64, 64, 4, 3),
    "square_wide": Config(64, 64, 8, 2),
    "tall": Config(128, 32, 8, 2),
    "tall_deep": Config(128, 64, 8, 3),
    "big": Config(128, 64, 8, 2),
    "huge": Config(128, 128, 8, 2),
    "low": Config(32, 64, 4, 2),
    "low_wide": Config(32, 64, 8, 2),
    "long": Config(32, 128, 8, 2),
    "tiny": Config(32, 32, 4, 1),
    "tiny_wide": Config(32, 32, 8, 1),
}


def choose(kernel: str, architecture: int, tile_c: int, tile_e: int, itemsize: int) -> Config:
    """The configuration of `kernel` for tiles of (tile_c, tile_e) channels of `itemsize` bytes."""
    return CONFIGS["square" if tile_e <= 128 and itemsize == 2 else "tiny"]
