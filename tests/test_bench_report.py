"""The report of the committed results: whole, self-contained, readable in a browser, and the README's source."""

import json
import pathlib
import re
import shutil
import subprocess

import pytest

from nystromgan import cli
from nystromgan.bench import gpu_targets, module_tables, plots, report, sections, store, tables
from nystromgan.bench.case import OURS
from nystromgan.bench.cases import cases

ROOT = pathlib.Path(__file__).parents[1]
MACHINES = sorted(path for path in (ROOT / "bench" / "results").glob("*") if (path / "nystrom_attention.json").exists())
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
SIZES = {"desktop": (1280, 2400), "phone": (390, 2400)}

FRAME = """<body style="margin:0"><iframe src="report.html" style="width:{width}px;height:{height}px;border:0" onload="
const root = this.contentDocument.documentElement;
console.log('page of ' + root.scrollWidth + ' in ' + root.clientWidth)"></iframe></body>"""


@pytest.fixture(scope="module", params=MACHINES, ids=lambda path: path.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of one machine's report."""
    folder = tmp_path_factory.mktemp(request.param.name)
    assert cli.main(["report", "--results", str(request.param), "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("folder", MACHINES, ids=lambda path: path.name)
def test_committed_results_are_right(folder: pathlib.Path) -> None:
    rows = store.rows_of(store.load(folder))
    assert rows
    assert not [row for row in rows if row["form"] == OURS and row.get("wrong")]
    assert not [row for row in rows if row.get("wrong") and "median_ms" in row]


def test_the_page_is_whole_and_stands_alone(made: pathlib.Path) -> None:
    page = (made / "report.html").read_text()
    assert page.count("<figure>") == len(re.findall(r"</svg>\s*</figure>", page)) > 0
    assert not re.search(r'(src|href)="(?!#)', page), "the page must be self-contained"
    for title in (
        "Time and memory over tokens",
        "passes exact attention",
        "Targets",
        "best other form",
        "was measured",
    ):
        assert title in page
    assert "the better choice" in page


def test_markdown_and_its_plots(made: pathlib.Path) -> None:
    text = (made / "report.md").read_text()
    plots = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert plots
    assert all((made / plot).read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert page_titles((made / "report.html").read_text()) == re.findall(r"^## (.*)$", text, re.MULTILINE)


def page_titles(page: str) -> list[str]:
    return re.findall(r"<(?:h2|summary)>(.*?)</", page)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_a_browser_shows_it(made: pathlib.Path, size: str, theme: str) -> None:
    """Screenshots go to out/bench/screenshots; nothing but scrolling tables is wider than the window.

    The page is shown in a frame, since Chromium makes no window as narrow as a phone.
    """
    width, height = SIZES[size]
    shots = ROOT / "out" / "bench" / "screenshots"
    shots.mkdir(parents=True, exist_ok=True)
    picture = shots / f"{made.name[:-1]}-{size}-{theme}.png"
    frame = made / "frame.html"
    frame.write_text(FRAME.format(width=width, height=height))
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--allow-file-access-from-files", f"--window-size={max(width, 500)},{height}",
        f"--user-data-dir={made / 'profile'}", f"--blink-settings=preferredColorScheme={int(theme == 'light')}",
        f"--screenshot={picture}", "--enable-logging=stderr", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"page of {width} in {width}" in done.stderr
    assert picture.stat().st_size > 20_000


def test_readme_shows_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert report.with_headline(text, store.load(store.RESULTS / report.README_MACHINE)) == text, "make bench-docs"


def test_readme_s_plot_is_of_the_committed_results() -> None:
    rows = store.rows_of(store.load(store.RESULTS / report.README_MACHINE))
    assert plots.fingerprint(rows).encode() in (ROOT / tables.PICTURE).read_bytes(), "make bench-docs"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_pages_show_the_committed_results_of_the_modules(page: pathlib.Path) -> None:
    assert module_tables.with_tables(page.read_text(), report.MODULES) == page.read_text(), "make bench-docs"


def test_a_second_run_without_results_is_an_error(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    folder = str(report.store.RESULTS / report.README_MACHINE)
    assert cli.main(["report", "--results", folder, "--again", str(tmp_path)]) == 1
    assert f"no results in {tmp_path}" in capsys.readouterr().err


def gpu_rows() -> list[dict]:
    """Rows by which a forward's floor holds, and the microseconds of one size miss; no line else is measured."""
    lines = {line.words: line for line in gpu_targets.LINES}
    held = lines["Forward of 65,536 tokens over its floor"].places(cases("cuda"))[0]
    late = lines["Forward of 1,024 to 8,192 tokens in microseconds"].places(cases("cuda"))[0]
    times = [(held, {"graph_ms": 0.12, "median_ms": 0.16, "floor_ms": 0.1}),
             (late, {"graph_ms": 0.055, "median_ms": 0.3, "floor_ms": 0.01})]  # fmt: skip
    return [{"case": place[0], "mode": place[1], "form": OURS, "commit": "abc", **fields} for place, fields in times]


@pytest.mark.parametrize("file", ["targets", "nystrom_attention"])
def test_the_page_of_a_gpu_has_its_verdicts(tmp_path: pathlib.Path, file: str) -> None:
    """From the targets stage's file, or where there is none from the benchmark's; a two-core CPU's promises are not."""
    rows = gpu_rows()
    if file == "targets":
        record = {"device": "nvidia-h200", "commit": "abc", "torch": "2.10", "verdicts": [], "rows": rows}
    else:
        where = {"name": "nvidia-h200", "device": "cuda", "cpu": {"model": "x", "threads": 2}, "versions": {}}
        named = {case.name: case for case in cases("cuda")}
        more = {"rounds": 3, "low_ms": 0.1, "high_ms": 0.2, "errors": {"output": 0.0}, "ratio": 1.0, "peak_bytes": 1}
        known = [named[row["case"]] for row in rows]
        rows = [row | more | {"op": case.op, "group": case.group, "dtype": case.dtype, **case.shape}
                for row, case in zip(rows, known, strict=True)]  # fmt: skip
        record = {"machine": where | {"commit": "abc"}, "rates": {}, "rows": rows}
    (tmp_path / f"{file}.json").write_text(json.dumps(record))
    assert cli.main(["report", "--results", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    table = {cells[1].strip(): cells for line in text.splitlines() if len(cells := line.split("|")) == 8}
    assert {line.words for line in gpu_targets.LINES} <= set(table)
    assert [cell.strip() for cell in table["Forward of 65,536 tokens over its floor"][2:5]] == [
        "floor <= 1.3", "1.2", "1.6",
    ]  # fmt: skip
    assert table["Forward of 65,536 tokens over its floor"][6].strip() == gpu_targets.PASS
    assert table["Forward of 1,024 to 8,192 tokens in microseconds"][6].strip() == gpu_targets.FAIL
    assert table["Power iteration of 40 layers: launches"][6].strip() == gpu_targets.NOT_MEASURED
    assert "two-core CPU" not in text
    assert "nvidia-h200" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<td class="no">FAIL</td>' in page


def test_verdicts_are_of_the_targets_alone_where_both_were_measured(tmp_path: pathlib.Path) -> None:
    """A slower run of the benchmark does not judge: the targets stage compares within one run."""
    rows = gpu_rows()
    records = {
        "nystrom_attention": {"machine": {"device": "cuda"}, "rows": [row | {"graph_ms": 9.0} for row in rows]},
        store.GPU_TARGETS: {"device": "nvidia-h200", "rows": rows},
    }
    verdicts = {cells[0]: cells[-1] for cells in sections._gpu_targets(records).table}
    assert verdicts["Forward of 65,536 tokens over its floor"] == gpu_targets.PASS
    cpu = store.load(store.RESULTS / report.README_MACHINE)
    assert not sections._of_gpu(cpu)
