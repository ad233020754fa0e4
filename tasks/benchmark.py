"""Latency to trust, and the suite's own speed. ``python -m tasks.benchmark backbone=small,large engine=all``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tasks.reporting.results import check_appendable
from tasks.words import command, pairs, suggest

HELP = """\
python -m tasks.benchmark [what] [key=value ...]

  latency (the default)     backbones x heads x engines x threads x precisions x batches, timed in turn: a table, and a
                            record for each in results.jsonl, which tasks.compare shows beside the scores
  cost                      latency over image_size= x width= x batch=: a table and a plot (plot=cost.svg)
  roofline                  this machine's peak, and each network's and layer's share of it (eager torch)
  paper                     the paper's ratios of latencies beside ours, for each engine and number of threads
                            (these, too, leave a record for each network)
  peer=torchvision          the suite against torchvision, each side in its own process, in turn
  check=self                does the benchmark itself tell right from wrong here? a model against itself, a delay of
                            10 %, a busy loop beside it

  what is timed             task=classify,detect,segment,multitask   backbone=small,large   head=ssdlite,fcoslite
                            image_size=224,320   width=0.75,1.0
                            run=<run folder>,... (a trained model instead; trust=true if it names parts of your own)
                            and any other setting of the command: backbone.reduced_tail=detection head.num_classes=20
  under which conditions    engine=all (the default of latency and paper; cost and check take the fastest) or names
                            threads=1,2   precision=f32,bf16   batch=1,8
  how                       rounds=100   seconds=60 (most, for what runs side by side)   photo=<a JPEG>
                            memory=true (peak of a fresh process)   results=results.jsonl (null: no records)
  peer                      rows=step_large,coco ... (rows=? lists them)   rounds=   threads=2
                            engine=openvino precision=bf16 (image_*, predict: ours)
                            profile=true (where the time goes, on both sides)
                            bccd=<folder> camvid=<folder> (input_*, step_ssdlite_real; else drawn scenes)
                            images=5000 (coco)   batch= (step_*, post_*, input_*)
  check                     trials=40   rounds=
  paper                     table=3,4,6   engine=   threads=   rounds=
  out=table.md              a file for the table, beside the screen

