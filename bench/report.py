"""`nystromgan report`: one self-contained page, the same in Markdown with PNG plots, and the README's table."""

import argparse
import html
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from nystromgan.bench import machine, module_tables, sections, store, tables
from nystromgan.bench.case import COMPILED, FULL, PASSES, TUNED
from nystromgan.bench.gpu_targets import FAIL
from nystromgan.bench.sections import Section, Table

START, END = "<!-- bench: written by make bench-docs -->", "<!-- /bench -->"
README_MACHINE = "cpu-2core-zen4"
MODULES = store.RESULTS / "cpu-2core-sapphire-rapids" / "modules"
NUMBER = r"–|[\d.,e-]+[x%]?( \(noisy\))?( to [\d.,]+)?( \([\d.]+ to [\d.]+\))?"
TITLE = "Landmark attention, measured"
INTRODUCTION = (
    "Our kernels beside the best that torch and other libraries do, in one run on one machine. A result that is wrong "
    "has no time."
)


class Plot(NamedTuple):
    """A drawing with its title and the stem of its file."""

    title: str
    stem: str
    draw: Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=pathlib.Path, help="folder of one machine; this machine's without it")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/bench"))
    parser.add_argument(
        "--again", type=pathlib.Path, help="folder of another run on the machine: only say where the two disagree"
    )
    parser.add_argument(
        "--readme", type=pathlib.Path, help="only write the headline table into this file, and its plot beside it"
    )
    parser.add_argument("--docs", type=pathlib.Path, help="only write the modules' tables into this folder's pages")


def run(args: argparse.Namespace) -> int:
    if args.docs:
        for path in args.docs.glob("*.md"):
            path.write_text(module_tables.with_tables(path.read_text(), MODULES))
        return 0
    folder = args.results or store.RESULTS / (README_MACHINE if args.readme else machine.name())
    records = store.load(folder)
    if not records:
        raise ValueError(f"no results in {folder}: run nystromgan bench")
    if args.again:
        again = store.load(args.again)
        if not again:
            raise ValueError(f"no results in {args.again}: run nystromgan bench --output")
        return compared(records, again)
    if args.readme:
        from nystromgan.bench import plots

        args.readme.write_text(with_headline(args.readme.read_text(), records))
        plots.headline(store.rows_of(records), args.readme.parent / tables.PICTURE)
        return 0
    write(records, args.output)
    print(f"Open {args.output / 'report.html'} in a browser.")
    return 0


def compared(records: dict[str, store.Record], again: dict[str, store.Record]) -> int:
    """Prints the ratios that two runs give over 10% apart and neither marks noisy; 1 where there is one."""
    count, apart = tables.disagreements(store.rows_of(records), store.rows_of(again))
    for row in apart:
        print(f"{row['case']}, {row['mode']}, {row['form']}: {row['ratio']:.2f} now")
    print(f"{len(apart)} of {count} ratios are over 10% apart and not marked noisy")
    return int(bool(apart))


def write(records: dict[str, store.Record], folder: pathlib.Path) -> None:
    """report.html, report.md and its PNG plots."""
    from nystromgan.bench import plots  # here, so that the README's table needs no matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    for drawing in [*growth_plots(records), *landmark_plots(records)]:
        plots.png(drawing.draw, folder / f"{drawing.stem}.png")
    (folder / "report.md").write_text(markdown(records))
    (folder / "report.html").write_text(page(records))


def with_headline(text: str, records: dict[str, store.Record]) -> str:
    """The README with the table of these records between its two marks."""
    before, rest = text.split(START)
    return f"{before}{START}\n{tables.headline(records)}\n{END}{rest.split(END)[1]}"


def growth_plots(records: dict[str, store.Record]) -> Iterator[Plot]:
    """Time and memory over tokens, where there are any."""
    from nystromgan.bench import plots

    rows = store.rows_of(records)
    for field, title in (("median_ms", "Time"), ("peak_bytes", "Peak extra memory")):
        for dtype in ("fp32", "bf16"):
            for mode in PASSES:
                draw = plots.growth(rows, mode, dtype, field)
                if draw is not None:
                    stem = f"{'time' if field == 'median_ms' else 'memory'}-{mode.replace('+', '-')}-{dtype}"
                    yield Plot(f"{title}, {mode}, {dtype}", stem, draw)


def landmark_plots(records: dict[str, store.Record]) -> Iterator[Plot]:
    """Error over the number of landmarks and over time."""
    from nystromgan.bench import plots

    if store.LANDMARKS not in records:
        return
    rows = records[store.LANDMARKS]["rows"]
    for sharpness in next(row["errors"] for row in rows if row["errors"]):
        yield Plot(
            f"Error over landmarks, sharpness {sharpness}", f"error-{sharpness}", plots.accuracy(rows, sharpness)
        )
        yield Plot(f"Error over time, sharpness {sharpness}", f"price-{sharpness}", plots.price(rows, sharpness))


