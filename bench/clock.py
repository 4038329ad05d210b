"""Clocks: of a CPU, which tells when others had the cores, and of a CUDA device, by events and past its L2 cache."""

import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
SAMPLE_S = 4e-3  # a shorter call is repeated until a sample lasts this long
RETRIES = 4
DISTURBED = 0.02  # the share of a sample that our threads may have waited for a core
MOST_SETS = 16  # of inputs


class Clock(Protocol):
    """Times calls of one kind of device."""

    device: str

    def number_of_sets(self, set_bytes: int) -> int:
        """How many sets of inputs, used in turn, keep one call from finding its inputs in a cache by luck."""

    def sample_s(self, calls: Sequence[Call], repeats: int) -> float:
        """Seconds of one call, over `repeats` of them, which take the sets in turn."""


class CpuClock:
    """Wall time; a sample in which other processes took the cores is taken again, up to RETRIES times."""

    device = "cpu"

    def number_of_sets(self, set_bytes: int) -> int:
        return 1

    def sample_s(self, calls: Sequence[Call], repeats: int) -> float:
        taken = []
        for _ in range(1 + RETRIES):
            waited, start = waited_s(), time.perf_counter()
            for i in range(repeats):
                calls[i % len(calls)]()
            seconds = time.perf_counter() - start
            taken.append((waited_s() - waited, seconds))
            if taken[-1][0] <= DISTURBED * seconds:
                break
        return min(taken)[1] / repeats


class CudaClock:
    """CUDA events around the calls, which are queued ahead of the device where they are short."""

    device = "cuda"

    def number_of_sets(self, set_bytes: int) -> int:
        cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        return max(2, min(MOST_SETS, -(-2 * cache_bytes // max(set_bytes, 1))))

    def sample_s(self, calls: Sequence[Call], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for i in range(repeats):
            calls[i % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end) / repeats


CLOCKS: dict[str, Clock] = {"cpu": CpuClock(), "cuda": CudaClock()}


def warm(calls: Sequence[Call]) -> None:
    """One call on every set."""
    for call in calls:
        call()


def repeats(clock: Clock, calls: Sequence[Call]) -> int:
    """How many warm calls make a sample."""
    once_s = clock.sample_s(calls, 1)
    if once_s < 10 * SAMPLE_S:
        once_s = clock.sample_s(calls, 1)
    return max(1, round(SAMPLE_S / max(once_s, 1e-6)))


def samples_s(clock: Clock, calls: Sequence[Call], budget_s: float, most: int = 50) -> list[float]:
    """Seconds of one call, several times within a budget."""
    warm(calls)
    count, spent = repeats(clock, calls), 0.0
    taken: list[float] = []
    while not taken or (spent < budget_s and len(taken) < most):
        taken.append(clock.sample_s(calls, count))
        spent += taken[-1] * count
    return taken


def median_ms(call: Call, device: str, budget_s: float) -> float:
    return 1e3 * statistics.median(samples_s(CLOCKS[device], [call], budget_s))


def graphed(calls: Sequence[Call]) -> Call | None:
    """The calls as one CUDA graph, which costs the CPU nothing; None where they cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def launches(call: Call) -> int | None:
    """How many kernels a warm call launches, copies and fills apart; None where the profiler sees none."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names) or None


def waited_s() -> float:
    """Seconds that this process's threads were ready to run while others had the cores; 0 where Linux does not tell."""
    stats = pathlib.Path("/proc/self/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[1]) for path in stats) / 1e9
