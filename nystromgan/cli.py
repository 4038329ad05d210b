"""The command `nystromgan`: a table of subcommands, each one module with `add_arguments(parser)` and `run(args)`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

# name: (module, imported only when its command runs; what it does)
COMMANDS = {
    "doctor": ("nystromgan._doctor", "say what this machine can run, and why not the rest"),
    "list": ("nystromgan.zoo.cli.list", "list the models, the checkpoints that ship and the recipes"),
    "info": ("nystromgan.zoo.cli.info", "say what a model or a checkpoint is"),
    "sample": ("nystromgan.zoo.cli.sample", "draw from a trained model: a GIF, an MP4 or a sheet"),
    "train": ("nystromgan.zoo.cli.train", "train a model by a recipe, or go on with a run"),
    "evaluate": ("nystromgan.zoo.cli.evaluate", "measure a trained model, with the real data's own values beside it"),
    "bench": ("nystromgan.bench.cli", "measure time and memory beside what else computes the same"),
    "report": ("nystromgan.bench.report", "make a page of the measured results"),
}


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the whole command line; only the command that `argv` names gets its arguments."""
    parser = argparse.ArgumentParser(prog="nystromgan", description="Nyström attention for images and video.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:
            importlib.import_module(module).add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, 1 after an error that the user can mend, told in one line."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser(argv).parse_args(argv)
        return importlib.import_module(COMMANDS[args.command][0]).run(args)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        advice = " (pip install 'nystromgan[zoo,metrics]')" if isinstance(error, ImportError) else ""
        print(f"nystromgan {argv[0]}: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        return 1
