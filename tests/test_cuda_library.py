"""The CUDA library without a GPU: what the compiler says of its kernels, what it registers, how it refuses.

`make cuda-check` builds it; without it these tests have nothing to read.
"""

import ctypes
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch._subclasses import FakeTensorMode

from nystromgan import (
    UnsupportedError,
    _backend,
    _native,
    iterative_pinv,
    nystrom_attention,
    power_iteration,
    spatiotemporal_attention,
)

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "build" / "native"
ARCHITECTURES = ("sm_80", "sm_90a")
LOGS = sorted(path.with_suffix(".log") for path in FOLDER.glob("*.fatbin"))
OPS = {
    "nystrom_attention": ("nystrom_attention", "nystrom_attention_backward", "cluster_landmarks"),
    "iterative_pinv": ("iterative_pinv", "iterative_pinv_backward"),
    "spatiotemporal_attention": ("spatiotemporal_attention", "spatiotemporal_attention_backward"),
    "power_iteration": ("power_iteration", "spectral_normalize", "spectral_normalize_backward"),
}
built = pytest.mark.skipif(not (FOLDER / _native.CUDA_LIBRARY).exists(), reason="the CUDA library is not built")


class Usage(NamedTuple):
    """What one kernel takes on one architecture."""

    kernel: str
    architecture: str
    registers: int
    spilled_bytes: int


def usages(log: pathlib.Path) -> list[Usage]:
    """Every kernel of one file, as ptxas counted it."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*? (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, log.read_text(), re.DOTALL)
    return [Usage(name, arch, int(registers), sum(map(int, bytes_))) for name, arch, *bytes_, registers in found]


@built
@pytest.mark.parametrize("log", LOGS, ids=[log.stem for log in LOGS])
def test_no_kernel_spills_and_each_is_there_for_every_architecture(log: pathlib.Path) -> None:
    found = usages(log)
    assert {usage.architecture for usage in found} >= set(ARCHITECTURES)
    assert [usage for usage in found if usage.spilled_bytes] == []
    assert not re.search(r" [1-9]\d* bytes spill", log.read_text())  # what a kernel calls has lines of its own
    assert [usage for usage in found if usage.registers > 255] == []


@built
def test_the_library_links_with_nothing_of_cuda() -> None:
    library = FOLDER / _native.CUDA_LIBRARY
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|cudart|c10_cuda)", needed)


@built
def test_every_entry_point_is_registered() -> None:
    """In a process of its own: what is loaded once stays."""
    names = [name for names in OPS.values() for name in names]
    code = (
        "import torch, nystromgan\n"
        f"torch.ops.load_library({str(FOLDER / _native.CUDA_LIBRARY)!r})\n"
        f"for name in {names!r}:\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'nystromgan::{name}_native', 'CUDA'), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@built
@pytest.mark.parametrize("path", ["single_launch", "clusters", "groups"])
def test_a_path_can_be_turned_off(path: str) -> None:
    """For measurements beside the other one."""
    getattr(ctypes.CDLL(str(FOLDER / _native.CUDA_LIBRARY)), f"nystromgan_cuda_allow_{path}")(1)


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "library_path", lambda name: FOLDER / name)
    _native.cuda_reasons.cache_clear()
    try:
        (reason,) = _native.cuda_reasons()
    finally:
        _native.cuda_reasons.cache_clear()
    assert re.match(r"there is no NVIDIA (driver|GPU)|the NVIDIA driver", reason)


def test_every_op_of_the_table_is_checked_here() -> None:
    assert set(OPS) == {op for op, backends in _backend.IMPLEMENTED.items() if "cuda" in backends}


def test_a_library_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(_native, "library_path", lambda name: tmp_path / name)
    _native.cuda_reasons.cache_clear()
    try:
        assert "is missing; reinstall with nvcc" in _native.cuda_reasons()[0]
        (tmp_path / _native.CUDA_LIBRARY).write_bytes(b"not a library")
        _native.cuda_reasons.cache_clear()
        assert "the CUDA library does not load" in _native.cuda_reasons()[0]
    finally:
        _native.cuda_reasons.cache_clear()


class TestFakeTensors:
    """Arguments are checked, and results have their shapes, before any kernel runs."""

    @pytest.fixture(autouse=True)
    def able(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backend, "machine_reasons", lambda backend: ())

    def test_pinv(self) -> None:
        with FakeTensorMode():
            inverse = iterative_pinv(torch.empty(2, 7, 7, device="cuda", dtype=torch.bfloat16), backend="cuda")
            assert (inverse.shape, inverse.dtype, inverse.device.type) == ((2, 7, 7), torch.float32, "cuda")
            with pytest.raises(UnsupportedError, match="takes up to 512 rows, got 513"):
                iterative_pinv(torch.empty(513, 513, device="cuda"), backend="cuda")
            with pytest.raises(UnsupportedError, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
                iterative_pinv(torch.empty(5, 5, device="cuda", dtype=torch.float64), backend="cuda")

    def test_power_iteration(self) -> None:
        with FakeTensorMode():
            weight, u, v = (torch.empty(*shape, device="cuda") for shape in ((8, 5), (8,), (5,)))
            assert power_iteration([weight, weight], [u, u], [v, v], backend="cuda").shape == (2,)
            with pytest.raises(UnsupportedError, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
                power_iteration(weight.double(), u, v, backend="cuda")

    def test_spatiotemporal_attention(self) -> None:
        with FakeTensorMode():
            query, value = torch.empty(2, 8, 4, 5, device="cuda"), torch.empty(2, 6, 3, 3, device="cuda")
            key = torch.empty(2, 8, 3, 3, device="cuda")
            assert spatiotemporal_attention(query, key, value, backend="cuda").shape == (2, 6, 4, 5)
            wide = torch.empty(1, 257, 4, 5, device="cuda")
            with pytest.raises(UnsupportedError, match="takes up to 256 channels a head, got 257"):
                spatiotemporal_attention(wide, wide, wide, backend="cuda")

    def test_nystrom_attention(self) -> None:
        with FakeTensorMode():
            query, key = torch.empty(1, 2, 70, 8, device="cuda"), torch.empty(1, 2, 50, 8, device="cuda")
            value = torch.empty(1, 2, 50, 6, device="cuda")
            assert nystrom_attention(query, key, value, num_landmarks=5, backend="cuda").shape == (1, 2, 70, 6)
            long = torch.empty(1, 1, 1000, 8, device="cuda")
            with pytest.raises(UnsupportedError, match="takes up to 512 landmarks, got 513"):
                nystrom_attention(long, long, long, num_landmarks=513, backend="cuda")
