"""Launch configurations of `iterative_pinv` in Triton, by device class and size class."""

Config = dict[str, int]

# The largest tile of the forward whose operands all stay on chip: above it registers spill (compiled, 3.6.0).
CHIP_MOST = {80: 64, 90: 128, 100: 64}
CHIP_MOST_BESIDE = {80: 32, 90: 64, 100: 64}  # in a kernel that does something else too

WARPS = {16: 1, 32: 4, 64: 8, 128: 8, 256: 8, 512: 8}  # by the side of the matrix's tile


def on_chip(block: int) -> Config:
    """Launch options of one program a matrix that holds it all."""
    return {"num_warps": WARPS[block], "num_stages": 1}


def tiled(block: int) -> Config:
    """Kernel and launch options of one program a matrix that works through memory: 16 columns a step spill nothing."""
    return {"TILE": min(block, 64), "TILE_K": 16, "num_warps": WARPS[block], "num_stages": 1}


def tiled_forward(block: int) -> Config:
    """`tiled` for the forward alone, which spills in sm_100's 8 warps."""
    return {**tiled(block), "num_warps": 4}


# (TILE, TILE_K, launch options) of a product of which every tile is a program: M > 128.
PRODUCT: dict[int, tuple[int, int, Config]] = {
    80: (64, 32, {"num_warps": 8, "num_stages": 3}),
    90: (64, 32, {"num_warps": 4, "num_stages": 3}),
    100: (64, 32, {"num_warps": 4, "num_stages": 3}),
}
