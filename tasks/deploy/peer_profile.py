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
    floor: float | None
    """Milliseconds of the engine's call alone, where there is one: what no code around it can go below."""


def profile(call: Callable[[], object], floor: Callable[[], object] | None) -> Profile:
    """Run a side's work under torch's profiler, which slows it a little, and its engine alone without."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    call()
    with watch(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(CALLS):
            call()
    found = {event.key: event.self_cpu_time_total / 1000 / CALLS for event in seen.key_averages()}
    return {"operators": found, "floor": None if floor is None else quiet(floor)}


def quiet(call: Callable[[], object], times: int = 50) -> float:
    """Median milliseconds of a call."""
    taken = []
    for _ in range(times + 5):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken[5:])


def lines(name: str, sides: Sequence[Profile], turns: Sequence[float]) -> list[str]:
    """Markdown: the operators that take longest on either side.

    Args:
        name: of the row.
        sides: ours, theirs.
        turns: their median milliseconds, measured without a profiler.
    """
    ours, theirs = (side["operators"] for side in sides)
    floor = sides[0]["floor"]
    if floor is not None:  # an engine's operators are its own affair
        rest = turns[0] - floor
        return [
            "",
            f"{name}: the engine's call alone takes {floor:.2f} of our {turns[0]:.2f} ms ({rest:.2f} around it); with "
            f"nothing around it the ratio would be {turns[1] / floor:.1f}x",
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
