"""The ledger's outcomes as aligned text, markdown or JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from tasks.reporting.ledger import (
    NOT_BUILT,
    NOT_PRINTED,
    UNITS,
    VERDICTS,
    Figure,
    LedgerTable,
    side_lengths,
)
from tasks.reporting.ledger_runs import ORDERS, STATUSES, Measured, Ordering, orderings
from tasks.reporting.statistics import summarise
from tasks.reporting.tables import difference_text, stat_text

if TYPE_CHECKING:  # they need torch, and the report page reads from here
    from tasks.deploy.printed import Latencies
    from tasks.reporting.ledger_counts import Found, Outcome

    Section = tuple[LedgerTable, list[Outcome]]

NAMES = {"params": "params", "madds": "MAdds"}
FORMAT = 2
"""Of the JSON."""


def title_of(figure: str) -> str:
    """``params``, ``MAdds``, ``MAdds 512x1024``."""
    name, _, size = figure.partition("@")
    return f"{NAMES[name]} {size}".strip()


def count_text(value: int | None, figure: Figure) -> str:
    """Ours, with two digits more than the print."""
    if value is None:
        return "-"
    if figure.unit == "1":
        return f"{value:,}"
    decimals = len((figure.printed or "0.0").partition(".")[2]) + 2
    return f"{value / UNITS[figure.unit]:.{decimals}f}"


def off_text(found: Found) -> str:
    """``+1.5 %``; 0 of nothing but what is equal."""
    return "-" if found.off is None else "0" if found.off == 0 else f"{100 * found.off:+.2g} %"


def measured_text(one: Measured) -> str:
    """``61.2 ± 0.8 n=3``."""
    return f"{stat_text(summarise(one.values))} n={len(one.values)}"


def ordering_text(one: Ordering) -> str:
    """``V3-Large 1.0 above V2 1.0: +3.2 printed, here +1.4 [+0.9, +1.9] n=2: holds``."""
    printed = f"{one.printed_points:+.3g} printed, here {difference_text(one.difference)}"
    return f"{one.better} above {one.worse}: {printed}: {one.verdict}"


def orders_of(section: Section) -> list[Ordering]:
    """The orderings of a table that runs can speak to."""
    return orderings([(one.row, one.measured) for one in section[1]])


def _order_lines(section: Section) -> list[str]:
    """One a pair, by conditions; and what two seeds can say."""
    found: dict[str, list[Ordering]] = {}
    for one in orders_of(section):
        found.setdefault(one.conditions, []).append(one)
    lines = []
    for conditions, ordered in found.items():
        lines.append(f"the print's order, on {conditions}:")
        lines += [f"    {ordering_text(one)}" for one in ordered]
        if any(1 < one.difference.n < 5 for one in ordered):
            lines.append(f"    {FEW}")
    return lines


FEW = (
    "of fewer than 5 pairs the interval is too narrow; of two it is their range, and by chance alone both lie on one "
    "side of zero in half of all cases"
)


def _header(section: Section) -> list[str]:
    table, outcomes = section
    cells = ["row"]
    for figure in table.figures:
        unit = {"1": ""}.get(outcomes[0].row.figures[figure].unit, outcomes[0].row.figures[figure].unit)
        cells += [f"{title_of(figure)} {unit}".strip(), "ours", "off", "verdict"]
    if table.metric:
        cells += [f"{table.metric} %", "measured"]
    if any(one.row.claim for one in outcomes):
        cells += ["claim", "status"]
    if table.devices:
        cells.append("ms on " + ", ".join(table.devices))
    return cells


def _cells(section: Section, outcome: Outcome, marks: dict[str, str]) -> list[str]:
    table, outcomes = section
    row = outcome.row
    cells = [row.name + (f" {marks['row']}" if "row" in marks else "")]
    for key, found in outcome.figures.items():
        verdict = found.verdict + (f" {marks[key]}" if key in marks else "")
        cells += [found.figure.printed or "-", count_text(found.ours, found.figure), off_text(found), verdict]
    if table.metric:
        full = [measured_text(one) for one in outcome.measured if one.status == outcome.status]
        status = f"{outcome.status}: {'; '.join(full)} {marks['score']}" if full else outcome.status or "-"
        cells += [row.score or "-", status]
    if any(one.row.claim for one in outcomes):
        cells += [row.claim or "-", outcome.status or "-"]
    if table.devices:
        cells.append(" / ".join(row.ms) or "-")
    return cells


class _Notes:
    """Notes below a table, numbered; what several rows have in common is said once."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}

    def add(self, text: str, detail: str = "") -> str:
        """The mark to put into the cell."""
        details = self.lines.setdefault(text, [])
        if detail:
            details.append(detail)
        return f"[{list(self.lines).index(text) + 1}]"

    def written(self) -> list[str]:
        """A line a note, and one a detail."""
        lines = []
        for number, (text, details) in enumerate(self.lines.items(), start=1):
            lines += [f"[{number}] {text}", *(f"    {detail}" for detail in details)]
        return lines


