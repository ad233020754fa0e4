"""The ledger as a section of ``report.html``, from what ``python -m tasks.ledger format=json`` wrote.

Counting every row takes torch and half a minute, so the page takes the written file and counts nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tasks.reporting.ledger import UNITS, Figure
from tasks.reporting.ledger_runs import Ordering
from tasks.reporting.ledger_text import FEW, FORMAT, count_text, ordering_text, title_of
from tasks.reporting.statistics import Difference, summarise
from tasks.reporting.tables import stat_text

COMMAND = "python -m tasks.ledger format=json out=ledger.json"
MEASURED = 12
"""Sets of conditions shown a row, and orderings a table are shown up to ten times as many."""
UNIT_NAMES = {value: name for name, value in UNITS.items()}


def ledger_section(path: str | Path | None) -> str:
    """The section; without a file it says how to make one.

    Args:
        path: what ``COMMAND`` wrote.
    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no ledger, or one of another version.
    """
    if path is None:
        return _wrap(f"<p>Not here yet: <code>{escape(COMMAND)}</code>, then compare again.</p>")
    if not Path(path).is_file():
        raise FileNotFoundError(f"ledger={path} is not a file; write it with {COMMAND}")
    fix = f"write it anew with {COMMAND}"
    try:
        ledger = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"ledger={path} is not JSON ({error}); {fix}") from error
    if not isinstance(ledger, dict) or ledger.get("format") != FORMAT:
        raise ValueError(f"ledger={path} is no ledger of this version; {fix}")
    try:
        return _wrap(_summary(ledger) + "".join(_table(i, table) for i, table in enumerate(ledger["tables"])))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"ledger={path} lacks what a ledger has ({error!r}); {fix}") from error


def _wrap(body: str) -> str:
    head = '<h2 id="ledger">Ledger: published figures and ours</h2>'
    return f'<section aria-labelledby="ledger">{head}{body}</section>'


def _summary(ledger: Mapping[str, Any]) -> str:
    meaning = ledger["verdicts"] | ledger["statuses"] | ledger["orders"]
    counts = "".join(
        f"<li>{int(count)} x {escape(name)}: {escape(meaning[name])}</li>" for name, count in ledger["summary"].items()
    )
    made = escape(str(ledger["made"]))
    return (
        f'<p class="soft">Counted {made}. Accuracies measured here stand in a column of their own; at reduced scale '
        f'they are not to be compared with the printed ones.</p><ul class="notes">{counts}</ul>'
        f"{_notes('Latencies here', ledger['latency_notes'])}"
    )


def _notes(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<p class="soft">{escape(title)}:</p><ul class="notes">{items}</ul>' if lines else ""


def _table(i: int, table: Mapping[str, Any]) -> str:
    rows = table["rows"]
    figures = list(rows[0]["counts"])
    claims = any(row["claim"] for row in rows)
    heads = ["row"]
    for key in figures:
        unit = UNIT_NAMES[rows[0]["counts"][key]["unit"]]
        heads += [f"{title_of(key)} {unit if unit != '1' else ''}".strip(), "#ours", "#off, %", "verdict"]
        heads[-4] = f"#{heads[-4]}"
    heads += [f"#{table['metric']} % printed", "measured here"] if table["metric"] else []
    heads += ["claim", "status"] if claims else []
    heads += [f"ms on {', '.join(table['devices'])}"] if table["devices"] else []
    head = "".join(
        f'<th scope="col" aria-sort="none"{" class=number" if name[0] == "#" else ""}>'
        f"<button>{escape(name.lstrip('#'))}</button></th>"
        for name in heads
    )
    lines = "".join(_row(table, row, figures, claims) for row in rows)
    title = escape(table["title"])
    sources = "; ".join(f"{name}: {text}" for name, text in table["sources"].items())
    notes = [table["convention"], f"source: {sources}"]
    notes += [f"accuracies are quoted: {table['quoted']}"] if table["quoted"] and table["metric"] else []
    below = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"""<h3>{title}</h3>
