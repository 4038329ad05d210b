"""The documents are true: their code runs, their commands and links exist, their table of variables is complete."""

import pathlib
import re
import shlex

import pytest

from nystromgan import cli

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(page for top in ("docs", "nystromgan", "zoo", "bench", "csrc") for page in (ROOT / top).rglob("*.md")),
]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def _blocks(page: pathlib.Path) -> list[tuple[str, str, int]]:
    """Every fenced block of a page: its language line, its text, and the line it starts on."""
    text = page.read_text()
    return [(m[1].strip(), m[2], text[: m.start()].count("\n") + 2) for m in BLOCK.finditer(text)]


PYTHON = [
    pytest.param(page, language, code, line, id=f"{page.relative_to(ROOT)}:{line}")
    for page in PAGES
    for language, code, line in _blocks(page)
    if language.startswith("python")
]


@pytest.mark.parametrize(("page", "language", "code", "line"), PYTHON)
def test_python_runs(page: pathlib.Path, language: str, code: str, line: int, tmp_path, monkeypatch) -> None:
    compiled = compile("\n" * (line - 1) + code, str(page), "exec")
    if language != "python no-run":
        monkeypatch.chdir(tmp_path)
        exec(compiled, {"__name__": "__main__"})


def _commands(page: pathlib.Path) -> list[str]:
    """What a page tells the reader to type: lines of shell blocks, and inline code."""
    text = page.read_text()
    shell = [line for language, code, _ in _blocks(page) if language in ("sh", "bash") for line in code.splitlines()]
    return shell + re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_exist(page: pathlib.Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in _commands(page):
        if command.startswith("make "):
            assert {word for word in shlex.split(command, comments=True)[1:] if "=" not in word} <= targets, command
        if command.startswith("nystromgan "):
            assert shlex.split(command, comments=True)[1] in cli.COMMANDS, command


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_exist(page: pathlib.Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", BLOCK.sub("", page.read_text()))
    assert not [link for link in links if not (page.parent / link).exists()]


def _variables_read(path: pathlib.Path) -> set[str]:
    return set(re.findall(r"""(?:environ\.get\(|environ\[|getenv\()\s*["']([A-Z_0-9]+)""", path.read_text()))


def test_environment_table_is_complete() -> None:
    table = set(re.findall(r"^\| `([A-Z_0-9]+)`", (ROOT / "docs/environment.md").read_text(), re.MULTILINE))
    emulation = "csrc/cuda/emulation/emulation.cpp"
    readers = ("nystromgan/_env.py", "setup.py", "csrc/build.py", "csrc/cpu/isa.cpp", emulation)
    assert table == set().union(*(_variables_read(ROOT / reader) for reader in readers))


def test_environment_is_read_in_one_place_a_language() -> None:
    sources = [path for top in ("nystromgan", "zoo", "bench") for path in (ROOT / top).rglob("*.py")]
    native = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    readers = {ROOT / "nystromgan/_env.py", ROOT / "csrc/cpu/isa.cpp", ROOT / "csrc/cuda/emulation/emulation.cpp"}
    reads = re.compile(r"environ\[|environ\.get|getenv\(")
    assert {path for path in [*sources, *native] if reads.search(path.read_text())} == readers
