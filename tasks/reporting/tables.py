"""A comparison as markdown, CSV, LaTeX or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from tasks.reporting.comparison import COSTS, SHOWN, Comparison, Row, Table
from tasks.reporting.grouping import field_text
from tasks.reporting.results import OPTIONAL
from tasks.reporting.statistics import Difference, Stat
from tasks.words import suggest

UNITS = {"params": ("params M", 1e6, 2), "madds": ("MAdds M", 1e6, 1), "latency_ms": ("latency ms", 1.0, 2)}
"""Column -> header, divisor, decimals."""


def columns_of(table: Table, asked: Sequence[str] | None = None) -> list[str]:
    """The columns that a table shows.

    Args:
        table: the table.
        asked: fields of a record, metrics, ``n``, ``place``, ``settings``, ``difference``, ``params``, ``madds``,
            ``latency_ms``; None: those that say something.
    """
    if asked:
        return list(asked)
    names = [n for n in table.rows[0].names if n != "weights" or any(r.names[n] != "scratch" for r in table.rows)]
    shown = [m for m in table.metrics if m.rpartition("/")[2] in SHOWN] or table.metrics[:3]
    parts = [
        ["place"] if any(row.place for row in table.rows) else [],
        names,
        ["settings"] if any(row.settings for row in table.rows) else [],
        ["n"],
        shown,
        ["difference"] if any(row.difference for row in table.rows) else [],
        ["params", "madds"],
        ["latency_ms"] if table.latency else [],
    ]
    return [name for part in parts for name in part]


def check_columns(tables: Sequence[Table], asked: Sequence[str]) -> None:
    """Refuse a column that no table can have; one that only some have is ``-`` in the others.

    Raises:
        ValueError: names it, and what there is.
    """
    for name in asked:
        if not any(_known(table, name) for table in tables):
            own = dict.fromkeys(one for table in tables for one in (*table.rows[0].names, *table.metrics))
            known = ["place", "settings", "n", "difference", *COSTS, *own]
            raise ValueError(
                f"columns: there is no column {name!r}{suggest(name, known)}; there are {', '.join(known)} and a "
                "record's fields"
            )


def _known(table: Table, name: str) -> bool:
    if name in ("place", "settings", "n", "difference", *COSTS, *table.metrics):
        return True
    return name in OPTIONAL or any(field_text(run, name) != "-" for row in table.rows for run in row.runs[:1])


def header(table: Table, column: str) -> str:
    """A column's title with its unit."""
    if column in table.metrics:
        return f"{column} %"
    if column == "difference":
        return f"{table.sort} - base, points"
    return UNITS[column][0] if column in UNITS else column


def stat_text(stat: Stat | None) -> str:
    """``51.2 ± 0.8``, percent."""
    if stat is None:
        return "-"
    return f"{100 * stat.mean:.1f}" + ("" if stat.deviation is None else f" ± {100 * stat.deviation:.1f}")


