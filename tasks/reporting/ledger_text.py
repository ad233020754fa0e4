"""The ledger's outcomes as aligned text, markdown or JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tasks.reporting.ledger import (
    NOT_BUILT,
    NOT_PRINTED,
    UNITS,
    VERDICTS,
    Figure,
    LedgerTable,
    side_lengths,
)
from tasks.reporting.ledger_counts import Found, Outcome
from tasks.reporting.ledger_runs import STATUSES, Measured
from tasks.reporting.statistics import summarise
from tasks.reporting.tables import stat_text

NAMES = {"params": "params", "madds": "MAdds"}
Section = tuple[LedgerTable, list[Outcome]]


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
    return cells + (["ms here"] if any(one.latency for one in outcomes) else [])


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
    if any(one.latency for one in outcomes):
        cells.append(f"{outcome.latency['median_ms']:.1f}" if outcome.latency else "-")
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
    table, outcomes = section
    lines = [table.convention, f"source: {'; '.join(f'{k}: {v}' for k, v in table.sources.items())}"]
    if table.quoted and table.metric:
        lines.append(f"accuracies are quoted: {table.quoted}")
    timed = next((one.latency for one in outcomes if one.latency), None)
    if timed:
        lines.append(
            f"ms here: median, {timed['engine']}, {timed['device']}, {timed['threads']} threads, "
            f"batch {timed['batch_size']}; another device than the printed ones"
        )
    return lines


def summary(sections: Sequence[Section]) -> dict[str, int]:
    """How often each verdict was given, and each accuracy status."""
    counts = Counter(found.verdict for _, outcomes in sections for one in outcomes for found in one.figures.values())
    counts += Counter(one.status for _, outcomes in sections for one in outcomes if one.status)
    return {name: counts[name] for name in [*VERDICTS, *STATUSES] if counts[name]}


def _legend(sections: Sequence[Section]) -> list[str]:
    meaning = VERDICTS | STATUSES
    return [f"{count} x {name}: {meaning[name]}" for name, count in summary(sections).items()]


def text(sections: Sequence[Section]) -> str:
    """For a terminal."""
    parts = []
    for section in sections:
        grid, notes = _grid(section)
        widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in grid]
        rule = "-" * min(max(len(line) for line in lines), 160)
        parts.append("\n".join([section[0].title, rule, *lines, rule, *_below(section), *notes]))
    return "\n\n".join([*parts, "\n".join(_legend(sections))])


def markdown(sections: Sequence[Section]) -> str:
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
        parts.append("\n".join([f"### {section[0].title}", "", *lines, "", *listed]))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in _legend(sections))])


def to_json(sections: Sequence[Section]) -> str:
    """Everything, as plain numbers; accuracies measured are fractions, printed ones percent."""
    tables = [
        {
            "table": table.name,
            "title": table.title,
            "convention": table.convention,
            "metric": table.metric,
            "devices": list(table.devices),
            "sources": table.sources,
            "rows": [_plain(outcome) for outcome in outcomes],
        }
        for table, outcomes in sections
    ]
    meaning = {"verdicts": VERDICTS, "statuses": STATUSES}
    return json.dumps({"tables": tables, "summary": summary(sections), **meaning}, indent=1, ensure_ascii=False)


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
            "measured": [{**one._asdict(), "mean": sum(one.values) / len(one.values)} for one in outcome.measured],
        },
        "latency": {"printed_ms": [float(ms) for ms in row.ms], "here": outcome.latency},
    }


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


FORMATS: dict[str, Callable[[Sequence[Section]], str]] = {"text": text, "markdown": markdown, "json": to_json}
