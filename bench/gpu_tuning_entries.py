"""What the tuning stage measures: every entry of the Triton kernels' tables, and the cases whose time decides on it."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

import nystromgan
from nystromgan import _triton
from nystromgan.bench.case import BOTH, FORWARD, Case
from nystromgan.bench.cases import iterative_pinv, nystrom_attention, power_iteration, spatiotemporal_attention

ITEMSIZES = {"bf16": 2, "fp32": 4}
# What comes first where time is short: long sequences in half precision, SAVGAN's shapes, float32, wide heads.
FIRST, SAVGAN, FLOAT32, WIDE = range(4)
# (B, H, N, D, E, M), with the dtypes that they are measured in.
LONG = [((1, 8, 65536, 64, 64, 64), ("bf16",)), ((1, 8, 16384, 64, 64, 64), ("bf16", "fp32"))]
SAVGANS = [((8, 1, 2048, 8, 64, 64), ("bf16", "fp32")), ((8, 1, 16384, 4, 32, 512), ("bf16", "fp32"))]
TOKENS = LONG + SAVGANS + [((1, 8, 16384, d, d, m), ("bf16", "fp32")) for d in (128, 256) for m in (64, 256)]
# (B, C, E) of maps of 64 x 64 positions; those of the targets first.
MAPS = [(8, 8, 64), (4, 32, 128), (8, 64, 64), (4, 128, 128), (4, 32, 256), (4, 256, 256)]


class Entry(NamedTuple):
    """A configuration in a table of an op's tuning module: under a key and, where that holds a row, in a column."""

    op: str
    table: str
    key: Any
    column: int | None = None

    @property
    def tuning(self) -> Any:
        return importlib.import_module(f"nystromgan.ops.{self.op}.tuning")

    @property
    def own(self) -> str:
        """The name of what the table holds."""
        held = getattr(self.tuning, self.table)[self.key]
        return str(held if self.column is None else held[self.column])

    @property
    def column_name(self) -> str | None:
        return None if self.column is None else column_names(self.op)[self.column]

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Inside, the table holds the configuration called `name`, and its kernel runs where there is a choice."""
        tuning = self.tuning
        table = getattr(tuning, self.table)
        with mock.patch.dict(table, {self.key: replaced(table[self.key], self.column, name)}):
            if self.op == "iterative_pinv" and self.key[0] in ("chip", "iterate"):
                most = tuning.COLUMNS[-1] if self.key[0] == "chip" else 0
                with mock.patch.dict(tuning.CHIP_MOST, {self.key[1]: most}):
                    yield
            else:
                yield


def replaced(held: Any, column: int | None, name: str) -> Any:
    """What a table holds under one key, with the configuration called `name` in a column."""
    if column is not None:
        return (*held[:column], name, *held[column + 1 :])
    return type(held)(name)


def column_names(op: str) -> list[str]:
    columns = importlib.import_module(f"nystromgan.ops.{op}.tuning").COLUMNS
    return [" ".join(map(str, column)) if isinstance(column, tuple) else str(column) for column in columns]


class Measurement(NamedTuple):
    """An entry, the names of what may stand there, and a case in a mode that runs it."""

    entry: Entry
    candidates: Sequence[str]
    case: Case
    mode: str
    rank: int = FIRST

    @property
    def names(self) -> list[str]:
        """The candidates, what the table holds first."""
        return [self.entry.own, *(name for name in self.candidates if name != self.entry.own)]

    @property
    def place(self) -> dict[str, Any]:
        """What tells this row of a report from others."""
        entry = self.entry
        return {
            "op": entry.op, "table": entry.table, "key": entry.key, "column": entry.column_name,
            "case": self.case.name, "mode": self.mode,
        }  # fmt: skip


def measurements(device: str, tiny: bool) -> list[Measurement]:
    """All of them, what matters most first; those of one case and mode lie together."""
    architecture = _triton.architecture(torch.empty(0, device=device))
    found = [one for source in SOURCES for one in source(architecture, tiny)]
    return sorted(found, key=lambda one: one.rank)


def _attention(architecture: int, tiny: bool) -> Iterator[Measurement]:
    from nystromgan.ops.nystrom_attention import tuning

    op = nystrom_attention.OP
    for sizes, dtypes in [((1, 1, 40, 8, 8, 16), ("fp32",))] if tiny else TOKENS:
        for dtype in dtypes:
            itemsize, rank = ITEMSIZES[dtype], _rank(sizes, dtype)
            for case, mode, passes in _runs(sizes, dtype):
                for name in passes:
                    entry = Entry(op, "TABLE", (name, architecture, itemsize), tuning.column(max(sizes[3:5])))
                    yield Measurement(entry, tuning.CANDIDATES[itemsize], case, mode, rank)
            if rank in (FIRST, SAVGAN) and sizes[2] >= tuning.SPLIT_LEAST * max(tuning.SPLIT_CANDIDATES):
                splits = tuple(map(str, tuning.SPLIT_CANDIDATES))
                yield Measurement(Entry(op, "SPLITS", architecture), splits, _segments(sizes, dtype), BOTH, rank)


def _runs(sizes: tuple[int, ...], dtype: str) -> Iterator[tuple[Case, str, tuple[str, ...]]]:
    """Cases and modes with the passes that are measured on them; of wide heads and many landmarks only one."""
    segments = _segments(sizes, dtype)
    many = sizes[-1] > 64  # more than one tile holds
    if not (many and max(sizes[3:5]) > 64):
        yield segments, FORWARD, ("landmarks", "output")
        yield segments, BOTH, ("query_sums", "keys", "query")
    if many:
        yield segments, BOTH, ("query_stats",)
    else:
        yield _clustered(sizes, dtype), FORWARD, ("index_sum", "lloyd")
        yield _convolved(sizes, dtype), BOTH, ("weight_gradient",)


def _rank(sizes: tuple[int, ...], dtype: str) -> int:
    if max(sizes[3:5]) > 64:
        return WIDE
    return FLOAT32 if dtype == "fp32" else FIRST if sizes[1] > 1 else SAVGAN


def _segments(sizes: tuple[int, ...], dtype: str) -> Case:
    return nystrom_attention.landmark_case("tokens", sizes, dtype, "cuda")._replace(peers={})


def _convolved(sizes: tuple[int, ...], dtype: str) -> Case:
    """With a convolution of the values beside the attention."""
    made = nystrom_attention.convolved_case(sizes[2], dtype, "cuda").make
    return _segments(sizes, dtype)._replace(group="convolution", make=made)


def _clustered(sizes: tuple[int, ...], dtype: str) -> Case:
    """Two Lloyd steps, held to what the benchmark holds them to."""
    ours = nystrom_attention.ours(num_landmarks=sizes[-1], cluster_iterations=2)
    tolerance = nystrom_attention.clustered_case(sizes[2], dtype, "cuda").tolerance
    return _segments(sizes, dtype)._replace(group="clustered", ours=ours, tolerance=tolerance)


def _pinv(architecture: int, tiny: bool) -> Iterator[Measurement]:
    from nystromgan.ops.iterative_pinv import tuning

    def of(kernel: str, side: int, case: Case, mode: str) -> Measurement:
        entry = Entry("iterative_pinv", "TABLE", (kernel, architecture), tuning.COLUMNS.index(min(side, 128)))
        candidates = tuning.CANDIDATES.get(kernel, tuning.TILED)
        if kernel not in ("chip", "product"):  # whose tiles hold no more than the matrix
            candidates = tuple(name for name in candidates if tuning.named(name)["TILE"] <= side)
        return Measurement(entry, candidates, case, mode, FIRST if side in (64, 512) else WIDE)

    for side in (16,) if tiny else (64, 128, 32, 16):
        matrices = iterative_pinv.pinv_case(1 if tiny else 64, side, "fp32")
        yield from (of(kernel, side, matrices, FORWARD) for kernel in ("chip", "iterate"))
        yield of("backward", side, matrices, BOTH)
        sizes, dtype = ((1, 1, 40, 8, 8, side), "fp32") if tiny else ((1, 8, 4096, 64, 64, side), "bf16")
        # Of 16 rows all candidates are one: they have one tile, and the inverse takes at least the warps of its pass.
        kernels = ("beside", "core_backward") if side > 16 else ("core_backward",)
        yield from (of(kernel, side, _segments(sizes, dtype), BOTH) for kernel in kernels)
        if side < 128:  # below, one tile a program is for a start that the whole batch shares
            yield of("product", side, _global(matrices), FORWARD)
    for count in () if tiny else (64, 1):
        yield of("product", 512, iterative_pinv.pinv_case(count, 512, "fp32"), FORWARD)


def _global(case: Case) -> Case:
    return case._replace(
        group="pinv, global_max",
        ours=lambda backend: functools.partial(nystromgan.iterative_pinv, init="global_max", backend=backend),
    )


def _maps(architecture: int, tiny: bool) -> Iterator[Measurement]:
    from nystromgan.ops.spatiotemporal_attention import tuning

    for dtype, itemsize in ITEMSIZES.items():
        most = 64 if dtype == "fp32" else 256  # channels of a tile, as the launcher has it
        for i, (batch, channels, values) in enumerate(MAPS[: 3 if dtype == "fp32" else None]):
            case = spatiotemporal_attention.map_case(batch, channels, values, 64, dtype, "cuda")._replace(peers={})
            tiles = (_triton.tile(size, most) for size in (channels, values))
            column = tuning.column(*tiles, max(channels, values) > most)
            rank = FLOAT32 if dtype == "fp32" else FIRST if i < 2 else WIDE
            for kernel, mode in (("forward", FORWARD), ("grad_query", BOTH), ("grad_key_value", BOTH)):
                entry = Entry("spatiotemporal_attention", "TABLE", (kernel, architecture, itemsize), column)
                one = Measurement(entry, tuning.CANDIDATES[itemsize], case, mode, rank)
                if not tiny:
                    yield one
                elif dtype == "fp32" and i == 0:
                    yield one._replace(case=case._replace(shape={"B": 1, "C": 4, "E": 8, "side": 5}))


def _power(architecture: int, tiny: bool) -> Iterator[Measurement]:
    from nystromgan.ops.power_iteration import tuning

    for dtype in ("fp32",) if tiny else ("fp32", "bf16"):
        case = power_iteration.sigma_case(4 if tiny else 40, dtype)._replace(peers={})
        yield Measurement(Entry("power_iteration", "TABLE", architecture), tuple(tuning.CONFIGS), case, FORWARD)


SOURCES: tuple[Callable[[int, bool], Iterator[Measurement]], ...] = (_power, _attention, _pinv, _maps)
