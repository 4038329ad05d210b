"""How the native libraries are compiled: which compiler makes what of which file, and with what flags.

The libraries hold no Python symbol: they register with torch through its stable ABI, so one wheel serves every Python
and every torch >= 2.10. Bindings are compiled once with torch's headers; each file of cpu/kernels, free of torch, once
for every instruction set; each file of cuda/kernels by nvcc, or as C++ where a CPU is to emulate them.
"""

import functools
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1].resolve()
CPU, CUDA = ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda"
CPU_LIBRARY, CUDA_LIBRARY = "libnystromgan_cpu.so", "libnystromgan_cuda.so"
X86_64 = platform.machine() in ("x86_64", "AMD64")
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
AVX512BF16 = f"{AVX512} -mavx512bf16"
AMX = f"{AVX512BF16} -mamx-tile -mamx-bf16"
WIDER = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512BF16, "amx": AMX}
ISA_FLAGS = {"portable": "", **(WIDER if X86_64 else {})}

# No -ffast-math: NaN in must stay NaN out, and infinities mask keys.
FLAGS = "-std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra"
SANITIZED = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
EMULATED = "-O1 -DNYSTROMGAN_EMULATION=1"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10's
NVCC_FLAGS = "-std=c++20 -O3 -fatbin -Xptxas -v"
DEFAULT_ARCHS = "80 90a"


class Job(NamedTuple):
    """One run of a compiler."""

    command: list[str]
    source: pathlib.Path
    target: pathlib.Path


def compiler() -> list[str]:
    """The C++ compiler's command line; empty when there is none."""
    asked = os.environ.get("CXX", "").split()
    return next((line for line in ([asked] if asked else [["c++"], ["g++"], ["clang++"]]) if shutil.which(line[0])), [])


def nvcc() -> str:
    """Where nvcc is; empty when there is none."""
    return (
        shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin") or shutil.which("nvcc") or ""
    )


def torch_folder() -> pathlib.Path | None:
    """Where torch is installed, found without importing it."""
    spec = find_spec("torch")
    return pathlib.Path(spec.origin).parent if spec and spec.origin else None


@functools.cache
def newest_part(path: pathlib.Path) -> float:
    """When a file of csrc, or what it includes of csrc, was last changed."""
    names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    places = [[folder / name for folder in (path.parent, CPU, CUDA)] for name in names]
    parts = [next(place for place in candidates if place.exists()).resolve() for candidates in places]
    return max(path.stat().st_mtime, *map(newest_part, parts), 0.0)


def compile_file(job: Job) -> None:
    """Makes one file, unless it is newer than its source and what that includes, and came from the same command.

    What the compiler said lies beside it: of every kernel nvcc counts the registers.
    """
    command, target = [*job.command, str(job.source)], job.target
    note, log = (target.with_suffix(suffix) for suffix in (".cmd", ".log"))
    made = target.stat().st_mtime if target.exists() and note.exists() and note.read_text() == str(command) else 0.0
    if made > newest_part(job.source):
        return
    fresh = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, "-o", str(fresh)], stderr=subprocess.PIPE, text=True)
    if done.returncode or target.suffix == ".o":
        sys.stderr.write(done.stderr)
    if done.returncode:
        sys.exit(f"nystromgan: {job.source} does not compile: the compiler's message is above")
    log.write_text(done.stderr)
    fresh.replace(target)
    note.write_text(str(command))


