"""The command line: what doctor says, and that errors are one line and a non-zero exit code."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from nystromgan import _backend, _doctor, _native, cli


def _fresh_doctor(*options: str, **variables: str) -> subprocess.CompletedProcess:
    """`nystromgan doctor` in a fresh process with these environment variables."""
    command = [sys.executable, "-m", "nystromgan", "doctor", *options]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)


def test_doctor_lists_every_backend_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for op in _backend.IMPLEMENTED:
        start = lines.index(op) + 1
        assert [line.split()[0] for line in lines[start : start + 4]] == list(_backend.BACKENDS)


def test_doctor_json_agrees_with_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["backends"]) == set(_backend.IMPLEMENTED)
    for op, backends in report["backends"].items():
        assert backends["reference"] == []
        assert backends["cpu"] == _backend.unsupported_reasons(op, "cpu", [])
    assert (report["cpu"]["isa"] is None) == (report["advice"] is not None)


def test_doctor_without_the_native_library_says_how_to_get_it(tmp_path: pathlib.Path) -> None:
    text = _fresh_doctor(NYSTROMGAN_LIBRARY_DIR=str(tmp_path)).stdout
    assert f"{tmp_path}/libnystromgan_cpu.so is missing" in text
    assert text.splitlines()[-1].startswith("Advice: ")
    report = json.loads(_fresh_doctor("--json", NYSTROMGAN_LIBRARY_DIR=str(tmp_path)).stdout)
    assert report["cpu"]["isa"] is None


@pytest.mark.skipif(bool(_native.cpu_reasons()), reason="no native library")
@pytest.mark.parametrize("isa", _native.CPU_ISAS)
def test_doctor_names_the_highest_instruction_set_allowed(isa: str) -> None:
    chosen = json.loads(_fresh_doctor("--json", NYSTROMGAN_CPU_ISA=isa).stdout)["cpu"]["isa"]
    assert _native.CPU_ISAS.index(chosen) <= _native.CPU_ISAS.index(isa)


@pytest.mark.skipif(bool(_native.cpu_reasons()), reason="no native library")
def test_doctor_refuses_an_unknown_instruction_set() -> None:
    done = _fresh_doctor(NYSTROMGAN_CPU_ISA="sse9")
    assert done.returncode == 1
    assert done.stderr.startswith("nystromgan doctor: NYSTROMGAN_CPU_ISA must be one of")
    assert done.stderr.endswith("got 'sse9'\n")


def test_unknown_command_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doktor"])
    assert "'doktor'" in capsys.readouterr().err


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> dict[str, object]:
        raise OSError("two\nlines")

    monkeypatch.setattr(_doctor, "inspect_machine", fail)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "nystromgan doctor: two lines\n"


def test_the_command_is_installed() -> None:
    command = pathlib.Path(sys.executable).with_name("nystromgan")
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)
