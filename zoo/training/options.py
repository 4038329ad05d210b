"""What a recipe's [train] may say."""

import dataclasses
from typing import Literal

from nystromgan.zoo.config import seed

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How long, on how much, and what is kept.

    Attributes:
        steps: of each stage that does not say its own.
        batch: samples of one turn, over all processes.
        precision: bf16 and fp16 are autocast, fp16 with a loss scale; weights stay float32.
        accumulation: pieces that a batch is computed in; raised to the number of processes.
        ema: decay per step of the average that is shipped; 0 ships the weights themselves.
        save_every, sample_every, log_every: in steps. Saving writes the state, the model for use, and a line of the
            log, which is of the steps since the line before.
        keep: how many states stay.
        samples: clips on a sample sheet.
        workers: processes that load data.
        deterministic: only deterministic algorithms, where there are several (GPU); an operation that has none ends the
            run, with its name.
        threads: of torch on the CPU; 0: torch's choice.
    """

    steps: int
    batch: int
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulation: int = 1
    ema: float = 0.0
    save_every: int = 1000
    sample_every: int = 1000
    log_every: int = 10
    keep: int = 2
    samples: int = 4
    workers: int = 0
    deterministic: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "save_every", "sample_every", "log_every", "keep", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        seed(self.seed)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {self.ema}")

    def pieces(self, processes: int) -> int:
        """How many equal pieces each batch is computed in; every process gets as many."""
        pieces = max(self.accumulation, processes)
        if pieces % processes:
            raise ValueError(f"accumulation ({self.accumulation}) must be a multiple of the {processes} processes")
        if self.batch % pieces:
            raise ValueError(f"batch ({self.batch}) must be a multiple of its {pieces} pieces")
        return pieces
