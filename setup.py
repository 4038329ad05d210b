"""Builds the native libraries; everything else about the package is in pyproject.toml.

The libraries hold no Python symbol: they register with torch through its stable ABI, so one wheel serves every Python
and every torch >= 2.10. Each file of csrc/cpu is compiled once with torch's headers; each file of csrc/cpu/kernels is
free of torch and compiled once for every instruction set.
"""

import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = pathlib.Path(__file__).parent.resolve()
SOURCES = ROOT / "csrc" / "cpu"
LIBRARY = "libnystromgan_cpu.so"
PACKAGES = {"nystromgan": "nystromgan", "nystromgan.zoo": "zoo", "nystromgan.bench": "bench"}
BUILD = os.environ.get("NYSTROMGAN_BUILD", "auto")
SANITIZE = os.environ.get("NYSTROMGAN_SANITIZE", "0") == "1"
BUILD_FOLDER = ROOT / "build" / ("sanitize" if SANITIZE else "native")
X86_64 = platform.machine() in ("x86_64", "AMD64")
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
AMX = f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"
ISA_FLAGS = {"portable": "", **({"avx2": AVX2, "avx512": AVX512, "amx": AMX} if X86_64 else {})}

# No -ffast-math: NaN in must stay NaN out, and infinities mask keys.
FLAGS = "-std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra"
SANITIZED = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
OPTIMISE = SANITIZED if SANITIZE else "-O3"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10's


def compiler() -> list[str]:
    """The C++ compiler's command line; empty when there is none."""
    asked = os.environ.get("CXX", "").split()
    return next((line for line in ([asked] if asked else [["c++"], ["g++"], ["clang++"]]) if shutil.which(line[0])), [])


def torch_folder() -> pathlib.Path | None:
    """Where torch is installed, found without importing it."""
    spec = find_spec("torch")
    return pathlib.Path(spec.origin).parent if spec and spec.origin else None


def refusal() -> str:
    """Why the native library is not built here; empty when it is."""
    if BUILD == "none":
        return "NYSTROMGAN_BUILD is none"
    if sys.platform != "linux":
        return f"{sys.platform} is not supported, only linux"
    if not compiler():
        return "no C++ compiler was found (install g++ >= 11, or set CXX)"
    return "" if torch_folder() else "torch is not installed where the build runs (pip needs --no-build-isolation)"


def builds_library() -> bool:
    """Whether this build carries the native library, as NYSTROMGAN_BUILD and the machine decide."""
    if BUILD not in ("auto", "none", "cpu"):
        sys.exit(f"NYSTROMGAN_BUILD must be one of auto, none, cpu; got {BUILD!r}")
    if BUILD == "cpu" and refusal():
        sys.exit(f"NYSTROMGAN_BUILD is cpu, but {refusal()}")
    return not refusal()


def compile_object(source: pathlib.Path, target: pathlib.Path, flags: list[str]) -> None:
    """Compiles one file, unless its object is newer than the file and every header and came from the same command."""
    command = [*compiler(), *FLAGS.split(), *OPTIMISE.split(), *flags, "-c", str(source)]
    note = target.with_suffix(".cmd")
    newest = max(path.stat().st_mtime for path in [source, *(ROOT / "csrc").rglob("*.h")])
    if target.exists() and target.stat().st_mtime > newest and note.exists() and note.read_text() == str(command):
        return
    fresh = target.with_suffix(f".{os.getpid()}")
    if subprocess.run([*command, "-o", str(fresh)]).returncode:
        sys.exit(f"nystromgan: {source} does not compile: the compiler's message is above")
    fresh.replace(target)
    note.write_text(str(command))


def compile_library() -> pathlib.Path:
    """Compiles and links the CPU library in the build folder; returns its path."""
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    torch = torch_folder()
    x86 = ["-DNYSTROMGAN_X86=1"] if X86_64 else []
    binding = [*x86, STABLE_ABI, "-isystem", f"{torch}/include", "-isystem", f"{torch}/include/torch/csrc/api/include"]
    jobs = [(source, BUILD_FOLDER / f"{source.stem}.o", binding) for source in SOURCES.glob("*.cpp")]
    for source in SOURCES.glob("kernels/*.cpp"):
        for isa, flags in ISA_FLAGS.items():
            kernel = [*x86, f"-DNYSTROMGAN_ISA={isa}", f"-I{SOURCES}", *flags.split()]
            jobs.append((source, BUILD_FOLDER / f"{source.stem}.{isa}.o", kernel))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: compile_object(*job), jobs))
    fresh = BUILD_FOLDER / f"{LIBRARY}.{os.getpid()}"
    # Of libtorch_cpu only the soname is recorded: at run time it is torch's own, already in the process.
    link = [*compiler(), "-shared", *OPTIMISE.split(), *sorted(str(target) for _, target, _ in jobs)]
    subprocess.run([*link, f"-L{torch}/lib", "-ltorch_cpu", "-o", str(fresh)], check=True)
    return fresh.replace(BUILD_FOLDER / LIBRARY)


class BuildNative(Command):
    """A part of `build`; alone, `python setup.py build_native --inplace` renews an editable install's library."""

    user_options: ClassVar = [("inplace", "i", "put the library into the source tree")]
    editable_mode = False

    def initialize_options(self) -> None:
        self.inplace, self.build_lib = False, ""

    def finalize_options(self) -> None:
        self.build_lib = self.build_lib or self.get_finalized_command("build").build_lib

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")]  # what an sdist needs

    def run(self) -> None:
        if not builds_library():
            print(f"nystromgan: no native library: {refusal()}", file=sys.stderr)
            return
        library = compile_library()
        if not SANITIZE:
            base = ROOT if self.inplace or self.editable_mode else pathlib.Path(self.build_lib)
            target = base / "nystromgan" / "lib" / LIBRARY
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = shutil.copy(library, target.with_suffix(f".{os.getpid()}"))
            fresh.replace(target)  # never writes into a library that a process has mapped


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return "py3", "none", machine if builds_library() else "any"


build.sub_commands.append(("build_native", None))
setup(
    packages=[f"{name}.{sub}".rstrip(".") for name, path in PACKAGES.items() for sub in ("", *find_packages(path))],
    distclass=type("NativeDistribution", (Distribution,), {"has_ext_modules": lambda self: builds_library()}),
    cmdclass={"build_native": BuildNative, "bdist_wheel": Wheel},
)
