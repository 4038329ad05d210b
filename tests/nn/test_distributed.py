"""Two processes under DDP and FSDP2: the same parameters on both, and those of one process on the joint batch."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

WORKER = pathlib.Path(__file__).with_name("distributed_worker.py")
MODELS = (
    "attention", "discriminator", "fused discriminator", "fused legacy discriminator", "video discriminator"
)  # fmt: skip
States = list[dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Tensor]]:
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return {name: worker.train(name, None) for name in MODELS}


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> States:
    folder = tmp_path_factory.mktemp(request.param)
    commands = [[sys.executable, str(WORKER), request.param, str(rank), str(folder)] for rank in range(2)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{request.param}.{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_both_processes_and_one_agree(
    name: str, two_processes: States, one_process: dict[str, dict[str, Tensor]]
) -> None:
    first, second = (states[name] for states in two_processes)
    assert list(first) == list(second) == list(one_process[name])
    for key, expected in one_process[name].items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], expected, rtol=1e-4, atol=1e-5, msg=key)
