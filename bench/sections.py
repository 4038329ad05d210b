"""The parts of the report: a title, a sentence and a table each, the same in HTML and Markdown."""

from typing import NamedTuple

from nystromgan.bench import gpu_targets, store, tables, targets
from nystromgan.bench.case import BOTH
from nystromgan.bench.cases import cases
from nystromgan.bench.landmarks import EXACT

Table = list[list[str]]  # rows of cells, the first the head
MEMORY_AGREES = 0.1


class Section(NamedTuple):
    """One part; `plots` names the drawings above its table, `folded` leaves it closed on the page."""

    title: str
    note: str
    table: Table | None
    plots: str = ""
    folded: bool = False


def all_of(records: dict[str, store.Record]) -> list[Section]:
    """The parts for which there are results."""
    rows = store.rows_of(records)
    parts = []
    if any(row["group"] == "landmarks" for row in rows):
        parts.append(_growth(rows))
        parts.append(_crossovers(rows))
    if store.LANDMARKS in records:
        parts.append(_landmarks(records[store.LANDMARKS]["rows"]))
    parts.append(_gpu_targets(records) if _of_gpu(records) else _targets(records))
    if not rows:
        return parts
    return [*parts, _ratios(rows), *([memory] if (memory := _memory(rows)) else []), _everything(rows)]


def tiles(records: dict[str, store.Record]) -> list[tuple[str, str]]:
    """The largest of each of the README's cases in float32, forward and backward."""
    found = {}
    for pair in tables.results(store.rows_of(records)):
        ours = pair.ours
        if ours["dtype"] == "fp32" and ours["group"] in tables.LABELS and ours["mode"] == BOTH:
            label = tables.LABELS[ours["group"]].format(**ours)
            found[ours["group"]] = (f"{pair.ratio:.1f}x", f"{label}, {ours['mode']}, fp32, beside {pair.peer['form']}")
    return list(found.values())


def _growth(rows: list[tables.Row]) -> Section:
    note = (
        "(B, H, D, M) = (1, 8, 64, 64). Both axes are logarithmic; a line that ends early was stopped where a call "
        "would "
        "take too long. Landmark attention grows as N, exact attention as N x N in time, while its fused kernels "
        "store no "
        "more than their output."
    )
    return Section("Time and memory over tokens", note, None, "growth")


def _crossovers(rows: list[tables.Row]) -> Section:
    sentences, table = [], [["dtype, mode", "faster from N =", "exact over ours, by N"]]
    for dtype, mode, ratios in tables.crossovers(rows):
        crossing = tables.crossing(ratios)
        least = min(ratios)
        below = "never, at these sizes" if crossing is None else f"about {_round(crossing):,}"
        if crossing == least:
            below = f"{least:,}, the least measured"
        shown = ", ".join(f"{n:,}: {ratio:.2f}" for n, ratio in sorted(ratios.items()))
        table.append([f"{dtype}, {mode}", below, shown])
        if crossing is None or crossing > least:
            sentences.append(f"{mode} in {dtype}")
    note = (
        "Below the crossing torch's fused full attention is the better choice, and it is exact: it does 2 N N (D + E) "
        "operations, ours 4 N M (D + E) and, however short the sequence, 48 M M M for the pseudo-inverse and three "
        "passes "
        "over landmarks. With M = 64 the counts are equal near N = 300; what ours takes beyond its count moves the "
        "crossing "
        "up. Exact attention is also the choice where attention is sharp: see the errors below."
    )
    losing = f" Ours loses somewhere in: {', '.join(sentences)}." if sentences else ""
    return Section("Where landmark attention passes exact attention", note + losing, table)


def _round(value: float) -> int:
    """To two digits: it lies between two sizes measured."""
    return int(float(f"{value:.2g}"))


def _landmarks(rows: list[dict]) -> Section:
    note = (
        "Error: |landmark - exact| / |exact - plain mean|, so that 1 is no better than the plain mean; N = 12,288 "
        "voxels of "
        "a time-lapse of cells through a random 3-D convolution, D = 8, the median of three networks, their range "
        "shaded. "
        "Sharpness is the standard deviation of the logits. Clustered landmarks are grid means after two Lloyd steps."
    )
    sharpnesses = list(next(row["errors"] for row in rows if row["errors"]))
    table = [["landmarks", "ms, forward", *(f"error, sharpness {value}" for value in sharpnesses)]]
    for row in rows:
        name = EXACT if row["kind"] == EXACT else f"{row['landmarks']} {row['kind']}"
        errors = [_error(row["errors"][value]) if row["errors"] else "0" for value in sharpnesses]
        table.append([name, tables.number(row["median_ms"]), *errors])
    return Section("Accuracy and time over landmarks, on a real video", note, table, "landmarks")


