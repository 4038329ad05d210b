"""The registry of cases: what is measured, against what, and the arithmetic and traffic that it cannot do without.

To add a case, append to `cases()`; to add a peer, write it in `baselines.py` and name it in the case's `peers`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nystromgan
from nystromgan import testing
from nystromgan.bench import baselines
from nystromgan.ops.power_iteration import spectral_normalize

Inputs = dict[str, Tensor]
Form = Callable[..., Tensor | Sequence[Tensor]]
OURS = "nystromgan"
FULL = "full attention"  # another function than landmark attention: what users pick instead
PLAIN = "nystromgan, segment means"
COMPILED = ", compiled"
MODES = ("forward", "forward+backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHANNELS = [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5  # of the 20-layer discriminator, 3 x 3 convolutions


class Case(NamedTuple):
    """One op at one shape and dtype: ours, the definition in float64, and the peers."""

    op: str
    group: str  # cases that one plot or one target speaks of
    shape: dict[str, int]
    dtype: str
    make: Callable[[str, dict[str, int]], Inputs]  # device and shape; every tensor is differentiated
    forms: dict[str, Callable[[], Form]]  # makers, ours first: a form may keep state of its own
    exact: Form  # ours in float64
    flops: dict[str, float]
    moved_bytes: dict[str, float]
    small: dict[str, int]  # the shape that loads code before memory is measured
    tolerance: testing.Tolerance
    quick: bool = True
    plain_exact: Form | None = None  # of PLAIN, where it is a peer
    training: bool = False  # the forward records what a backward needs

    @property
    def name(self) -> str:
        return f"{self.group} {' '.join(f'{key}={value}' for key, value in self.shape.items())} {self.dtype}"


def cases(full: bool = True) -> list[Case]:
    """All cases, or those of --quick."""
    sizes = (512, 1024, 4096, 16384, 65536)
    found = [
        landmark_case("landmarks", 1, 8, n, 64, 64, 64, dtype, compiled=n >= 16384, quick=n < 65536 and dtype == "fp32")
        for n in sizes
        for dtype in DTYPES
    ]
    found += [
        landmark_case("savgan", batch, 1, n, d, e, m, dtype, compiled=batch == 1, quick=batch == 1 and dtype == "fp32")
        for d, e, n, m in ((8, 64, 2048, 64), (4, 32, 16384, 512))
        for batch in (1, 4)
        for dtype in DTYPES
    ]
    found += [clustered_case(16384, dtype) for dtype in DTYPES]
    found += [map_case(1, 16, 128, 64, dtype) for dtype in DTYPES]
    found += [pinv_case(matrices, side) for matrices, side in ((8, 64), (1, 512))]
    found.append(power_case())
    return [case for case in found if full or case.quick]


def _tokens(dtype: str) -> Callable[[str, dict[str, int]], Inputs]:
    def make(device: str, shape: dict[str, int]) -> Inputs:
        sizes = (shape["B"], shape["H"], shape["N"], None, shape["D"], shape["E"])
        return testing.attention_inputs(*sizes, dtype=DTYPES[dtype], device=device)

    return make


def _landmarks(num_landmarks: int, **options: Any) -> Form:
    return functools.partial(nystromgan.nystrom_attention, num_landmarks=num_landmarks, **options)


def _exactly(num_landmarks: int, **options: Any) -> Form:
    return _landmarks(num_landmarks, backend="reference", **options)


def _compiled(make: Callable[[int], Form], num_landmarks: int) -> Form:
    return torch.compile(make(num_landmarks), dynamic=False)


def _landmark_work(shape: dict[str, int], dtype: str) -> tuple[dict[str, float], dict[str, float]]:
    """Products F, G, F (Z G V) and G V and those of the pseudo-inverse; query, key, value and output moved once."""
    rows, width = shape["B"] * shape["H"] * shape["N"], shape["D"] + shape["E"]
    flops = 4.0 * rows * shape["M"] * width + 48.0 * shape["B"] * shape["H"] * shape["M"] ** 3
    element = DTYPES[dtype].itemsize
    moved = element * rows * 2.0 * width
    return dict(zip(MODES, (flops, 3.5 * flops), strict=True)), dict(zip(MODES, (moved, 3 * moved), strict=True))


def landmark_case(
    group: str, batch: int, heads: int, tokens: int, head_dim: int, value_dim: int, landmarks: int, dtype: str,
    *, compiled: bool, quick: bool,
) -> Case:  # fmt: skip
    """Segment-mean Nyström attention of one sequence."""
    shape = {"B": batch, "H": heads, "N": tokens, "D": head_dim, "E": value_dim, "M": landmarks}
    same = {
        "two SDPA calls": baselines.two_sdpa,
        "eager, F (Z (G V))": baselines.eager,
        "eager, (F Z) (G V)": baselines.eager_left,
        "nystrom-attention": baselines.nystrom_attention_package,
    }
    forms: dict[str, Callable[[], Form]] = {OURS: lambda: _landmarks(landmarks)}
    forms |= {name: functools.partial(make, landmarks) for name, make in same.items()}
    if group == "savgan":
        forms["authors, N x N"] = lambda: baselines.authors(landmarks)
    if compiled:
        forms |= {
            name + COMPILED: functools.partial(_compiled, make, landmarks)
            for name, make in same.items()
        }  # fmt: skip
    forms[FULL] = lambda: baselines.full_attention
    flops, moved = _landmark_work(shape, dtype)
    return Case(
        "nystrom_attention", group, shape, dtype, _tokens(dtype), forms, _exactly(landmarks), flops, moved,
        {**shape, "N": 2 * landmarks}, testing.TOLERANCES[DTYPES[dtype]], quick,
    )  # fmt: skip


def clustered_case(tokens: int, dtype: str) -> Case:
    """Two Lloyd steps beside plain segment means: what better landmarks cost.

    A token midway between two landmarks may go to either, so the result is held to the error that such flips make.
    """
    shape = {"B": 1, "H": 8, "N": tokens, "D": 64, "E": 64, "M": 64}
    flops, moved = _landmark_work(shape, dtype)
    # Two steps for queries and for keys: distances to all landmarks, then sums.
    assignment = 2 * 2 * 2.0 * 8 * tokens * 64 * 64
    return Case(
        "nystrom_attention", "clustered", shape, dtype, _tokens(dtype),
        {OURS: lambda: _landmarks(64, cluster_iterations=2), PLAIN: lambda: _landmarks(64)},
        _exactly(64, cluster_iterations=2),
        {mode: work + assignment for mode, work in flops.items()}, moved, {**shape, "N": 128},
        testing.Tolerance(5e-2, 0.2), dtype == "fp32", _exactly(64),
    )  # fmt: skip


def map_case(batch: int, channels: int, value_channels: int, side: int, dtype: str) -> Case:
    """Exact attention of square maps, channel first."""
    tokens = side * side
    shape = {"B": batch, "C": channels, "E": value_channels, "side": side}

    def make(device: str, shape: dict[str, int]) -> Inputs:
        grid = (shape["side"], shape["side"])
        sizes = (shape["B"], shape["C"], grid, None, shape["E"])
        return testing.map_inputs(*sizes, dtype=DTYPES[dtype], device=device)

    forms: dict[str, Callable[[], Form]] = {
        OURS: lambda: nystromgan.spatiotemporal_attention,
        "transpose, pad, SDPA": lambda: baselines.transposed_sdpa,
        "transpose, SDPA": lambda: baselines.transposed_unpadded_sdpa,
        "eager, N x N": lambda: baselines.eager_maps,
    }
    pairs, width = batch * tokens**2, channels + value_channels
    moved = 2.0 * DTYPES[dtype].itemsize * batch * tokens * width
    return Case(
        "spatiotemporal_attention", "maps", shape, dtype, make, forms,
        lambda **inputs: nystromgan.spatiotemporal_attention(**inputs, backend="reference"),
        dict(zip(MODES, (2.0 * pairs * width, 2.0 * pairs * (4 * channels + 3 * value_channels)), strict=True)),
        dict(zip(MODES, (moved, 3 * moved), strict=True)), {**shape, "side": 8}, testing.TOLERANCES[DTYPES[dtype]],
    )  # fmt: skip


def pinv_case(matrices: int, side: int) -> Case:
    """Six steps on softmax matrices, as attention makes them, but for their row sums.

    Equal row sums would leave the gradient of |A|_inf to rounding, and no two forms would agree on it.
    """

    def make(device: str, shape: dict[str, int]) -> Inputs:
        logits = testing.normal(shape["B"], shape["M"], shape["M"], device=device)
        return {"matrix": logits.softmax(-1) * torch.linspace(0.9, 1.0, shape["M"], device=device)[:, None]}

    product = 2.0 * matrices * side**3
    moved = 8.0 * matrices * side**2
    return Case(
        "iterative_pinv", "pinv", {"B": matrices, "M": side}, "fp32", make,
        {OURS: lambda: nystromgan.iterative_pinv, "eager": lambda: baselines.pinv},
        lambda matrix: nystromgan.iterative_pinv(matrix, backend="reference"),
        dict(zip(MODES, (24 * product, 72 * product), strict=True)),
        dict(zip(MODES, (moved, 2 * moved), strict=True)), {"B": 1, "M": 16}, testing.TOLERANCES[torch.float32],
    )  # fmt: skip


def power_case() -> Case:
    """Spectral normalisation of all weights of a discriminator of 20 layers, one training step."""

    def sizes(layers: int) -> list[tuple[int, int]]:
        widths = CHANNELS[:: len(CHANNELS) // layers]
        return [(out, 9 * into) for into, out in zip([64, *widths], widths, strict=False)]

    def make(device: str, shape: dict[str, int]) -> Inputs:
        drawn = (testing.normal(*size, device=device, seed=i) for i, size in enumerate(sizes(shape["layers"])))
        return {f"w{i}": weight for i, weight in enumerate(drawn)}

    def vectors(weights: Sequence[Tensor], axis: int) -> list[Tensor]:
        drawn = [testing.normal(w.shape[axis], device=w.device.type, seed=100 + axis) for w in weights]
        return [(x / x.norm()).to(w.dtype) for x, w in zip(drawn, weights, strict=True)]

    def ours(backend: str) -> Form:
        state: list[list[Tensor]] = []

        def form(**weights: Tensor) -> list[Tensor]:
            matrices = list(weights.values())
            if not state:
                state.extend(vectors(matrices, axis) for axis in range(2))
            return spectral_normalize(matrices, *state, backend=backend)

        return form

    def torchs() -> Form:
        modules: list[Callable[..., list[Tensor]]] = []

        def form(**weights: Tensor) -> Sequence[Tensor]:
            matrices = list(weights.values())
            if not modules:
                modules.append(baselines.torch_spectral_norm(matrices, vectors(matrices, 0), vectors(matrices, 1)))
            return modules[0](*matrices)

        return form

    shape = {"layers": 20}
    elements = sum(rows * columns for rows, columns in sizes(20))
    return Case(
        "power_iteration", "spectral norm", shape, "fp32", make,
        {OURS: lambda: ours("auto"), "torch's parametrization": torchs},
        lambda **weights: ours("reference")(**weights),
        dict(zip(MODES, (4.0 * elements, 8.0 * elements), strict=True)),
        dict(zip(MODES, (8.0 * elements, 20.0 * elements), strict=True)), {"layers": 4},
        testing.TOLERANCES[torch.float32],
        training=True,
    )  # fmt: skip
