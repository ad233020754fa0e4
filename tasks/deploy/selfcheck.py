"""Does the benchmark itself tell right from wrong on this machine? ``python -m tasks.benchmark check=self``

Three experiments with known answers: a model against itself, against itself with a delay of 10 %, and with a busy loop
beside it. Their counts are what a verdict of ``timing.compare`` is worth here.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from tasks import build
from tasks.benchmark import Options
from tasks.deploy import facts, machine, timing
from tasks.deploy.cases import Case, Plan
from tasks.deploy.progress import Progress, show
from tasks.deploy.session import open_model

ROUNDS = 100
DELAY = 0.10
BUSY_TRIALS = 10
SPIN = "while True: pass"


class Trial(NamedTuple):
    """What was said of one comparison."""

    different: bool
    noisy: bool


class Counts(NamedTuple):
    """Of an experiment."""

    yes: int
    trials: int
    wanted: str


def work(options: Options, planned: Plan) -> int:
    """Run the three experiments and print the counts. Returns 0 if all hold, 130 when Ctrl-C ended it."""
    case = planned.cases[0]
    rounds = options.rounds or ROUNDS
    beside = min(BUSY_TRIALS, options.trials)
    watch, progress = machine.Watch(), Progress(2 * options.trials + 2 * beside)
    call = runner_call(case)
    usual = float(np.median([timing.timed(call)() for _ in range(20)]))
    same: list[Trial] = []
    late: list[Trial] = []
    calm: list[Trial] = []
    loud: list[Trial] = []
    interrupted = False
    try:
        trials(call, call, options.trials, rounds, progress, "a model against itself", same)
        trials(with_delay(call, DELAY), call, options.trials, rounds, progress, "a delay of 10 %", late)
        trials(call, call, beside, rounds, progress, "nothing beside it", calm)
        with busy_loop() as process:
            trials(call, call, beside, rounds, progress, "a busy loop beside it", loud, [process.pid])
    except KeyboardInterrupt:
        interrupted = True
    progress.clear()
    different, slower = (sum(trial.different for trial in found) for found in (same, late))
    marked, by_chance = (sum(trial.noisy for trial in found) for found in (loud, [*same, *calm]))
    results = [
        ("the same model against itself", "called different", Counts(different, len(same), "<= 5 %"),
         different <= 0.05 * len(same)),
        ("a delay of 10 % injected", "called slower", Counts(slower, len(late), ">= 95 %"), slower >= 0.95 * len(late)),
        ("a busy loop beside it", "marked noisy", Counts(marked, len(loud), "all"), marked == len(loud)),
        ("nothing of ours beside it", "marked noisy", Counts(by_chance, len(same) + len(calm), "for information"),
         True),
    ]  # fmt: skip
    load = watch.load()
    lines = ["| experiment | found | count | wanted | holds |", "| --- | --- | --- | --- | --- |"]
    for name, found, counts, holds in results:
        if counts.trials:
            share = f"{counts.yes} of {counts.trials} ({100 * counts.yes / counts.trials:.1f} %)"
            lines.append(f"| {name} | {found} | {share} | {counts.wanted} | {'yes' if holds else 'NO'} |")
    lines += [
        "",
        f"case      {case.label}; {usual:.2f} ms; {rounds} rounds a trial, both contenders in each, order drawn",
        f"verdict   different: the {100 * timing.SURE:.0f} % interval of the median ratio lies beyond "
        f"+-{100 * timing.MARGIN:.0f} %",
        *machine.in_words([case.threads], list(facts(case.engine)["PACKAGES"])),
        f"{load.in_words()}; our busy loop is none of them",
    ]
    lines += ["stopped   by Ctrl-C: what had been measured"] if interrupted else []
    show(lines, options.out)
    return 130 if interrupted else 0 if all(holds for *_, holds in results) else 1


def runner_call(case: Case) -> Callable[[], object]:
    """One run of the case's engine on random pixels."""
    network = case.network
    runner = open_model(build(network.task, network.overrides), case.engine, case.threads, case.precision, case.batch)
    image = np.random.default_rng(0).integers(0, 256, (case.batch, 3, *network.size), dtype=np.uint8)
    return lambda: runner.run(image)


def with_delay(call: Callable[[], object], share: float) -> Callable[[], object]:
    """The call, then that share of its time of doing nothing useful; sleeping would round it up."""

    def later() -> None:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        end += share * (end - start)
        while time.perf_counter() < end:
            pass

    return later


def trials(
    one: Callable[[], object],
    other: Callable[[], object],
    count: int,
    rounds: int,
    progress: Progress,
    what: str,
    found: list[Trial],
    strangers: Sequence[int] = (),
) -> None:
    """Compare so many times; what was said of each is appended to ``found``.

    Where the two are not the same, only ``slower`` counts: the delay must be found as what it is.

    Raises:
        KeyboardInterrupt: Ctrl-C; the trial that it ended is left out.
    """
    for seed in range(count):
        watch = machine.Watch(strangers)
        times = timing.measure({"one": timing.timed(one), "other": timing.timed(other)}, rounds, seed=seed)
        if times.interrupted:
            raise KeyboardInterrupt
        ratio = timing.compare(times.ms[:, 0], times.ms[:, 1])
        different = ratio.different and (one is other or ratio.median > 1)
        found.append(Trial(different, bool(machine.noise(watch.load(), times.ms[:, 1]))))
        progress.step()
        counts = [sum(trial.different for trial in found), sum(trial.noisy for trial in found)]
        progress.say(f"{what}: {counts[0]} different, {counts[1]} noisy of {len(found)}")


@contextmanager
def busy_loop() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, as fast as it can."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    time.sleep(0.5)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
