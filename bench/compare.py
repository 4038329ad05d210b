"""`nystromgan bench --compare REV`: this tree beside another commit of it, in two processes that take turns.

Both sides are measured by this tree's benchmark; only the library differs. REV is checked out and built in a folder of
its own, which is removed afterwards.
"""

import contextlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from nystromgan.bench.case import Case
from nystromgan.bench.measure import quartile

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOISE = 0.05  # a change of the median ratio below this share is no news
LEAST_ROUNDS, MOST_ROUNDS, BUDGET_S = 7, 25, 4.0


class Verdict(NamedTuple):
    """This tree's time over REV's: the median of the rounds' ratios, its quartiles, and what to make of them."""

    ratio: float
    low: float
    high: float
    word: str


def verdict(this: Sequence[float], other: Sequence[float]) -> Verdict:
    """`slower` or `faster` where the median lies beyond NOISE and the quartiles on its side of 1; else `same`."""
    ratios = [mine / theirs for mine, theirs in zip(this, other, strict=True)]
    middle, low, high = statistics.median(ratios), quartile(ratios, 0.25), quartile(ratios, 0.75)
    word = "slower" if middle > 1 + NOISE and low > 1 else "faster" if middle < 1 / (1 + NOISE) and high < 1 else "same"
    return Verdict(middle, low, high, word)


def run(revision: str, chosen: Sequence[Case], modes: Sequence[str], device: str, full: bool) -> int:
    """Prints a line a case and mode; 1 where something is slower beyond noise, or wrong."""
    slower = []
    with _worker(ROOT, device) as this, _checked_out(revision) as tree, _worker(tree, device) as other:
        print(f"this tree's time over {revision}'s, medians and quartiles of interleaved rounds", flush=True)
        pairs = [(case, mode) for case in chosen for mode in modes if mode in case.modes]
        for i, (case, mode) in enumerate(pairs):
            refused = [side.ask(do="prepare", case=case.name, mode=mode).get("refused") for side in (this, other)]
            if any(refused):
                line = "; ".join(
                    f"{name}: {why}" for name, why in zip(("this tree", revision), refused, strict=True) if why
                )
                slower += [case.name] if refused[0] else []
            else:
                found = verdict(*_rounds(this, other, 2 * BUDGET_S if full else BUDGET_S))
                line = f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})  {found.word}"
                slower += [case.name] if found.word == "slower" else []
            print(f"{i + 1}/{len(pairs)}  {case.name}, {mode}: {line}", flush=True)
    print(f"{len(slower)} of {len(pairs)} slower beyond noise" if slower else "nothing slower beyond noise")
    return int(bool(slower))


def _rounds(this: "Side", other: "Side", budget_s: float) -> tuple[list[float], list[float]]:
    """Seconds of one call on each side; the side that goes first changes from round to round."""
    times: dict[Side, list[float]] = {this: [], other: []}
    spent = 0.0
    while len(times[this]) < LEAST_ROUNDS or (spent < budget_s and len(times[this]) < MOST_ROUNDS):
        for side in (this, other) if len(times[this]) % 2 == 0 else (other, this):
            answer = side.ask(do="sample")
            times[side].append(answer["seconds"])
            spent += answer["seconds"] * answer["repeats"]
    return times[this], times[other]


class Side:
    """A process that measures one tree on request."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that measures ended with exit status {self.process.wait()}")
        return json.loads(line)


@contextlib.contextmanager
def _worker(tree: pathlib.Path, device: str) -> Iterator[Side]:
    """A measuring process that imports the library from `tree` and the benchmark from here."""
    with tempfile.TemporaryDirectory() as folder:
        package = pathlib.Path(folder) / "nystromgan"
        package.mkdir()
        for path in (tree / "nystromgan").iterdir():
            (package / path.name).symlink_to(path)
        (package / "zoo").symlink_to(tree / "zoo")
        (package / "bench").symlink_to(ROOT / "bench")
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        with subprocess.Popen(
            [sys.executable, "-m", "nystromgan.bench.worker", device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder,
        ) as process:  # fmt: skip
            side = Side(process)
            found = side.ask(do="hello")["library"]
            assert pathlib.Path(found).parent == package, f"measured {found} instead of {tree}"
            yield side


@contextlib.contextmanager
def _checked_out(revision: str) -> Iterator[pathlib.Path]:
    """A worktree of REV with its native library built."""
    if not (ROOT / ".git").exists():
        raise ValueError(f"--compare needs a git checkout of nystromgan; {ROOT} is none")
    commit = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit.returncode:
        raise ValueError(f"--compare must name a commit, got {revision!r}")
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "tree"
        done = _git("worktree", "add", "--detach", "--quiet", str(tree), commit.stdout.strip())
        if done.returncode:
            raise RuntimeError(f"git worktree: {done.stderr.strip()}")
        try:
            _build(tree, commit.stdout.strip())
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _build(tree: pathlib.Path, commit: str) -> None:
    """REV's native library: this tree's where the sources are the same, since a build takes minutes."""
    built = ROOT / "nystromgan" / "lib"
    if built.exists() and not _git("diff", "--quiet", commit, "--", "csrc", "setup.py").returncode:
        shutil.copytree(built, tree / "nystromgan" / "lib", dirs_exist_ok=True)
        return
    print(f"building {commit[:12]}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_native", "--inplace"], cwd=tree, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{commit[:12]} does not build: {done.stderr.strip()[-500:]}")


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
