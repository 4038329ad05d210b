"""What a run measures on, and how long."""

import contextlib
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Effort(NamedTuple):
    """How long to repeat one case in one mode, and in how many visits, each of which has a round at least.

    The budget is of the forms near the fastest; the others have `far_rounds`. A form whose call should take longer than
    the limit is left out.
    """

    budget_s: float
    least_rounds: int
    most_rounds: int
    limit_s: float = 3.0
    visits: int = 1
    far_rounds: int = 2

    def of_visit(self, index: int) -> "Effort":
        """A visit's share; what is left over goes to the first."""
        least, most, far = (
            (rounds + self.visits - 1 - index) // self.visits
            for rounds in (self.least_rounds, self.most_rounds, self.far_rounds)
        )
        return Effort(self.budget_s / self.visits, least, most, self.limit_s, far_rounds=far)


QUICK, THOROUGH = Effort(0.6, 3, 7, 0.7, visits=2), Effort(2.0, 5, 21, visits=2)


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
    """What a run measures on: device and backend, how long, the time for torch.compile if any, the machine's rates.

    No form is started after the deadline, on time.perf_counter's clock, and none that is in `failed`: (case, form),
    which must not take this process down, or in `too_long`, where those are added that took longer than the limit.
    """

    device: str
    rates: dict[str, float]
    effort: Effort = QUICK
    compiling: Allowance | None = None
    backend: str = "auto"
    deadline: float = math.inf
    failed: frozenset[tuple[str, str]] = frozenset()
    too_long: set[tuple[str, str]] | None = None  # None: not remembered from one mode of a case to the next


class Stage(NamedTuple):
    """What a stage of `gpu_check` is asked for; it starts nothing after its deadline, on time.perf_counter's clock."""

    device: str
    tiny: bool = False
    ops: Sequence[str] | None = None
    deadline: float = math.inf
    folder: pathlib.Path = pathlib.Path()

    def wants(self, op: str) -> bool:
        return self.ops is None or op in self.ops

    def left_s(self) -> float:
        return self.deadline - time.perf_counter()
