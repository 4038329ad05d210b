"""The pseudo-inverse of softmax matrices, over sides and dtypes."""

import functools

import torch

import nystromgan
from nystromgan import testing
from nystromgan.bench import draw
from nystromgan.bench.baselines import landmark
from nystromgan.bench.case import DTYPES, Case, Inputs, Peer, Shape, by_mode

QUICK = ((8, 64), (1, 512))


def cases(device: str) -> list[Case]:
    sizes = [(8, 16), *QUICK[:1], (8, 128), (8, 256), *QUICK[1:]]
    if device == "cuda":
        sizes += [(64, 64), (64, 512)]
    return [pinv_case(matrices, side, dtype) for matrices, side in sizes for dtype in ("fp32", "bf16")]


def pinv_case(matrices: int, side: int, dtype: str) -> Case:
    """Six steps on softmax matrices, as attention makes them, but for their row sums; the result is float32.

    Equal row sums would leave the gradient of |A|_inf to rounding, and no two forms would agree on it.
    """

    def make(device: str, shape: Shape, seed: int) -> Inputs:
        logits = draw.normal(shape["B"], shape["M"], shape["M"], device=device, seed=seed)
        sums = torch.linspace(0.9, 1.0, shape["M"], device=device)[:, None]
        return {"matrix": (logits.softmax(-1) * sums).to(DTYPES[dtype])}

    product = 2.0 * matrices * side**3
    moved = (DTYPES[dtype].itemsize + 4.0) * matrices * side**2
    return Case(
        "iterative_pinv", "pinv", {"B": matrices, "M": side}, dtype, make,
        lambda backend: functools.partial(nystromgan.iterative_pinv, backend=backend),
        {"eager": Peer(lambda: landmark.pinv, compiled=True)},
        by_mode(24 * product, 72 * product), by_mode(moved, 2 * moved), {"B": 1, "M": 16},
        testing.TOLERANCES[DTYPES[dtype]], quick=dtype == "fp32" and (matrices, side) in QUICK,
        compiled_in_full=side in (64, 512),
    )  # fmt: skip