def markdown(records: dict[str, store.Record]) -> str:
    parts = [f"# {TITLE}", "", INTRODUCTION]
    for section in sections.all_of(records):
        parts += ["", f"## {section.title}", "", section.note]
        parts += ["", *(f"![{plot.title}]({plot.stem}.png)" for plot in _plots_of(section, records))]
        parts += ["", _markdown_table(section.table)] if section.table else []
    return "\n".join([*parts, "", "## How this was measured", "", *(f"- {x}" for x in sections.method(records))]) + "\n"


def _plots_of(section: Section, records: dict[str, store.Record]) -> list[Plot]:
    return list({"growth": growth_plots, "landmarks": landmark_plots}.get(section.plots, lambda _: iter(()))(records))


def _markdown_table(table: Table) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def page(records: dict[str, store.Record]) -> str:
    """The whole HTML document."""
    from nystromgan.zoo.demo.style import STYLE

    body = [
        f"<h1>{TITLE}</h1>",
        f"<p>{INTRODUCTION}</p>",
        _tiles(sections.tiles(records)),
        *(_html_section(section, records) for section in sections.all_of(records)),
        "<h2>How this was measured</h2><ul class=muted>",
        *(f"<li>{html.escape(line)}</li>" for line in sections.method(records)),
        "</ul>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}{EXTRA_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}\n</main>\n</body>\n</html>\n"
    )


EXTRA_STYLE = """
th, td { text-align: left; }
th.n, td.n { text-align: right; white-space: nowrap; }
.numbers { min-width: 0; width: auto; }
.numbers th:first-child { min-width: 13rem; }
.no { color: var(--accent); font-weight: 600; }
details summary { cursor: pointer; font-weight: 600; margin: 2.6rem 0 .4rem; }
"""


def _tiles(tiles: Iterable[tuple[str, str]]) -> str:
    made = "".join(f'<div class="tile"><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>' for a, b in tiles)
    return f"<div class=tiles>{made}</div>" if made else ""


def _html_section(section: Section, records: dict[str, store.Record]) -> str:
    from nystromgan.bench import plots

    figures = "".join(
        f"<figure><figcaption>{plot.title}</figcaption>{plots.svg(plot.draw)}</figure>"
        for plot in _plots_of(section, records)
    )
    content = f"<p class=muted>{html.escape(section.note)}</p>"
    if figures:
        content += f"{_legend(section, records)}<div class=pair>{figures}</div>"
    content += _html_table(section.table) if section.table else ""
    if section.folded:
        return f"<details><summary>{section.title}</summary>{content}</details>"
    return f"<section><h2>{section.title}</h2>{content}</section>"


def _legend(section: Section, records: dict[str, store.Record]) -> str:
    from nystromgan.bench import plots

    if section.plots == "landmarks":
        return plots.legend(plots.KIND_COLORS, set(plots.KIND_COLORS), "Dashed: exact attention.")
    forms = {row["form"] for row in store.rows_of(records) if row["group"] == "landmarks" and "median_ms" in row}
    compiled = any(form.endswith((COMPILED, TUNED)) for form in forms)
    note = f"{FULL}: torch's fastest kernel." + (" Dashed: under torch.compile." if compiled else "")
    return plots.legend(plots.COLORS, {family for form in forms if (family := plots.family(form))}, note)


def _html_table(table: Table) -> str:
    numeric = [i > 0 and any(_is_number(cells[i]) for cells in table[1:]) for i in range(len(table[0]))]
    head = "".join(
        f"<th{' class=n' if right else ''}>{html.escape(cell)}</th>"
        for cell, right in zip(table[0], numeric, strict=True)
    )
    lines = "".join(f"<tr>{_cells(cells)}</tr>" for cells in table[1:])
    return f"<div class=scroll><table class=numbers><tr>{head}</tr>{lines}</table></div>"


def _cells(contents: Iterable[str]) -> str:
    """One row: numbers are set right, and what is missed or noisy stands out."""
    first, *rest = contents
    cells = [f"<th>{html.escape(first)}</th>"]
    for content in rest:
        marks = ["n"] if _is_number(content) else []
        marks += ["no"] if content in ("no", FAIL) else ["muted"] if "noisy" in content else []
        cells.append(f'<td class="{" ".join(marks)}">{html.escape(content)}</td>')
    return "".join(cells)


def _is_number(cell: str) -> bool:
    return re.fullmatch(NUMBER, cell) is not None
