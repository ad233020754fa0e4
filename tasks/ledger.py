"""The paper's figures, row by row: theirs, ours, how far, why. ``python -m tasks.ledger table=6``"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.words import command, pairs, suggest

HELP = """\
python -m tasks.ledger [key=value ...]      every published row: printed, ours, difference, verdict, and why

  table=3,6                 tables of the paper (3 to 9, text) and of other implementations (torchvision, timm ...);
                            default: all
  row=dagger                rows whose name contains this, or fits a pattern with *
  format=text               text, markdown or json; markdown and json hold each row's command
  out=ledger.md             a file to write to, instead of the screen
  results=results.jsonl     run records (one or several files, separated by commas): accuracies measured here
  latency=true              time one image through each network on this machine (two seconds a network)

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
        if key in ("table", "results"):
            setattr(options, key, [part for part in value.split(",") if part])
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
    return options


def work(options: Options) -> None:
    """Read, build, count, print."""
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

    sections = [(table, find(table, records, options.latency)) for table in tables.values()]
    written = WRITERS[options.format](sections)
    if options.out is None:
        print(written)
        return
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(written + "\n", encoding="utf-8")
    print(f"ledger  {Path(options.out).resolve()}", file=sys.stderr)


def main() -> None:
    """Entry point."""
    command(HELP, lambda words: work(parse(words)))


if __name__ == "__main__":
    main()
