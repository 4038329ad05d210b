"""The only reader of environment variables in Python; each has a row in `docs/environment.md`."""

import os


def triton_interpret() -> bool:
    """TRITON_INTERPRET=1: the triton backend runs on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cpu_isa() -> str:
    """NYSTROMGAN_CPU_ISA: the highest instruction set that the native CPU library may use; empty means any."""
    return os.environ.get("NYSTROMGAN_CPU_ISA", "")


def commit() -> str:
    """NYSTROMGAN_COMMIT: the commit that benchmarks name in a copy of the tree without git; empty means unknown."""
    return os.environ.get("NYSTROMGAN_COMMIT", "")


def native_library_dir() -> str:
    """NYSTROMGAN_LIBRARY_DIR: where to look for the native libraries; empty means inside the package."""
    return os.environ.get("NYSTROMGAN_LIBRARY_DIR", "")
