"""``report.html``: the comparison as one page that loads nothing from anywhere.

Tables are written here and readable without scripts; sorting, filtering and plots are ``report.js``. Whatever comes
from records is escaped, and the page's policy lets no script run but that one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tasks.reporting.artefacts import data_uris, pictures_of
from tasks.reporting.comparison import Comparison, Row, Table
from tasks.reporting.grouping import field_text
from tasks.reporting.ledger_page import ledger_section
from tasks.reporting.plot_data import table_data
from tasks.reporting.results import Record
from tasks.reporting.tables import UNITS, cell, columns_of, header, notes, place_text, stat_text

ROWS = 200
"""Of a table at most; the rest is counted."""
DETAILS = 100
"""Runs shown with command, conditions, curves and picture: the newest."""
PICTURED = 50
"""Of those, runs whose pictures are shown: the newest."""
PICTURES = 1_400_000
"""Characters that all pictures together may take."""


def write_report(
    path: str | Path,
    comparison: Comparison,
    columns: Sequence[str] | None = None,
    ledger: str | Path | None = None,
) -> None:
    """Write the page.

    Args:
        path: of the page; its folder is made, an old page is replaced at once or not at all.
        comparison: what to show. A run's ``run`` is its folder, as seen from here.
        columns: of the tables; None: those that say something.
        ledger: what ``python -m tasks.ledger format=json`` wrote; None: the section says how to get it.
    Raises:
        FileNotFoundError, ValueError: see ``ledger_section``.
    """
    path = Path(path)
    text = page(comparison, columns, path.parent, ledger)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def page(comparison: Comparison, columns: Sequence[str] | None, folder: Path, ledger: str | Path | None = None) -> str:
    """The page's text; links to run folders count from ``folder``."""
    detailed = _detailed(comparison)
    script = _own("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    tables = [table_data(table, table.rows[:ROWS], detailed) for table in comparison.tables]
    # a class may be called </script>
    data = json.dumps({"tables": tables}, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    anchors = {f"table-{i}": _short(table) for i, table in enumerate(comparison.tables)}
    anchors |= {"ledger": "ledger", "runs": "runs", "left-out": "left out"}
    links = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in anchors.items())
    sections = "\n".join(_section(i, table, tables[i], columns, detailed) for i, table in enumerate(comparison.tables))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Comparison of runs</title>
<style>
{_own("report.css")}</style>
</head>
<body>
<a class="skip" href="#main">to the tables</a>
<header>
<h1>Comparison of runs</h1>
{_summary(comparison)}
</header>
<nav aria-label="tables"><div>{links}</div></nav>
<main id="main">
{sections}
{ledger_section(ledger)}
{_runs(comparison, detailed, folder)}
{_left_out(comparison)}
</main>
<footer><p class="soft">A number counts only with the conditions that stand beside it.</p></footer>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _short(table: Table) -> str:
    shared = table.fields
    return f"{shared['task']} {shared['data']} {shared['budget']}"


def _detailed(comparison: Comparison) -> dict[int, int]:
    """id of a record -> number of its details: the newest runs of the shown rows."""
    runs = [run for table in comparison.tables for row in table.rows[:ROWS] for run in row.runs]
    newest = {id(run) for run in sorted(runs, key=lambda run: run["time"])[-DETAILS:]}
    return {id(run): number for number, run in enumerate(run for run in runs if id(run) in newest)}


def _summary(comparison: Comparison) -> str:
    runs = [run for table in comparison.tables for row in table.rows for run in row.runs]
    devices = sorted({run["device"] for run in runs})
    rows = []
    for i, table in enumerate(comparison.tables):
        first = table.rows[0]
        stat = first.stats.get(table.sort)
        open_to = sum(row.place is not None and row.place[0] == 1 for row in table.rows)
        if first.place is None:
            how = "no spread: one seed"
        elif first.place[0] > 1:  # sorted by something else
            how = f"place {place_text(first.place)}"
        else:
            how = "alone" if open_to == 1 else f"{open_to} rows may be first"
        runs_here = sum(len(row.runs) for row in table.rows)
        rows.append(
            f'<tr><th scope="row" class="wrap"><a href="#table-{i}">{escape(table.title)}</a></th>'
            f'<td class="number">{len(table.rows)}</td><td class="number">{runs_here}</td><td>{escape(first.name)}</td>'
            f'<td class="number">{escape(table.sort)} {stat_text(stat)}</td><td>{how}</td></tr>'
        )
    made = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    counted = f"{len(runs):,} runs in {len(comparison.tables)} tables"
    return f"""<p class="soft">{counted}; trained on {escape(", ".join(devices[:6]))}; made {made}.
Runs are compared only within one task, data set, split, image size and budget.</p>
<div class="scroll"><table><thead><tr><th scope="col">table</th><th scope="col" class="number">rows</th>
<th scope="col" class="number">runs</th><th scope="col">first row</th><th scope="col" class="number">score, %</th>
<th scope="col">standing</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>"""


def _section(
    i: int, table: Table, data: dict[str, Any], columns: Sequence[str] | None, detailed: dict[int, int]
) -> str:
    names = columns_of(table, columns)
    shown = table.rows[:ROWS]
    more = [f"left out: {len(table.rows) - ROWS:,} rows after the first {ROWS}"] if len(table.rows) > ROWS else []
    lines = "".join(f"<li>{escape(line)}</li>" for line in notes(table, names) + more)
    captions = {
        "front": f"{table.sort} against cost, Pareto front dashed" if table.metrics else "",
        "curves": "Learning curves" if data["curves"] else "",
        "bars": "By class, mean over seeds" if data["per_class"] else "",
    }
    figures = [
        f'<figure id="{kind}-{i}"><figcaption>{escape(caption)}</figcaption></figure>'
        for kind, caption in captions.items()
        if caption
    ]
    label = escape(f"table: {table.title}")
    return f"""<section aria-labelledby="table-{i}">
<h2 id="table-{i}">{escape(table.title)}</h2>
<div class="tools"><label>filter <input id="filter-t{i}" type="search" placeholder="words that a row holds"></label>
<span id="count-t{i}" class="soft" role="status"></span></div>
<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="sortable" id="t{i}">
<thead><tr>{"".join(_head(table, name) for name in names)}<th scope="col">runs</th></tr></thead>
<tbody>
{"".join(_line(table, row, names, detailed) for row in shown)}</tbody></table></div>
<ul class="notes">{lines}</ul>
<div class="plots">{"".join(figures)}</div>
</section>"""


def _numeric(table: Table, column: str) -> bool:
    return column in table.metrics or column in UNITS or column in ("n", "difference", "place")


def _head(table: Table, column: str) -> str:
    number = ' class="number"' if _numeric(table, column) else ""
    return f'<th scope="col" aria-sort="none"{number}><button>{escape(header(table, column))}</button></th>'


def _line(table: Table, row: Row, names: Sequence[str], detailed: dict[int, int]) -> str:
    cells = []
    first = next((name for name in names if name in row.names), None)
    for name in names:
        text = escape(cell(table, row, name))
        if name == first:
            cells.append(f'<th scope="row">{text}</th>')
        elif _numeric(table, name):
            value = _value(table, row, name)
            cells.append(f'<td class="number" data-v="{"" if value is None else value}">{text}</td>')
        else:
            cells.append(f"<td>{text}</td>")
    links = []
    for run in row.runs[:10]:
        number = detailed.get(id(run))
        seed = f"seed {run['seed']}"
        links.append(seed if number is None else f'<a href="#run-{number}">{seed}</a>')
    more = f" and {len(row.runs) - 10} more" if len(row.runs) > 10 else ""
    return f"<tr>{''.join(cells)}<td>{', '.join(links)}{more}</td></tr>\n"


def _value(table: Table, row: Row, column: str) -> float | None:
    """What a column is sorted by."""
    if column in table.metrics:
        stat = row.stats[column]
        return stat.mean if stat else None
    if column == "difference":
        return row.difference.mean if row.difference else (0.0 if row.name == table.base else None)
    if column == "place":
        return row.place[0] if row.place else None
    return len(row.runs) if column == "n" else getattr(row, column)


def _runs(comparison: Comparison, detailed: dict[int, int], folder: Path) -> str:
    """Each run with its command, conditions and picture."""
    shown = [
        (detailed[id(run)], row, run)
        for table in comparison.tables
        for row in table.rows[:ROWS]
        for run in row.runs
        if id(run) in detailed
    ]
    newest = sorted(shown, key=lambda entry: entry[2]["time"])[-PICTURED:]
    paths = {number: pictures_of(Path(str(run["run"]))) for number, _, run in newest if run.get("run")}
    uris = data_uris([path for found in paths.values() for path in found], PICTURES)
    parts = []
    for number, row, run in shown:
        pictures = "".join(
            f'<p><a href="{quote(os.path.relpath(path, folder))}"><img loading="lazy" src="{uris[path]}" '
            f'alt="{escape(path.stem)} of {escape(row.name)}, seed {run["seed"]}"></a></p>'
            for path in paths.get(number, [])
            if path in uris
        )
        parts.append(_run(number, row, run, pictures))
    total = sum(len(row.runs) for table in comparison.tables for row in table.rows)
    only = f" The newest {len(shown)} of {total:,}; the others stand in the records." if total > len(shown) else ""
    head = f'<h2 id="runs">Runs</h2><p class="soft">What produced each number.{only}</p>'
    return f'<section aria-labelledby="runs">{head}{"".join(parts)}</section>'


def _run(number: int, row: Row, run: Record, pictures: str) -> str:
    metrics = ", ".join(
        f"{name} {100 * v:.2f}" if v is not None else f"{name} none" for name, v in run["metrics"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    latency = run["latency"]
    commit = (run["commit"] or "unknown")[:12] + (" with changes" if run["dirty"] else "")
    lines = {
        "command": f"<code>{escape(run.get('command') or 'not recorded')}</code>",
        "metrics, %": escape(metrics),
        "on": escape(f"{field_text(run, 'data')}, {run['split']} split, {field_text(run, 'image_size')} px"),
        "trained": escape(
            f"budget {run['budget']}, {run['train_seconds']:,.0f} s, batch {run['batch_size']}, "
            f"from {run['weights'] or 'scratch'}"
        ),
        "machine": escape(f"{run['device']}, {run['threads']} threads"),
        "cost": escape(f"{run['params']:,} parameters, {run['madds']:,} multiply-adds"),
        "latency": escape(
            f"{latency['median_ms']:.2f} ms: {latency['engine']}, {latency['threads']} threads, batch "
            f"{latency['batch_size']}, {latency['device']}{', machine busy' if latency.get('noisy') else ''}"
            if latency
            else "not measured"
        ),
        "code": escape(f"commit {commit}; {versions}"),
        "folder": escape(str(run.get("run") or "not recorded")),
        "ended": escape(run["time"]),
    }
    body = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in lines.items())
    return (
        f'<details id="run-{number}"><summary>{escape(run["task"])}: {escape(row.name)}, seed {run["seed"]}</summary>'
        f"<dl>{body}</dl>{pictures}</details>\n"
    )


def _left_out(comparison: Comparison) -> str:
    lines = comparison.left_out[:200]
    lines += [f"and {len(comparison.left_out) - 200:,} more"] if len(comparison.left_out) > 200 else []
    body = (
        f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'
        if lines
        else "<p>Nothing.</p>"
    )
    return f'<section aria-labelledby="left-out"><h2 id="left-out">Left out of all tables</h2>{body}</section>'
