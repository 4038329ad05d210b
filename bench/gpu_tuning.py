"""The tuning stage: measures every candidate configuration of the Triton kernels, and names the winners."""

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nystromgan import _backend, _triton, testing
from nystromgan.bench import clock

Row = dict[str, Any]
TIME_S = 0.05  # of one measurement
# (batch, C, E) that stand for the columns of spatiotemporal_attention's table, those of the targets first.
MAPS = [(8, 8, 64), (4, 32, 128), (8, 64, 64), (4, 128, 128), (4, 32, 256), (4, 256, 256)]


def rows(device: str, tiny: bool, ops: list[str] | None, budget_s: float, folder: pathlib.Path) -> Iterator[Row]:
    """A row a kernel and shape: the time of every candidate and the winner's name; wrong candidates are left out."""
    started = time.perf_counter()

    def left_s() -> float:
        return budget_s - (time.perf_counter() - started)

    for op, tune in {"power_iteration": _power, "spatiotemporal_attention": _maps}.items():
        able = not _backend.unsupported_reasons(op, "triton", [])
        if able and (ops is None or op in ops):
            for row in tune(device, tiny, left_s):
                yield {"op": op, **row}


def _maps(device: str, tiny: bool, left_s: Callable[[], float]) -> Iterator[Row]:
    from nystromgan.ops.spatiotemporal_attention import tuning

    for itemsize, dtype in ((4, torch.float32),) if tiny else ((2, torch.bfloat16), (4, torch.float32)):
        for shape in [(1, 4, 8)] if tiny else MAPS[: 3 if itemsize == 4 else None]:
            for kernel in ("forward", "grad_query", "grad_key_value"):
                call, args = _map_call(kernel, (*shape, 33 if tiny else 4096), dtype, device)
                tiles = [_triton.tile(c, 64 if itemsize == 4 else 256) for c in shape[1:3]]
                place = (kernel, _triton.architecture(args[0]), itemsize)
                names = tuning.CANDIDATES[itemsize][: 2 if tiny else None]

                def using(name: str, kernel: str = kernel) -> Any:
                    standard, config = tuning.choose, tuning.Config.named(name)
                    return mock.patch.object(
                        tuning, "choose", lambda k, *rest: config if k == kernel else standard(k, *rest)
                    )

                column = tuning.COLUMNS[tuning.column(*tiles)]
                yield {"table": place, "column": column, **_best(call, names, using, device, tiny, left_s)}


def _map_call(kernel: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Any:
    """A call that runs `kernel` (and the other one, if a backward's) on (batch, channels, value channels, tokens)."""
    from nystromgan.ops.spatiotemporal_attention import triton as kernels

    batch, channels, values, tokens = shape
    maps = [
        testing.normal(batch, 1, c, tokens, dtype=dtype, device=device, seed=seed)
        for seed, c in enumerate((channels, channels, values))
    ]
    scale = channels**-0.5
    output, _, lse = kernels.spatiotemporal_attention(*maps, None, None, None, scale, False, True)
    if kernel == "forward":
        return lambda: kernels.spatiotemporal_attention(*maps, None, None, None, scale, False, True)[:1], maps
    return (
        lambda: kernels.spatiotemporal_attention_backward(output, *maps, None, None, output, lse, scale, False)[:3],
        maps,
    )


def _power(device: str, tiny: bool, left_s: Callable[[], float]) -> Iterator[Row]:
    from nystromgan.ops.power_iteration import triton as kernels
    from nystromgan.ops.power_iteration import tuning

    shapes = [(16, 40)] * 2 if tiny else [(width, 9 * width) for width in (64, 128, 256, 512) for _ in range(10)]
    for dtype in (torch.float32,) if tiny else (torch.float32, torch.bfloat16):
        weights = [testing.normal(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]
        u = [testing.normal(shape[0], device=device, seed=i) for i, shape in enumerate(shapes)]
        v = [testing.normal(shape[1], device=device, seed=i) for i, shape in enumerate(shapes)]

        def call(weights: list[Tensor] = weights, u: list[Tensor] = u, v: list[Tensor] = v) -> tuple[Tensor, ...]:
            return kernels.power_iteration(weights, [x.clone() for x in u], [x.clone() for x in v], 1, 1e-12)

        def using(name: str) -> Any:
            return mock.patch.object(tuning, "choose", return_value=tuning.CONFIGS[name])

        names = list(tuning.CONFIGS)[: 2 if tiny else None]
        place = (_triton.architecture(weights[0]), str(dtype))
        yield {"table": place, **_best(call, names, using, device, tiny, left_s)}


def _best(
    call: Callable[[], tuple[Tensor, ...]],
    names: Any,
    using: Callable[[str], Any],
    device: str,
    tiny: bool,
    left_s: Callable[[], float],
) -> Row:
    """Times `call` under every name's configuration; one that fails or differs from the table's choice has no time."""
    standard = call()
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in names:
        if left_s() < 0:
            refused[name] = "beyond the budget"
            continue
        try:
            with using(name):
                error = max(testing.relative_error(x, y) for x, y in zip(call(), standard, strict=True))
                if not error <= 2 * testing.TOLERANCES[standard[0].dtype].output:
                    raise ArithmeticError(f"differs by {error:.2e}")
                times[name] = clock.median_ms(call, device, 0.0 if tiny else TIME_S)
        except Exception as error:  # out of shared memory, mostly
            refused[name] = f"{type(error).__name__}: {str(error)[:100]}"
    table_ms = clock.median_ms(call, device, 0.0 if tiny else TIME_S)
    best = min(times, key=lambda name: times[name]) if times else None
    return {"best": best, "best_ms": times.get(best or ""), "table_ms": table_ms, "times_ms": times, "refused": refused}
