"""The paper's latencies as ratios beside ours, for each engine and number of threads, and which orderings hold.

Milliseconds of a phone's core and of this machine are not to be compared; how much longer one network takes than
another is. The figures are the ledger's (``conf/ledger``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.benchmark import Options
from tasks.cli import CONF
from tasks.deploy import facts, machine
from tasks.deploy.cases import Case, Network, check_threads, cores, engines_of, network_of
from tasks.deploy.progress import Progress, show
from tasks.reporting.ledger import LedgerTable, Row, choose, read_ledger

if TYPE_CHECKING:
    from tasks.deploy.latency import Store

ROUNDS = 60
RATIOS = (
    "ratios    of the network's time to that of the table's first row, batch 1, timed in the same rounds: median "
    "[95 % interval]; the printed ones are of the printed milliseconds"
)
HOLDS = (
    "holds     of two rows the printed slower one is slower here, too; reversed: it is faster; not told apart: the "
    "99 % interval of their ratio reaches within 2 % of 1"
)
QUANTISED = {"4": "the printed latencies are of 8-bit networks, ours of float32"}


class Pair(NamedTuple):
    """Two rows of a table, the printed one of them slower on some device."""

    slower: str
    faster: str
    device: str
    printed: float
    """Printed ratio, above 1."""
    ours: float
    verdict: str
    """``holds``, ``reversed``, or ``not told apart``."""


class Measured(NamedTuple):
    """A table under one engine and number of threads."""

    title: str
    """``onnxruntime, 2 threads``, and to which row the ratios are where the table's first could not be run."""
    engine: str
    threads: int
    rows: list[Row]
    ratios: list[tuple[float, float, float]]
    """Of each row to the first: median, 95 % interval."""
    ms: list[float]
    pairs: list[Pair]
    noise: list[str]


class Latencies(NamedTuple):
    """What ``measure`` found."""

    tables: dict[str, list[Measured]]
    """By the table's name."""
    notes: list[str]
    """The conditions, what the words mean, what was left out and why."""
    interrupted: bool

    def lines(self, table: LedgerTable) -> list[str]:
        """Of a table, as markdown; none if it was not asked for."""
        return written(table, self.tables[table.name]) if table.name in self.tables else []

    def plain(self, table: LedgerTable) -> list[dict[str, Any]]:
        """Of a table, as JSON has it."""
        return [plain(measured) for measured in self.tables.get(table.name, [])]


def work(options: Options) -> int:
    """Measure the tables and print them. Returns the exit code."""
    tables = choose(read_ledger(CONF / "ledger"), options.table, None)
    found = measure(tables, options)
    parts = [line for name in found.tables for line in (f"### {tables[name].title}", "", *found.lines(tables[name]))]
    show(parts + found.notes, options.out)
    from tasks.deploy.latency_text import conclude  # imports torch

    code = conclude(options.results, found.notes)
    return 130 if found.interrupted else code


def measure(tables: Mapping[str, LedgerTable], options: Options) -> Latencies:
    """Every table's networks in turn, for each engine and number of threads.

    Args:
        tables: by name, with their rows.
        options: engines, threads, rounds, seconds, and where the records go (``results`` None: nowhere).
    Raises:
        ValueError: a table that prints no latencies; an engine that is unknown or not installed.
    """
    for name, table in tables.items():
        if not table.devices:
            with_ms = [key for key, one in read_ledger(CONF / "ledger").items() if one.devices]
            raise ValueError(f"table={name} prints no latencies; those that do: {', '.join(with_ms)}")
    left_out: list[str] = []
    engines = list(dict.fromkeys(engines_of(options.engine, left_out)))
    counts = list(dict.fromkeys(options.threads or [cores()]))
    check_threads(counts)
    progress, watch = Progress(len(tables) * len(engines) * len(counts)), machine.Watch()
    from tasks.deploy.latency import Store

    found: dict[str, list[Measured]] = {name: [] for name in tables}
    interrupted = False
    try:
        for name, table in tables.items():
            with tempfile.TemporaryDirectory(prefix="mobilenetv3_bench_") as folder:
                store = Store(Path(folder))
                for engine, threads in product(engines, counts):
                    one = measure_table(table, engine, threads, options, store, progress, left_out)
                    found[name] += [one] if one else []
                    progress.step()
    except KeyboardInterrupt:
        interrupted = True
    progress.clear()
    packages = sorted({name for engine in engines for name in facts(engine)["PACKAGES"]})
    notes = [*machine.in_words(counts, packages), RATIOS, HOLDS, watch.load().in_words()]
    notes += [f"table {name}   {QUANTISED[name]}" for name in tables if name in QUANTISED]
    return Latencies(found, notes + [f"left out  {line}" for line in dict.fromkeys(left_out)], interrupted)


def rows_of(table: LedgerTable) -> list[Row]:
    """The rows that print a latency and can be built; the same network twice (an older text) only once."""
    rows: dict[tuple[str, ...], Row] = {}
    for row in table.rows:
        if row.network and row.ms:
            rows.setdefault((*row.network.overrides, str(row.network.size)), row)
    return list(rows.values())


def case_of(row: Row, engine: str, threads: int) -> Case:
    """A row's network, to be timed."""
    assert row.network
    height, width = row.network.size
    overrides = [*row.network.overrides, f"image_size=[{height},{width}]"]
    network: Network = network_of(row.network.command, overrides)
    return Case(network, engine, threads, "f32", 1)


