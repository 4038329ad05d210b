"""The machine: its name, what it can do at best, and the versions of what ran on it."""

import functools
import pathlib
import platform
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from nystromgan import _doctor

# The oldest generation that has the flag, newest first; virtual machines hide the model's own name.
GENERATIONS = {
    "amx_fp16": "granite-rapids",
    "amx_tile": "sapphire-rapids",
    "avx512_vp2intersect": "zen5",
    "avx512_bf16": "zen4",
    "avx512f": "avx512",
    "avx2": "avx2",
}


def name(device: str = "cpu") -> str:
    """For example cpu-2core-sapphire-rapids, or nvidia-h200."""
    if device == "cuda":
        return _slug(torch.cuda.get_device_name())
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    flags = found[1].split() if found else []
    kind = next((kind for flag, kind in GENERATIONS.items() if flag in flags), _slug(platform.machine()))
    return f"cpu-{torch.get_num_threads()}core-{kind}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe(device: str) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    doctor = _doctor.inspect_machine()
    return {
        "name": name(device), "device": device, "cpu": doctor["cpu"], "gpus": doctor["gpus"],
        "system": f"{platform.system()} {platform.machine()}", "versions": doctor["versions"], "commit": _commit(),
    }  # fmt: skip


def _commit() -> str | None:
    """The commit of the checkout, with + where tracked files of the package differ from it."""
    root = pathlib.Path(__file__).parents[1]
    describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*"]
    changed = ["git", "-C", str(root), "diff", "--quiet", "HEAD", "--", "nystromgan", "csrc"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, check=True)
        return done.stdout.strip() + ("+" if subprocess.run(changed).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def rates(device: str) -> dict[str, float]:
    """The best of ten: products of 2048 x 2048 matrices by dtype, and a copy of 256 MiB, read and written."""
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    found = {"copy_bytes_per_s": 2 * 4 * 2**26 / _best_s(lambda: target.copy_(source), device)}
    for dtype_name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.randn(2048, 2048, device=device).to(dtype)
        found[f"gemm_{dtype_name}_flop_per_s"] = (
            2 * 2048**3 / _best_s(functools.partial(torch.matmul, matrix, matrix), device)
        )
    return found


def _best_s(call: Callable[[], object], device: str) -> float:
    call()
    return min(duration_s(call, device) for _ in range(10))


def duration_s(call: Callable[[], object], device: str) -> float:
    """Seconds of one call; a GPU is waited for before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def waited_s() -> float:
    """Seconds that this process's threads were ready to run while others had the cores; 0 where Linux does not tell."""
    stats = pathlib.Path("/proc/self/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[1]) for path in stats) / 1e9
