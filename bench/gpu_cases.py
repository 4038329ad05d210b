"""What `gpu_check` checks and times: small cases for correctness, the shapes of the targets for speed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nystromgan
from nystromgan import testing
from nystromgan.bench import gpu_peers

Inputs = dict[str, Tensor]


class Check(NamedTuple):
    """A call of a public function on small inputs, and what of it is compared: all gradients, against float64."""

    op: str
    name: str
    function: Callable[..., Tensor]
    make: Callable[[torch.dtype, str], Inputs]
    options: dict[str, Any]


class Case(NamedTuple):
    """A call of a public function at a size that matters, what else computes it, and the least work it can be."""

    op: str
    name: str
    function: Callable[..., Tensor]
    make: Callable[[str, int], Inputs]  # device and seed
    options: dict[str, Any]
    peers: dict[str, gpu_peers.Peer]
    forward_bytes: float
    forward_flops: float
    both_bytes: float  # forward and backward
    both_flops: float


def checks(tiny: bool) -> list[Check]:
    """The cases of the correctness stage."""
    attend, attend_maps = nystromgan.nystrom_attention, nystromgan.spatiotemporal_attention
    maps = [((3, 5), (3, 5), 4, 32), ((4, 4, 4), (2, 2, 2), 8, 64), ((67,), (33,), 32, 128), ((40,), (40,), 256, 256)]
    found = [
        Check(
            "spatiotemporal_attention",
            f"{grid} from {key_grid}, C={c}, E={e}",
            attend_maps,
            _maps(grid, key_grid, c, e),
            {},
        )
        for grid, key_grid, c, e in (maps[:1] if tiny else maps)
    ]
    tokens = [(67, 67, 16, 16, 8), (300, 211, 8, 64, 16), (1000, 1000, 64, 64, 64), (700, 700, 4, 32, 128)]
    found += [
        Check(
            "nystrom_attention", f"N={n}, S={s}, D={d}, E={e}, M={m}", attend, _tokens(n, s, d, e), {"num_landmarks": m}
        )
        for n, s, d, e, m in (tokens[:1] if tiny else tokens)
    ]
    sides = (9,) if tiny else (9, 64, 128, 200)
    found += [Check("iterative_pinv", f"M={m}", _pinv_of_softmax, _matrices(m), {}) for m in sides]
    return found


def _pinv_of_softmax(matrix: Tensor, **options: Any) -> Tensor:
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    return nystromgan.iterative_pinv(wide.softmax(-1), **options)


def _maps(grid: tuple[int, ...], key_grid: tuple[int, ...], channels: int, values: int) -> Callable[..., Inputs]:
    return lambda dtype, device: testing.map_inputs(2, channels, grid, key_grid, values, dtype=dtype, device=device)


def _tokens(queries: int, keys: int, head_dim: int, value_dim: int) -> Callable[..., Inputs]:
    return lambda dtype, device: testing.attention_inputs(
        2, 2, queries, keys, head_dim, value_dim, dtype=dtype, device=device
    )


def _matrices(side: int) -> Callable[..., Inputs]:
    return lambda dtype, device: {"matrix": testing.normal(3, side, side, dtype=dtype, device=device)}


def cases(device: str, tiny: bool) -> list[Case]:
    """The cases of the benchmark, in bfloat16."""
    sizes = (64,) if tiny else (4096, 16384, 65536)
    found = [landmark_case(1, 1 if tiny else 8, n, 64, 64, 8 if tiny else 64, device) for n in sizes]
    if not tiny:
        found += [landmark_case(8, 1, 2048, 8, 64, 64, device), landmark_case(8, 1, 16384, 4, 32, 512, device)]
    maps = [(1, 8, 32, 64)] if tiny else [(8, 32, 128, 4096), (2, 32, 128, 16384), (8, 8, 64, 4096), (8, 64, 256, 4096)]
    return found + [map_case(*shape, device) for shape in maps]


def landmark_case(
    batch: int, heads: int, tokens: int, head_dim: int, value_dim: int, landmarks: int, device: str
) -> Case:
    """Nyström attention of one sequence; work as in the table of the design: 5 and 14 N D elements where D = E."""

    def make(device: str, seed: int) -> Inputs:
        return testing.attention_inputs(
            batch, heads, tokens, None, head_dim, value_dim, dtype=torch.bfloat16, device=device, seed=seed
        )

    peers = dict(gpu_peers.landmark_attention(landmarks))
    if value_dim == head_dim:
        peers |= gpu_peers.full_attention(device)
    else:
        peers["authors"] = gpu_peers.authors_form(landmarks)
    rows = batch * heads * tokens
    return Case(
        "nystrom_attention",
        f"B={batch} H={heads} N={tokens} D={head_dim} E={value_dim} M={landmarks}",
        nystromgan.nystrom_attention,
        make,
        {"num_landmarks": landmarks},
        peers,
        forward_bytes=2 * rows * (3 * head_dim + 2 * value_dim),
        forward_flops=4 * rows * landmarks * (head_dim + value_dim),
        both_bytes=2 * rows * (8 * head_dim + 6 * value_dim),
        both_flops=14 * rows * landmarks * (head_dim + value_dim),
    )


def map_case(batch: int, channels: int, values: int, tokens: int, device: str) -> Case:
    """Exact attention of square maps: products of N x N weights, five of them in the backward."""
    side = round(tokens**0.5)

    def make(device: str, seed: int) -> Inputs:
        return testing.map_inputs(
            batch, channels, (side, side), None, values, dtype=torch.bfloat16, device=device, seed=seed
        )

    pairs, forward_elements = batch * tokens**2, batch * tokens * (2 * channels + 2 * values)
    return Case(
        "spatiotemporal_attention",
        f"B={batch} C={channels} E={values} N={tokens}",
        nystromgan.spatiotemporal_attention,
        make,
        {},
        gpu_peers.map_attention(device),
        forward_bytes=2 * forward_elements,
        forward_flops=2 * pairs * (channels + values),
        both_bytes=2 * forward_elements + 2 * batch * tokens * (4 * channels + 4 * values),
        both_flops=2 * pairs * (4 * channels + 3 * values),
    )
