"""What the report page's plots are drawn from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tasks.reporting.artefacts import read_curves
from tasks.reporting.comparison import COSTS, SHOWN, Row, Table
from tasks.reporting.statistics import pareto_front


def table_data(table: Table, rows: Sequence[Row], detailed: Collection[int]) -> dict[str, Any]:
    """The plots of one table as plain data.

    Args:
        table: the table.
        rows: those that are shown.
        detailed: ids of the records whose curves are shown.
    Returns:
        ``metrics``, ``latency`` (its conditions), ``rows``, ``fronts`` (metric -> cost -> rows on the Pareto front),
        ``curves``, ``per_class``.
    """
    metrics = [name for name in table.metrics if name.rpartition("/")[2] in SHOWN] or table.metrics[:6]
    fronts: dict[str, dict[str, list[int]]] = {}
    for metric in metrics:
        means = [stat.mean if (stat := row.stats[metric]) else None for row in rows]
        fronts[metric] = {
            cost: [i for i, on in enumerate(pareto_front([getattr(row, cost) for row in rows], means)) if on]
            for cost in COSTS
        }
    curves = [
        {"row": i, "seed": run["seed"], "series": series}
        for i, row in enumerate(rows)
        for run in row.runs
        if id(run) in detailed and run.get("run") and (series := read_curves(Path(str(run["run"]))))
    ]
    return {
        "metrics": metrics,
        "latency": table.latency and str(table.latency),
        "rows": [
            {
                "name": row.name,
                "stats": {name: row.stats[name] for name in metrics},
                **{c: getattr(row, c) for c in COSTS},
            }
            for row in rows
        ],
        "fronts": fronts,
        "curves": curves,
        "per_class": _per_class(rows),
    }


def _per_class(rows: Sequence[Row], most: int = 40) -> list[dict[str, Any]]:
    """task -> classes and the mean of each over a row's seeds, for the first rows."""
    tasks: dict[str, dict[str, None]] = {}
    for row in rows[:most]:
        for run in row.runs:
            for task, values in run.get("per_class", {}).items():
                tasks.setdefault(task, {}).update(dict.fromkeys(values))
    return [
        {"task": task, "classes": list(classes), "values": [_means(row, task, list(classes)) for row in rows[:most]]}
        for task, classes in tasks.items()
    ]


def _means(row: Row, task: str, classes: Sequence[str]) -> list[float | None] | None:
    tables = [run["per_class"][task] for run in row.runs if task in run.get("per_class", {})]
    if not tables:
        return None
    means: list[float | None] = []
    for name in classes:
        values = [value for table in tables if (value := table.get(name)) is not None]
        means.append(round(sum(values) / len(values), 5) if values else None)
    return means