def difference_text(difference: Difference | None) -> str:
    """``-2.1 [-3.0, -1.2] n=3``, points of a percent."""
    if difference is None:
        return "-"
    ends = (
        ""
        if difference.low is None or difference.high is None
        else f" [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    )
    return f"{100 * difference.mean:+.1f}{ends} n={difference.n}"


def place_text(place: tuple[int, int] | None) -> str:
    """``1``; ``2-4 tie``: its spread overlaps with others', so it may hold any of these."""
    if place is None:
        return "-"
    return str(place[0]) if place[0] == place[1] else f"{place[0]}-{place[1]} tie"


def cell(table: Table, row: Row, column: str) -> str:
    """What a table shows."""
    if column in table.metrics:
        return stat_text(row.stats[column])
    if column in UNITS:
        value = getattr(row, column)
        return "-" if value is None else f"{value / UNITS[column][1]:.{UNITS[column][2]}f}"
    if column == "difference":
        return "base" if row.name == table.base and row.difference is None else difference_text(row.difference)
    texts: dict[str, Callable[[], str]] = {
        "place": lambda: place_text(row.place),
        "settings": lambda: row.settings,
        "n": lambda: _n_text(table, row),
    }
    if column in texts:
        return texts[column]()
    if column in row.names:
        return row.names[column]
    return ", ".join(dict.fromkeys(field_text(run, column) for run in row.runs))


def _n_text(table: Table, row: Row) -> str:
    """The seeds in the mean; ``2 of 3`` where a run has no number, as one that diverged."""
    stat = row.stats.get(table.sort)
    counted = stat.n if stat else 0 if table.sort in table.metrics else len(row.runs)
    return str(counted) if counted == len(row.runs) else f"{counted} of {len(row.runs)}"


def notes(table: Table, shown: Sequence[str]) -> list[str]:
    """The conditions under a table of these columns, what to mind, what was left out."""
    lines = ["metrics in %: mean ± standard deviation over n seeds"]
    if "place" in shown:
        lines[0] += f"; place: those in {table.sort} that the spreads leave open"
    if "difference" in shown:
        lines.append(
            f"difference in {table.sort} to {table.base} over the n seeds both have, with its 95 % bootstrap interval"
            + (" (of fewer than 5 pairs: too narrow)" if _few(table) else "")
        )
    if table.latency and "latency_ms" in shown:
        lines.append(f"latency: median, {table.latency}")
    return lines + [f"mind: {line}" for line in table.mind] + [f"left out: {line}" for line in table.left_out]


def _few(table: Table) -> bool:
    return any(row.difference is not None and 1 < row.difference.n < 5 for row in table.rows)


def markdown(comparison: Comparison, columns: Sequence[str] | None = None) -> str:
    """Tables that read well on a screen too."""
    parts = []
    for table in comparison.tables:
        names = columns_of(table, columns)
        grid = [[header(table, c) for c in names]]
        grid += [[cell(table, row, c).replace("|", "\\|") for c in names] for row in table.rows]
        widths = [max(3, *(len(line[i]) for line in grid)) for i in range(len(names))]
        left = [c in table.rows[0].names or c in ("settings", "place") for c in names]
        lines = [f"### {table.title}", ""]
        for number, line in enumerate(grid):
            padded = [t.ljust(w) if side else t.rjust(w) for t, w, side in zip(line, widths, left, strict=True)]
            lines.append("| " + " | ".join(padded) + " |")
            if number == 0:
                rules = [
                    ":" + "-" * (w - 1) if side else "-" * (w - 1) + ":" for w, side in zip(widths, left, strict=True)
                ]
                lines.append("| " + " | ".join(rules) + " |")
        parts.append("\n".join([*lines, "", *(f"- {line}" for line in notes(table, names))]))
    if comparison.left_out:
        parts.append("\n".join(["### left out of all tables", "", *(f"- {line}" for line in comparison.left_out)]))
    return "\n\n".join(parts)


def to_csv(comparison: Comparison, columns: Sequence[str] | None = None) -> str:
    """One flat table of plain numbers: fractions, parameters, multiply-adds, ms."""
    rows: list[dict[str, Any]] = []
    for table in comparison.tables:
        wanted = columns_of(table, columns) if columns else None
        rows += [_flat_row(table, row, wanted) for row in table.rows]
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def _flat_row(table: Table, row: Row, wanted: Sequence[str] | None) -> dict[str, Any]:
    values: dict[str, Any] = {**table.fields, "title": table.title, **row.names, "settings": row.settings}
    values |= {"n": len(row.runs), "place": place_text(row.place), **{name: getattr(row, name) for name in COSTS}}
    values["latency_conditions"] = str(table.latency) if row.latency_ms is not None else None
    for metric in table.metrics if wanted is None else [name for name in wanted if name in table.metrics]:
        stat = row.stats[metric]
        values |= {metric: stat and stat.mean, f"{metric}_sd": stat and stat.deviation, f"{metric}_n": stat and stat.n}
    for name in wanted or ():
        if name not in values and name != "difference":
            values[name] = cell(table, row, name)
    if row.difference is not None:
        values |= {f"difference_{k}": v for k, v in row.difference._asdict().items()}
        values["difference_of"], values["difference_to"] = table.sort, table.base
    return values


LATEX_ESCAPES = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$"}
    | {"<": r"\textless{}", ">": r"\textgreater{}"}
)


def latex(comparison: Comparison, columns: Sequence[str] | None = None) -> str:
    """``table`` environments for the booktabs package."""
    parts = []
    for table in comparison.tables:
        names = columns_of(table, columns)
        left = [c in table.rows[0].names or c in ("settings", "place") for c in names]

        def line(texts: Sequence[str]) -> str:
            return " & ".join(text.translate(LATEX_ESCAPES) for text in texts) + r" \\"

        caption = f"{table.title}. {'; '.join(notes(table, names))}."
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{caption.translate(LATEX_ESCAPES)}}}",
                    rf"\begin{{tabular}}{{{''.join('l' if side else 'r' for side in left)}}}",
                    r"\toprule",
                    line([header(table, c) for c in names]),
                    r"\midrule",
                    *(line([cell(table, row, c) for c in names]) for row in table.rows),
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts)


def to_json(comparison: Comparison, columns: Sequence[str] | None = None) -> str:
    """Everything, as plain numbers; ``columns`` chooses nothing here."""
    tables = [
        {
            "title": table.title,
            **table.fields,
            "sort": table.sort,
            "base": table.base,
            "latency": table.latency and table.latency._asdict(),
            "rows": [
                {
                    **row.names,
                    "settings": row.settings,
                    "place": row.place,
                    "seeds": [run["seed"] for run in row.runs],
                    "metrics": {name: stat and stat._asdict() for name, stat in row.stats.items()},
                    **{name: getattr(row, name) for name in COSTS},
                    "difference": row.difference and row.difference._asdict(),
                    "commands": [run.get("command") for run in row.runs],
                }
                for row in table.rows
            ],
            "mind": table.mind,
            "left_out": table.left_out,
        }
        for table in comparison.tables
    ]
    return json.dumps({"tables": tables, "left_out": comparison.left_out}, indent=1, ensure_ascii=False)


FORMATS: dict[str, Callable[[Comparison, Sequence[str] | None], str]] = {
    "markdown": markdown,
    "csv": to_csv,
    "latex": latex,
    "json": to_json,
}
