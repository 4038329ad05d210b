"""The registry: every case that is measured, one file an op, one for modules, one for whole networks and one
for steps of their training.

To add a case, add it to its file's `cases`; to add a baseline, write it in `baselines/` and name it in a case's peers.
"""

from nystromgan.bench.case import Case
from nystromgan.bench.cases import (
    iterative_pinv,
    modules,
    nystrom_attention,
    power_iteration,
    spatiotemporal_attention,
    steps,
    zoo,
)

SOURCES = (nystrom_attention, spatiotemporal_attention, iterative_pinv, power_iteration, modules, zoo, steps)


def cases(device: str = "cpu", full: bool = True) -> list[Case]:
    """All cases of a device, or those of --quick."""
    return [case for source in SOURCES for case in source.cases(device) if full or case.quick]
