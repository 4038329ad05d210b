"""`nystromgan report`: one self-contained page, the same in Markdown, and the README's table."""

import argparse
import html
import pathlib
from collections.abc import Iterable
from typing import Any

from nystromgan.bench import cli, machine, tables
from nystromgan.bench.cases import FULL, MODES

START, END = "<!-- bench: written by make bench-docs -->", "<!-- /bench -->"
README_MACHINE = "cpu-2core-sapphire-rapids"
Table = list[list[str]]  # rows of cells, the first the head


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=pathlib.Path, help="folder of one machine; this machine's without it")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/bench"))
    parser.add_argument(
        "--readme", type=pathlib.Path, help="only write the headline table, of the committed results, into this file"
    )


def run(args: argparse.Namespace) -> int:
    folder = args.results or cli.RESULTS / (README_MACHINE if args.readme else machine.name())
    records = tables.load(folder)
    if not records:
        raise ValueError(f"no results in {folder}: run nystromgan bench")
    if args.readme:
        args.readme.write_text(with_headline(args.readme.read_text(), records))
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.md").write_text(markdown(records))
    (args.output / "report.html").write_text(page(records))
    print(f"Open {args.output / 'report.html'} in a browser.")
    return 0


def with_headline(text: str, records: dict[str, Any]) -> str:
    """The README with the table of these records between its two marks."""
    before, rest = text.split(START)
    return f"{before}{START}\n{tables.headline(records)}\n{END}{rest.split(END)[1]}"


def sections(records: dict[str, Any]) -> list[tuple[str, str, Table]]:
    """Title, sentence and table of each part of the report."""
    rows = tables.rows_of(records)
    return [
        ("Against the best other form", _ratio_note(), _ratios(rows)),
        (
            "Where landmark attention passes exact attention",
            "Below these lengths torch's fused full attention is the better choice: the pseudo-inverse of A and the "
            "passes over landmarks cost the same however short the sequence is.",
            _crossovers(rows),
        ),
        ("Targets", "What the project promises on a CPU, and whether it holds here.", _targets(rows)),
        ("Every form", "Median, quartiles, rounds; what was not run, and why.", _everything(rows)),
    ]


def _ratio_note() -> str:
    return (
        "Ratio: the peer's time over ours, the median of the rounds' ratios; a ratio whose quartiles lie more than 10% "
        "apart is marked noisy. Floor: the operations over the rate of matrix products, or the bytes over that of a "
        "copy, whichever is longer, both measured in the same run."
    )


def _ratios(rows: list[tables.Row]) -> Table:
    found = [["case", "mode", "ours, ms", "best other, ms", "form", "ratio", "of floor", "MiB, ours", "MiB, other"]]
    for pair in tables.results(rows):
        ours, peer = pair
        noisy = " (noisy)" if pair.noisy else ""
        found.append(
            [
                ours["case"], ours["mode"], tables.number(ours["median_ms"]), tables.number(peer["median_ms"]),
                peer["form"], f"{pair.ratio:.2f}{noisy}", f"{ours['median_ms'] / ours['floor_ms']:.1f}x",
                tables.mib(ours), tables.mib(peer),
            ]
        )  # fmt: skip
    return found


def _crossovers(rows: list[tables.Row]) -> Table:
    lines = [[dtype, mode, f"{n:,}" if n else "–"] for dtype, mode, n in tables.crossovers(rows)]
    return [["dtype", "mode", "faster from N ="], *lines]


def _targets(rows: list[tables.Row]) -> Table:
    found = [["case", "mode", "against", "ratio", "promised", "held"]]
    for target in tables.TARGETS:
        for pair, holds in tables.held(target, rows):
            verdict = "yes" if holds else "no"
            cells = [pair.ours["case"], pair.ours["mode"], pair.peer["form"], f"{pair.ratio:.2f}"]
            found.append([*cells, f"{target.least:.2f}", verdict])
    return found


def _everything(rows: list[tables.Row]) -> Table:
    found = [["case", "mode", "form", "median, ms", "quartiles, ms", "rounds", "error", "MiB"]]
    for row in rows:
        cells = [row["case"], row["mode"], row["form"]]
        if "median_ms" not in row:
            found.append([*cells, "wrong" if row.get("wrong") else "not run: " + row["not_run"], "", "", "", ""])
            continue
        spread = f"{tables.number(row['low_ms'])} to {tables.number(row['high_ms'])}"
        error = f"{max(row['errors'].values()):.0e}"
        cells += [tables.number(row["median_ms"]), spread, str(row["rounds"]), error, tables.mib(row)]
        found.append(cells)
    return found


def _method(records: dict[str, Any]) -> list[str]:
    """What a reader needs to judge the numbers."""
    lines = []
    for op, record in records.items():
        where, rates = record["machine"], record["rates"]
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        lines.append(
            f"{op}: {where['name']} ({where['cpu']['model']}, {where['cpu']['threads']} threads), {versions}, commit "
            f"{where['commit']}; products {rates['gemm_fp32_flop_per_s'] / 1e9:,.0f} GFLOP/s in fp32 and "
            f"{rates['gemm_bf16_flop_per_s'] / 1e9:,.0f} in bf16, copy {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s."
        )
    return lines


def markdown(records: dict[str, Any]) -> str:
    parts = ["# Landmark attention, measured", *(f"- {line}" for line in _method(records))]
    for title, note, table in sections(records):
        parts += ["", f"## {title}", "", note, "", _markdown_table(table)]
    return "\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def page(records: dict[str, Any]) -> str:
    """The whole HTML document."""
    from nystromgan.bench import plots  # here, so that the README's table needs no matplotlib
    from nystromgan.zoo.demo.style import STYLE

    rows = tables.rows_of(records)
    figures = "".join(
        f"<figure><figcaption>{title}, {mode}, {dtype}</figcaption>{drawing}</figure>"
        for field, title in (("median_ms", "Time"), ("peak_bytes", "Peak extra memory"))
        for dtype in ("fp32", "bf16")
        for mode in MODES
        if (drawing := plots.growth(rows, mode, dtype, field))
    )
    growth = (
        f"<h2>Time and memory over tokens</h2><p class=muted>(B, H, D, M) = (1, 8, 64, 64); both axes logarithmic. "
        f"{FULL} is torch's fused attention.</p>{plots.legend(rows)}<div class=pair>{figures}</div>"
    )
    body = [
        "<h1>Landmark attention, measured</h1>",
        "<p>Our kernels beside the best that torch and other libraries do, in one run on one machine. A result that is "
        "wrong has no time.</p>",
        growth if figures else "",
        *(f"<h2>{title}</h2><p class=muted>{note}</p>{_html_table(table)}" for title, note, table in sections(records)),
        "<h2>How this was measured</h2><ul class=muted>"
        + "".join(f"<li>{html.escape(x)}</li>" for x in _method(records)),
        "</ul>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Landmark attention, measured</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}\n</main>\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    head = _cells(table[0], "th")
    lines = "".join(f"<tr>{_cells(cells, 'td')}</tr>" for cells in table[1:])
    return f"<div class=scroll><table class=numbers><tr>{head}</tr>{lines}</table></div>"


def _cells(contents: Iterable[str], tag: str) -> str:
    first, *rest = (html.escape(content) for content in contents)
    return f"<th>{first}</th>" + "".join(f"<{tag}>{content}</{tag}>" for content in rest)
