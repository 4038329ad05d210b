"""Launch configurations of `nystrom_attention` in Triton, from one table: not measured on a GPU yet.

Chosen by compiling for sm_80, sm_90 and sm_100: the largest tiles that spill nothing and keep to the shared memory of
sm_86. Only the shapes of one batch and head enter, so that a row's bits do not depend on what else is in the batch.
"""

import re
from typing import NamedTuple


class Config(NamedTuple):
    """The most landmarks of a tile (of weight_gradient: the values), its tokens, and how a program runs it."""

    landmarks: int
    tokens: int
    num_warps: int
    num_stages: int

    @classmethod
    def named(cls, name: str) -> "Config":
        """The configuration called, say, "64x32/8/2": 64 landmarks by 32 tokens, 8 warps, 2 stages."""
        return cls(*map(int, re.split("[x/]", name)))


ARCHITECTURES = (80, 90, 100)
PASSES = (
    "index_sum", "lloyd", "landmarks", "output", "query_stats", "query_sums", "keys", "query", "weight_gradient",
)  # fmt: skip

# What is measured on a new device, by bytes an element.
CANDIDATES = {
    2: ("64x32/4/2", "64x32/8/2", "64x32/8/3", "64x64/4/2", "64x64/4/3", "64x64/8/2", "64x64/8/3", "64x128/4/2",
        "64x128/8/2", "128x64/8/2", "128x64/8/3", "32x64/4/2", "32x32/8/2", "64x16/8/1", "32x16/8/1", "16x16/8/1"),
    4: ("32x32/4/1", "32x32/8/1", "32x32/8/2", "64x32/8/1", "64x16/8/1", "32x16/8/1", "16x32/4/1", "16x16/4/1",
        "16x16/8/1"),
}  # fmt: skip

# By pass, architecture and bytes an element, the configurations for these columns: the tile of the wider head dim.
COLUMNS = (64, 128, 256)
TABLE = {
    (name, architecture, itemsize): row
    for (name, itemsize), row in {
        ("index_sum", 2): ("64x64/4/2", "64x32/8/2", "32x32/8/2"),
        ("index_sum", 4): ("32x32/4/1", "16x32/4/1", "16x16/4/1"),
        ("lloyd", 2): ("64x32/8/2", "64x32/8/2", "32x16/8/1"),
        ("lloyd", 4): ("32x32/4/1", "16x16/4/1", "16x16/4/1"),
        ("landmarks", 2): ("64x64/4/3", "64x32/8/2", "32x32/8/2"),
        ("landmarks", 4): ("32x32/8/1", "32x32/8/1", "16x16/8/1"),
        ("output", 2): ("128x64/8/3", "64x64/8/2", "64x32/8/2"),
        ("output", 4): ("32x32/8/1", "32x16/8/1", "16x16/8/1"),
        ("query_stats", 2): ("64x64/4/2", "64x32/8/2", "32x16/8/1"),
        ("query_stats", 4): ("32x32/8/1", "16x16/8/1", "16x16/8/1"),
        ("query_sums", 2): ("64x64/4/2", "64x32/8/2", "32x16/8/1"),
        ("query_sums", 4): ("16x16/8/1", "16x16/8/1", "16x16/8/1"),
        ("keys", 2): ("64x64/8/2", "64x32/8/2", "16x16/8/1"),
        ("keys", 4): ("16x16/8/1", "16x16/8/1", "16x16/8/1"),
        ("query", 2): ("64x32/8/2", "64x32/8/2", "32x16/8/1"),
        ("query", 4): ("32x16/8/1", "16x16/8/1", "16x16/8/1"),
        ("weight_gradient", 2): ("32x64/4/2", "32x64/4/2", "32x32/8/2"),
        ("weight_gradient", 4): ("32x32/8/1", "16x32/4/1", "16x16/8/1"),
    }.items()
    for architecture in ARCHITECTURES
} | {
    ("keys", 80, 2): ("64x32/8/2", "64x32/8/2", "16x16/8/1"),
    ("keys", 100, 2): ("64x64/8/2", "64x32/8/2", "64x16/8/1"),
    ("index_sum", 100, 2): ("64x64/4/2", "64x64/8/2", "32x32/8/2"),
    ("lloyd", 100, 2): ("64x32/8/2", "64x32/8/2", "64x16/8/1"),
    ("output", 80, 2): ("64x64/8/3", "64x32/8/2", "64x32/8/2"),
    ("query", 80, 2): ("64x32/8/2", "64x32/8/2", "16x16/8/1"),
    ("query_stats", 80, 2): ("64x64/4/2", "64x32/8/2", "16x16/8/1"),
    ("keys", 90, 2): ("64x64/8/2", "64x32/8/2", "64x16/8/1"),
    ("landmarks", 100, 4): ("32x32/8/1", "32x32/8/1", "32x16/8/1"),
    ("landmarks", 90, 4): ("32x32/4/1", "32x32/8/1", "16x16/8/1"),
    ("query", 90, 2): ("64x64/4/2", "64x32/8/2", "32x16/8/1"),  # the 64 tokens that wgmma needs, on which sm_80 spills
}