Numbers are medians; brackets are the median's 95 % interval. Runs beside which the machine did other work are marked
noisy, with the reason.
"""
LISTS = ("task", "backbone", "head", "run", "image_size", "width", "engine", "threads", "precision", "batch", "rows",
         "table")  # fmt: skip
TIMED = {"task", "backbone", "head", "image_size", "width", "engine", "threads", "precision", "batch", "rounds",
         "seconds", "out", "results", "run"}  # fmt: skip
KEYS = {
    "latency": TIMED | {"photo", "memory", "trust"},
    "cost": TIMED - {"run"} | {"plot"},
    "roofline": {"task", "backbone", "head", "image_size", "width", "threads", "batch", "rounds", "out", "results"},
    "paper": {"table", "engine", "threads", "rounds", "seconds", "out", "results"},
    "peer": {"peer", "rows", "profile", "bccd", "camvid", "images"}
    | {"rounds", "threads", "engine", "precision", "batch", "out"},
    "check": {"check", "engine", "backbone", "image_size", "threads", "trials", "rounds", "out"},
}
"""What is measured -> the keys that it knows."""
PLOTS = (".svg", ".png", ".pdf")
OVERRIDABLE = {"latency", "cost", "roofline"}
ONE_AT_A_TIME = {"backbone", "image_size", "engine", "threads", "precision", "batch"}
"""Of peer and check."""


@dataclass
class Options:
    """What was asked for on the command line."""

    what: str = "latency"
    task: list[str] = field(default_factory=lambda: ["classify"])
    backbone: list[str] = field(default_factory=lambda: ["small", "large"])
    head: list[str] | None = None
    run: list[str] = field(default_factory=list)
    image_size: list[tuple[int, int]] | None = None
    width: list[float] | None = None
    engine: list[str] | None = None
    threads: list[int] | None = None
    precision: list[str] = field(default_factory=lambda: ["f32"])
    batch: list[int] = field(default_factory=lambda: [1])
    overrides: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    """The keys that were typed."""
    rounds: int | None = None
    seconds: float = 60.0
    trials: int = 40
    photo: str | None = None
    memory: bool = True
    profile: bool = False
    trust: bool = False
    results: str | None = "results.jsonl"
    plot: str = "cost.svg"
    peer: str | None = None
    check: str | None = None
    rows: list[str] | None = None
    bccd: str | None = None
    camvid: str | None = None
    images: int = 5000
    table: list[str] = field(default_factory=lambda: ["3", "4", "6"])
    out: str | None = None


def parse(words: Sequence[str]) -> Options:
    """Options from the words of the command line.

    Raises:
        ValueError: a word that is no key=value, a key that this measurement does not know, a value that is none.
    """
    words = list(words)
    options = Options()
    for what, key in (("peer", "peer="), ("check", "check=")):
        if any(word.startswith(key) for word in words):
            options.what = what
    if words and "=" not in words[0]:
        options.what = words.pop(0)
        if options.what not in KEYS:
            raise ValueError(f"there is nothing called {options.what!r}{suggest(options.what, KEYS)}; --help lists it")
    known = KEYS[options.what]
    for key, value in pairs(words):
        if not value:
            raise ValueError(f"{key}= is empty; --help says what it takes")
        if key in known:
            setattr(options, key, read(key, value))
            options.given.add(key)
        elif "." in key and options.what in OVERRIDABLE:
            options.overrides.append(f"{key}={value}")
        else:
            raise ValueError(f"{options.what} has no key {key!r}{suggest(key, known)}; --help lists them")
    owned = sorted(options.given & {"task", "backbone", "head", "image_size", "width"}) + options.overrides
    if options.run and owned:
        raise ValueError(f"run= measures a trained network as it is; leave {', '.join(owned)} out")
    for key, value in (("peer", "torchvision"), ("check", "self")):
        if getattr(options, key) not in (None, value):
            raise ValueError(f"{key}={getattr(options, key)}; expected {key}={value}")
    for key in ONE_AT_A_TIME & options.given if options.what in ("peer", "check") else ():
        if len(getattr(options, key)) > 1:
            raise ValueError(f"{options.what} takes one {key}= at a time: all is measured under one set of conditions")
    if options.results and "results" in known:
        check_appendable(options.results)
    return options


def read(key: str, text: str) -> object:
    """A key's value.

    Raises:
        ValueError: no number where one is needed; names the key.
    """
    parts = [part for part in text.split(",") if part]
    if not parts:
        raise ValueError(f"{key}={text} names none; --help says what it takes")
    try:
        if key == "image_size":
            sizes = [[int(side) for side in part.split("x")] for part in parts]
            if not all(len(sides) in (1, 2) and min(sides) >= 32 for sides in sizes):
                raise ValueError
            return [(sides[0], sides[-1]) for sides in sizes]
        if key in ("threads", "batch", "rounds", "trials", "images"):
            numbers = [int(part) for part in parts]
            if min(numbers) < 1 or (key not in LISTS and len(numbers) > 1):
                raise ValueError
            return numbers if key in LISTS else numbers[0]
        if key in ("width", "seconds"):
            reals = [float(part) for part in parts]
            if not all(0 < real < float("inf") for real in reals) or (key not in LISTS and len(reals) > 1):
                raise ValueError
            return reals if key in LISTS else reals[0]
    except ValueError:
        expected = "sides of at least 32 px such as 224 or 512x1024" if key == "image_size" else "numbers above 0"
        raise ValueError(f"{key}={text}; expected {expected}") from None
    if key in ("memory", "profile", "trust"):
        if text not in ("true", "false"):
            raise ValueError(f"{key}={text}; expected true or false")
        return text == "true"
    if key == "plot" and not text.endswith(PLOTS):
        raise ValueError(f"plot={text}; expected a file that ends in {', '.join(PLOTS)}")
    if key in ("out", "plot", "results") and Path(text).is_dir():
        raise ValueError(f"{key}={text} is a folder; expected a file's name")
    if key == "results" and text in ("null", "none"):
        return None
    return parts if key in LISTS else text


def work(options: Options) -> int:
    """Check what can be checked without torch, then measure. Returns the exit code."""
    from tasks.deploy import cases

    if options.what == "peer":
        from tasks.deploy import peer

        return peer.work(options)
    if options.what == "paper":
        from tasks.deploy import printed

        return printed.work(options)
    if options.what == "cost" and find_spec("matplotlib") is None:
        raise ValueError('cost draws a plot: pip install -e ".[plots]"')
    planned = cases.plan(options)  # every mistake in names and settings ends here, before torch is loaded
    if options.what == "check":
        from tasks.deploy import selfcheck

        return selfcheck.work(options, planned)
    if options.what == "roofline":
        from tasks.deploy import roofline

        return roofline.work(options, planned)
    if options.what == "cost":
        from tasks.deploy import cost

        return cost.work(options, planned)
    from tasks.deploy import latency

    return latency.work(options, planned)


def main() -> None:
    """Entry point."""
    command(HELP, lambda words: work(parse(words)))


if __name__ == "__main__":
    main()
