"""The ledger: published figures as data, and verdicts on ours beside them.

The figures lie in ``conf/ledger/*.yaml``, whose first lines say what a table and a row hold. Nothing here needs torch;
``ledger_counts`` builds and counts, ``ledger_runs`` finds the runs that measured an accuracy, ``ledger_text`` prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tasks.words import suggest

EQUAL, ROUNDING, PERCENT, DIFFERS = "equal", "within rounding", "within 1 %", "differs"
NOT_BUILT, NOT_PRINTED = "not built", "-"
VERDICTS = {
    EQUAL: "the same number",
    ROUNDING: "the print is ours, rounded or cut to the printed digits",
    PERCENT: "multiply-adds only: not so, but at most 1 % apart",
    DIFFERS: "none of these; the reason stands in the notes",
    NOT_BUILT: "nothing here builds the row",
}
UNITS = {"1": 1, "M": 10**6, "B": 10**9}
TABLE_KEYS = {
    "title", "source", "convention", "command", "config", "size", "units", "batch_norm", "score", "data", "full_epochs",
    "quoted", "ms", "why", "tried", "rows",
}  # fmt: skip
ROW_KEYS = {"row", "source", "config", "size", "batch_norm", "score", "ms", "less", "to", "why", "tried", "claim"}
TRIED_KEYS = {"figure", "config", "size", "batch_norm", "folded", "resizing"}


class Network(NamedTuple):
    """What is built and how it is counted."""

    command: str
    overrides: tuple[str, ...]
    size: tuple[int, int]
    """Height, width of the input, px."""
    batch_norm: bool = True
    """Whether parameters include batch norm's scale and shift."""
    folded: bool = False
    """Parameters instead with one bias for each channel of a batch norm, and none in squeeze-excite."""
    resizing: int = 0
    """Multiply-adds for each value of a bilinearly resized map, the final one at the input's size included."""

    @property
    def typed(self) -> str:
        """What to type to train it."""
        words = [*self.overrides, f"image_size=[{self.size[0]},{self.size[1]}]"]
        return " ".join(["python -m", f"tasks.{self.command}", *(f"'{w}'" if "[" in w else w for w in words)])


class Figure(NamedTuple):
    """A count as printed."""

    printed: str | None
    unit: str
    """A key of ``UNITS``."""
    to: str | None = None
    """Multiple that the source rounds to, in the unit; None: by its printed digits."""


class Tried(NamedTuple):
    """Another way to count a row."""

    network: Network
    less: Network | None
    """Its counts, made the same way, are subtracted."""
    figure: str | None
    """None: ``params`` and ``madds``."""


@dataclass(frozen=True)
class Row:
    """A row of a published table."""

    name: str
    source: str
    network: Network | None
    less: Network | None
    """Its counts are subtracted."""
    figures: dict[str, Figure]
    """``params``, ``madds``, ``madds@HxW``; all that the table has, printed in this row or not."""
    score: str | None
    """The accuracy as printed, percent."""
    ms: tuple[str, ...]
    claim: str | None
    why: dict[str, str]
    tried: dict[str, Tried]
    alone: bool = True
    """No other row of its table is the same network at another size."""


@dataclass(frozen=True)
class LedgerTable:
    """A published table."""

    name: str
    title: str
    convention: str
    shared: str
    """What all its rows' commands have in common."""
    metric: str | None
    """Of the scores: a key of a record's metrics."""
    data: str | None
    full_epochs: int
    quoted: str | None
    """Why no run of ours can stand beside its scores."""
    devices: tuple[str, ...]
    """Of the printed latencies."""
    sources: dict[str, str]
    rows: tuple[Row, ...]

    @property
    def figures(self) -> list[str]:
        """The counts that stand in the table."""
        return list(self.rows[0].figures)


def read_ledger(folder: Path) -> dict[str, LedgerTable]:
    """All tables by name, the paper's first.

    Raises:
        ValueError: a file with an unknown or missing key; names the table and the row.
    """
    tables: dict[str, LedgerTable] = {}
    for path in sorted(folder.glob("*.yaml")):
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        for name, node in content["tables"].items():
            if name in tables:
                raise ValueError(f"{path}: there are two tables {name!r}")
            tables[name] = _table(f"{path.name}: table {name}", name, node, content["sources"])
    return tables


def _table(where: str, name: str, node: Mapping[str, Any], sources: Mapping[str, str]) -> LedgerTable:
    _check(where, node, TABLE_KEYS)
    rows = [_row(f"{where}: {one.get('row')}", one, node) for one in node["rows"]]
    sizes: dict[tuple[str, ...], set[tuple[int, int]]] = {}
    for row in rows:
        if row.network:
            sizes.setdefault(row.network.overrides, set()).add(row.network.size)
    shared = " ".join(["python -m", f"tasks.{node['command']}", *node.get("config", [])])
    return LedgerTable(
        name,
        node["title"],
        node["convention"],
        shared,
        node.get("score"),
        node.get("data"),
        int(node.get("full_epochs", 0)),
        node.get("quoted"),
        tuple(node.get("ms", ())),
        {key: sources[key] for key in dict.fromkeys([node["source"], *(row.source for row in rows)])},
        tuple(replace(row, alone=row.network is None or len(sizes[row.network.overrides]) == 1) for row in rows),
    )


