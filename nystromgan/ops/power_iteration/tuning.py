"""Tile sizes of the Triton kernels: not measured on a GPU yet."""

from typing import NamedTuple


class Config(NamedTuple):
    """Rows and columns of a weight in one tile, and the warps of a program."""

    BLOCK_O: int
    BLOCK_I: int
    num_warps: int


CONFIGS = {
    "8x512": Config(8, 512, 4),
    "8x1024w": Config(8, 1024, 8),
    "16x256": Config(16, 256, 4),
    "16x512w": Config(16, 512, 8),
    "32x256w": Config(32, 256, 8),
}  # rows x columns, w: 8 warps instead of 4

TABLE = {80: "8x512", 90: "16x512w", 100: "16x512w"}  # by architecture


def choose(architecture: int) -> Config:
    """The configuration of the device's class."""
    return CONFIGS[TABLE[architecture]]
