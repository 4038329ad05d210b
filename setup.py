"""Builds the native libraries, as csrc/build.py knows how; everything else about the package is in pyproject.toml."""

import importlib.util
import os
import pathlib
import shutil
import sys
import sysconfig
from typing import ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = pathlib.Path(__file__).parent.resolve()
PACKAGES = {"nystromgan": "nystromgan", "nystromgan.zoo": "zoo", "nystromgan.bench": "bench"}
BUILDS = ("auto", "none", "cpu", "cuda", "emulation")
BUILD = os.environ.get("NYSTROMGAN_BUILD", "auto")
ARCHS = os.environ.get("NYSTROMGAN_CUDA_ARCHS", "")
SANITIZE = os.environ.get("NYSTROMGAN_SANITIZE", "0") == "1"

# csrc is no package: its build.py is loaded by its path.
spec = importlib.util.spec_from_file_location("native", ROOT / "csrc" / "build.py")
assert spec is not None
assert spec.loader is not None
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


def refusal() -> str:
    """Why no native library is built here; empty when one is."""
    if BUILD == "none":
        return "NYSTROMGAN_BUILD is none"
    if sys.platform != "linux":
        return f"{sys.platform} is not supported, only linux"
    if not native.compiler():
        return "no C++ compiler was found (install g++ >= 11, or set CXX)"
    if BUILD == "cuda" and not native.nvcc():
        return "nvcc was not found (install CUDA >= 13.0, or set CUDA_HOME)"
    return (
        "" if native.torch_folder() else "torch is not installed where the build runs (pip needs --no-build-isolation)"
    )


def builds_library() -> bool:
    """Whether this build carries native libraries, as NYSTROMGAN_BUILD and the machine decide."""
    if BUILD not in BUILDS:
        sys.exit(f"NYSTROMGAN_BUILD must be one of {', '.join(BUILDS)}; got {BUILD!r}")
    if BUILD not in ("auto", "none") and refusal():
        sys.exit(f"NYSTROMGAN_BUILD is {BUILD}, but {refusal()}")
    return not refusal()


def libraries() -> list[pathlib.Path]:
    """Builds what NYSTROMGAN_BUILD asks for; `auto` adds CUDA where architectures are named and nvcc is found."""
    if BUILD == "emulation":
        native.emulated_library(ROOT / "build" / "emulation")
        return []
    if SANITIZE:
        native.cpu_library(ROOT / "build" / "sanitize", sanitize=True)
        return []
    folder = ROOT / "build" / "native"
    built = [native.cpu_library(folder, sanitize=False)]
    if BUILD == "cuda" or (BUILD == "auto" and ARCHS and native.nvcc()):
        built.append(native.cuda_library(folder, (ARCHS or native.DEFAULT_ARCHS).split()))
    return built


class BuildNative(Command):
    """A part of `build`; alone, `python setup.py build_native --inplace` renews an editable install's libraries."""

    user_options: ClassVar = [("inplace", "i", "put the libraries into the source tree")]
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
        base = ROOT if self.inplace or self.editable_mode else pathlib.Path(self.build_lib)
        folder = base / "nystromgan" / "lib"
        for library in libraries():
            folder.mkdir(parents=True, exist_ok=True)
            fresh = shutil.copy(library, folder / f"{library.stem}.{os.getpid()}")
            pathlib.Path(fresh).replace(folder / library.name)  # never writes into a library that a process has mapped


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
