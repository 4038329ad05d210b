"""Exact attention of channel-first maps whose values are wider than their queries."""

import functools

import nystromgan
from nystromgan import testing
from nystromgan.bench import draw
from nystromgan.bench.baselines import exact
from nystromgan.bench.case import DTYPES, MODES, Case, Inputs, Peer, Shape, by_mode


def cases(device: str) -> list[Case]:
    sizes = [(1, 16, 128, 64)]
    if device == "cuda":
        sizes += [(batch, 32, 128, side) for batch, side in ((1, 64), (1, 128), (8, 64), (2, 128))]
        sizes += [(8, 8, 64, 64), (8, 64, 256, 64)]
    return [map_case(*size, dtype, device) for size in sizes for dtype in ("fp32", "bf16")]


def map_case(batch: int, channels: int, value_channels: int, side: int, dtype: str, device: str) -> Case:
    """Square maps of side x side positions."""
    shape = {"B": batch, "C": channels, "E": value_channels, "side": side}

    def make(device: str, shape: Shape, seed: int) -> Inputs:
        grid = (shape["side"], shape["side"])
        return draw.maps(shape["B"], shape["C"], grid, shape["E"], dtype=DTYPES[dtype], device=device, seed=seed)

    pairs, width = batch * side**4, channels + value_channels
    forward = 2.0 * pairs * width
    stored = {"flops": forward, "stored_bytes": 4.0 * pairs}
    peers = {
        f"transpose, pad, SDPA {name}": Peer(lambda form=form: exact.maps(form), flops=2.0 * pairs * 2 * value_channels)
        for name, form in exact.fused(device).items()
    }
    peers |= {
        "transpose, SDPA": Peer(lambda: exact.maps(exact.unpadded), **stored),
        "eager, N x N": Peer(lambda: exact.eager_maps, compiled=True, **stored),
    }
    moved = 2.0 * DTYPES[dtype].itemsize * batch * side**2 * width
    return Case(
        "spatiotemporal_attention", "maps", shape, dtype, make,
        lambda backend: functools.partial(nystromgan.spatiotemporal_attention, backend=backend), peers,
        by_mode(forward, 2.0 * pairs * (4 * channels + 3 * value_channels)), by_mode(moved, 3 * moved),
        {**shape, "side": 8}, testing.TOLERANCES[DTYPES[dtype]], quick=True, compiled_in_full=True,
        modes=MODES,
    )  # fmt: skip
