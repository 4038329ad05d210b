"""The tables of the modules' pages, from the results of bench_modules: what stands between a page's marks."""

import pathlib
import re
from collections.abc import Callable, Sequence

from nystromgan.bench import store
from nystromgan.bench.tables import Row, number

BLOCK = re.compile(r"(<!-- modules: (\w+) ?(.*?); written by make bench-docs -->\n).*?(<!-- /modules -->)", re.DOTALL)
Column = tuple[str, Callable[[Row], str]]


def _of(field: str) -> Callable[[Row], str]:
    return lambda row: str(row[field]).replace("+", " + ")


def _ms(field: str) -> Callable[[Row], str]:
    return lambda row: f"{number(row[field])} ms"


def _percent(field: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row[field]:.2g}%"


def _times(row: Row) -> str:
    return f"{row['ratio']:.2f}"


COLUMNS: dict[str, list[Column]] = {
    "encoder": [
        ("attention", _of("form")), ("time", _ms("median_ms")), ("times faster", _times),
        ("error of the logits", _percent("logit_error")),
    ],
    "digits": [
        ("weights", _of("weights")), ("attention", _of("form")), ("error of the logits", _percent("logit_error")),
        ("accuracy", lambda row: f"{100 * row['accuracy']:.1f}%"),
    ],
    "nystromformer": [
        ("mode", _of("mode")), ("form", _of("form")), ("time", _ms("median_ms")), ("times faster", _times),
        ("error of the outputs", lambda row: f"{row['output_error']:.1e}"),
    ],
    "discriminator": [
        ("batch", _of("batch")), ("mode", _of("mode")), ("form", _of("form")), ("time", _ms("median_ms")),
        ("added", _ms("added_ms")), ("share of torch's", lambda row: f"{row['share_of_torch']:.2f}"),
    ],
    "crossover": [
        ("tokens", lambda row: f"{row['N']:,}"), ("mode", _of("mode")), ("attention", _of("form")),
        ("time", _ms("median_ms")), ("times faster", _times),
    ],
    "peaks": [
        ("case", _of("case")), ("mode", _of("mode")), ("form", _of("form")),
        ("MiB", lambda row: number(row["peak_bytes"] / 2**20)),
    ],
}  # fmt: skip


def with_tables(text: str, folder: pathlib.Path) -> str:
    """The page with the table of each pair of marks: `modules: NAME PREFIX`, rows of one module or cases' prefix."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}{table(found[2], found[3], folder)}\n{found[4]}"

    return BLOCK.sub(block, text)


def table(name: str, prefix: str, folder: pathlib.Path) -> str:
    record = store.read(folder / f"{name}.json")
    if not record["rows"]:
        raise ValueError(f"{folder} must hold {name}.json: run python -m nystromgan.bench.bench_modules --model {name}")
    columns = COLUMNS[name]
    rows = [row for row in record["rows"] if row.get("module", row.get("case", "")).startswith(prefix)]
    lines = [_line([header for header, _ in columns]), "|---" * len(columns) + "|"]
    lines += [_line([show(row) for _, show in columns]) for row in rows]
    return "\n".join([*lines, "", _note(name, record)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _note(name: str, record: store.Record) -> str:
    one_thread = record["clock"].startswith("CPU time")
    command = f"python -m nystromgan.bench.bench_modules --model {name}{' --cpu-time' if one_thread else ''}"
    machine = record["machine"]
    kind = {"digits": "", "peaks": ""}.get(name, f", {record['clock']}, medians")
    return f"`{command}`{kind}; `{machine['name']}`, torch {machine['versions']['torch']}."
