"""Pareto plots and metric bars as SVG and PNG for papers. Needs matplotlib (the extra ``plots``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tasks.reporting.comparison import COSTS, Comparison, Table
from tasks.reporting.drawing import PALETTE
from tasks.reporting.statistics import pareto_front
from tasks.reporting.tables import UNITS

MARKERS = "osD^vP*X"


def write_plots(folder: str | Path, comparison: Comparison) -> list[Path]:
    """One plot a table and cost: the table's headline metric with its spread, the Pareto front dashed.

    Args:
        folder: is made.
        comparison: what to plot.
    Returns:
        The files written: an SVG and a PNG (200 dpi) each.
    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('plots= needs matplotlib: pip install -e ".[plots]"') from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, table in enumerate(comparison.tables, start=1):
        for cost in COSTS:
            figure = Figure(figsize=(5.2, 3.6), layout="constrained")
            if not _draw(figure, table, cost):
                continue
            words = f"{number:02d} {table.fields['task']} {table.fields['data']} {table.sort} {cost}"
            stem = re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")
            for suffix in (".svg", ".png"):
                figure.savefig(folder / f"{stem}{suffix}", dpi=200)
                written.append(folder / f"{stem}{suffix}")
    return written


def _draw(figure: Any, table: Table, cost: str) -> bool:
    """Draw on a matplotlib figure; False if nothing is known."""
    title, divisor, _ = UNITS[cost]
    costs = [getattr(row, cost) for row in table.rows]
    stats = [row.stats.get(table.sort) for row in table.rows]
    front = pareto_front(costs, [stat.mean if stat else None for stat in stats])
    if not any(front):
        return False
    axes = figure.subplots()
    best = []
    for i, (row, at, stat, on) in enumerate(zip(table.rows, costs, stats, front, strict=True)):
        if at is None or stat is None:
            continue
        x, y = at / divisor, 100 * stat.mean
        colour = tuple(channel / 255 for channel in PALETTE[i % len(PALETTE)])
        spread = None if stat.deviation is None else 100 * stat.deviation
        axes.errorbar(
            x, y, yerr=spread, fmt=MARKERS[i % len(MARKERS)], color=colour, markeredgecolor="black", ecolor="grey",
            capsize=2, label=_plain(row.name), zorder=3,
        )  # fmt: skip
        if on:
            best.append((x, y, _plain(row.name)))
    best.sort()
    for x, y, name in best:  # names stay inside: those on the right half point left
        left = x > (best[0][0] + best[-1][0]) / 2
        side, offset = ("right", -6) if left else ("left", 6)
        axes.annotate(name, (x, y), xytext=(offset, 5), textcoords="offset points", ha=side, fontsize=7)
    axes.step([x for x, _, _ in best], [y for _, y, _ in best], where="post", linestyle="--", color="grey", zorder=1)
    axes.set_xlabel(title.replace(" M", ", M").replace(" ms", ", ms"))
    axes.set_ylabel(f"{_plain(table.sort)}, %")
    axes.set_title(_plain(table.title), fontsize=7, wrap=True)
    axes.grid(alpha=0.3)
    if len(table.rows) <= 12:
        axes.legend(fontsize=6)
    if cost == "latency_ms" and table.latency:
        axes.text(0.99, 0.01, _plain(str(table.latency)), transform=axes.transAxes, ha="right", va="bottom", fontsize=6)
    return True


def _plain(text: str) -> str:
    """A name that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")
