"""`nystromgan list`: the models, the checkpoints that ship, and the recipes."""

import argparse
import json
from fnmatch import fnmatch

from nystromgan.zoo import checkpoints, registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="a shell pattern, such as 'savgan*' (all)")
    parser.add_argument("--task", help="only models of this task: video, image, ...")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    models = registry.list_models(args.pattern, args.task)
    shipped = {name: size for name, size in checkpoints.list_checkpoints().items() if fnmatch(name, args.pattern)}
    recipes = {name: str(path) for name, path in registry.recipes().items() if fnmatch(name, args.pattern)}
    if args.json:
        print(json.dumps({"models": models, "checkpoints": shipped, "recipes": recipes}, indent=2))
        return 0
    print("\n".join(["models", *(f"  {name}" for name in models)]))
    print("\n".join(["", "checkpoints", *(f"  {name:<20} {size / 1e6:.1f} MB" for name, size in shipped.items())]))
    print("\n".join(["", "recipes", *(f"  {name}" for name in recipes)]))
    return 0
