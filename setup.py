"""Builds the native libraries; everything else about the package is in pyproject.toml.

The libraries hold no Python symbol: they register with torch through its stable ABI, so one wheel serves every Python
and every torch >= 2.10. Each file of csrc/cpu is compiled once with torch's headers; each file of csrc/cpu/kernels is
free of torch and compiled once for every instruction set.
"""

import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = pathlib.Path(__file__).parent.resolve()
SOURCES = ROOT / "csrc" / "cpu"
LIBRARY = "libnystromgan_cpu.so"
BUILD = os.environ.get("NYSTROMGAN_BUILD", "auto")  # auto, none, cpu
SANITIZE = os.environ.get("NYSTROMGAN_SANITIZE", "0") == "1"

X86_64 = platform.machine() in ("x86_64", "AMD64")
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
AMX = f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"
ISA_FLAGS = {"portable": "", **({"avx2": AVX2, "avx512": AVX512, "amx": AMX} if X86_64 else {})}

# No -ffast-math: NaN in must stay NaN out, and infinities mask keys.
FLAGS = "-std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra"
OPTIMISE = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" if SANITIZE else "-O3"
TORCH_DEFINE = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10


def compiler() -> list[str]:
    """The C++ compiler's command line; empty when there is none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    return asked or next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])


def torch_folder() -> pathlib.Path | None:
    """Where torch is installed, found without importing it."""
    spec = find_spec("torch")
    return pathlib.Path(spec.origin).parent if spec and spec.origin else None


def refusals() -> list[str]:
    """Why the native library cannot be built here; none when it can."""
    checks = {
        f"{sys.platform} is not supported, only linux": sys.platform == "linux",
        "no C++ compiler was found (set CXX, or install g++ >= 11)": bool(compiler() and shutil.which(compiler()[0])),
        "torch is not installed where the build runs (install it first, then use pip --no-build-isolation)": torch_folder(),
    }
    return [reason for reason, holds in checks.items() if not holds]


def wants_library() -> bool:
    """Whether this build carries the native library, as NYSTROMGAN_BUILD and the machine decide."""
    if BUILD not in ("auto", "none", "cpu"):
        sys.exit(f"NYSTROMGAN_BUILD must be one of auto, none, cpu; got {BUILD!r}")
    if BUILD == "cpu" and refusals():
        sys.exit("NYSTROMGAN_BUILD=cpu, but " + "; ".join(refusals()))
    return BUILD != "none" and not refusals()


def compile_object(source: pathlib.Path, target: pathlib.Path, flags: str) -> None:
    """Compiles one file, unless its object is newer than every source and came from the same command."""
    command = [*compiler(), *shlex.split(f"{FLAGS} {OPTIMISE} {flags}"), "-c", str(source)]
    note = target.with_suffix(".cmd")
    newest = max(path.stat().st_mtime for path in [source, *(ROOT / "csrc").rglob("*.h")])
    if target.exists() and target.stat().st_mtime > newest and note.exists() and note.read_text() == str(command):
        return
    fresh = target.with_suffix(f".{os.getpid()}.o")
    subprocess.run([*command, "-o", str(fresh)], check=True)
    fresh.replace(target)
    note.write_text(str(command))


def compile_library(folder: pathlib.Path) -> pathlib.Path:
    """Compiles and links the CPU library in `folder`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    torch = torch_folder()
    include = f"-isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include {TORCH_DEFINE}"
    x86 = "-DNYSTROMGAN_X86=1" if X86_64 else ""
    jobs = [(source, folder / f"{source.stem}.o", f"{x86} {include}") for source in sorted(SOURCES.glob("*.cpp"))]
    for source in sorted((SOURCES / "kernels").glob("*.cpp")):
        for isa, flags in ISA_FLAGS.items():
            define = f"-DNYSTROMGAN_ISA={isa} -I{SOURCES}"
            jobs.append((source, folder / f"{source.stem}.{isa}.o", f"{x86} {define} {flags}"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: compile_object(*job), jobs))
    fresh = folder / f"{LIBRARY}.{os.getpid()}"
    link = [*compiler(), "-shared", *shlex.split(OPTIMISE), *(str(target) for _, target, _ in jobs)]
    # Only the soname is recorded: at run time the library is torch's own, already in the process.
    subprocess.run([*link, f"-L{torch}/lib", "-ltorch_cpu", "-o", str(fresh)], check=True)
    fresh.replace(folder / LIBRARY)
    return folder / LIBRARY


class BuildNative(Command):
    """Part of `build`; alone, `python setup.py build_native --inplace` rebuilds the library of an editable install."""

    description = "build the native libraries"
    user_options = [("inplace", "i", "put the library into the source tree")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.inplace = False
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        if not wants_library():
            print("nystromgan: no native library: " + ("; ".join(refusals()) or "NYSTROMGAN_BUILD=none"), file=sys.stderr)
            return
        library = compile_library(ROOT / "build" / ("sanitize" if SANITIZE else "native"))
        if SANITIZE:
            return
        base = ROOT if self.inplace or self.editable_mode else pathlib.Path(self.build_lib)
        target = base / "nystromgan" / "lib" / LIBRARY
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)  # never writes into a library that a process has mapped


class NativeDistribution(Distribution):
    """A distribution whose wheel is bound to a platform exactly when it carries the native library."""

    def has_ext_modules(self) -> bool:
        return wants_library()


class Wheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>, or py3-none-any without the library."""

    def get_tag(self) -> tuple[str, str, str]:
        name = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return "py3", "none", name if wants_library() else "any"


def packages() -> list[str]:
    """Every package, under the name that it has once installed."""
    folders = {"nystromgan": "nystromgan", "nystromgan.zoo": "zoo", "nystromgan.bench": "bench"}
    return [f"{name}.{part}".rstrip(".") for name, folder in folders.items() for part in ("", *find_packages(folder))]


build.sub_commands.append(("build_native", None))
setup(
    packages=packages(),
    distclass=NativeDistribution,
    cmdclass={"build_native": BuildNative, "bdist_wheel": Wheel},
)
