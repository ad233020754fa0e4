"""Latency over resolution, width and batch: a table, and a plot against multiply-adds (as Figures 1 and 2)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.benchmark import Options
from tasks.deploy import machine
from tasks.deploy.cases import Plan
from tasks.deploy.latency import sweep
from tasks.deploy.latency_text import Result, notes, table
from tasks.deploy.progress import show

MARKERS = "os^Dv*XP"


def work(options: Options, planned: Plan) -> int:
    """Sweep, print the grid and the whole table, plot. Returns the exit code."""
    options.memory = False
    results: list[Result] = []
    left_out, watch = list(planned.left_out), machine.Watch()
    interrupted = sweep(options, planned.cases, results, left_out)
    if not results:
        print("\n".join(f"left out: {line}" for line in left_out), file=sys.stderr)
        return 130 if interrupted else 1
    threads = sorted({result.opened.case.threads for result in results})
    conditions = [*machine.in_words(threads), *notes(results, watch.load(), left_out)]
    show([*grid(results), "", *table(results), "", *conditions], options.out)
    draw(results, Path(options.plot))
    print(f"plot      {Path(options.plot).resolve()}", file=sys.stderr)
    return 130 if interrupted else 0


def series(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results that a line joins: one network family and width under one set of conditions, over sizes."""
    lines: dict[str, list[Result]] = {}
    for result in results:
        case = result.opened.case
        network = case.network
        threads = f"{case.threads} thread{'s' if case.threads > 1 else ''}"
        name = f"{network.backbone}, {network.head}, {case.engine_text}, {threads}, batch {case.batch}"
        lines.setdefault(name, []).append(result)
    return {name: sorted(ones, key=lambda one: one.opened.costs.madds) for name, ones in lines.items()}


def grid(results: Sequence[Result]) -> list[str]:
    """Markdown: milliseconds a batch, a row a network and its conditions, a column a size."""
    sizes = sorted({result.opened.case.network.size for result in results})
    lines = [f"| ms a batch | {' | '.join(f'{height}x{width}' for height, width in sizes)} |"]
    lines.append("|" + " --- |" * (1 + len(sizes)))
    for name, ones in series(results).items():
        found = {one.opened.case.network.size: one for one in ones}
        cells = [f"{found[size].summary.median:.2f}{'*' if found[size].noise else ''}" if size in found else "-"
                 for size in sizes]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", "* noisy"] if any(result.noise for result in results) else lines


def draw(results: Sequence[Result], file: Path) -> None:
    """Latency of an image against multiply-adds, both logarithmic, with the median's interval.

    Args:
        results: what was measured.
        file: ``.svg``, ``.png`` or ``.pdf``.
    Raises:
        ValueError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    axes = figure.subplots()
    for number, (name, ones) in enumerate(series(results).items()):
        batch = [one.opened.case.batch for one in ones]
        x = [one.opened.costs.madds / 1e6 for one in ones]
        y = [one.summary.median / b for one, b in zip(ones, batch, strict=True)]
        below = [max(0.0, one.summary.median - one.summary.low) / b for one, b in zip(ones, batch, strict=True)]
        above = [max(0.0, one.summary.high - one.summary.median) / b for one, b in zip(ones, batch, strict=True)]
        axes.errorbar(
            x, y, yerr=[below, above], marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1, capsize=2,
            label=name.replace("$", r"\$"),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("multiply-adds of an image, M")
    axes.set_ylabel("latency of an image, ms (median, 95 % interval)")
    noisy = ", some runs noisy" if any(one.noise for one in results) else ""
    device = machine.describe(1)["device"]
    axes.set_title(f"{device}{noisy}; points of a line differ in resolution".replace("$", r"\$"), fontsize=8)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=6)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=200)
