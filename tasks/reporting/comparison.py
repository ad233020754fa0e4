"""Run records to tables of what may be compared, each with what was left out of it and why.

A table holds runs of one task, data set (with all that defines it), split, image size and budget. A row holds runs that
differ in nothing but their seed; ``by`` says which fields name a row, and whatever else sets rows apart stands in its
``settings``. Nothing here needs torch.
"""

from __future__ import annotations

import json
import marshal
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple, cast

from tasks.reporting.grouping import (
    ABSENT,
    BY,
    differing,
    field_text,
    flatten,
    group_of,
    settings_of,
    titles,
    value_at,
)
from tasks.reporting.results import OPTIONAL, REQUIRED, Latency, Record
from tasks.reporting.statistics import Difference, Stat, paired_difference, places, summarise
from tasks.words import suggest

HEADLINES = ("map", "miou", "top1")
SHOWN = ("map", "map_50", "miou", "pixel_accuracy", "top1", "top5")
COSTS = ("params", "madds", "latency_ms")
OF_RUNS = ("data", "split", "seed", "budget", "weights", "config", "run", "train_seconds", "note")
"""Fields that say something of a trained run and nothing of a latency measured on its own."""


class Conditions(NamedTuple):
    """What must agree for latencies to stand in one column."""

    device: str
    engine: str
    threads: int
    batch_size: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return f"{self.engine}, {threads}, batch {self.batch_size}, {self.device}"


