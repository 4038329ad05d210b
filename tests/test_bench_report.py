"""The report of the committed results: whole, self-contained, readable in a browser, and the README's source."""

import pathlib
import re
import shutil
import subprocess

import pytest

from nystromgan import cli
from nystromgan.bench import module_tables, plots, report, store, tables
from nystromgan.bench.case import OURS

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
