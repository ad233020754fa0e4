"""Where a turn of ``peer`` goes, operator by operator, on both sides: what stands between a ratio and its target."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypedDict

CALLS = 5
SHOWN = 12
"""Operators in a table; the rest is one line."""


class Profile(TypedDict):
    """Of one side."""

    operators: dict[str, float]
    """Name -> its own milliseconds a turn."""
    engine: float | None
    """Share of a turn that the engine's calls take alone, where there is one: what no code around it can go below."""


def profile(call: Callable[[], object], floor: Callable[[], object] | None) -> Profile:
    """Run a side's work under torch's profiler, which slows it a little, and its engine alone without."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    call()
    with watch(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(CALLS):
            call()
    found = {event.key: event.self_cpu_time_total / 1000 / CALLS for event in seen.key_averages()}
    return {"operators": found, "engine": None if floor is None else share(call, floor)}


def share(call: Callable[[], object], part: Callable[[], object], rounds: int = 20) -> float:
    """How much of a call's time a part of it takes alone: the median of rounds in which both have their turn."""
    shares = []
    for _ in range(rounds + 2):
        clock = [time.perf_counter()]
        for each in (part, call):
            each()
            clock.append(time.perf_counter())
        shares.append((clock[1] - clock[0]) / (clock[2] - clock[1]))
    return statistics.median(shares[2:])


def lines(name: str, sides: Sequence[Profile], turns: Sequence[float], images: float) -> list[str]:
    """Markdown: the operators that take longest on either side.

    Args:
        name: of the row.
        sides: ours, theirs.
        turns: their median milliseconds, measured without a profiler.
        images: that a turn takes.
    """
    ours, theirs = (side["operators"] for side in sides)
    if (engine := sides[0]["engine"]) is not None:  # an engine's operators are its own affair
        whole = turns[0] / images
        call = engine * whole
        return [
            "",
            f"{name}: the engine's call alone takes {call:.2f} of our {whole:.2f} ms an image, {whole - call:.2f} are "
            f"around it; with nothing around it the ratio would be {turns[1] / turns[0] / engine:.1f}x",
        ]
    order = sorted(ours.keys() | theirs.keys(), key=lambda key: -max(ours.get(key, 0.0), theirs.get(key, 0.0)))
    rows = [(key, ours.get(key, 0.0), theirs.get(key, 0.0)) for key in order[:SHOWN]]
    rest_of = [sum(side.get(key, 0.0) for key in order[SHOWN:]) for side in (ours, theirs)]
    rows.append((f"{max(0, len(order) - SHOWN)} others", rest_of[0], rest_of[1]))
    rows.append(("all", sum(ours.values()), sum(theirs.values())))
    return [
        "",
        f"| {name}: operator | ours, ms | theirs, ms |",
        "| --- | --- | --- |",
        *(f"| {key} | {mine:.1f} | {peers:.1f} |" for key, mine, peers in rows),
    ]
