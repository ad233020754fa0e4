"""Every record so far as tables, and one report page. ``python -m tasks.compare task=detect data=bccd by=backbone``"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tasks.words import command, pairs, suggest

HELP = """\
python -m tasks.compare [key=value ...]     tables of what may be compared, and report.html

  results=results.jsonl     one or several files, separated by commas
  by=backbone,head,weights  the fields that name a row; what else differs stands in its settings
  sort=map                  a metric, params, madds, latency_ms or a field of by; sort=-map turns it round
  columns=backbone,map,n    what to show: metrics, params, madds, latency_ms, n, place, difference, settings,
                            and any field of a record (device, config.optimizer.lr ...)
  against=large             the row that paired differences are taken to; default: each table's first
  format=markdown           markdown, csv, latex or json
  report=report.html        where the page goes; report=null writes none (csv, latex, json: only if asked for)
  ledger=ledger.json        the published figures beside ours, for the page: python -m tasks.ledger format=json
                            out=ledger.json writes it; if it is there it is taken, ledger=null leaves it out
  plots=figures             a folder for plots as SVG and, with matplotlib installed, PNG

Any field of a record filters: task=detect data=bccd backbone=small,large* image_size=320x320 seed=0
config.optimizer.lr=0.01 latency.engine=onnxruntime. Runs are compared only within one task, data set, split, image
size and budget; rows hold runs that differ in nothing but the seed.
"""
LEDGER = "ledger.json"
FORMATS = ("markdown", "csv", "latex", "json")


@dataclass
class Options:
    """What was asked for on the command line."""

    results: list[str] = field(default_factory=lambda: ["results.jsonl"])
    by: list[str] = field(default_factory=lambda: ["backbone", "head", "weights"])
    sort: str | None = None
    columns: list[str] | None = None
    against: str | None = None
    format: str = "markdown"
    report: str | None = "report.html"
    ledger: str | None = None
    plots: str | None = None
    filters: dict[str, list[str]] = field(default_factory=dict)


def parse(words: Sequence[str]) -> Options:
    """Options from ``key=value`` words.

    Raises:
        ValueError: a word that is none, an unknown key or format.
    """
    from tasks.reporting.results import OPTIONAL, REQUIRED

    options, given = Options(), set()
    for key, value in pairs(words):
        given.add(key)
        parts = [part for part in value.split(",") if part]
        none = value in ("", "null", "none")
        if key in ("results", "by", "columns"):
            if not parts:
                raise ValueError(f"{key}= is empty; --help says what it takes")
            setattr(options, key, parts)
        elif key in ("sort", "against", "report", "ledger", "plots"):
            setattr(options, key, None if none else value)
        elif key == "format":
            options.format = value
        elif key.partition(".")[0] in REQUIRED + OPTIONAL:
            options.filters[key] = parts
        else:
            known = [*(f for f in Options.__dataclass_fields__ if f != "filters"), *REQUIRED, *OPTIONAL]
            raise ValueError(f"there is no key {key!r}{suggest(key, known)}; --help lists them")
    if options.format not in FORMATS:
        raise ValueError(f"format={options.format}; expected one of {', '.join(FORMATS)}")
    if options.format != "markdown" and "report" not in given:
        options.report = None
    if "ledger" not in given and Path(LEDGER).is_file():
        options.ledger = LEDGER
    return options


def work(options: Options) -> None:
    """Read, compare, print, write the page."""
    from tasks.reporting.comparison import compare
    from tasks.reporting.results import Record, read_records
    from tasks.reporting.tables import FORMATS as WRITERS
    from tasks.reporting.tables import check_columns

    records: list[Record] = []
    unread = []
    for path in options.results:
        found, problems = read_records(path)
        unread += [str(problem) for problem in problems]
        folder = str(Path(path).parent)
        for record in found:
            run = record.get("run")
            if run:  # as written it counts from the folder of the results
                record["run"] = os.path.join(folder, run)  # noqa: PTH118 - ten thousand of them
        records += found
    if not records:
        raise ValueError(
            f"{', '.join(options.results)}: no record in it; {'; '.join(unread[:3]) or 'train something first'}"
        )
    comparison = compare(records, options.filters, options.by, options.sort, options.against)
    comparison.left_out += unread
    if not comparison.tables and not comparison.left_out:
        comparison.left_out.append(f"{len(records)} latencies without scores; a training command adds its own")
    check_columns(comparison.tables, options.columns or [])
    print(WRITERS[options.format](comparison, options.columns))
    if options.report:
        from tasks.reporting.report import write_report

        write_report(options.report, comparison, options.columns, options.ledger)
        print(f"\nreport  {Path(options.report).resolve()}", file=sys.stderr)
    if options.plots:
        from tasks.reporting.plots import write_plots

        written = write_plots(options.plots, comparison)
        print(f"plots   {len(written)} files in {Path(options.plots).resolve()}", file=sys.stderr)


def main() -> None:
    """Entry point."""
    gc.disable()  # its passes over ten thousand records take longer than the process lives
    command(HELP, lambda words: work(parse(words)))


if __name__ == "__main__":
    main()