<div class="tools"><label>filter <input id="filter-l{i}" type="search" placeholder="words that a row holds"></label>
<span id="count-l{i}" class="soft" role="status"></span></div>
<div class="scroll" tabindex="0" role="region" aria-label="ledger: {title}"><table class="sortable" id="l{i}">
<thead><tr>{head}<th scope="col">how</th></tr></thead><tbody>
{lines}</tbody></table></div>
<ul class="notes">{below}</ul>{_orderings(table["orderings"])}{_latencies(table)}
"""


def _row(table: Mapping[str, Any], row: Mapping[str, Any], figures: Sequence[str], claims: bool) -> str:
    cells = [f'<th scope="row">{escape(row["row"])}</th>']
    for key in figures:
        count = row["counts"][key]
        printed, off = count["printed"], count["difference"]
        figure = Figure(printed, UNIT_NAMES[count["unit"]])
        cells += [
            _number(printed and float(printed), printed or "-"),
            _number(count["ours"], count_text(count["ours"], figure)),
            _number(off, "-" if off is None else "0" if off == 0 else f"{100 * off:+.2g}"),
            f"<td>{escape(count['verdict'] or '-')}</td>",
        ]
    accuracy = row["accuracy"]
    if table["metric"]:
        score = accuracy["printed_percent"]
        cells += [_number(score, "-" if score is None else str(score)), f"<td>{_measured(accuracy)}</td>"]
    if claims:
        cells += [
            f'<td class="text">{escape(row["claim"] or "-")}</td>',
            f"<td>{escape(accuracy['status'] or '-')}</td>",
        ]
    if table["devices"]:
        cells.append(f"<td>{escape(' / '.join(f'{ms:g}' for ms in row['printed_ms']) or '-')}</td>")
    return f"<tr>{''.join(cells)}<td>{_how(row)}</td></tr>\n"


def _number(value: float | None, text: str) -> str:
    return f'<td class="number" data-v="{"" if value is None else float(value)}">{escape(text)}</td>'


def _measured(accuracy: Mapping[str, Any]) -> str:
    """``measured at reduced scale: 61.2 ± 0.8 n=2``; the conditions unfold."""
    found = accuracy["measured"]
    status = escape(accuracy["status"] or "-")
    if not found:
        return status
    runs = "".join(
        f"<li>{escape(one['status'])}: {stat_text(summarise(one['values']))} n={len(one['values'])} "
        f"on {escape(one['conditions'])}</li>"
        for one in found[:MEASURED]
    )
    more = f"<li>and {len(found) - MEASURED} more</li>" if len(found) > MEASURED else ""
    first = f"{status}: {stat_text(summarise(found[0]['values']))} n={len(found[0]['values'])}"
    return f'<details class="how"><summary>{first}</summary><ul class="notes">{runs}{more}</ul></details>'


def _how(row: Mapping[str, Any]) -> str:
    """What builds the row, how it was counted, and why it differs."""
    parts = []
    if row["command"]:
        parts.append(f"<p><code>{escape(row['command'])}</code></p>")
    if row["less"]:
        parts.append(f"<p>less <code>{escape(row['less'])}</code></p>")
    if row["not_built"]:
        parts.append(f"<p>{escape(row['not_built'])}</p>")
    for key, count in row["counts"].items():
        size = "x".join(str(side) for side in count["size"] or ())
        if count["ours"] is not None:
            without = "" if count["batch_norm"] or key != "params" else ", without batch norm's"
            parts.append(f"<p>{escape(title_of(key))}: {count['ours']:,} at {escape(size)}{without}</p>")
        if count["why"] and count["why"] != row["not_built"]:
            parts.append(f"<p>{escape(title_of(key))}: {escape(count['why'])}</p>")
        figure = Figure(count["printed"], UNIT_NAMES[count["unit"]])
        for label, tried in count["tried"].items():
            ours = count_text(tried["ours"], figure)
            parts.append(f"<p>{escape(title_of(key))}, {escape(label)}: {ours} ({escape(tried['verdict'])})</p>")
    return f'<details class="how"><summary>how</summary>{"".join(parts)}</details>'


def _orderings(found: Sequence[Mapping[str, Any]]) -> str:
    """Which of the print's orderings the runs bear out, by conditions."""
    if not found:
        return ""
    by_conditions: dict[str, list[str]] = {}
    for one in found[: 10 * MEASURED]:
        ordering = Ordering(**{**one, "difference": Difference(**one["difference"])})
        by_conditions.setdefault(ordering.conditions, []).append(ordering_text(ordering))
    more = [f"and {len(found) - 10 * MEASURED} more"] if len(found) > 10 * MEASURED else []
    few = [FEW] if any(1 < one["difference"]["n"] < 5 for one in found) else []
    lists = "".join(
        f'<p>The print\'s order, on {escape(conditions)}:</p><ul class="notes">'
        f"{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
        for conditions, lines in by_conditions.items()
    )
    return lists + "".join(f'<p class="soft">{escape(line)}</p>' for line in more + few)


def _latencies(table: Mapping[str, Any]) -> str:
    """Ratios of latencies here beside the printed ones, an engine and number of threads a column."""
    found = table["latencies"]
    if not found:
        return ""
    printed = {row["row"]: row["printed_ms"] for row in table["rows"]}
    heads = [f"{device}, printed" for device in table["devices"]]
    heads += [one["title"] for one in found]
    ours = [{row["row"]: row for row in one["rows"]} for one in found]
    shown = [name for name in printed if any(name in rows for rows in ours)]
    lines = []
    for name in shown:
        cells = [_number(a / b, f"{a / b:.2f}") for a, b in zip(printed[name], printed[shown[0]], strict=False)]
        for rows in ours:
            row = rows.get(name)
            text = "{ratio:.2f} [{low:.2f}, {high:.2f}]".format(**row) if row else "-"
            cells.append(_number(row and row["ratio"], text))
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    orders = []
    for head, one in zip(heads[len(table["devices"]) :], found, strict=True):
        counts = Counter(pair["verdict"] for pair in one["orderings"])
        noise = f" (noisy: {'; '.join(one['noise'])})" if one["noise"] else ""
        orders.append(f"{head}: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}{noise}")
    head = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in heads)
    return f"""<p>Latencies as ratios to the first row:</p>
<div class="scroll" tabindex="0" role="region" aria-label="latencies: {escape(table["title"])}"><table>
<thead><tr><th scope="col">row</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>
{_notes("The print's orders of latencies", orders)}"""