@dataclass
class Row:
    """Runs that differ only in their seed."""

    names: dict[str, str]
    """The fields of ``by``."""
    runs: list[Record]
    """One a seed, by seed."""
    settings: str = ""
    """``key=value`` of what else sets it apart from rows of the same names."""
    stats: dict[str, Stat | None] = field(default_factory=dict)
    params: int = 0
    madds: int = 0
    latency_ms: float | None = None
    """Median over the runs, under the table's conditions."""
    place: tuple[int, int] | None = None
    difference: Difference | None = None
    """To the table's ``base``."""

    @property
    def name(self) -> str:
        """The row in one line."""
        parts = [value for value in self.names.values() if value != "scratch"]
        return " ".join([" + ".join(parts), self.settings]).strip()

    def by_seed(self, metric: str) -> dict[int, float]:
        """seed -> value, where there is one."""
        found = {run["seed"]: run["metrics"].get(metric) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass
class Table:
    """Rows that may be compared."""

    title: str
    task: str
    fields: dict[str, str]
    """What all its runs share: task, data, split, image_size, budget."""
    rows: list[Row]
    metrics: list[str]
    """Every metric that a run has, headline first."""
    sort: str
    """The metric that places and differences are of."""
    latency: Conditions | None = None
    base: str | None = None
    """The name of the row that differences are taken to."""
    left_out: list[str] = field(default_factory=list)
    """What is not in it, and why."""
    mind: list[str] = field(default_factory=list)
    """What is in it and may mislead."""


@dataclass
class Comparison:
    """All tables, and what is in none of them."""

    tables: list[Table]
    left_out: list[str]


def compare(
    records: Sequence[Record],
    filters: Mapping[str, Sequence[str]] | None = None,
    by: Sequence[str] = BY,
    sort: str | None = None,
    against: str | None = None,
) -> Comparison:
    """Group, summarise, place.

    Args:
        records: in the order written; of runs equal in everything, the seed too, the last counts.
        filters: field (dotted for inside: ``config.optimizer.lr``, ``latency.engine``) -> accepted values; ``*`` may
            stand for anything.
        by: the fields that name a row.
        sort: what rows are ordered by: a metric (highest first), ``params``, ``madds``, ``latency_ms`` (lowest first)
            or a field of ``by``; ``-`` in front turns it round. None: the task's headline metric.
        against: the row that differences are taken to, by its name or one of its names; None: each table's first of
            several seeds.
    Returns:
        The tables, most runs first.
    Raises:
        ValueError: a field that no record has, or nothing left after filtering.
    """
    chosen, left_out = select(records, filters or {})
    for name in by:
        if all(value_at(record, name) is ABSENT for record in records):
            raise ValueError(f"by={name}: no record has a field {name}{suggest(name, REQUIRED + OPTIONAL)}")
    latency_filters = {k.partition(".")[2]: v for k, v in (filters or {}).items() if k.startswith("latency.")}
    if latency_filters and not any(_fits(record["latency"], latency_filters) for record in chosen):
        typed = " ".join(f"latency.{name}={','.join(accepted)}" for name, accepted in latency_filters.items())
        there = sorted({f"engine={one['engine']} threads={one['threads']}" for r in chosen if (one := r["latency"])})
        raise ValueError(f"{typed} fits no latency; there are {'; '.join(there[:12]) or 'none'}")
    measured: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in chosen:
        if record["metrics"]:
            groups[group_of(record)].append(record)
        else:
            measured[_network(record)].append(record)
    names = titles(groups)
    tables = []
    for key, runs in groups.items():
        table = _table(names[key], runs, by)
        _measure(table, measured, latency_filters)
        _place(table, sort, against)
        tables.append(table)
    tables.sort(key=lambda t: (t.task, -sum(len(row.runs) for row in t.rows), t.title))
    if sort and tables and not any(_sortable(t, sort.lstrip("-")) for t in tables):
        known = sorted({*COSTS, *by, *(m for t in tables for m in t.metrics)})
        raise ValueError(f"sort={sort}: no table has it; expected one of {', '.join(known)}")
    if against and not any(t.base for t in tables):
        raise ValueError(f"against={against}: no row has that name; there are {', '.join(_row_names(tables))}")
    return Comparison(tables, left_out)


def _row_names(tables: Iterable[Table]) -> list[str]:
    return sorted({row.name for table in tables for row in table.rows})[:20]


def select(records: Sequence[Record], filters: Mapping[str, Sequence[str]]) -> tuple[list[Record], list[str]]:
    """The records that every filter accepts, and a line for each filter on how many it did not.

    Raises:
        ValueError: no record has the field, or none is accepted.
    """
    chosen, left_out = list(records), []
    for name, accepted in filters.items():
        if name.startswith("latency."):
            continue  # chooses measurements, not runs
        if chosen and all(value_at(record, name) is ABSENT for record in chosen):
            raise ValueError(f"{name}={','.join(accepted)}: no record has a field {name}")
        values = [field_text(record, name) for record in chosen]
        fitting = {value for value in set(values) if any(fnmatchcase(value, a) for a in accepted)}
        # a latency measured on its own is of no data set and no run: it follows the networks that are left
        alone = name.partition(".")[0] in OF_RUNS
        kept = [r for r, v in zip(chosen, values, strict=True) if v in fitting or (alone and not r["metrics"])]
        if not fitting and chosen:
            there = ", ".join(sorted(set(values))[:12])
            raise ValueError(f"{name}={','.join(accepted)} fits no record; there are {there}")
        if len(kept) < len(chosen):
            left_out.append(f"{_count(len(chosen) - len(kept), 'record')} by {name}={','.join(accepted)}")
        chosen = kept
    return chosen, left_out


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _table(title: str, runs: list[Record], by: Sequence[str]) -> Table:
    """The rows of one table, not yet measured, placed or sorted."""
    named: dict[tuple[str, ...], dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    again = 0
    # few differ among thousands: one is written out sorted, the others are known by their bytes (version 2 has no
    # references, so equal values have equal bytes)
    known: dict[bytes, str] = {}
    for run in runs:
        names = tuple(field_text(run, name) for name in by)
        settings = settings_of(run, by)
        key = marshal.dumps(settings, 2)
        if key not in known:
            known[key] = json.dumps(settings, sort_keys=True)
        seeds = named[names][known[key]]
        again += run["seed"] in seeds
        seeds[run["seed"]] = run
    rows = []
    for names, variants in named.items():
        labels = differing([fields | flatten(config) for fields, config in map(json.loads, variants)])
        for label, seeds in zip(labels, variants.values(), strict=True):
            of_row = [seeds[seed] for seed in sorted(seeds)]
            rows.append(Row(dict(zip(by, names, strict=True)), of_row, label))
    first = runs[0]
    shared = {name: field_text(first, name) for name in ("task", "data", "split", "image_size", "budget")}
    table = Table(title, first["task"], shared, rows, _metrics(runs), "")
    if again:
        table.left_out.append(
            f"{_count(again, 'run')} repeated later with equal settings and seed: the last one counts"
        )
    for row in rows:
        row.params, row.madds = row.runs[-1]["params"], row.runs[-1]["madds"]
        row.stats = {metric: summarise(list(row.by_seed(metric).values())) for metric in table.metrics}
    _note_settings(table)
    return table


def _metrics(runs: Iterable[Record]) -> list[str]:
    """Every metric of the runs, the headlines first, then those usually shown."""
    found = dict.fromkeys(metric for run in runs for metric in run["metrics"])
    order = [*HEADLINES, *SHOWN]

    def place(metric: str) -> int:
        name = metric.rpartition("/")[2]
        return order.index(name) if name in order else len(order)

    return sorted(found, key=place)


def _note_settings(table: Table) -> None:
    """Say which settings besides the parts' own differ between rows: a recipe may explain a difference as well."""
    of_parts = ("backbone", "head", "heads")
    settings = [{k: v for k, v in settings_of(row.runs[-1], BY)[1].items() if k not in of_parts} for row in table.rows]
    flat = [flatten(json.loads(text)) for text in {json.dumps(one, sort_keys=True) for one in settings}]
    keys = sorted({key for one in flat for key in one})
    different = [key for key in keys if len({json.dumps(one.get(key)) for one in flat}) > 1]
    if different:
        shown = ", ".join(different[:8]) + (f" and {len(different) - 8} more" if len(different) > 8 else "")
        table.mind.append(f"rows differ in {shown}")
    runs = [run for row in table.rows for run in row.runs]
    for what, found in [
        ("commits", {str(run["commit"])[:8] for run in runs}),
        ("versions of torch", {str(run["versions"].get("torch")) for run in runs}),
    ]:
        if len(found) > 1:
            table.mind.append(f"runs are of {len(found)} {what} ({', '.join(sorted(found)[:4])})")
    if any(run["dirty"] for run in runs):
        table.mind.append("some runs are of code that was changed after its commit")


def _measure(
    table: Table, measured: Mapping[tuple[str, ...], Sequence[Record]], wanted: Mapping[str, Sequence[str]]
) -> None:
    """Give rows the latencies that were measured under one set of conditions: the one that most rows have.

    Those count from a machine that is known to have been calm; else those where nobody looked, as training leaves them.
    """
    found: list[dict[Conditions, list[Latency]]] = []
    for row in table.rows:
        own: dict[Conditions, list[Latency]] = defaultdict(list)
        for record in [*row.runs, *measured.get(_network(row.runs[-1]), ())]:
            latency = record["latency"]
            if latency and _fits(latency, wanted):
                own[_conditions(latency)].append(latency)
        found.append(own)
    counts = Counter(conditions for own in found for conditions in own)
    if not counts:
        return
    table.latency = min(counts, key=lambda c: (-counts[c], c))
    elsewhere: Counter[Conditions] = Counter()
    busy = unchecked = 0
    for row, own in zip(table.rows, found, strict=True):
        if table.latency in own:
            least = min(_doubt(one) for one in own[table.latency])
            busy += least == 2
            unchecked += least == 1
            values = sorted(one["median_ms"] for one in own[table.latency] if _doubt(one) == least)
            row.latency_ms = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        elsewhere.update(conditions for conditions in own if conditions != table.latency)
    if busy:
        table.mind.append(f"the latency of {_count(busy, 'row')} was only ever measured on a busy machine")
    if unchecked:
        table.mind.append(
            f"the latency of {_count(unchecked, 'row')} was taken within seconds after training, whatever else ran; "
            "python -m tasks.benchmark run=<run folder> measures it"
        )
    for conditions, n in elsewhere.most_common():
        table.left_out.append(f"latency of {_count(n, 'row')} measured under other conditions ({conditions})")


def _fits(latency: Latency | None, wanted: Mapping[str, Sequence[str]]) -> bool:
    """Whether a latency has one of the accepted values (``*`` allowed) in each field."""
    if latency is None:
        return False
    return all(any(fnmatchcase(str(latency.get(name)), one) for one in accepted) for name, accepted in wanted.items())


def _doubt(latency: Latency) -> int:
    """0: the machine was calm; 1: nobody looked; 2: it was busy."""
    return 1 if latency.get("noisy") is None else 2 * bool(latency["noisy"])


def _conditions(latency: Latency) -> Conditions:
    return Conditions(latency["device"], latency["engine"], latency["threads"], latency["batch_size"])


def _network(record: Record) -> tuple[str, ...]:
    """What makes a latency that was measured on its own belong to a trained row."""
    return tuple(field_text(record, name) for name in ("task", "backbone", "head", "params", "madds", "image_size"))


def _sortable(table: Table, name: str) -> bool:
    return name in table.metrics or name in COSTS or any(name in row.names for row in table.rows)


def _place(table: Table, sort: str | None, against: str | None) -> None:
    """Sort the rows; give them their places and their difference to the base."""
    order = sort if sort and _sortable(table, sort.lstrip("-")) else (table.metrics or ["params"])[0]
    name, turned = order.lstrip("-"), order.startswith("-")
    table.sort = name if name in table.metrics else (table.metrics or [""])[0]

    def value(row: Row) -> float | None:
        stat = row.stats.get(name)
        return -stat.mean if stat else (cast("float | None", getattr(row, name)) if name in COSTS else None)

    if name in table.metrics or name in COSTS:
        known = sorted((row for row in table.rows if value(row) is not None), key=value, reverse=turned)  # type: ignore[arg-type]
        table.rows = known + [row for row in table.rows if value(row) is None]
    else:
        table.rows.sort(key=lambda row: row.names[name], reverse=turned)
    stats = [row.stats.get(table.sort) for row in table.rows]
    for row, place in zip(table.rows, places(stats), strict=True):
        row.place = place
    single = sum(stat is not None and stat.n == 1 for stat in stats)
    if single:
        table.left_out.append(f"{_count(single, 'row')} of one seed: no spread, so no place")
    missing = sum(stat is None for stat in stats)
    if missing:
        table.left_out.append(f"{_count(missing, 'row')} without {table.sort}")
    _subtract(table, against)


def _subtract(table: Table, against: str | None) -> None:
    bases = [row for row in table.rows if against is None or against in (row.name, *row.names.values())]
    if len(table.rows) < 2 or not bases:
        if against and bases:
            table.base = bases[0].name
        return
    # of one seed it would share at most that one with others
    base = next((row for row in bases if len(row.runs) > 1), bases[0])
    table.base = base.name
    of_base = base.by_seed(table.sort)
    for row in table.rows:
        if row is not base:
            row.difference = paired_difference(row.by_seed(table.sort), of_base)
