"""Lines of an H200: each names cases that are measured, and verdicts over made-up rows are right."""

import json
from typing import Any

import pytest

from nystromgan.bench import forms, gpu_target_rows, gpu_targets
from nystromgan.bench.case import BOTH, BY, FORWARD, OURS, PASSES, TUNED
from nystromgan.bench.cases import cases
from nystromgan.bench.gpu_targets import FAIL, LINES, NOT_MEASURED, PASS, Line
from nystromgan.bench.plan import Stage

CASES = cases("cuda")


def line_of(words: str) -> Line:
    return next(line for line in LINES if words in line.words)


def row(place: tuple[str, str], form: str = OURS, **fields: Any) -> dict[str, Any]:
    return {"case": place[0], "mode": place[1], "form": form, **fields}


def verdict(line: Line, rows: list[dict[str, Any]]) -> gpu_targets.Verdict:
    (found,) = gpu_targets.verdicts(rows, CASES, [line])
    return found


def test_every_line_has_its_cases_and_peers() -> None:
    """A line that names no case, or a peer that a case lacks, could never pass."""
    known = {case.name: case for case in CASES}
    for line in LINES:
        places = line.places(CASES)
        assert len({place[0] for place in places}) >= len(line.shapes), line.words
        for name, mode in places if line.against[0] else ():
            assert mode in known[name].modes
            assert any(line.is_peer(form) for form in forms.forms_of(known[name], True)), (line.words, name)


def test_the_stage_measures_every_place() -> None:
    stage = Stage("cuda")
    names = {case.name for case in gpu_target_rows.chosen(stage)}
    for line in LINES:
        if line.measure != "error":
            assert {name for name, _ in line.places(CASES)} <= names
    case = next(case for case in CASES if case.name in names and case.shape.get("N") == 65536)
    peers = gpu_target_rows._peers(case, BOTH, LINES)
    assert "two SDPA calls" in peers
    assert not any(peer.needs_compile for peer in peers.values())
    (tuned,) = gpu_target_rows._peers(case, BOTH, LINES, tuned=True)
    assert forms.forms_of(case._replace(peers=gpu_target_rows._peers(case, BOTH, LINES, tuned=True)), True) == [
        OURS, tuned, tuned + TUNED,
    ]  # fmt: skip
    assert not gpu_target_rows._peers(case, FORWARD, LINES, tuned=True)


def test_a_floor_is_judged_by_the_gpu_s_time() -> None:
    line = line_of("Forward of 65,536 tokens over its floor")
    (place,) = line.places(CASES)
    fast = row(place, graph_ms=1.2, median_ms=2.0, floor_ms=1.0)
    found = verdict(line, [fast])
    assert (found.word, found.value, found.plain) == (PASS, 1.2, 2.0)
    assert verdict(line, [fast | {"graph_ms": 1.4}]).word == FAIL
    assert verdict(line, [fast | {"graph_ms": None}]).word == NOT_MEASURED
    assert verdict(line, [fast | {"wrong": True}]).word == FAIL
    assert verdict(line, []).word == NOT_MEASURED


def test_a_ratio_is_to_the_fastest_of_the_peers_named_and_holds_everywhere() -> None:
    line = line_of("Both passes against the eager form")
    first, second = line.places(CASES)
    one = [
        row(first, graph_ms=1.0, median_ms=1.0, ratio=1),
        row(first, "eager, F (Z (G V))", graph_ms=5.0, graph_ratio=5.0, median_ms=6.0, ratio=6.0),
        row(first, "eager, (F Z) (G V)", graph_ms=4.5, graph_ratio=4.5, median_ms=7.0, ratio=7.0),
        row(first, "eager, F (Z (G V))" + TUNED, graph_ms=1.5, graph_ratio=1.5, median_ms=1.5, ratio=1.5),
        row(first, "two SDPA calls", graph_ms=1.1, graph_ratio=1.1, median_ms=1.1, ratio=1.1),
    ]
    assert verdict(line, one).word == NOT_MEASURED, "one of two places"
    found = verdict(line, one + [each | {"case": second[0]} for each in one])
    assert (found.word, found.value, found.plain) == (PASS, 4.5, 6.0)
    slow = [each | {"case": second[0], "graph_ratio": each.get("graph_ratio", 1) / 2} for each in one]
    found = verdict(line, one + slow)
    assert (found.word, found.value) == (FAIL, 2.25)
    assert second[0] in found.place
    assert verdict(line, slow).word == FAIL, "a miss needs no other place"
    assert verdict(line_of("under max-autotune"), one + [each | {"case": second[0]} for each in one]).word == FAIL


@pytest.mark.parametrize(
    ("words", "ours", "others", "value", "word"),
    [
        ("Their memory", {"peak_bytes": 10}, {"authors, N x N": {"peak_bytes": 200}}, 0.05, PASS),
        ("Their memory", {"peak_bytes": 10}, {"authors, N x N": {"peak_bytes": 20}}, 0.5, FAIL),
        ("Their memory", {"peak_bytes": 10}, {"authors, N x N": {}}, None, NOT_MEASURED),
        ("tokens in microseconds", {"graph_ms": 0.03}, {}, 30.0, PASS),
        ("40 layers: launches", {"launches": 1}, {}, 1, PASS),
        ("40 layers: launches", {"launches": 3}, {}, 3, FAIL),
        ("40 layers: launches", {"launches": None}, {}, None, NOT_MEASURED),
        ("error over the eager form's in float32", {"error_ratio": 0.9}, {}, 0.9, PASS),
        ("same by the fastest backend", {"graph_ms": 2.0, "floor_ms": 1.0}, {BY + "cuda": {"graph_ms": 1.25}}, 1.25,
         PASS),
        ("chosen for power_iteration", {"graph_ms": 2.0}, {BY + "cuda": {"graph_ms": 1.0}}, 2.0, FAIL),
        ("chosen for power_iteration", {"graph_ms": 2.0}, {}, None, NOT_MEASURED),
    ],
)  # fmt: skip
def test_measures(words: str, ours: dict, others: dict, value: float | None, word: str) -> None:
    line = line_of(words)
    rows = [
        row(place, form, **fields) for place in line.places(CASES) for form, fields in {OURS: ours, **others}.items()
    ]
    found = verdict(line, rows)
    assert found.word == word
    assert found.value == (value if value is None else pytest.approx(value))
    assert json.dumps(found.record())
    assert str(found).startswith(word)


def test_a_backward_is_both_passes_less_the_forward() -> None:
    line = line_of("Backward of a pseudo-inverse")
    rows = [
        row((name, mode), graph_ms=ms)
        for name, _ in line.places(CASES)
        for mode, ms in zip(PASSES, (1.0, 3.5), strict=True)
    ]
    assert (verdict(line, rows).word, verdict(line, rows).value) == (PASS, 2.5)


def test_later_rows_of_a_form_add_to_earlier_ones() -> None:
    line = line_of("40 layers: launches")
    (place,) = line.places(CASES)
    assert verdict(line, [row(place, graph_ms=1.0), row(place, launches=1)]).word == PASS
