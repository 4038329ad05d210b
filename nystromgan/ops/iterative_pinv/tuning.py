"""Launch configurations of `iterative_pinv` in Triton, from one table: not measured on a GPU yet.

Chosen by compiling for sm_80, sm_90 and sm_100 (3.6.0) so that nothing spills.
"""

import re

Config = dict[str, int]

# The largest tile of the forward whose operands all stay on chip: above it registers spill.
CHIP_MOST = {80: 64, 90: 128, 100: 64}
# In a kernel that does something else too; 3.6.0 fails at 64 on sm_100 beside heads of up to 32.
CHIP_MOST_BESIDE = {80: 32, 90: 64, 100: 32}
CHIP_MOST_BACKWARD = {80: 32, 90: 64, 100: 32}  # of the backward, with twice the matrices; 3.6.0 fails at 64 on sm_100

ARCHITECTURES = (80, 90, 100)

# What is measured on a new device, by kernel; a name is read by `named`.
TILED = ("16x16/1/1", "16x16/4/1", "32x16/4/1", "32x16/8/1", "32x32/4/1", "64x16/4/1", "64x16/8/1", "64x32/8/1")
CANDIDATES = {
    "chip": ("1/1", "2/1", "4/1", "8/1"),
    "iterate": TILED,
    "backward": TILED,
    "core_backward": TILED,
    "product": ("64x16/8/3", "64x16/8/4", "64x32/8/2", "64x32/8/3"),
}

# By kernel and architecture, the configurations for these columns, the side of the matrix's tile: `chip` holds a matrix
# whole, `iterate` and `backward` work through memory, where 16 columns a step spill nothing, but for what the backward
# holds whole, too: there only its warps count. `beside` is the inverse in a pass of nystrom_attention, `core_backward`
# its gradient there, whose other products take these tiles; `product` makes one tile a program, for M > 128.
COLUMNS = (16, 32, 64, 128)
TABLE = {
    (kernel, architecture): row
    for kernel, row in {
        "chip": ("1/1", "4/1", "8/1", "8/1"),
        "iterate": ("16x16/4/1", "32x16/4/1", "64x16/4/1", "64x16/4/1"),
        "backward": ("16x16/1/1", "32x16/4/1", "64x16/8/1", "64x16/8/1"),
        "beside": ("16x16/1/1", "32x16/4/1", "64x16/8/1", "64x16/8/1"),
        "core_backward": ("16x16/4/1", "32x16/4/1", "64x16/8/1", "64x16/8/1"),
        "product": ("64x32/8/3",) * 4,
    }.items()
    for architecture in ARCHITECTURES
} | {
    ("product", 80): ("64x16/8/3",) * 4,
    ("beside", 80): ("16x16/1/1", "32x16/4/1", "64x32/8/1", "64x16/8/1"),
    ("backward", 90): ("16x16/1/1", "32x16/4/1", "64x16/4/1", "64x16/8/1"),
    ("core_backward", 80): ("16x16/4/1", "32x16/4/1", "32x16/4/1", "64x16/8/1"),
    ("core_backward", 90): ("16x16/4/1", "32x16/4/1", "32x32/4/1", "64x16/8/1"),
    ("core_backward", 100): ("16x16/4/1", "32x16/4/1", "64x16/4/1", "64x32/8/1"),
}

# Where 16 does not divide the rows, in place of the table's: with 8 warps, 33 rows spill 8 bytes.
UNEVEN = {("backward", 80, 64): "64x16/4/1"}


def named(name: str) -> Config:
    """The options called, say, "64x16/8/1": a tile of 64 by 64, 16 columns a step, 8 warps, 1 stage; or "8/1"."""
    values = map(int, re.split("[x/]", name))
    keys = ("TILE", "TILE_K", "num_warps", "num_stages") if "x" in name else ("num_warps", "num_stages")
    return dict(zip(keys, values, strict=True))


def choose(kernel: str, architecture: int, block: int, even: bool = True) -> Config:
    """The options of `kernel` for matrices in a tile of side `block`; `even` where 16 divides their rows."""
    if not even and (kernel, architecture, block) in UNEVEN:
        return named(UNEVEN[kernel, architecture, block])
    return named(TABLE[kernel, architecture][COLUMNS.index(min(block, COLUMNS[-1]))])
