"""Times of a device: medians over inputs that outgrow its cache, and the two rates that floors are made of."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_SETS = 16
MOST_RUNS = 200


class Timing(NamedTuple):
    """Milliseconds of one call: the median and the quartiles of its runs."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


class Rates(NamedTuple):
    """What the device does at best: bytes copied (read and written) and half-precision operations a second."""

    bytes_per_s: float
    flops_per_s: float

    def floor_ms(self, moved_bytes: float, flops: float) -> float:
        """The time below which no kernel that moves and computes as much can be."""
        return 1e3 * max(moved_bytes / self.bytes_per_s, flops / self.flops_per_s)


def number_of_sets(set_bytes: int, device: str) -> int:
    """How many sets of inputs, used in turn, are twice the L2 cache in all."""
    if device != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MOST_SETS, -(-2 * cache_bytes // max(set_bytes, 1))))


def measure(call: Callable[..., Any], sets: Sequence[Any], device: str, budget_s: float) -> Timing:
    """Times call(one of `sets`), in turn, for about `budget_s` seconds, after a warm-up call for each set."""
    for inputs in sets:
        call(inputs)
    _finish(device)
    started = time.perf_counter()
    call(sets[0])
    _finish(device)
    once_s = max(time.perf_counter() - started, 1e-6)
    runs = max(1, min(MOST_RUNS, int(budget_s / once_s)))
    turns = itertools.islice(itertools.cycle(sets), runs)
    times = sorted(_times_on_gpu(call, turns) if device == "cuda" else _times_on_cpu(call, turns))
    return Timing(statistics.median(times), times[len(times) // 4], times[3 * len(times) // 4], runs)


def graphed(call: Callable[[Any], Any], inputs: Any) -> Callable[[Any], None] | None:
    """The call on these inputs as a CUDA graph, which costs the CPU nothing; None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call(inputs)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return lambda _: graph.replay()


def _times_on_gpu(call: Callable[..., Any], turns: Any) -> list[float]:
    events = []
    for inputs in turns:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(inputs)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _times_on_cpu(call: Callable[..., Any], turns: Any) -> list[float]:
    times = []
    for inputs in turns:
        started = time.perf_counter()
        call(inputs)
        times.append(1e3 * (time.perf_counter() - started))
    return times


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rates(device: str, tiny: bool) -> Rates:
    """The device's copy bandwidth and its rate in square bfloat16 products, both measured."""
    length, side = (1 << 16, 64) if tiny else (1 << 29, 8192)
    source = torch.zeros(length, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda _: target.copy_(source), [None], device, 0.5)
    factor = torch.randn(side, side, device=device).to(torch.bfloat16)
    product = measure(lambda _: factor @ factor, [None], device, 0.5)
    return Rates(4 * length / copy.median_ms * 1e3, 2 * side**3 / product.median_ms * 1e3)


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """The most memory that a call holds beyond what was held before it."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_bytes(tensors: Any) -> int:
    """The bytes of a tensor, or of all tensors in a list or dictionary."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    values = tensors.values() if isinstance(tensors, dict) else tensors
    return sum(in_bytes(x) for x in values)
