"""The process that measures peak memory: reads cases from stdin, prints the extra bytes of each, one a line."""

import json
import sys

from nystromgan.testing import extra_peak_bytes
from nystromgan.zoo.demo import measure


def main() -> None:
    request = json.load(sys.stdin)
    cases = [measure.Case(form, mode, tuple(grid)) for form, mode, grid in request["cases"]]
    for form in measure.FORMS:  # what a first call loads is no case's memory
        for mode in measure.MODES:
            measure.prepared(measure.Case(form, mode, measure.GRIDS[1]), request["seed"])()
    for case in cases:
        print(extra_peak_bytes(measure.prepared(case, request["seed"])), flush=True)


if __name__ == "__main__":
    main()
