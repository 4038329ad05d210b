"""What is in the wheel, what its tag promises, and that no instruction set leaks out of its own kernels."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
KERNELS = ROOT / "csrc" / "cpu" / "kernels"
LIBRARY = "nystromgan/lib/libnystromgan_cpu.so"
ISAS = ("avx2", "avx512", "avx512bf16", "amx")
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _setup(folder: pathlib.Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs the build into `folder`, sharing only the compiled objects with the tree."""
    steps = ["egg_info", "-e", str(folder), "build", "-b", str(folder / "build"), "bdist_wheel", "-d", str(folder)]
    command = [sys.executable, "setup.py", "-q", *steps, "-b", str(folder / "bdist")]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)


def _wheel(folder: pathlib.Path, **variables: str) -> pathlib.Path:
    done = _setup(folder, **variables)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return _wheel(tmp_path_factory.mktemp("wheel"), NYSTROMGAN_BUILD="cpu", NYSTROMGAN_SANITIZE="0")


@pytest.fixture(scope="module")
def library(wheel: pathlib.Path) -> pathlib.Path:
    zipfile.ZipFile(wheel).extract(LIBRARY, wheel.parent)
    return wheel.parent / LIBRARY


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return _wheel(tmp_path_factory.mktemp("pure"), NYSTROMGAN_BUILD="auto", CXX="no-such-compiler")


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _run(code: str, path: pathlib.Path) -> str:
    """What `code` prints in a fresh process that finds the unpacked wheel in `path` first."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    environment.pop("NYSTROMGAN_LIBRARY_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_serves_every_python(wheel: pathlib.Path) -> None:
    assert wheel.name.startswith("nystromgan-0.1.0-py3-none-linux_")


def test_wheel_holds_the_package_and_nothing_else(wheel: pathlib.Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tree = {"nystromgan": ROOT / "nystromgan", "nystromgan/zoo": ROOT / "zoo", "nystromgan/bench": ROOT / "bench"}
    kinds = ("*.py", "*.toml", "*.safetensors")
    sources = {
        f"{name}/{path.relative_to(top)}" for name, top in tree.items() for kind in kinds for path in top.rglob(kind)
    }
    missing = sorted(sources - names)
    assert not missing, "a package without __init__.py, a recipe or a network is left out of the wheel"
    assert LIBRARY in names
    assert {name.split("/")[0] for name in names} == {"nystromgan", "nystromgan-0.1.0.dist-info"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".pyc")) or "/tests/" in name]


def test_library_holds_no_python_and_no_torch_cpp_symbol(library: pathlib.Path) -> None:
    undefined = [line.split(maxsplit=1)[1] for line in _lines("nm", "-DC", "--undefined-only", str(library))]
    assert any(name.startswith("aoti_torch") for name in undefined), "nm lists no stable-ABI symbol: the check is blind"
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    assert not [name for name in undefined if any(space in name for space in ("at::", "c10::", "torch::", "caffe2::"))]
    needed = [line for line in _lines("readelf", "-d", str(library)) if "NEEDED" in line or "RUNPATH" in line]
    assert not [line for line in needed if "python" in line or "RUNPATH" in line]


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_share_no_function_between_instruction_sets(isa: str, library: pathlib.Path) -> None:
    """Of a shared inline function the linker keeps any one copy: an AVX-512 copy would be an illegal instruction."""
    objects = [ROOT / "build" / "native" / f"{source.stem}.{isa}.o" for source in KERNELS.glob("*.cpp")]
    symbols = [line.split()[-2:] for path in objects for line in _lines("nm", "--defined-only", str(path))]
    functions = [name for kind, name in symbols if kind in ("T", "W")]
    assert functions, f"no function found in {objects}"
    assert not [name for name in functions if f"{len(isa)}{isa}" not in name]


def test_wheel_runs_on_its_native_library(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import nystromgan; print(nystromgan.__file__, nystromgan.available_backends()['cpu'])"
    assert _run(code, tmp_path).split(maxsplit=1) == [str(tmp_path / "nystromgan/__init__.py"), "()\n"]


def test_without_a_compiler_the_package_runs_on_reference(pure_wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert pure_wheel.name == "nystromgan-0.1.0-py3-none-any.whl"
    assert LIBRARY not in zipfile.ZipFile(pure_wheel).namelist()
    zipfile.ZipFile(pure_wheel).extractall(tmp_path)
    code = (
        "import torch, nystromgan\n"
        "x = torch.ones(1, 1, 9, 4)\n"
        "print(nystromgan.nystrom_attention(x, x, x, num_landmarks=2).shape, nystromgan.available_backends()['cpu'])\n"
    )
    printed = _run(code, tmp_path)
    assert printed.startswith("torch.Size([1, 1, 9, 4])")
    assert "is not built" in printed


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NYSTROMGAN_BUILD": "fast"}, "NYSTROMGAN_BUILD must be one of auto, none, cpu, cuda, emulation; got 'fast'"),
        (
            {"NYSTROMGAN_BUILD": "cpu", "CXX": "no-such-compiler"},
            "NYSTROMGAN_BUILD is cpu, but no C++ compiler was found",
        ),
    ],
)
def test_build_refuses_in_one_clear_line(variables: dict[str, str], message: str, tmp_path: pathlib.Path) -> None:
    done = _setup(tmp_path, **variables)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
