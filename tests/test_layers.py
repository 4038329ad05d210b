"""The arrows of the tree: who may import whom, and that importing the package does nothing but bind names."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = {"nystromgan": "nystromgan", "nystromgan.zoo": "zoo", "nystromgan.bench": "bench"}
PICTURES = ("matplotlib", "PIL", "tifffile", "imageio", "cv2", "skimage", "torchvision", "trackastra", "av")
SHARED_ZOO = {
    "blocks",
    "training",
    "metrics",
    "data",
    "checkpoints",
    "cli",
    "demo",
}  # every other folder of zoo/ is a paper


def _modules() -> Iterator[tuple[str, pathlib.Path]]:
    """Every module: its name once installed, and its file."""
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def _imports(module: str, path: pathlib.Path) -> set[str]:
    """Every dotted name that a file imports, at any depth; `from a import b` counts as a and as a.b."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{name.name}" for name in node.names}
    return found


MODULES = {module: (path, _imports(module, path)) for module, path in _modules()}


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _paper(module: str) -> str | None:
    parts = module.split(".")
    is_paper = len(parts) > 2 and parts[1] == "zoo" and (ROOT / "zoo" / parts[2]).is_dir()
    return parts[2] if is_paper and parts[2] not in SHARED_ZOO else None


def _forbidden(module: str) -> set[str]:
    """The packages that `module` must not import."""
    if _within(module, "nystromgan.bench"):
        return set()
    forbidden = {"nystromgan.bench"}
    if _within(module, "nystromgan.zoo"):
        private = {name for name in MODULES if name.startswith("nystromgan._")}
        papers = {f"nystromgan.zoo.{_paper(name)}" for name in MODULES if _paper(name)}
        own = {f"nystromgan.zoo.{_paper(module)}"}
        knows_papers = module in ("nystromgan.zoo", "nystromgan.zoo.registry")
        return forbidden | private | {"nystromgan.ops"} | (set() if knows_papers else papers - own)
    forbidden |= {"nystromgan.zoo", *PICTURES}
    if _within(module, "nystromgan.ops"):
        forbidden |= {"nystromgan.nn", "nystromgan.functional"}
    if _within(module, "nystromgan.nn"):
        forbidden |= {name for name in MODULES if name.startswith("nystromgan.ops.") and name.count(".") > 2}
    if module.endswith(".reference"):
        forbidden |= {"triton", module.removesuffix("reference") + "triton"}
    if _within(module, "nystromgan.ops") and module.endswith(".triton"):
        forbidden |= {module.removesuffix("triton") + "reference"}
    return forbidden


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module: str) -> None:
    imports = MODULES[module][1]
    wrong = {name for name in imports for package in _forbidden(module) if _within(name, package)}
    assert not wrong, f"{module} must not import {sorted(wrong)}"


def test_the_check_sees_a_wrong_arrow(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "op.py"
    path.write_text("def f():\n    from ...zoo import demo\n    import matplotlib.pyplot\n")
    imports = _imports("nystromgan.ops.nystrom_attention.op", path)
    assert {"nystromgan.zoo", "nystromgan.zoo.demo", "matplotlib.pyplot"} <= imports


def test_import_loads_nothing_heavy_and_prints_nothing() -> None:
    code = (
        "import pathlib, sys, nystromgan, nystromgan.functional\n"
        "heavy = {'triton', 'matplotlib', 'PIL', 'numba', 'nystromgan.zoo', 'nystromgan.bench'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'libnystromgan' not in pathlib.Path('/proc/self/maps').read_text(), 'a native library was loaded'\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
