"""Which implementation runs: one table, one rule, and the reasons when a backend cannot.

A backend answers with a list of reasons why it cannot run an input; an empty list means that it can. `auto` takes the
first able backend of the table; a named backend either runs or raises, and never falls back.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nystromgan import _env, _library, _native

BACKENDS = ("cuda", "triton", "cpu", "reference")

# The backends that implement each op, in the order in which `auto` tries them: the measured winner first, and `cuda`,
# which has not run on a GPU yet, after `triton`.
IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "nystrom_attention": ("cpu", "triton", "cuda", "reference"),
    "spatiotemporal_attention": ("cpu", "triton", "cuda", "reference"),
    "iterative_pinv": ("cpu", "triton", "cuda", "reference"),
    "power_iteration": ("cpu", "triton", "cuda", "reference"),
}

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class UnsupportedError(RuntimeError):
    """The backend that was asked for cannot run this input; the message lists why."""


def _machine_reasons(backend: str) -> list[str]:
    """Why this machine cannot run a backend at all."""
    if backend == "cpu":
        return _native.cpu_reasons()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return ["the package triton is not installed"]
        if not torch.cuda.is_available() and not _env.triton_interpret():
            return ["torch sees no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"]
    if backend == "cuda":
        return _native.cuda_reasons()
    return []


@_library.constant_when_compiled
def machine_reasons(backend: str) -> tuple[str, ...]:
    """`_machine_reasons`, which torch.compile evaluates once instead of tracing into it."""
    return tuple(_machine_reasons(backend))


def _input_reasons(backend: str, tensors: Sequence[Tensor]) -> list[str]:
    """Why a backend cannot take these devices and dtypes."""
    wanted = "cuda" if backend in ("cuda", "triton") else backend
    reasons = []
    for tensor in tensors:
        if (tensor.is_cpu if wanted == "cpu" else tensor.is_cuda) and tensor.dtype in NATIVE_DTYPES:
            continue
        on_cpu_interpreter = backend == "triton" and _env.triton_interpret() and tensor.device.type == "cpu"
        if tensor.device.type != wanted and not on_cpu_interpreter:
            reasons.append(f"needs tensors on {wanted}, got one on {tensor.device}")
        if tensor.dtype not in NATIVE_DTYPES:
            reasons.append(f"takes float32, bfloat16 and float16, got {tensor.dtype}")
    return list(dict.fromkeys(reasons))


def unsupported_reasons(op: str, backend: str, tensors: Sequence[Tensor]) -> list[str]:
    """Why `backend` cannot run `op` on `tensors`; an empty list means that it can."""
    if backend not in IMPLEMENTED[op]:
        return [f"{op} has no {backend} implementation in this version"]
    if backend == "reference":
        return []
    return list(machine_reasons(backend)) + _input_reasons(backend, tensors)


def choose(
    op: str,
    backend: str,
    tensors: Sequence[Tensor],
    op_reasons: Callable[[str], list[str]] = lambda backend: [],
) -> str:
    """The backend that runs `op`: the named one, or for "auto" the first able one of the table.

    `op_reasons(backend)` adds what only the op itself knows. Raises ValueError for an unknown name, and
    UnsupportedError with every reason for a named backend that cannot run this input.
    """
    if backend == "auto":
        for candidate in IMPLEMENTED[op]:
            if not unsupported_reasons(op, candidate, tensors) and not op_reasons(candidate):
                return candidate
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    reasons = unsupported_reasons(op, backend, tensors) + op_reasons(backend)
    if reasons:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors)
        raise UnsupportedError(f"backend {backend!r} cannot run {op} on {shapes}: " + "; ".join(reasons))
    return backend


def available_backends() -> dict[str, tuple[str, ...]]:
    """Every backend's name with the reasons why this machine cannot run it; an empty tuple means that it can.

    >>> available_backends()["reference"]
    ()
    """
    built = {name for names in IMPLEMENTED.values() for name in names}
    absent = ("not in this version",)
    return {name: machine_reasons(name) if name in built else absent for name in BACKENDS}
