"""The paper's figures, row by row: theirs, ours, how far, why. ``python -m tasks.ledger table=6``"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import benchmark
from tasks.words import command, pairs, suggest

if TYPE_CHECKING:
    from tasks.deploy.printed import Latencies
    from tasks.reporting.ledger import LedgerTable

HELP = """\
python -m tasks.ledger [key=value ...]      every published row: printed, ours, difference, verdict, and why

  table=3,6                 tables of the paper (3 to 9, text) and of other implementations (torchvision, timm ...);
                            default: all
  row=dagger                rows whose name contains this, or fits a pattern with *
  format=text               text, markdown or json; markdown and json hold each row's command
  out=ledger.md             a file to write to, instead of the screen
  results=results.jsonl     run records (one or several files, separated by commas): accuracies measured here
  latency=true              beside the printed milliseconds' ratios those of this machine, and which orderings hold;
                            of tables 3, 4 and 6, or those that table= names (minutes)
  engine=all                that latencies are measured in
  threads=1,2               that latencies are measured with

The figures, their sources and the config of every row are in conf/ledger.
"""
FORMATS = ("text", "markdown", "json")
RESULTS = "results.jsonl"


@dataclass
class Options:
    """What was asked for on the command line."""

    table: list[str] | None = None
    row: str | None = None
    format: str = "text"
    out: str | None = None
    results: list[str] | None = None
    latency: bool = False
    engine: list[str] | None = None
    threads: list[int] | None = None


def parse(words: Sequence[str]) -> Options:
    """Options from ``key=value`` words.

    Raises:
        ValueError: a word that is none, an unknown key or value.
    """
    options = Options()
    known = list(Options.__dataclass_fields__)
    for key, value in pairs(words):
        if key not in known:
            raise ValueError(f"there is no key {key!r}{suggest(key, known)}; there are {', '.join(known)}")
        if not value:
            raise ValueError(f"{key}= is empty; --help says what it takes")
        if key in ("table", "engine", "threads", "out"):
            setattr(options, key, benchmark.read(key, value))
        elif key == "results":
            options.results = [part for part in value.split(",") if part]
        elif key == "latency":
            if value not in ("true", "false"):
                raise ValueError(f"latency={value}; expected true or false")
            options.latency = value == "true"
        else:
            setattr(options, key, value)
    if options.format not in FORMATS:
        raise ValueError(
            f"there is no format {options.format!r}{suggest(options.format, FORMATS)}; there are {', '.join(FORMATS)}"
        )
    for key in ("engine", "threads"):
        if getattr(options, key) and not options.latency:
            raise ValueError(f"{key}= is of latencies; add latency=true")
    return options


def work(options: Options) -> int:
    """Read, build, count, print. Returns the exit code."""
    from tasks.reporting.ledger import choose, read_ledger
    from tasks.reporting.results import Record, read_records

    folder = Path(__file__).resolve().parents[1] / "conf" / "ledger"
    tables = choose(read_ledger(folder), options.table, options.row)
    records: list[Record] = []
    if options.results or Path(RESULTS).is_file():
        records, problems = read_records(options.results or RESULTS)
        for problem in problems:
            print(f"left out: {problem}", file=sys.stderr)

    from tasks.reporting.ledger_counts import find
    from tasks.reporting.ledger_text import FORMATS as WRITERS

    if options.out is not None:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    sections = [(table, find(table, records)) for table in tables.values()]
    found = latencies(tables, options) if options.latency else None
    written = WRITERS[options.format](sections, found)
    if options.out is None:
        print(written)
    else:
        Path(options.out).write_text(written + "\n", encoding="utf-8")
        print(f"ledger  {Path(options.out).resolve()}", file=sys.stderr)
    return 130 if found and found.interrupted else 0


def latencies(tables: Mapping[str, LedgerTable], options: Options) -> Latencies:
    """Measured ratios of the tables that print milliseconds.

    Raises:
        ValueError: none of them does.
    """
    from tasks.deploy import printed

    default = benchmark.Options().table
    timed = {
        name: table
        for name, table in tables.items()
        if len(printed.rows_of(table)) > 1 and (options.table or name in default)
    }
    if not timed:
        rows = f" row={options.row}" if options.row else ""
        raise ValueError(f"of table={','.join(tables)}{rows} no two rows print a latency; try table=3,4,6")
    return printed.measure(
        timed, benchmark.Options(what="paper", engine=options.engine, threads=options.threads, results=None)
    )


def main() -> None:
    """Entry point."""
    command(HELP, lambda words: work(parse(words)))


if __name__ == "__main__":
    main()
