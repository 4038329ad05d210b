"""The tests' own paper in the registry, and the command line in processes that can be killed."""

import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import pytest
import tiny
import torch

from nystromgan.zoo import data, registry


@pytest.fixture
def tiny_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PAPERS, "tiny", "tiny")
    monkeypatch.setitem(data.SOURCES, "blobs", "tiny:Blobs")


@pytest.fixture
def one_thread(reproducible: None) -> None:
    """For networks so small that a second thread costs more than it does."""
    torch.set_num_threads(1)


@pytest.fixture
def recipe(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny.RECIPE)
    return str(path)


@pytest.fixture(scope="session")
def launch() -> Callable[..., BaseProcess]:
    """Starts `nystromgan` in a process of its own; they come from a server that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])

    def start(
        *arguments: str, kill_in_sync: tuple[str, int] = ("", 1), largest_file: int = 0, **environment: str
    ) -> BaseProcess:
        process = context.Process(target=tiny.main, args=(arguments, environment, kill_in_sync, largest_file))
        with pytest.MonkeyPatch.context() as patch:  # the server does not take over sys.path before it imports
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            process.start()
        return process

    return start