def _error(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def _targets(records: dict[str, store.Record]) -> Section:
    note = (
        "What the project promises on a two-core CPU. Of several cases the one nearest to a miss is shown. Cost, "
        "memory and floor are ours over the other's."
    )
    table = [["line", "needed", "measured", "where", "held"]]
    for finding in targets.findings(store.rows_of(records)):
        target = finding.target
        if finding.value is None:
            table.append([target.line, target.needed, "–", "not measured", "–"])
            continue
        noisy = " (noisy)" if finding.noisy else ""
        held = "yes" if finding.held else "no"
        table.append([target.line, target.needed, f"{finding.value:.2f}x{noisy}", finding.place, held])
    return Section("Targets", note, [*table, targets.spectral_line(records), targets.landmark_line(records)])


def _of_gpu(records: dict[str, store.Record]) -> bool:
    """Whether the results are of a GPU, on which other promises are made."""
    machines = (record.get("machine", {}) for record in records.values())
    return store.GPU_TARGETS in records or any(machine.get("device") == "cuda" for machine in machines)


def _gpu_targets(records: dict[str, store.Record]) -> Section:
    """The verdicts over the rows of gpu_check's targets stage; without its file, over those of the benchmark."""
    rows = records[store.GPU_TARGETS]["rows"] if store.GPU_TARGETS in records else store.rows_of(records)
    found = gpu_targets.verdicts(rows, cases("cuda"))
    words = [verdict.word for verdict in found]
    counts = ", ".join(f"{words.count(word)} {word}" for word in gpu_targets.WORDS)
    note = (
        f"What the project promises on an H200: {counts}. Of several cases the one nearest to a miss is shown. A "
        "GPU's time is of calls replayed in a CUDA graph, beside it that of plain calls; a ratio is the peer's time "
        "over ours, what else compares is ours over the other's."
    )
    table = [["line", "needed", "measured", "plain call", "where", "verdict"]]
    for verdict in found:
        numbers = ["–" if value is None else tables.number(value) for value in (verdict.value, verdict.plain)]
        line = verdict.line
        table.append([line.words, f"{line.measure} {line.needed}", *numbers, verdict.place, verdict.word])
    return Section("Targets", note, table)


def _ratios(rows: list[tables.Row]) -> Section:
    note = (
        "Ratio: the peer's time over ours, the median of the rounds' ratios with its quartiles; noisy where those, "
        "the medians of the run's two visits, or two runs of one commit, lie more than 10% apart. Roofline: the least "
        "time, by operations over the rate of matrix products or bytes over that of a copy, whichever is longer, as a "
        "share of ours; both rates are of the same run."
    )
    marked = [pair.noisy for pair in tables.results(rows)]
    note += f" {sum(marked)} of {len(marked)} are noisy here."
    table = [
        [
            "case",
            "mode",
            "ours, ms",
            "other, ms",
            "best other form",
            "ratio",
            "quartiles",
            "roofline",
            "MiB",
            "MiB, other",
        ]
    ]
    for pair in tables.results(rows):
        ours, peer = pair
        table.append(
            [
                ours["case"], ours["mode"], tables.number(ours["median_ms"]), tables.number(peer["median_ms"]),
                peer["form"], f"{pair.ratio:.2f}{' (noisy)' if pair.noisy else ''}",
                f"{peer['ratio_low']:.2f} to {peer['ratio_high']:.2f}", _share(ours),
                tables.mib(ours), tables.mib(peer),
            ]
        )  # fmt: skip
    return Section("Against the best other form", note, table)


def _share(row: tables.Row) -> str:
    return f"{row['floor_ms'] / row['median_ms']:.0%}" if row["floor_ms"] else "–"


def _memory(rows: list[tables.Row]) -> Section | None:
    held = {(case.name, mode): size for case in cases() for mode, size in case.held_bytes.items()}
    table = [["case", "mode", "MiB, measured", "MiB, predicted", "agrees within 10%"]]
    for row, ratio in tables.predicted(rows, held):
        verdict = "yes" if abs(ratio - 1) <= MEMORY_AGREES else "no"
        predicted = tables.number(row["peak_bytes"] / ratio / 2**20)
        table.append([row["case"], row["mode"], tables.mib(row), predicted, verdict])
    note = "Outputs and gradients, where they outweigh everything else that a call holds."
    return Section("Memory against the formula", note, table) if len(table) > 1 else None


def _everything(rows: list[tables.Row]) -> Section:
    table = [["case", "mode", "form", "median, ms", "quartiles, ms", "rounds", "error", "MiB"]]
    for row in rows:
        cells = [row["case"], row["mode"], row["form"]]
        if "median_ms" not in row:
            table.append([*cells, "wrong" if row.get("wrong") else "not run: " + row["not_run"], "", "", "", ""])
            continue
        spread = f"{tables.number(row['low_ms'])} to {tables.number(row['high_ms'])}"
        error = f"{max(row['errors'].values()):.0e}"
        cells += [tables.number(row["median_ms"]), spread, str(row["rounds"]), error, tables.mib(row)]
        table.append(cells)
    return Section("Every form", "Median, quartiles, rounds; what was not run, and why.", table, folded=True)


def method(records: dict[str, store.Record]) -> list[str]:
    """What a reader needs to judge the numbers."""
    lines = []
    for op, record in records.items():
        if op == store.GPU_TARGETS:
            lines.append(_targets_method(record))
            continue
        where, rates = record["machine"], record.get("rates")
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        line = (
            f"{op}: {where['name']} ({where['cpu']['model']}, {where['cpu']['threads']} threads), {versions}, commit "
        )
        line += f"{where['commit']}"
        if rates:
            line += (
                f"; products {rates['gemm_fp32_flop_per_s'] / 1e9:,.0f} GFLOP/s in fp32 and "
                f"{rates['gemm_bf16_flop_per_s'] / 1e9:,.0f} in bf16, copy {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s"
            )
        lines.append(line + ".")
    return lines


def _targets_method(record: store.Record) -> str:
    """Of the targets' file, whose rows may be of several commits."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in record["rows"] if row.get("commit")))
    versions = ", ".join(f"{name} {record[name]}" for name in ("python", "torch", "triton", "cuda") if record.get(name))
    return f"targets: {record['device']}, {versions}, commit {commits or 'unknown'}."
