"""What a run measures on, and how long."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class Effort(NamedTuple):
    """How long to repeat one case in one mode; a form that should take longer than the limit is left out."""

    budget_s: float
    least_rounds: int
    most_rounds: int
    limit_s: float = 3.0


QUICK, THOROUGH = Effort(0.6, 3, 7, 0.7), Effort(1.5, 5, 21)


class Allowance:
    """Seconds that torch.compile may take in a whole run; what comes after they are spent is left out."""

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.left_s -= time.perf_counter() - start


class Plan(NamedTuple):
    """What a run measures on: device and backend, how long, the time for torch.compile if any, the machine's rates."""

    device: str
    rates: dict[str, float]
    effort: Effort = QUICK
    compiling: Allowance | None = None
    backend: str = "auto"
