"""The process that measures one tree for `compare`: requests on stdin, answers on stdout, JSON, one a line."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import nystromgan
from nystromgan.bench import clock, forms, gate
from nystromgan.bench.case import OURS
from nystromgan.bench.cases import cases


def prepare(name: str, mode: str, device: str) -> tuple[list[clock.Call], int]:
    """Calls of ours on every set of inputs, and how many make a sample; ArithmeticError where the result is wrong."""
    case = next(case for case in cases(device) if case.name == name)
    timer = clock.CLOCKS[device]
    first = case.make(device, case.shape, 0)
    count = timer.number_of_sets(sum(x.numel() * x.element_size() for x in first.values()))
    sets = [first, *(case.make(device, case.shape, seed) for seed in range(1, count))]
    function = case.ours("auto")
    found = gate.errors(case, OURS, function, first, gate.Exact(case, first, mode))
    if gate.wrong(case, found):
        raise ArithmeticError(f"wrong, errors {found}")
    calls = [forms.call_of(case, function, inputs, mode) for inputs in sets]
    clock.warm(calls)
    return calls, clock.repeats(timer, calls)


def answers(requests: Iterator[str], device: str) -> Iterator[dict[str, Any]]:
    calls: list[clock.Call] = []
    repeats = 1
    for line in requests:
        request = json.loads(line)
        if request["do"] == "hello":
            yield {"library": nystromgan.__file__}
        elif request["do"] == "prepare":
            try:
                calls, repeats = prepare(request["case"], request["mode"], device)
                yield {"repeats": repeats}
            except Exception as error:  # an older library may lack what a case uses
                yield {"refused": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        else:
            yield {"seconds": clock.CLOCKS[device].sample_s(calls, repeats), "repeats": repeats}


def main() -> None:
    for answer in answers(sys.stdin, sys.argv[1]):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