def _marks(outcome: Outcome, notes: _Notes) -> dict[str, str]:
    """Cell -> the mark of its note."""
    marks = {}
    if outcome.not_built:
        marks["row"] = notes.add(outcome.not_built)
    for key, found in outcome.figures.items():
        if found.why is not None:
            tried = [f"{k}: {count_text(v, found.figure)} ({verdict})" for k, (v, verdict) in found.tried.items()]
            counted = f"{outcome.row.name}, counted otherwise: {'; '.join(tried)}" if tried else ""
            marks[key] = notes.add(f"{title_of(key)}: {found.why}", counted)
    if outcome.measured:
        runs = [f"{one.status}: {measured_text(one)} on {one.conditions}" for one in outcome.measured]
        marks["score"] = notes.add(f"{outcome.row.name}: {'; '.join(runs)}")
    return marks


def _grid(section: Section) -> tuple[list[list[str]], list[str]]:
    notes = _Notes()
    grid = [_header(section), *(_cells(section, one, _marks(one, notes)) for one in section[1])]
    return grid, notes.written()


def _below(section: Section) -> list[str]:
    table, _ = section
    lines = [table.convention, f"source: {'; '.join(f'{k}: {v}' for k, v in table.sources.items())}"]
    if table.quoted and table.metric:
        lines.append(f"accuracies are quoted: {table.quoted}")
    return lines + _order_lines(section)


def summary(sections: Sequence[Section]) -> dict[str, int]:
    """How often each verdict was given, each accuracy status, and what became of the print's orderings."""
    counts = Counter(found.verdict for _, outcomes in sections for one in outcomes for found in one.figures.values())
    counts += Counter(one.status for _, outcomes in sections for one in outcomes if one.status)
    counts += Counter(order.verdict for section in sections for order in orders_of(section))
    return {name: counts[name] for name in [*VERDICTS, *STATUSES, *ORDERS] if counts[name]}


def _legend(sections: Sequence[Section]) -> list[str]:
    meaning = VERDICTS | STATUSES | ORDERS
    return [f"{count} x {name}: {meaning[name]}" for name, count in summary(sections).items()]


def text(sections: Sequence[Section], latencies: Latencies | None = None) -> str:
    """For a terminal."""
    parts = []
    for section in sections:
        grid, notes = _grid(section)
        widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in grid]
        rule = "-" * min(max(len(line) for line in lines), 160)
        more = _latency_lines(section, latencies)
        parts.append("\n".join([section[0].title, rule, *lines, rule, *_below(section), *notes, *more]))
    return "\n\n".join([*parts, "\n".join([*_legend(sections), *(latencies.notes if latencies else [])])])


