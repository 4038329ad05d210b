"""Tile sizes of the Triton kernels, from one table: not measured on a GPU yet, chosen so that nothing spills."""

import re
from typing import NamedTuple


class Config(NamedTuple):
    """Queries and keys of one tile, and how a program runs it."""

    BLOCK_N: int
    BLOCK_S: int
    num_warps: int
    num_stages: int

    @classmethod
    def named(cls, name: str) -> "Config":
        """The configuration called, say, "128x64/8/3": 128 queries by 64 keys, 8 warps, 3 stages."""
        return cls(*map(int, re.split("[x/]", name)))


# What is measured on a new device, by bytes an element.
CANDIDATES = {
    2: ("64x32/4/2", "64x64/4/2", "64x64/4/3", "64x64/8/2", "64x128/4/2", "64x128/8/2", "32x64/4/3", "32x128/8/2",
        "128x32/8/3", "128x64/4/2", "128x64/4/3", "128x64/8/2", "128x64/8/3", "128x128/8/2"),
    4: ("32x32/8/1", "64x32/4/1", "64x32/4/2", "64x32/8/1", "64x64/8/1", "32x64/4/1", "32x64/8/1", "16x64/4/1"),
}  # fmt: skip

# By kernel, architecture and bytes an element, the configurations for these columns: heads whose queries and keys are
# narrow (at most 32 channels, as in SAGAN and SAVGAN) or wide, and tiles of at most 64, 128 or 256 channels in all.
# Tiles of float32 have 64 at most; the third column is that of wider heads, which come in slices.
COLUMNS = (("narrow", 64), ("wide", 64), ("narrow", 128), ("wide", 128), ("narrow", 256), ("wide", 256))
TABLE = {
    ("forward", 80, 2): ("128x64/4/2", "64x64/4/2", "64x64/4/2", "64x32/4/2", "64x32/8/2", "64x32/8/2"),
    ("forward", 90, 2): ("128x64/4/3", "128x64/8/3", "128x64/8/3", "128x64/8/3", "128x64/8/2", "64x64/8/2"),
    ("forward", 100, 2): ("128x64/8/3", "128x64/8/3", "128x64/8/3", "128x64/8/2", "64x64/8/2", "64x64/8/2"),
    ("forward", 80, 4): ("32x32/8/1", "32x32/8/1", "32x32/8/1"),
    ("forward", 90, 4): ("64x32/4/2", "64x32/4/2", "32x32/8/1"),
    ("forward", 100, 4): ("64x32/4/1", "64x32/8/1", "64x32/8/1"),
    ("grad_query", 80, 2): ("64x64/4/2", "64x64/4/2", "64x64/8/2", "64x32/8/2", "64x32/8/2", "32x32/8/2"),
    ("grad_query", 90, 2): ("128x64/8/2", "128x64/8/2", "128x64/8/2", "128x64/8/2", "64x64/8/2", "64x64/8/2"),
    ("grad_query", 100, 2): ("128x64/8/2", "128x64/8/2", "128x64/8/2", "128x64/8/2", "64x64/4/2", "64x32/4/2"),
    ("grad_query", 80, 4): ("32x16/4/1", "16x32/4/1", "32x16/4/1"),
    ("grad_query", 90, 4): ("64x32/4/2", "64x32/8/2", "32x32/8/1"),
    ("grad_query", 100, 4): ("64x32/8/1", "64x32/8/1", "32x32/8/1"),
    ("grad_key_value", 80, 2): ("64x64/8/2", "32x64/8/2", "32x64/8/2", "32x64/8/2", "16x64/8/2", "32x32/8/2"),
    ("grad_key_value", 90, 2): ("64x128/8/2", "64x128/8/2", "64x128/8/2", "64x64/8/2", "32x64/8/2", "32x64/8/2"),
    ("grad_key_value", 100, 2): ("64x64/8/2", "64x64/8/2", "64x64/8/2", "64x64/8/2", "64x64/8/1", "64x64/8/1"),
    ("grad_key_value", 80, 4): ("16x32/8/1", "16x32/4/1", "32x16/4/1"),
    ("grad_key_value", 90, 4): ("16x64/4/1", "16x64/4/1", "16x32/4/1"),
    ("grad_key_value", 100, 4): ("32x64/8/1", "32x64/8/1", "32x64/8/1"),
}


def column(tile_c: int, tile_e: int, sliced: bool = False) -> int:
    """The place in the table's rows for tiles of (tile_c, tile_e) channels."""
    return 2 if sliced else COLUMNS.index(("narrow" if tile_c <= 32 else "wide", max(64, tile_c, tile_e)))


def choose(kernel: str, architecture: int, tile_c: int, tile_e: int, itemsize: int, sliced: bool = False) -> Config:
    """The configuration of `kernel` for tiles of (tile_c, tile_e) channels of `itemsize` bytes."""
    return Config.named(TABLE[kernel, architecture, itemsize][column(tile_c, tile_e, sliced)])
