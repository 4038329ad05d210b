"""Parts of a stage of `gpu_check`, each in a process of its own and many at once.

So their kernels compile side by side, caches are cold where a check asks for that, and a kernel that takes its process
down takes no other part along. What is timed runs alone, after them.

    python -m nystromgan.bench.gpu_parts gpu_checks '{"op": "iterative_pinv", ...}'
"""

import concurrent.futures
import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from nystromgan.bench.plan import Stage

Row = dict[str, Any]
Part = dict[str, Any]  # what `part_rows` of the module takes, JSON
MARK = "row "  # of a line that holds one
UNFINISHED = "beyond the budget"


def rows(stage: Stage, module: str, parts: Sequence[Part], cold: bool = False) -> Iterator[Row]:
    """The rows of every part, as they end; what is not done by the deadline keeps those that it has given.

    `cold`: kernels are compiled anew, as on a machine that has never run them.
    """
    workers = min(len(parts), (os.cpu_count() or 1) + 4)  # most wait for a compiler or the GPU
    with concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool:
        futures = [pool.submit(_rows_of, stage, module, part, cold) for part in parts]
        for future in concurrent.futures.as_completed(futures):
            yield from future.result()


def ahead(stage: Stage, module: str, parts: Sequence[Part]) -> Iterator[Row]:
    """The rows of parts that only compile, for what is timed afterwards: without them that takes longer, no more."""
    for row in rows(stage, module, parts):
        yield {"not_ahead" if name in ("unfinished", "wrong") else name: value for name, value in row.items()}


def _rows_of(stage: Stage, module: str, part: Part, cold: bool) -> list[Row]:
    if stage.left_s() <= 0:
        return [{**part, "unfinished": UNFINISHED}]
    call = [
        sys.executable,
        "-m",
        "nystromgan.bench.gpu_parts",
        module,
        json.dumps({**part, "device": stage.device, "tiny": stage.tiny}),
    ]
    with _environment(cold) as environment:
        code, printed, complaint = run(call, stage.left_s(), environment)
    found = [json.loads(line.removeprefix(MARK)) for line in printed.splitlines() if line.startswith(MARK)]
    if code is None:
        return [*found, {**part, "unfinished": UNFINISHED}]
    if code:
        last = (complaint.strip().splitlines() or ["no message"])[-1]
        return [*found, {**part, "wrong": True, "error": f"exit status {code}: {last[:500]}"}]
    return found


def run(
    command: Sequence[str], limit_s: float = math.inf, environment: dict[str, str] | None = None, cwd: Any = None
) -> tuple[int | None, str, str]:
    """(exit status, stdout, stderr) of a command; None where it, and what it had started, were stopped at the limit."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", cwd=cwd,
        env=environment, start_new_session=not math.isinf(limit_s),
    )  # fmt: skip
    try:
        output, complaint = process.communicate(timeout=None if math.isinf(limit_s) else limit_s)
        return process.returncode, output, complaint
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return (None, *process.communicate())


@contextlib.contextmanager
def _environment(cold: bool) -> Iterator[dict[str, str]]:
    """One thread a process, as there are many; cold ones have caches of their own."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if not cold:
        yield base
        return
    with tempfile.TemporaryDirectory() as folder:
        yield {**base, "TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}


def main(module: str, part: str) -> None:
    for row in importlib.import_module(f"nystromgan.bench.{module}").part_rows(**json.loads(part)):
        print(MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