def _row(where: str, node: Mapping[str, Any], table: Mapping[str, Any]) -> Row:
    units: Mapping[str, str] = table["units"]
    _check(where, node, ROW_KEYS | units.keys())
    why = {**table.get("why", {}), **node.get("why", {})}
    network, tried = None, {}
    if "config" in node:
        given = {key: node.get(key, table.get(key)) for key in ("size", "batch_norm")}
        network = _network(table["command"], [*table.get("config", []), *node["config"]], given)
        for label, other in (node.get("tried") or table.get("tried") or {}).items():
            _check(f"{where}: tried {label}", other, TRIED_KEYS)
            pair = [
                _network(table["command"], [*table.get("config", []), *config, *other.get("config", [])], given | other)
                for config in (node["config"], *([node["less"]] if "less" in node else []))
            ]
            tried[label] = Tried(pair[0], pair[1] if len(pair) > 1 else None, other.get("figure"))
    elif "row" not in why:
        raise ValueError(f"{where}: there is neither a config nor a why.row that says why there is none")
    return Row(
        node["row"],
        node.get("source", table["source"]),
        network,
        _network(table["command"], [*table.get("config", []), *node["less"]], given) if "less" in node else None,
        {key: Figure(node.get(key), unit, node.get("to")) for key, unit in units.items()},
        node.get("score"),
        tuple(node.get("ms", ())),
        node.get("claim"),
        why,
        tried,
    )


def _network(command: str, overrides: Sequence[str], given: Mapping[str, Any]) -> Network:
    last = {override.partition("=")[0]: override for override in overrides}  # a row's own word replaces its table's
    return Network(
        command,
        tuple(last.values()),
        side_lengths(given["size"]),
        batch_norm=given.get("batch_norm") in (None, "true"),
        folded=given.get("folded") == "true",
        resizing=int(given.get("resizing", 0)),
    )


def side_lengths(text: str) -> tuple[int, int]:
    """``224`` -> (224, 224), ``512x1024`` -> (512, 1024)."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _check(where: str, node: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in node:
        if key not in known:
            raise ValueError(f"{where}: there is no key {key!r}{suggest(key, known)}")


def judge(figure: Figure, ours: int, *, tolerance: bool) -> str:
    """The verdict on a printed count.

    Args:
        figure: as printed.
        ours: the exact count.
        tolerance: whether 1 % is near enough (multiply-adds).
    Returns:
        A key of ``VERDICTS``, or ``NOT_PRINTED``.
    """
    if figure.printed is None:
        return NOT_PRINTED
    unit = UNITS[figure.unit]
    printed = Decimal(figure.printed) * unit
    if printed == ours:
        return EQUAL
    digits = Decimal(figure.printed).as_tuple().exponent
    assert isinstance(digits, int)
    step = (Decimal(figure.to) if figure.to else Decimal(1).scaleb(digits)) * unit
    if printed in [(ours / step).to_integral_value(rule) * step for rule in (ROUND_HALF_UP, ROUND_FLOOR)]:
        return ROUNDING
    return PERCENT if tolerance and abs(ours - printed) * 100 <= printed else DIFFERS


def choose(tables: Mapping[str, LedgerTable], names: Sequence[str] | None, row: str | None) -> dict[str, LedgerTable]:
    """The tables and rows asked for.

    Args:
        tables: all of them.
        names: of tables; None: all.
        row: part of a row's name, or a pattern with ``*``; upper and lower case are the same. None: all.
    Raises:
        ValueError: a name that fits nothing, with the nearest that would.
    """
    for name in names or ():
        if name not in tables:
            raise ValueError(f"there is no table {name!r}{suggest(name, tables, 0.4)}; there are {', '.join(tables)}")
    chosen = {name: tables[name] for name in names or tables}
    if row is None:
        return chosen
    pattern = re.compile(".*".join(re.escape(part) for part in row.split("*")), re.IGNORECASE)
    matches = pattern.fullmatch if "*" in row else pattern.search
    kept = {
        name: replace(table, rows=tuple(one for one in table.rows if matches(one.name)))
        for name, table in chosen.items()
    }
    if not any(table.rows for table in kept.values()):
        rows = list(dict.fromkeys(one.name for table in chosen.values() for one in table.rows))
        raise ValueError(f"row={row} fits no row{suggest(row, rows, 0.4)}; table=<name> alone shows a table's rows")
    return {name: table for name, table in kept.items() if table.rows}
