"""What a training will take: counted where it can be, measured on two steps where it cannot."""

import dataclasses
import resource
import time

import torch

from nystromgan.zoo.training.loop import Loop


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one process.

    Attributes:
        parameters: of each player.
        weights_bytes, optimizer_bytes: parameters and buffers; the optimizers' own tensors.
        peak_bytes: the most memory in the measured steps: of the process on the CPU, allocated on a GPU.
        step_s, total_s: a step, without saving and sampling; all steps at that speed.
    """

    parameters: dict[str, int]
    weights_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    step_s: float
    total_s: float


def estimate(loop: Loop) -> Estimate:
    """Trains for two steps, the first of which is not timed, and writes nothing."""
    loop.step()
    if loop.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loop.step()
    seconds = time.perf_counter() - start  # a step ends by reading its losses, and so waits for the device
    tensors = loop.state()
    return Estimate(
        {name: sum(p.numel() for p in turns.parameters) for name, turns in loop.turns.items()},
        sum(t.nbytes for t in loop.objective.state_dict().values()),
        sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("optimizer.")),
        _peak_bytes(loop.device),
        seconds,
        seconds * loop.steps,
    )


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
