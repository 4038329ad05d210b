"""The machine: its name, what it can do at best, and the versions of what ran on it."""

import functools
import pathlib
import platform
import re
import subprocess
from typing import Any

import torch

from nystromgan import _doctor, _env
from nystromgan.bench import clock
from nystromgan.bench.case import DTYPES

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
        "system": f"{platform.system()} {platform.machine()}", "versions": doctor["versions"], "commit": commit(),
    }  # fmt: skip


def commit() -> str | None:
    """The commit of the checkout, with + where tracked files of the package or of the benchmark differ from it.

    Where git knows none, as in a copy without .git, NYSTROMGAN_COMMIT, if set.
    """
    git = ["git", "-C", str(pathlib.Path(__file__).resolve().parents[1])]
    changed = [*git, "diff", "--quiet", "HEAD", "--", "nystromgan", "csrc", "bench", ":!bench/results"]
    try:
        done = subprocess.run([*git, "describe", "--always", "--abbrev=12", "--exclude=*"], capture_output=True,
                              text=True, check=True)  # fmt: skip
        return done.stdout.strip() + ("+" if subprocess.run(changed).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return _env.commit() or None


def _side(timer: clock.Clock, dtype: torch.dtype, most: int) -> int:
    """The largest side up to `most` whose product takes a quarter of a second at most.

    Without AVX-512 torch multiplies bfloat16 at 1.4 GFLOP/s: a side of 2048 takes 13 s there.
    """
    side = min(64, most)
    while side < most:
        matrix = torch.randn(side, side).to(dtype)
        if 8 * timer.sample_s([functools.partial(torch.matmul, matrix, matrix)], 2) > 0.25:
            break
        side *= 2
    return side


def rates(device: str, tiny: bool = False) -> dict[str, float]:
    """The best of several: a copy, read and written, and products of square matrices by dtype."""
    timer = clock.CLOCKS[device]
    length, most = (2**16, 64) if tiny else (2**26, 2048) if device == "cpu" else (2**28, 8192)
    source = torch.randn(length, device=device)
    target = torch.empty_like(source)
    found = {
        "copy_bytes_per_s": 2
        * 4
        * length
        / min(clock.samples_s(timer, [lambda: target.copy_(source)], 0.0 if tiny else 0.5))
    }
    for dtype_name, dtype in DTYPES.items():
        side = _side(timer, dtype, most) if device == "cpu" else most
        matrix = torch.randn(side, side, device=device).to(dtype)
        seconds = min(clock.samples_s(timer, [functools.partial(torch.matmul, matrix, matrix)], 0.0 if tiny else 0.5))
        found[f"gemm_{dtype_name}_flop_per_s"] = 2 * side**3 / seconds
    return found
