"""What a case of the benchmark is, and what it is measured against."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nystromgan import testing

Shape = dict[str, Any]
Inputs = dict[str, Tensor]
Form = Callable[..., Tensor | Sequence[Tensor]]  # of the inputs, by their names
FORWARD, BACKWARD, BOTH = MODES = ("forward", "backward", "forward+backward")
PASSES = (FORWARD, BOTH)  # what a case is measured in unless it says more
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = "nystromgan"
BY = "nystromgan by "  # and a backend's name, where a GPU has more than one
FULL = "full attention"  # another function than landmark attention: what users pick instead
PLAIN = "nystromgan, segment means"
COMPILED, TUNED = ", compiled", ", max-autotune"  # under torch.compile, by default and at its best
DEVICES = ("cpu", "cuda")


class Peer(NamedTuple):
    """One other way to compute a case; `make` is called once a measurement, so that a form may keep state.

    Attributes:
        make: gives the form.
        definition: in float64, where the peer computes another function than ours.
        coupled: whether heads and samples change each other's results, so that no part can be checked alone.
        compiled: whether it gains a row under torch.compile.
        tuned: and one under torch.compile with max-autotune.
        needs_compile: whether it is nothing without torch.compile, and so left out where that is.
        modes: those that it can run.
        flops, stored_bytes: of one forward, where they grow with N x N: a call that would take or store too much is
            left out.
    """

    make: Callable[[], Form]
    definition: Form | None = None
    coupled: bool = False
    compiled: bool = False
    tuned: bool = False
    needs_compile: bool = False
    modes: Sequence[str] = MODES
    flops: float = 0.0
    stored_bytes: float = 0.0


class Case(NamedTuple):
    """One op or module at one shape and dtype: ours, the peers, and what it cannot do without.

    Attributes:
        group: cases that one plot or one target speaks of.
        make: (device, shape, seed) to the tensors; each is differentiated.
        ours: (backend) to the form; in float64 on "reference" it is the definition that all results are held to.
        flops, moved_bytes: by mode: the least work, which with the measured rates gives the floor.
        small: the shape at which code is loaded before memory is measured; tests run it.
        tolerance: of relative errors against float64.
        heads: the first head of the first sample stands for all of them when errors are taken.
        quick: whether --quick has it.
        compiled_in_full: whether --full puts the peers under torch.compile, which takes minutes.
        training: the forward records what a backward needs.
        held_bytes: by mode: outputs and gradients, where they outweigh everything else that a call holds.
        optimizer: of the tensors that `make` gives: forward and backward then end with its step, as training does.
    """

    op: str
    group: str
    shape: Shape
    dtype: str
    make: Callable[[str, Shape, int], Inputs]
    ours: Callable[[str], Form]
    peers: dict[str, Peer]
    flops: dict[str, float]
    moved_bytes: dict[str, float]
    small: Shape
    tolerance: testing.Tolerance
    heads: bool = False
    quick: bool = False
    compiled_in_full: bool = False
    training: bool = False
    held_bytes: dict[str, float] = {}  # noqa: RUF012 (never written)
    modes: Sequence[str] = PASSES
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None

    @property
    def name(self) -> str:
        sizes = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return f"{self.group} {sizes} {self.dtype}"


def by_mode(forward: float, both: float) -> dict[str, float]:
    return {FORWARD: forward, BACKWARD: both - forward, BOTH: both}