def link(name: str, jobs: list[Job], flags: str, folder: pathlib.Path) -> pathlib.Path:
    """Runs the jobs, and links what they made in `folder`; returns the library's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_file, jobs))
    parts = [job.target for job in jobs if job.target.suffix == ".o"]
    images = [job.target for job in jobs if job.target.suffix == ".fatbin"]
    parts += [_embed(images, folder)] if images else []
    fresh = folder / f"{name}.{os.getpid()}"
    # Of libtorch_cpu only the soname is recorded: at run time it is torch's own, already in the process.
    command = [
        *compiler(),
        "-shared",
        *flags.split(),
        *sorted(map(str, parts)),
        f"-L{torch_folder()}/lib",
        "-ltorch_cpu",
    ]
    subprocess.run([*command, "-o", str(fresh)], check=True)
    return fresh.replace(folder / name)


def _embed(images: list[pathlib.Path], folder: pathlib.Path) -> pathlib.Path:
    """An assembler file with the compiled kernels, and the table of their names and places that csrc/cuda reads."""
    lines = ['.section .note.GNU-stack,"",@progbits', ".section .rodata"]
    for image in images:
        lines += [".balign 64", f'{image.stem}: .incbin "{image}"', f'name_of_{image.stem}: .string "{image.stem}"']
    lines += [".section .data.rel.ro", ".balign 8", ".globl nystromgan_cuda_images", ".hidden nystromgan_cuda_images"]
    lines += ["nystromgan_cuda_images:", *(f".quad name_of_{x.stem}, {x.stem}" for x in images), ".quad 0, 0", ""]
    path = folder / "images.S"
    path.write_text("\n".join(lines))
    return path


def _bindings(sources: list[pathlib.Path], flags: str, folder: pathlib.Path) -> list[Job]:
    include = f"{torch_folder()}/include"
    command = [*compiler(), *FLAGS.split(), *flags.split(), STABLE_ABI]
    command += ["-isystem", include, "-isystem", f"{include}/torch/csrc/api/include", "-c"]
    return [Job(command, source, folder / f"{source.parent.name}.{source.stem}.o") for source in sources]


def cpu_library(folder: pathlib.Path, sanitize: bool) -> pathlib.Path:
    """Builds the CPU library in `folder`."""
    optimise = SANITIZED if sanitize else "-O3"
    flags = f"{optimise} -DNYSTROMGAN_X86=1" if X86_64 else optimise
    jobs = _bindings(list(CPU.glob("*.cpp")), flags, folder)
    for source in CPU.glob("kernels/*.cpp"):
        for isa, isa_flags in ISA_FLAGS.items():
            command = f"{FLAGS} {flags} -DNYSTROMGAN_ISA={isa} -I{CPU} {isa_flags} -c"
            jobs.append(Job([*compiler(), *command.split()], source, folder / f"{source.stem}.{isa}.o"))
    return link(CPU_LIBRARY, jobs, optimise, folder)


def cuda_library(folder: pathlib.Path, archs: list[str]) -> pathlib.Path:
    """Builds the CUDA library in `folder`: machine code for every arch, and of the first PTX for those to come."""
    headers = pathlib.Path(nvcc()).resolve().parents[1] / "include"
    jobs = _bindings([*CUDA.glob("*.cpp"), CUDA / "driver" / "launch.cpp"], f"-O3 -isystem {headers}", folder)
    targets = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
    targets += f" -gencode arch=compute_{archs[0]},code=compute_{archs[0]}"
    command = [nvcc(), *f"{NVCC_FLAGS} -I{CUDA} {targets}".split()]
    sources = [CUDA / "driver" / "probe.cu", *sorted(CUDA.glob("kernels/*.cu"))]
    return link(CUDA_LIBRARY, [*jobs, *(Job(command, x, folder / f"{x.stem}.fatbin") for x in sources)], "", folder)


def emulated_library(folder: pathlib.Path) -> pathlib.Path:
    """Builds the CUDA kernels and bindings for the CPU, where they take the place of the CPU library, in tests."""
    jobs = _bindings([*CUDA.glob("*.cpp"), *CUDA.glob("emulation/*.cpp")], EMULATED, folder)
    command = [*compiler(), *f"{FLAGS} {EMULATED} -I{CUDA} -x c++ -c".split()]
    jobs += [Job(command, source, folder / f"kernel.{source.stem}.o") for source in CUDA.glob("kernels/*.cu")]
    return link(CPU_LIBRARY, jobs, "-O1", folder)
