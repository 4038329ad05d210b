"""Landmark attention: over tokens, at SAVGAN's shapes, clustered, with a convolution, and over a video's grid."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

import nystromgan
from nystromgan import testing
from nystromgan.bench import draw
from nystromgan.bench.baselines import exact, landmark, packages
from nystromgan.bench.case import DTYPES, FORWARD, FULL, MODES, PASSES, PLAIN, Case, Form, Inputs, Peer, Shape, by_mode

OP = "nystrom_attention"
WINDOW = 7  # of neighbourhood attention, an axis
TAPS = 33  # of the convolution beside the attention, as nystrom-attention has it unless told otherwise
MAKERS = {
    "two SDPA calls": landmark.two_sdpa,
    "eager, F (Z (G V))": landmark.eager,
    "eager, (F Z) (G V)": landmark.eager_left,
    "nystrom-attention's maths": landmark.einsums,
}
FASTEST = (landmark.two_sdpa, landmark.eager)  # one of them is, under torch.compile, wherever all four were measured


def cases(device: str) -> list[Case]:
    found = [
        landmark_case("landmarks", (1, 8, tokens, 64, 64, 64), dtype, device)
        for tokens in sorted((512, 1024, 4096, 16384, 65536, *((2048, 8192) if device == "cuda" else ())))
        for dtype in ("fp32", "bf16")
    ]
    found += [
        landmark_case("dims", (1, 8, 16384, width, width, landmarks), dtype, device)
        for width, landmarks in ((32, 64), (128, 64), (64, 256))
        for dtype in ("fp32", "bf16")
    ]
    found += [
        landmark_case("savgan", (batch, 1, tokens, d, e, landmarks), dtype, device)
        for d, e, tokens, landmarks in ((8, 64, 2048, 64), (4, 32, 16384, 512))
        for batch in (1, 4, *((8,) if device == "cuda" else ()))
        for dtype in ("fp32", "bf16")
    ]
    if device == "cuda":  # the sizes that FlashNystrom's authors give for an H100
        found.append(landmark_case("flashnystrom", (4, 16, 131072, 128, 128, 64), "bf16", device))
    found += [make(16384, dtype, device) for make in (clustered_case, convolved_case) for dtype in ("fp32", "bf16")]
    found += [padded_case(4, 4096, dtype, device) for dtype in ("fp32", "bf16")]
    return found + [video_case((8, 32, 32), dtype, device) for dtype in ("fp32", "bf16")]


def ours(**options: Any) -> Callable[[str], Form]:
    return lambda backend: functools.partial(nystromgan.nystrom_attention, backend=backend, **options)


def tokens_of(dtype: str) -> Callable[[str, Shape, int], Inputs]:
    def make(device: str, shape: Shape, seed: int) -> Inputs:
        sizes = (shape["B"], shape["H"], shape["N"], shape["D"], shape["E"])
        return draw.tokens(*sizes, dtype=DTYPES[dtype], device=device, seed=seed)

    return make


def work(shape: Shape, dtype: str, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Operations and bytes: products F, G, F (Z G V), G V and the pseudo-inverse's; each tensor moved once.

    A GPU's caches hold no sequence between two passes over it, so what the algorithm reads twice counts twice there:
    queries for their landmarks and for F; in a backward queries and the output's gradient, for F's landmarks and for
    d query. With D = E those are 5 N D elements forward and 14 N D in both passes.
    """
    rows, head, value = shape["B"] * shape["H"] * shape["N"], shape["D"], shape["E"]
    flops = 4.0 * rows * shape["M"] * (head + value) + 48.0 * shape["B"] * shape["H"] * shape["M"] ** 3
    forward, both = 2 * (head + value), 6 * (head + value)
    if device == "cuda":
        forward, both = 3 * head + 2 * value, 8 * head + 6 * value
    bytes_a_row = DTYPES[dtype].itemsize * float(rows)
    return by_mode(flops, 3.5 * flops), by_mode(bytes_a_row * forward, bytes_a_row * both)


def held(shape: Shape, dtype: str) -> dict[str, float]:
    """The output; with a backward the gradients too."""
    element = DTYPES[dtype].itemsize * shape["B"] * shape["H"] * shape["N"]
    return by_mode(element * shape["E"], element * 2.0 * (shape["D"] + shape["E"]))


