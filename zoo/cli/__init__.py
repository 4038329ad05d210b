"""The zoo's commands: one module each, with `add_arguments(parser)` and `run(args)`."""

import sys
from collections.abc import Callable


def run_module(name: str, main: Callable[[], object]) -> None:
    """What `python -m name` runs: an error that the user can mend is one line, and the exit code is 1."""
    try:
        main()
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{name}: {' '.join(str(error).split())}")
