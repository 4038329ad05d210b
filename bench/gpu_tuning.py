"""The tuning stage: measures every candidate configuration of the Triton kernels, and names the winners."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nystromgan import _backend, _triton, testing
from nystromgan.bench import clock, draw, gpu_parts
from nystromgan.bench.plan import Stage

Row = dict[str, Any]
Call = Callable[[], tuple[Tensor, ...]]
Using = Callable[[str], Any]  # a context in which calls have the named configuration
Best = Callable[[Call, Iterable[str], Using], Row]
COMPILING, SHARES = 0.4, 12  # of the time left, until candidates must be compiled; processes an op that compile them
TIME_S = 0.05  # of one measurement
# (batch, C, E) that stand for the columns of spatiotemporal_attention's table, those of the targets first.
MAPS = [(8, 8, 64), (4, 32, 128), (8, 64, 64), (4, 128, 128), (4, 32, 256), (4, 256, 256)]


def rows(stage: Stage) -> Iterator[Row]:
    """A row a kernel and shape: the time of every candidate and the winner's name; wrong candidates are left out."""
    chosen = [op for op in TUNED if stage.wants(op) and not _backend.unsupported_reasons(op, "triton", [])]
    if stage.device == "cuda":  # candidates are compiled by many processes, and timed by this one
        until = time.perf_counter() + COMPILING * stage.left_s()
        parts = [{"op": op, "share": share} for op in chosen for share in range(SHARES)]
        yield from gpu_parts.ahead(stage._replace(deadline=until), "gpu_tuning", parts)
    for op in chosen:
        for row in TUNED[op](stage.device, stage.tiny, functools.partial(_best, stage)):
            yield {"op": op, **row}


def part_rows(op: str, share: int, device: str, tiny: bool) -> Iterator[Row]:
    """Runs one of SHARES parts of the op's candidates once, which leaves their kernels in Triton's cache."""
    count = 0

    def run(call: Call, names: Iterable[str], using: Using) -> Row:
        nonlocal count
        for name in names:
            count += 1
            if count % SHARES == share:
                with (
                    contextlib.suppress(Exception),
                    using(name),
                ):  # what fails here fails where it is timed, and is told
                    call()
        return {}

    start = time.perf_counter()
    for _ in TUNED[op](device, tiny, run):
        pass
    yield {"op": op, "share": share, "compiled_s": time.perf_counter() - start}


def _maps(device: str, tiny: bool, best: Best) -> Iterator[Row]:
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
                yield {"table": place, "column": column, **best(call, names, using)}


def _map_call(kernel: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Any:
    """A call that runs `kernel` (and the other one, if a backward's) on (batch, channels, value channels, tokens)."""
    from nystromgan.ops.spatiotemporal_attention import triton as kernels

    batch, channels, values, tokens = shape
    maps = [
        draw.normal(batch, 1, c, tokens, dtype=dtype, device=device, seed=seed)
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


def _power(device: str, tiny: bool, best: Best) -> Iterator[Row]:
    from nystromgan.ops.power_iteration import triton as kernels
    from nystromgan.ops.power_iteration import tuning

    shapes = [(16, 40)] * 2 if tiny else [(width, 9 * width) for width in (64, 128, 256, 512) for _ in range(10)]
    for dtype in (torch.float32,) if tiny else (torch.float32, torch.bfloat16):
        weights = [draw.normal(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]
        u = [draw.normal(shape[0], device=device, seed=i) for i, shape in enumerate(shapes)]
        v = [draw.normal(shape[1], device=device, seed=i) for i, shape in enumerate(shapes)]

        def call(weights: list[Tensor] = weights, u: list[Tensor] = u, v: list[Tensor] = v) -> tuple[Tensor, ...]:
            return kernels.power_iteration(weights, [x.clone() for x in u], [x.clone() for x in v], 1, 1e-12)

        def using(name: str) -> Any:
            return mock.patch.object(tuning, "choose", return_value=tuning.CONFIGS[name])

        names = list(tuning.CONFIGS)[: 2 if tiny else None]
        place = (_triton.architecture(weights[0]), str(dtype))
        yield {"table": place, **best(call, names, using)}


TUNED: dict[str, Callable[[str, bool, Best], Iterator[Row]]] = {
    "power_iteration": _power, "spatiotemporal_attention": _maps,
}  # fmt: skip


def _best(stage: Stage, call: Call, names: Iterable[str], using: Using) -> Row:
    """Times `call` under every name's configuration; one that fails or differs from the table's choice has no time."""
    device, least_s = stage.device, 0.0 if stage.tiny else TIME_S
    if stage.left_s() < 0:
        return {"unfinished": gpu_parts.UNFINISHED}
    standard = call()
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in names:
        if stage.left_s() < 0:
            refused[name] = gpu_parts.UNFINISHED
            continue
        try:
            with using(name):
                error = max(testing.relative_error(x, y) for x, y in zip(call(), standard, strict=True))
                if not error <= 2 * testing.TOLERANCES[standard[0].dtype].output:
                    raise ArithmeticError(f"differs by {error:.2e}")
                times[name] = clock.median_ms(call, device, least_s)
        except Exception as error:  # out of shared memory, mostly
            refused[name] = f"{type(error).__name__}: {str(error)[:100]}"
    table_ms = clock.median_ms(call, device, least_s)
    best = min(times, key=lambda name: times[name]) if times else None
    row = {"best": best, "best_ms": times.get(best or ""), "table_ms": table_ms, "times_ms": times, "refused": refused}
    return row | ({"unfinished": gpu_parts.UNFINISHED} if gpu_parts.UNFINISHED in refused.values() else {})
