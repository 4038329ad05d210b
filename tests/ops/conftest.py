"""Files whose tests run in a process of their own: the interpreter's beside the emulation's, a core each."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest


def interpret(file: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)


@pytest.fixture(scope="session")
def interpreted(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Holds a file's tests to pass under Triton's interpreter. All such files begin, one by one, when one asks."""
    files = {str(item.path) for item in request.session.items if item.name == "test_under_the_interpreter"}
    with ThreadPoolExecutor(1) as pool:
        outcomes = {file: pool.submit(interpret, file) for file in sorted(files)}

        def check(file: str) -> None:
            done = outcomes[file].result()
            assert done.returncode == 0, done.stdout + done.stderr

        yield check
        pool.shutdown(cancel_futures=True)
