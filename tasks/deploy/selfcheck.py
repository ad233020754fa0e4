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
from tasks.deploy import machine, timing
from tasks.deploy.cases import Case, Plan
from tasks.deploy.progress import Progress, show
from tasks.deploy.session import open_model

ROUNDS = 100
DELAY = 0.10
BUSY_TRIALS = 10
SPIN = "while True: pass"


class Counts(NamedTuple):
    """Of an experiment."""

    yes: int
    trials: int
    wanted: str

    @property
    def share(self) -> float:
        return self.yes / self.trials if self.trials else float("nan")


def work(options: Options, planned: Plan) -> int:
    """Run the three experiments and print the counts. Returns 0 if all hold."""
    case = planned.cases[0]
    rounds = options.rounds or ROUNDS
    call = runner_call(case)
    watch, progress = machine.Watch(), Progress(2 * options.trials + 2 * min(BUSY_TRIALS, options.trials))
    usual = float(np.median([timing.timed(call)() for _ in range(20)]))
    delayed = with_delay(call, DELAY)
    same, same_noisy = trials(call, call, options.trials, rounds, progress, "a model against itself")
    late, _ = trials(delayed, call, options.trials, rounds, progress, "a delay of 10 %")
    beside = min(BUSY_TRIALS, options.trials)
    calm_noisy = trials(call, call, beside, rounds, progress, "nothing beside it")[1]
    with busy_loop() as process:
        loud_noisy = trials(call, call, beside, rounds, progress, "a busy loop beside it", [process.pid])[1]
    progress.clear()
    results = [
        ("the same model against itself", "called different", Counts(same, options.trials, "<= 5 %"),
         same <= 0.05 * options.trials),
        ("a delay of 10 % injected", "called slower", Counts(late, options.trials, ">= 95 %"),
         late >= 0.95 * options.trials),
        ("a busy loop beside it", "marked noisy", Counts(loud_noisy, beside, "all"), loud_noisy == beside),
        ("nothing of ours beside it", "marked noisy", Counts(calm_noisy + same_noisy, beside + options.trials,
                                                             "for information"), True),
    ]  # fmt: skip
    load = watch.load()
    lines = ["| experiment | found | count | wanted | holds |", "| --- | --- | --- | --- | --- |"]
    for name, found, counts, holds in results:
        share = f"{counts.yes} of {counts.trials} ({100 * counts.share:.1f} %)"
        lines.append(f"| {name} | {found} | {share} | {counts.wanted} | {'yes' if holds else 'NO'} |")
    lines += [
        "",
        f"case      {case.label}; {usual:.2f} ms; {rounds} rounds a trial, both contenders in each, order drawn",
        f"verdict   different: the {100 * timing.SURE:.0f} % interval of the median ratio lies beyond "
        f"+-{100 * timing.MARGIN:.0f} %",
        *machine.in_words([case.threads], [case.engine]),
        f"{load.in_words()}; our busy loop is none of them",
    ]
    show(lines, options.out)
    return 0 if all(holds for *_, holds in results) else 1


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
    strangers: Sequence[int] = (),
) -> tuple[int, int]:
    """Compare so many times; how often they were called different, and how often the run was marked noisy.

    Where the two are not the same, only ``slower`` counts: the delay must be found as what it is.
    """
    different = noisy = 0
    for trial in range(count):
        watch = machine.Watch(strangers)
        times = timing.measure({"one": timing.timed(one), "other": timing.timed(other)}, rounds, seed=trial)
        if times.interrupted:
            raise KeyboardInterrupt
        ratio = timing.compare(times.ms[:, 0], times.ms[:, 1])
        different += ratio.different and (one is other or ratio.median > 1)
        noisy += bool(machine.noise(watch.load(), times.ms[:, 1]))
        progress.step()
        progress.say(f"{what}: {different} different, {noisy} noisy of {trial + 1}")
    return different, noisy


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