def full_attention(shape: Shape, device: str) -> dict[str, Peer]:
    """Exact attention of the same tokens, by each kernel that may run here."""
    flops = 2.0 * shape["B"] * shape["H"] * shape["N"] ** 2 * (shape["D"] + shape["E"])
    names = exact.fused(device) | (exact.packages() if device == "cuda" else {})
    found = {
        f"{FULL}, {name}": Peer(lambda form=form: form, exact.attention, flops=flops) for name, form in names.items()
    }
    modes = MODES if device == "cuda" else (FORWARD,)
    if shape["B"] * shape["H"] < 8 or (device == "cpu" and shape["N"] != 4096):
        return found  # it is compiled for every shape, and on a CPU slower than flash: 3.7 s a call at N = 16384
    return found | {
        f"{FULL}, FlexAttention": Peer(exact.flex, exact.attention, needs_compile=True, modes=modes, flops=flops)
    }


def _is_tuned(make: Callable[[int], Form], tokens: int, device: str) -> bool:
    """Whether a form has a row under max-autotune, which takes minutes: on a GPU, the same algorithm in eager too."""
    if device == "cuda":
        return tokens >= 16384 and make in FASTEST
    return tokens <= 16384 and make is landmark.two_sdpa


def landmark_case(group: str, sizes: tuple[int, ...], dtype: str, device: str) -> Case:
    """Segment means; D, E, N and M as `sizes` (B, H, N, D, E, M) gives them."""
    shape = dict(zip("BHNDEM", sizes, strict=True))
    landmarks, tokens = shape["M"], shape["N"]
    many = tokens <= 16384  # forms to compile, which takes minutes a shape
    peers = {
        name: Peer(
            functools.partial(make, landmarks), compiled=many or make in FASTEST,
            tuned=group == "landmarks" and _is_tuned(make, tokens, device),
        )
        for name, make in MAKERS.items()
    }  # fmt: skip
    if shape["D"] == shape["E"]:
        coupled = functools.partial(
            nystromgan.nystrom_attention, num_landmarks=landmarks, pinv_init="global_max", backend="reference"
        )
        for name, make in packages.installed().items():
            peers[name] = Peer(functools.partial(make, shape["H"], shape["D"], landmarks), coupled, coupled=True)
    if group == "savgan":
        pairs = shape["B"] * shape["H"] * tokens**2
        peers["authors, N x N"] = Peer(
            functools.partial(landmark.authors, landmarks),
            flops=2.0 * pairs * (landmarks + shape["E"]), stored_bytes=4.0 * pairs,
        )  # fmt: skip
    if group != "dims":
        peers |= full_attention(shape, device)
    flops, moved = work(shape, dtype, device)
    compiled_in_full = (group == "landmarks" and tokens >= 16384) or (
        (group, shape["B"], tokens, dtype) == ("savgan", 1, 16384, "fp32")
    )
    quick = dtype == "fp32" and group in ("landmarks", "savgan") and shape["B"] == 1 and 512 < tokens < 65536
    return Case(
        OP, group, shape, dtype, tokens_of(dtype), ours(num_landmarks=landmarks), peers, flops, moved,
        {**shape, "N": 2 * landmarks}, testing.TOLERANCES[DTYPES[dtype]], heads=True, quick=quick,
        compiled_in_full=compiled_in_full,
        held_bytes=held(shape, dtype) if tokens >= 65536 else {},
        modes=MODES if group == "landmarks" and tokens in (4096, 16384) else PASSES,
    )  # fmt: skip


def clustered_case(tokens: int, dtype: str, device: str) -> Case:
    """Two Lloyd steps beside plain segment means: what better landmarks cost.

    A token midway between two landmarks may go to either, so the result is held to the error that such flips make.
    """
    shape = {"B": 1, "H": 8, "N": tokens, "D": 64, "E": 64, "M": 64}
    flops, moved = work(shape, dtype, device)
    # Two steps for queries and for keys: distances to all landmarks, then sums.
    assignment = 2 * 2 * 2.0 * 8 * tokens * 64 * 64
    plain = ours(num_landmarks=64)
    return Case(
        OP, "clustered", shape, dtype, tokens_of(dtype), ours(num_landmarks=64, cluster_iterations=2),
        {PLAIN: Peer(lambda: plain("auto"), plain("reference"))},
        {mode: flop + assignment for mode, flop in flops.items()}, moved, {**shape, "N": 128},
        testing.Tolerance(5e-2, 0.2), heads=True, quick=dtype == "fp32",
    )  # fmt: skip


