"""Files whose tests run in a process of their own."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def interpreted() -> Callable[[str], None]:
    """Holds a file's tests to pass under Triton's interpreter."""

    def check(file: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return check