# What replaces the options of a pass whose counts 16 does not divide, by pass, architecture and bytes an element, for
# these wider head dims. To keep to a round number of registers ptxas spills 8 to 32 bytes there, and none when told
# that number; mean_kernel needs 8 more, and keys_kernel, where it writes, fewer threads with more.
UNEVEN = {
    ("lloyd", 80, 4): (range(1, 17), {"maxnreg": 64}),
    ("query", 90, 4): (range(1, 9), {"maxnreg": 128}),
    ("keys_write", 100, 4): (range(1, 9), {"num_warps": 4, "maxnreg": 168}),
    ("keys_sum", 80, 4): (range(33, 65), {"maxnreg": 128}),
    ("means_of_three", 100, 4): (range(129, 257), {"maxnreg": 80}),
}

# Tokens of which one product of the convolution takes the values, by bytes an element.
CONVOLVED = {2: 32, 4: 16}


def convolved_keys(architecture: int, widest: int, itemsize: int) -> int:
    """The same in the pass that makes dV: with 32, bfloat16 heads of 256 spill 16 bytes on sm_80."""
    return 16 if architecture == 80 and widest > 128 else CONVOLVED[itemsize]


# Programs that share the tokens of one head, by architecture: eight heads fill the 132 SMs of an H200 twice.
SPLITS = {80: 32, 90: 32, 100: 32}
SPLIT_CANDIDATES = (16, 32, 64)
SPLIT_LEAST = 256
LONG = 32768  # tokens


def split_tokens(count: int, architecture: int) -> int:
    """Tokens of one split: a power of two."""
    return max(SPLIT_LEAST, 1 << (-(-count // SPLITS[architecture]) - 1).bit_length())


def steps(count: int) -> int:
    """Tiles of tokens that one program of the output and of d query works through with the landmarks at hand."""
    return 8 if count >= LONG else 2 if count >= 4096 else 1


def with_core(num_warps: int, core_warps: int, block: int, count: int, architecture: int) -> dict[str, int | None]:
    """How a pass over `count` keys that wants `num_warps` runs beside an inverse of side `block` that wants others.

    The inverse's registers let one program of 8 warps on an SM of sm_90. A long pass outlasts an inverse of 4 warps
    too, and of those three programs fit.
    """
    if architecture == 90 and count >= LONG and num_warps == 4 and block == 64:
        return {"num_warps": 4, "maxnreg": 168}
    return {"num_warps": max(num_warps, core_warps), "maxnreg": None}


def column(widest: int) -> int:
    """The place in the table's rows for head dims in tiles of at most `widest`."""
    return COLUMNS.index(max(widest, COLUMNS[0]))


def choose(name: str, architecture: int, widest: int, itemsize: int) -> Config:
    """The configuration of pass `name` for head dims in tiles of at most `widest`, of `itemsize` bytes an element."""
    return Config.named(TABLE[name, architecture, itemsize][column(widest)])


def uneven(name: str, architecture: int, dim: int, itemsize: int, *counts: int) -> dict[str, int]:
    """What replaces the options of `name` for these counts of tokens and landmarks; `dim` is the wider head dim."""
    dims, options = UNEVEN.get((name, architecture, itemsize), (range(0), {}))
    return options if dim in dims and any(count % 16 for count in counts) else {}
