"""The arithmetic of comparisons: spreads, ties, paired differences, Pareto fronts. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

RESAMPLES = 4_000
EXACT_UP_TO = 5
"""Pairs up to which every resample is counted (5^5 = 3,125) and none is drawn."""


class Stat(NamedTuple):
    """A metric over the seeds of one row."""

    mean: float
    deviation: float | None
    """Standard deviation (n - 1); None for one seed."""
    n: int


class Difference(NamedTuple):
    """How far a row lies from another, over the seeds that both have."""

    mean: float
    low: float | None
    """Lower end of the 95 % bootstrap interval of the mean; None for one pair."""
    high: float | None
    n: int
    """Pairs."""


def summarise(values: Sequence[float]) -> Stat | None:
    """Mean, standard deviation and count; None of no value."""
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return Stat(mean, deviation, n)


def places(stats: Sequence[Stat | None]) -> list[tuple[int, int] | None]:
    """The places that each row may hold, higher means first.

    A row is above another only where its whole mean +- standard deviation is. Rows whose spreads overlap are in no
    order, so their places overlap. A row of one seed has no spread and gets no place.

    Args:
        stats: one a row.
    Returns:
        (first, last) place, counted from 1 among the rows that have one; equal where the place is certain.
    """
    spread = [i for i, s in enumerate(stats) if s is not None and s.deviation is not None]
    known = [(s.mean - s.deviation, s.mean + s.deviation) for s in stats if s is not None and s.deviation is not None]
    lows, highs = np.sort([low for low, _ in known]), np.sort([high for _, high in known])
    found: list[tuple[int, int] | None] = [None] * len(stats)
    for row, (low, high) in zip(spread, known, strict=True):
        above = len(known) - int(np.searchsorted(lows, high, side="right"))
        below = int(np.searchsorted(highs, low, side="left"))
        found[row] = (1 + above, len(known) - below)
    return found


@cache
def _resamples(n: int) -> np.ndarray:
    """[r, n] the share of each pair in the mean of each resample: of all n^n if they are few, else of drawn ones."""
    if n <= EXACT_UP_TO:
        taken = np.stack(np.meshgrid(*[np.arange(n)] * n, indexing="ij"), axis=-1).reshape(-1, n, 1)
        return np.asarray((taken == np.arange(n)).mean(axis=1))
    return np.random.default_rng(0).multinomial(n, [1 / n] * n, RESAMPLES) / n


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Mean of the differences seed by seed, with its 95 % bootstrap percentile interval: of two seeds their range.

    Args:
        values: seed -> metric of the row.
        base: seed -> metric of the row compared with.
    Returns:
        The difference (positive: the row is higher); None if no seed is in both.
    """
    seeds = sorted(values.keys() & base.keys())
    if not seeds:
        return None
    differences = np.array([values[seed] - base[seed] for seed in seeds])
    n = len(seeds)
    if n == 1:
        return Difference(float(differences[0]), None, None, 1)
    means = _resamples(n) @ differences  # few values: between two of them lies nothing that could be drawn
    low, high = np.quantile(means, 0.025, method="lower"), np.quantile(means, 0.975, method="higher")
    return Difference(float(differences.mean()), float(low), float(high), n)


def pareto_front(costs: Sequence[float | None], scores: Sequence[float | None]) -> list[bool]:
    """Which points no other beats: none is as cheap and as good, and better in one of the two.

    Args:
        costs: lower is better; None = unknown.
        scores: higher is better; None = unknown.
    Returns:
        One flag a point; False where something is unknown.
    """
    known = [(c, s) for c, s in zip(costs, scores, strict=True) if c is not None and s is not None]
    best_before: dict[float, float] = {}
    best = -math.inf
    for cost, score in sorted(known, key=lambda point: (point[0], -point[1])):
        best_before.setdefault(cost, score if score > best else math.inf)
        best = max(best, score)
    return [
        c is not None and s is not None and best_before[c] == s for c, s in zip(costs, scores, strict=True)
    ]  # fmt: skip