def measure_table(
    table: LedgerTable,
    engine: str,
    threads: int,
    options: Options,
    store: Store,
    progress: Progress,
    left_out: list[str],
) -> Measured | None:
    """All rows of a table side by side, each with its record; None where the engine cannot run two of them."""
    from tasks.deploy import latency, timing
    from tasks.deploy.latency_text import Result, keep

    rows, opened = [], []
    for row in rows_of(table):
        one = latency.open_group([case_of(row, engine, threads)], store, progress, left_out)
        rows += [row] if one else []
        opened += one
    if len(rows) < 2:
        return None

    def on_round(done: int, total: int) -> None:
        progress.say(f"{table.name}, {engine}, {threads} thread(s): round {done} of {total}", part=done / total)

    turns = {row.name: timing.timed(latency.call_of(one)) for row, one in zip(rows, opened, strict=True)}
    watch = machine.Watch()
    times = timing.measure(turns, options.rounds or ROUNDS, options.seconds, on_round=on_round)
    if times.interrupted:
        raise KeyboardInterrupt
    load = watch.load()
    noise = machine.noise(load)
    summaries = [timing.summarise(times.ms[:, i]) for i in range(len(rows))]
    for each, summary in zip(opened, summaries, strict=True):
        keep(Result(each, summary, None, load, noise, times.steady), options.results, left_out)
    ratios = [timing.compare(times.ms[:, i], times.ms[:, 0]) for i in range(len(rows))]
    pairs = []
    for (i, row), (j, other) in combinations(enumerate(rows), 2):
        ratio = timing.compare(times.ms[:, i], times.ms[:, j])
        pairs += judged(row, other, table.devices, ratio.median, ratio.different)
    title = f"{engine}, {threads} thread{'s' if threads > 1 else ''}"
    if rows[0] != rows_of(table)[0]:
        title += f", to {rows[0].name}"
    return Measured(
        title,
        engine,
        threads,
        rows,
        [(ratio.median, ratio.low, ratio.high) for ratio in ratios],
        [summary.median for summary in summaries],
        pairs,
        noise,
    )


def judged(row: Row, other: Row, devices: Sequence[str], ours: float, different: bool) -> list[Pair]:
    """What a printed pair says on each device, and whether it is so here.

    Args:
        row, other: of one table.
        devices: of the printed milliseconds, in their order.
        ours: time of ``row`` over that of ``other``.
        different: whether ours are surely apart.
    """
    pairs = []
    for device, first, second in zip(devices, row.ms, other.ms, strict=False):
        printed = float(first) / float(second)
        if printed == 1:
            continue
        here = ours if printed > 1 else 1 / ours
        names = (row.name, other.name) if printed > 1 else (other.name, row.name)
        verdict = "not told apart" if not different else "holds" if here > 1 else "reversed"
        pairs.append(Pair(*names, device, max(printed, 1 / printed), here, verdict))
    return pairs


def written(table: LedgerTable, found: Sequence[Measured]) -> list[str]:
    """Markdown: ratios row by row, then the orderings."""
    if not found:
        return ["nothing was measured", ""]
    names = [one.title for one in found]
    rows = [row for row in rows_of(table) if any(row in one.rows for one in found)]
    head = ["row", *(f"{device} ms" for device in table.devices), *(f"{device} ratio" for device in table.devices)]
    head += [f"{name}: ratio" for name in names] + [f"{name}: ms" for name in names]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    first = rows[0]
    for row in rows:
        cells = [row.name, *row.ms]
        cells += [f"{float(a) / float(b):.2f}" for a, b in zip(row.ms, first.ms, strict=False)]
        places = [[one.name for one in measured.rows].index(row.name) if row in measured.rows else None
                  for measured in found]  # fmt: skip
        for measured, place in zip(found, places, strict=True):
            cells.append("-" if place is None else "{:.2f} [{:.2f}, {:.2f}]".format(*measured.ratios[place]))
        for measured, place in zip(found, places, strict=True):
            cells.append("-" if place is None else f"{measured.ms[place]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *orderings(table, found, names)]


def orderings(table: LedgerTable, found: Sequence[Measured], names: Sequence[str]) -> list[str]:
    """Counts of the orderings that hold, a row an engine and device, and those that do not by name."""
    lines = ["| engine | device | holds | reversed | not told apart | |", "|" + " --- |" * 6]
    wrong = []
    for name, one in zip(names, found, strict=True):
        for device in table.devices:
            pairs = [pair for pair in one.pairs if pair.device == device]
            counts = [sum(p.verdict == verdict for p in pairs) for verdict in ("holds", "reversed", "not told apart")]
            noisy = f"noisy: {'; '.join(one.noise)}" if one.noise else ""
            lines.append(f"| {name} | {device} | {' | '.join(f'{n} of {len(pairs)}' for n in counts)} | {noisy} |")
            wrong += [
                f"- {name}: {pair.slower} takes {pair.printed:.2f} x {pair.faster} on {device}, here {pair.ours:.2f} x"
                for pair in pairs
                if pair.verdict == "reversed" and device == table.devices[0]
            ]
    return [*lines, "", *wrong, ""] if wrong else [*lines, ""]


def plain(measured: Measured) -> dict[str, Any]:
    """As JSON has it."""
    rows = [
        {"row": row.name, "ms": ms, "ratio": ratio, "low": low, "high": high}
        for row, ms, (ratio, low, high) in zip(measured.rows, measured.ms, measured.ratios, strict=True)
    ]
    about = {"title": measured.title, "engine": measured.engine, "threads": measured.threads, "noise": measured.noise}
    return {**about, "rows": rows, "orderings": [pair._asdict() for pair in measured.pairs]}
