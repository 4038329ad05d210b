"""Choosing a backend: `auto` takes the first able one, a named one runs or refuses with every reason."""

import pytest
import torch

from nystromgan import UnsupportedError, _backend, available_backends, nystrom_attention, spatiotemporal_attention
from nystromgan.testing import attention_inputs, map_inputs

FLOAT, DOUBLE = torch.zeros(2, 3), torch.zeros(4, dtype=torch.float64)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, ...]]:
    """What this machine can run, made up: the CPU library is there, Triton is not."""
    reasons: dict[str, tuple[str, ...]] = {"cpu": (), "reference": (), "triton": ("no device", "no compiler")}
    monkeypatch.setattr(_backend, "machine_reasons", lambda backend: reasons[backend])
    monkeypatch.setattr(_backend, "IMPLEMENTED", {"op": ("triton", "cpu", "reference")})
    monkeypatch.setattr(_backend._env, "triton_interpret", lambda: False)
    return reasons


class TestChoose:
    def test_auto_takes_the_first_able_one(self, table) -> None:
        assert _backend.choose("op", "auto", [FLOAT]) == "cpu"
        table["cpu"] = ("not built",)
        assert _backend.choose("op", "auto", [FLOAT]) == "reference"

    def test_auto_leaves_what_the_natives_cannot_take_to_the_reference(self, table) -> None:
        assert _backend.choose("op", "auto", [FLOAT, DOUBLE]) == "reference"
        assert _backend.choose("op", "auto", [FLOAT.to("meta")]) == "reference"

    def test_auto_hears_the_op(self, table) -> None:
        refuse = lambda backend: ["too large"] if backend == "cpu" else []  # noqa: E731
        assert _backend.choose("op", "auto", [FLOAT], refuse) == "reference"

    def test_a_named_one_is_kept(self, table) -> None:
        assert _backend.choose("op", "reference", [FLOAT]) == "reference"
        assert _backend.choose("op", "cpu", [FLOAT]) == "cpu"

    def test_a_named_one_refuses_with_every_reason(self, table) -> None:
        with pytest.raises(UnsupportedError) as caught:
            _backend.choose("op", "triton", [FLOAT, DOUBLE], lambda backend: ["M above 512"])
        assert str(caught.value) == (
            "backend 'triton' cannot run op on (2, 3) torch.float32 on cpu, (4,) torch.float64 on cpu: "
            "no device; no compiler; needs tensors on cuda, got one on cpu; "
            "takes float32, bfloat16 and float16, got torch.float64; M above 512"
        )

    def test_a_backend_without_the_op_says_so(self, table) -> None:
        with pytest.raises(UnsupportedError, match="op has no cuda implementation in this version"):
            _backend.choose("op", "cuda", [FLOAT])

    @pytest.mark.parametrize("name", ["gpu", "", "AUTO", None])
    def test_an_unknown_name(self, table, name) -> None:
        with pytest.raises(ValueError, match=r"backend must be one of \('auto', 'cuda', .*\), got ") as caught:
            _backend.choose("op", name, [FLOAT])
        assert str(caught.value).endswith(repr(name))


def test_the_interpreter_takes_cpu_tensors(table, monkeypatch: pytest.MonkeyPatch) -> None:
    table["triton"] = ()
    monkeypatch.setattr(_backend._env, "triton_interpret", lambda: True)
    assert _backend.choose("op", "triton", [FLOAT]) == "triton"


def test_every_op_has_the_reference_last_and_known_backends_only() -> None:
    for op, backends in _backend.IMPLEMENTED.items():
        assert backends[-1] == "reference", op
        assert set(backends) <= set(_backend.BACKENDS)
        assert len(set(backends)) == len(backends)


def test_available_backends_names_all_and_says_why_not() -> None:
    available = available_backends()
    assert tuple(available) == _backend.BACKENDS
    assert available["reference"] == ()
    assert all(isinstance(reason, str) for reasons in available.values() for reason in reasons)


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("NYSTROMGAN_LIBRARY_DIR", str(tmp_path))
    _backend._native.cpu_reasons.cache_clear()
    try:
        message = rf"the native CPU library is not built \({tmp_path}.* is missing"
        with pytest.raises(UnsupportedError, match=message):
            nystrom_attention(**attention_inputs(), backend="cpu")
        assert nystrom_attention(**attention_inputs()).isfinite().all()  # auto goes on with the reference
        (tmp_path / _backend._native.CPU_LIBRARY).write_bytes(b"not a library")
        _backend._native.cpu_reasons.cache_clear()
        with pytest.raises(UnsupportedError, match="the native CPU library does not load"):
            spatiotemporal_attention(**map_inputs(), backend="cpu")
    finally:
        _backend._native.cpu_reasons.cache_clear()
