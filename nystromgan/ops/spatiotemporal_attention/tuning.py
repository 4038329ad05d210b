"""Tile sizes of the Triton kernels, from one table: not measured on a GPU yet, chosen so that nothing spills."""

from typing import NamedTuple


class Config(NamedTuple):
    """Queries and keys of one tile, and how a program runs it."""

    BLOCK_N: int
    BLOCK_S: int
    num_warps: int
    num_stages: int


CONFIGS = {
    "16x32": Config(16, 32, 4, 1),
    "32x32": Config(32, 32, 4, 1),
    "32x32w": Config(32, 32, 8, 1),
    "32x64": Config(32, 64, 4, 2),
    "32x64w": Config(32, 64, 8, 2),
    "32x128w": Config(32, 128, 8, 2),
    "64x32": Config(64, 32, 4, 2),
    "64x32w": Config(64, 32, 8, 2),
    "64x64": Config(64, 64, 4, 2),
    "64x64d": Config(64, 64, 4, 3),
    "64x64w": Config(64, 64, 8, 2),
    "64x128": Config(64, 128, 4, 2),
    "64x128w": Config(64, 128, 8, 2),
    "128x32w": Config(128, 32, 8, 2),
    "128x64": Config(128, 64, 4, 2),
    "128x64d": Config(128, 64, 4, 3),
    "128x64w": Config(128, 64, 8, 2),
    "128x64wd": Config(128, 64, 8, 3),
    "128x128w": Config(128, 128, 8, 2),
}  # queries x keys, w: 8 warps instead of 4, d: 3 stages instead of 2

# By kernel, architecture and bytes an element: the configuration for heads that are narrow (queries and keys of at most
# 32 channels, as SAGAN and SAVGAN have them) or wide, and of up to 64, 128 or 256 channels in all.
COLUMNS = (("narrow", 64), ("narrow", 128), ("narrow", 256), ("wide", 64), ("wide", 128), ("wide", 256))
TABLE = {
    ("forward", 80, 2): ("128x64", "64x64", "64x32w", "64x64", "64x32", "64x32w"),
    ("forward", 90, 2): ("128x64d", "128x64wd", "128x64w", "128x64d", "128x64wd", "128x64w"),
    ("forward", 100, 2): ("128x64d", "128x64wd", "128x64w", "128x64d", "128x64wd", "128x64w"),
    ("forward", 80, 4): ("64x32", "64x32w", "32x32w", "64x32w", "32x32w", "32x32w"),
    ("forward", 90, 4): ("64x32", "64x32w", "64x32w", "64x32w", "64x32w", "32x32w"),
    ("forward", 100, 4): ("64x32", "64x32w", "64x32w", "64x32w", "64x32w", "32x32w"),
    ("grad_query", 80, 2): ("64x64", "64x64w", "64x32w", "64x64", "64x32w", "64x32w"),
    ("grad_query", 90, 2): ("128x64w", "128x64w", "64x64w", "128x64w", "128x64w", "64x64w"),
    ("grad_query", 100, 2): ("128x64w", "128x64w", "64x64w", "128x64w", "128x64w", "64x64w"),
    ("grad_query", 80, 4): ("64x32", "32x32w", "32x32w", "64x32w", "32x32w", "32x32w"),
    ("grad_query", 90, 4): ("64x32", "64x32w", "32x32w", "64x32w", "32x32w", "32x32w"),
    ("grad_query", 100, 4): ("64x32", "64x32w", "32x32w", "64x32w", "32x32w", "32x32w"),
    ("grad_key_value", 80, 2): ("64x64", "32x64w", "32x64w", "64x64w", "32x64w", "32x64w"),
    ("grad_key_value", 90, 2): ("64x128w", "64x128w", "32x64w", "64x128w", "64x128w", "32x64w"),
    ("grad_key_value", 100, 2): ("64x128w", "64x128w", "32x64w", "64x128w", "64x128w", "32x64w"),
    ("grad_key_value", 80, 4): ("32x32", "32x32w", "32x32w", "32x32w", "32x32w", "32x32w"),
    ("grad_key_value", 90, 4): ("32x64", "32x64w", "32x64w", "32x64w", "32x64w", "32x32w"),
    ("grad_key_value", 100, 4): ("32x64", "32x64w", "32x64w", "32x64w", "32x64w", "32x32w"),
}


def column(tile_c: int, tile_e: int) -> int:
    """The place in the table's rows for tiles of (tile_c, tile_e) channels."""
    width = max(64, tile_c, tile_e)
    return COLUMNS.index(("narrow" if tile_c <= 32 else "wide", width))


def choose(kernel: str, architecture: int, tile_c: int, tile_e: int, itemsize: int) -> Config:
    """The configuration of `kernel` for tiles of (tile_c, tile_e) channels of `itemsize` bytes."""
    return CONFIGS[TABLE[kernel, architecture, itemsize][column(tile_c, tile_e)]]