def markdown(sections: Sequence[Section], latencies: Latencies | None = None) -> str:
    """For a README, with the command of every row."""
    parts = []
    for section in sections:
        grid, notes = _grid(section)
        grid[0].append("command")
        for line, outcome in zip(grid[1:], section[1], strict=True):
            line.append(f"`{outcome.row.network.typed}`" if outcome.row.network else "-")
        escaped = [[cell.replace("|", "\\|") for cell in line[:-1]] + line[-1:] for line in grid]
        lines = [f"| {' | '.join(line)} |" for line in escaped]
        lines.insert(1, "|" + " --- |" * len(grid[0]))
        listed = [f"  - {line.strip()}" if line.startswith(" ") else f"- {line}" for line in [*_below(section), *notes]]
        more = _latency_lines(section, latencies)
        parts.append("\n".join([f"### {section[0].title}", "", *lines, "", *listed, *more]))
    notes = [*_legend(sections), *(latencies.notes if latencies else [])]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in notes)])


def _latency_lines(section: Section, latencies: Latencies | None) -> list[str]:
    lines = latencies.lines(section[0]) if latencies else []
    return ["", "Latencies as ratios:", "", *lines[:-1]] if lines else []


def to_json(sections: Sequence[Section], latencies: Latencies | None = None) -> str:
    """Everything, as plain numbers; accuracies measured are fractions, printed ones percent."""
    tables = [
        {
            "table": table.name,
            "title": table.title,
            "convention": table.convention,
            "metric": table.metric,
            "devices": list(table.devices),
            "sources": table.sources,
            "quoted": table.quoted,
            "rows": [_plain(outcome) for outcome in outcomes],
            "orderings": [
                {**one._asdict(), "difference": one.difference._asdict()} for one in orders_of((table, outcomes))
            ],
            "latencies": latencies.plain(table) if latencies else [],
        }
        for table, outcomes in sections
    ]
    about = {"format": FORMAT, "made": datetime.now().astimezone().isoformat(timespec="seconds")}
    meaning = {"verdicts": VERDICTS, "statuses": STATUSES, "orders": ORDERS}
    whole = about | {
        "latency_notes": latencies.notes if latencies else [],
        "tables": tables,
        "summary": summary(sections),
        **meaning,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False)


def _plain(outcome: Outcome) -> dict[str, Any]:
    row = outcome.row
    return {
        "row": row.name,
        "source": row.source,
        "command": row.network and row.network.typed,
        "less": row.less and row.less.typed,
        "not_built": outcome.not_built,
        "claim": row.claim,
        "counts": {key: _plain_count(found, outcome, key) for key, found in outcome.figures.items()},
        "accuracy": {
            "printed_percent": row.score and float(row.score),
            "status": outcome.status,
            "measured": [_plain_measured(one) for one in outcome.measured],
        },
        "printed_ms": [float(ms) for ms in row.ms],
    }


def _plain_measured(one: Measured) -> dict[str, Any]:
    values = one.values
    seeds = {"seeds": sorted(one.scores), "values": values, "mean": sum(values) / len(values)}
    return {"status": one.status, **seeds, "conditions": one.conditions}


def _plain_count(found: Found, outcome: Outcome, key: str) -> dict[str, Any]:
    figure, network = found.figure, outcome.row.network
    size = key.partition("@")[2]
    counted_on = side_lengths(size) if size else network and network.size
    return {
        "printed": figure.printed,
        "unit": UNITS[figure.unit],
        "ours": found.ours,
        "difference": found.off,
        "verdict": None if found.verdict == NOT_PRINTED else found.verdict,
        "why": outcome.not_built if found.verdict == NOT_BUILT else found.why,
        "tried": {label: {"ours": value, "verdict": verdict} for label, (value, verdict) in found.tried.items()},
        "size": counted_on and list(counted_on),
        "batch_norm": network and network.batch_norm,
    }


Writer = Callable[["Sequence[Section]", "Latencies | None"], str]
FORMATS: dict[str, Writer] = {"text": text, "markdown": markdown, "json": to_json}
