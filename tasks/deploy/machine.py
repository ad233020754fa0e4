"""What a timing was taken on, and whether something else was running meanwhile. Free of torch.

Others' share is what all processors did, less what this process and its children did; a virtual machine's stolen time
counts as others'. Where ``/proc`` is missing (macOS, Windows) only the load average is known, or nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.reporting.results import environment

PROC = Path("/proc")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
BUSY_CORES = 0.2
"""From so much of a core taken by others on, a run is noisy."""
WIDE = 0.25
"""From an interquartile range of this share of the median on, too."""
MANY = 0.1
"""And from this share of outliers on."""
USER, NICE, SYSTEM, IRQ, SOFTIRQ, STEAL = 0, 1, 2, 5, 6, 7


class Load(NamedTuple):
    """What else the machine did while a ``Watch`` ran."""

    seconds: float
    others_cores: float | None
    """Cores' worth of time taken by others (0.5: half of one core); None: not known here."""
    average: float | None
    """The system's load average over a minute, before this command began to measure; None: not known."""
    preempted: int | None
    """How often this process had to give up its core."""

    def in_words(self) -> str:
        """For people, under a table."""
        others = "an unknown share" if self.others_cores is None else f"{self.others_cores:.2f} cores"
        return f"load      others took {others} over {self.seconds:.0f} s"


class Watch:
    """Watches the machine from its construction on.

    Args:
        strangers: processes that count as others', though this one started them.
        proc: where the system tells of its processes.
    """

    def __init__(self, strangers: Sequence[int] = (), proc: Path = PROC) -> None:
        self.strangers, self.proc = tuple(strangers), proc
        self.average = load_average()
        self.preempted = preemptions()
        self.began = time.perf_counter()
        self.busy, self.own = busy_seconds(proc), own_seconds(self.strangers, proc)

    def load(self) -> Load:
        """What happened since."""
        busy, own = busy_seconds(self.proc), own_seconds(self.strangers, self.proc)
        seconds = time.perf_counter() - self.began
        others = None
        if None not in (busy, own, self.busy, self.own) and seconds > 0:
            others = max(0.0, ((busy - self.busy) - (own - self.own)) / seconds)  # type: ignore[operator]
        now = preemptions()
        preempted = None if now is None or self.preempted is None else now - self.preempted
        return Load(seconds, others, self.average, preempted)


def noise(load: Load, ms: np.ndarray | None = None, cores: int | None = None) -> list[str]:
    """Why a run's timings are not to be trusted; nothing if they are.

    Args:
        load: of the watch that ran beside it.
        ms: [n] one contender's milliseconds.
        cores: that this process may use; None asks the system.
    """
    reasons = []
    if load.others_cores is not None:
        if load.others_cores > BUSY_CORES:
            reasons.append(f"others took {load.others_cores:.2f} cores")
    elif load.average is not None and load.average > 0.5 * (cores or os.cpu_count() or 1):
        reasons.append(f"the load average was {load.average:.1f} before the run")
    if ms is not None and len(ms) >= 10:
        q1, median, q3 = np.quantile(ms, [0.25, 0.5, 0.75])
        outliers = ((ms < q1 - 3 * (q3 - q1)) | (ms > q3 + 3 * (q3 - q1))).mean()
        if q3 - q1 > WIDE * median:
            reasons.append(f"the interquartile range is {100 * (q3 - q1) / median:.0f} % of the median")
        if outliers > MANY:
            reasons.append(f"{100 * outliers:.0f} % are outliers")
    return reasons


def busy_seconds(proc: Path = PROC) -> float | None:
    """Seconds that the processors this process may use have worked since boot, all together; None: not known."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        lines = (proc / "stat").read_text().splitlines()
        total, seen = 0.0, 0
        for line in lines:
            name, _, rest = line.partition(" ")
            if not name.startswith("cpu") or not name[3:].isdigit() or (mine is not None and int(name[3:]) not in mine):
                continue
            ticks = [int(word) for word in rest.split()]
            total += sum(ticks[i] for i in (USER, NICE, SYSTEM, IRQ, SOFTIRQ, STEAL))
            seen += 1
        return total / os.sysconf("SC_CLK_TCK") if seen else None
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def own_seconds(strangers: Sequence[int] = (), proc: Path = PROC) -> float | None:
    """Processor time of this process and all that it started, those that have ended included; None: not known."""
    try:
        found: dict[int, tuple[int, float]] = {}
        for folder in proc.iterdir():
            if folder.name.isdigit():
                with suppress(OSError, ValueError, IndexError):  # it may end while we look
                    words = (folder / "stat").read_text().rpartition(")")[2].split()
                    found[int(folder.name)] = int(words[1]), float(sum(int(word) for word in words[11:15]))
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    if os.getpid() not in found:
        return None
    family, grew = {os.getpid()}, True
    while grew:
        more = {pid for pid, (parent, _) in found.items() if parent in family} - family - set(strangers)
        grew, family = bool(more), family | more
    return sum(found[pid][1] for pid in family) / tick


@cache
def load_average() -> float | None:
    """Over the minute before this process first asked: later our own work is in it. None where the system has none."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def preemptions() -> int | None:
    """Involuntary context switches of this process so far; None where the system does not count them."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def governor() -> str | None:
    """The policy that sets the processors' clock; None where it is hidden, as in virtual machines."""
    try:
        return GOVERNOR.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def describe(threads: int, packages: Sequence[str] = ()) -> dict[str, Any]:
    """The machine as fields of a record: ``tasks.reporting.results.environment``, with more packages' versions."""
    found = environment(threads)
    versions = found["versions"]
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {**found, "versions": versions}


def in_words(threads: Sequence[int], packages: Sequence[str] = ()) -> list[str]:
    """The machine, for people: one line each on the processor, the load and the versions."""
    found = describe(threads[0] if threads else 1, packages)
    average = load_average()
    counts = " and ".join(str(count) for count in threads)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return [
        f"machine   {found['device']}, {found['cores']} core{'s' if found['cores'] != 1 else ''} to use; "
        f"{counts} thread{'s' if threads != [1] else ''}",
        f"clock     governor {governor() or 'not visible'}; load average before "
        f"{'not known' if average is None else f'{average:.2f}'}",
        f"versions  {versions}",
    ]
