"""The tests stage of `gpu_check`: the op tests that a GPU takes part in, under one budget."""

import collections
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from nystromgan.bench import gpu_parts
from nystromgan.bench.plan import Stage

Row = dict[str, Any]
ROOT = pathlib.Path(__file__).resolve().parents[1]
NO_GPU = ("test_triton_aot_*.py", "test_cuda_emulation.py")  # these compile or emulate; `make test` has them anywhere
# A verbose line of pytest, with pytest-xdist ("[gw0] [ 1%] PASSED tests/...::test") or without it.
LINES = (
    re.compile(r"^\[gw\d+\] \[ *\d+%\] (?P<word>[A-Z]+) (?P<test>\S*?(?P<stem>\w+)\.py::.*?)\s*$", re.MULTILINE),
    re.compile(r"^(?P<test>\S*?(?P<stem>\w+)\.py::.*?) (?P<word>[A-Z]+)(?: +\(.*\))? +\[ *\d+%\]$", re.MULTILINE),
)
BAD = ("FAILED", "ERROR")


def rows(stage: Stage) -> Iterator[Row]:
    """A row a file, `wrong` where a test fails; one more where the budget ends before the tests."""
    folder = ROOT / "tests" / "ops"
    left_out = {path for pattern in NO_GPU for path in folder.glob(pattern)}
    paths = [path for path in sorted(folder.glob("test_*.py")) if path not in left_out]
    if not paths:
        yield {"tests": "left out: this installation has no tests, a checkout has them"}
        return
    wanted = [path for path in paths if stage.ops is None or any(_is_about(path.stem, op) for op in stage.ops)]
    code, printed, complaint = gpu_parts.run(_command(wanted), stage.left_s(), _environment(), ROOT)
    files = list(_told(printed))
    yield from files
    if code is None:
        yield {"tests": "all files", "unfinished": gpu_parts.UNFINISHED}
    elif code and not any(row["wrong"] for row in files):  # a file that cannot be imported, or pytest itself
        lines = (printed.strip() or complaint.strip() or "no output").splitlines()
        told = [line for line in lines if line.startswith("ERROR")]
        yield {"tests": "all files", "wrong": True, "summary": lines[-1], "failed": told[:20]}


def _is_about(stem: str, op: str) -> bool:
    return op in stem or op.split("_")[0] in stem


def _command(paths: Sequence[pathlib.Path]) -> list[str]:
    """Warnings do not fail here: they are torch's, whose version is the machine's own."""
    several = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return [
        sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "default", "--color=no", "--tb=short",
        "--continue-on-collection-errors",
        *several, *map(str, paths),
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    """cuBLAS has this workspace's size alone for deterministic mode, which the tests use to fill new memory."""
    return {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "COLUMNS": "400"}


def _told(printed: str) -> Iterator[Row]:
    """A row a file of what pytest has printed until its end."""
    counts: dict[str, collections.Counter] = {}
    failed: dict[str, list[str]] = {}
    for line in LINES:
        for found in line.finditer(printed):
            counts.setdefault(found["stem"], collections.Counter())[found["word"]] += 1
            failed.setdefault(found["stem"], []).extend([found["test"]] * (found["word"] in BAD))
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (\S.*?) - (.*)$", printed, re.MULTILINE))
    for stem, count in sorted(counts.items()):
        row: Row = {"tests": stem, "wrong": bool(failed[stem])}
        row["summary"] = ", ".join(f"{number} {word.lower()}" for word, number in sorted(count.items()))
        told = [f"{test} - {reasons[test]}" if test in reasons else test for test in failed[stem][:20]]
        yield row | ({"failed": told} if told else {})