def convolved_case(tokens: int, dtype: str, device: str) -> Case:
    """Nyströmformer's depthwise convolution of the values beside the attention, whose peers call torch's for it."""
    shape = {"B": 1, "H": 8, "N": tokens, "D": 64, "E": 64, "M": 64}

    def make(device: str, shape: Shape, seed: int) -> Inputs:
        weight = draw.normal(shape["H"], TAPS, dtype=DTYPES[dtype], device=device, seed=99) / TAPS**0.5
        return {**tokens_of(dtype)(device, shape, seed), "conv_weight": weight}

    flops, moved = work(shape, dtype, device)
    taps = 2.0 * TAPS * 8 * tokens * 64
    return Case(
        OP, "convolution", shape, dtype, make, ours(num_landmarks=64),
        {f"{name} + conv2d": Peer(functools.partial(landmark.convolved, form, 64)) for name, form in MAKERS.items()
         if form in FASTEST},
        {mode: flop + taps * (1 if mode == FORWARD else 3) for mode, flop in flops.items()}, moved,
        {**shape, "N": 128}, testing.TOLERANCES[DTYPES[dtype]], heads=True,
    )  # fmt: skip


def padded_case(batch: int, tokens: int, dtype: str, device: str) -> Case:
    """Rows of unequal lengths under a padding mask, which costs something or, as padding needs no products, less."""
    shape = {"B": batch, "H": 8, "N": tokens, "D": 64, "E": 64, "M": 64}
    flops, moved = work(shape, dtype, device)
    plain = ours(num_landmarks=64)

    def padding(key: Tensor) -> Tensor:
        return draw.padding(key.shape[0], key.shape[2], key.device)

    def form(backend: str) -> Form:
        return lambda query, key, value: plain(backend)(query, key, value, key_padding_mask=padding(key))

    full = exact.masked(padding)
    return Case(
        OP, "padded", shape, dtype, tokens_of(dtype), form,
        {
            "nystromgan, no mask": Peer(lambda: plain("auto"), plain("reference")),
            "two SDPA calls, masked": Peer(lambda: landmark.two_sdpa_padded(64, padding)),
            f"{FULL}, masked": Peer(lambda: full, full, flops=4.0 * batch * 8 * tokens**2 * 64),
        },
        flops, moved, {**shape, "N": 256}, testing.TOLERANCES[DTYPES[dtype]], heads=True,
    )  # fmt: skip


def video_case(grid: tuple[int, int, int], dtype: str, device: str) -> Case:
    """Grid landmarks of a clip, beside exact attention and beside what sees a neighbourhood alone."""
    tokens = grid[0] * grid[1] * grid[2]
    shape = {"B": 1, "H": 8, "N": tokens, "D": 64, "E": 64, "M": 64, "grid": grid}

    def form(backend: str) -> Form:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            over = _grid_of(query.shape[2])
            return nystromgan.nystrom_attention(query, key, value, num_landmarks=64, grid=over, backend=backend)

        return attend

    near = functools.partial(exact.neighbourhood, grid, WINDOW)
    modes = MODES if device == "cuda" else (FORWARD,)
    peers = {}
    if device == "cuda" or dtype == "bf16":  # in float32 a CPU takes 2 s a call
        peers[f"neighbourhood {WINDOW} x {WINDOW} x {WINDOW}, FlexAttention"] = Peer(
            lambda: exact.flex_neighbourhood(grid, WINDOW), near, needs_compile=True, modes=modes
        )
    if device == "cuda" and exact.has("natten"):
        peers[f"neighbourhood {WINDOW} x {WINDOW} x {WINDOW}, NATTEN"] = Peer(
            lambda: exact.natten_neighbourhood(grid, WINDOW), near
        )
    flops, moved = work(shape, dtype, device)
    return Case(
        OP, "video", shape, dtype, tokens_of(dtype), form, peers | full_attention(shape, device), flops, moved,
        {**shape, "N": 512, "grid": (8, 8, 8)}, testing.TOLERANCES[DTYPES[dtype]], heads=True,
    )  # fmt: skip


def _grid_of(tokens: int) -> tuple[int, int, int]:
    """Eight square frames."""
    side = round((tokens / 8) ** 0.5)
    return 8, side, side
