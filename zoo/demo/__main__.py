"""The command: runs the experiment, shows progress, writes the report and says where it is."""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

OUTPUT = pathlib.Path("out/demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code, 1 after an error that the user can mend, told in one line."""
    args = _parser().parse_args(argv)
    try:
        report = _run(args.output, args.seed, args.quick)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        advice = " (pip install 'nystromgan[demo]')" if isinstance(error, ImportError) else ""
        print(f"\ndemo: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        return 1
    print(f"Open {report} in a browser.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nystromgan.zoo.demo",
        description="The self-attention block on a real video, exactly and through landmarks: what it attends to, "
        "error, time and memory. Writes report.html, results.json and demo.png; takes one to three minutes.",
    )
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help=f"folder to write to ({OUTPUT})")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (0)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes; under half a minute")
    return parser


def _run(output: pathlib.Path, seed: int, quick: bool) -> pathlib.Path:
    from nystromgan.zoo.demo import experiment, plots, report  # here, so that a missing package is one clear line

    output.mkdir(parents=True, exist_ok=True)
    outcome = experiment.run(seed, quick, _progress(experiment.steps(quick)))
    print(file=sys.stderr)
    (output / "results.json").write_text(json.dumps(outcome.results, indent=1))
    (output / "demo.png").write_bytes(plots.picture(outcome))
    path = output / "report.html"
    path.write_text(report.page(outcome), encoding="utf-8")
    return path


def _progress(steps: int) -> Callable[[str], None]:
    """Prints a bar of `steps` steps, on one line where stderr is a terminal."""
    start, done = time.perf_counter(), 0

    def advance(message: str) -> None:
        nonlocal done
        done += 1
        filled = 24 * done // steps
        bar = "#" * filled + "." * (24 - filled)
        line = f"[{bar}] {done:3}/{steps} {time.perf_counter() - start:4.0f} s  {message}"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line[:110]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    return advance


if __name__ == "__main__":
    sys.exit(main())
