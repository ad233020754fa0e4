"""Timings that can be trusted: warm-up until steady, contenders in turn, intervals that know of autocorrelation.

Everything but ``measure`` is a pure function of numbers. Times are milliseconds.

Two contenders are timed in the same rounds, so whatever slows the machine for longer than a round slows both, and the
ratio of a round stays. Timings of neighbouring rounds are alike (caches, clock, a neighbour's work), which makes the
usual bootstrap too sure of itself; blocks of rounds are drawn instead, as long as the likeness lasts.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 1_000
CONFIDENCE = 0.95
"""Of the intervals that are shown."""
SURE = 0.99
"""Of the interval that a verdict rests on."""
MARGIN = 0.02
"""Two contenders less than this apart are not called different: where memory lies alone moves a model by 1 to 2 %."""
STEADY = 0.05
"""Warm-up ends when each contender's median over a window is this near to that of the window before."""


class Timings(NamedTuple):
    """What was measured, nothing left out."""

    names: tuple[str, ...]
    ms: np.ndarray
    """[rounds, contenders] float64."""
    warmup: int
    """Rounds before that are not counted."""
    steady: bool
    """Whether warm-up ended by its rule and not by its limit."""
    interrupted: bool = False
    """Ctrl-C ended it; the rounds until then are there."""


class Summary(NamedTuple):
    """One contender's timings, milliseconds."""

    n: int
    median: float
    low: float
    high: float
    """The median's 95 % interval."""
    iqr: float
    p90: float
    p99: float
    outliers: tuple[float, ...]
    """Beyond 3 interquartile ranges from the quartiles, in the order measured; part of all the other numbers."""


class Ratio(NamedTuple):
    """How many times as long one contender takes as another: the median over the rounds' ratios."""

    median: float
    low: float
    high: float
    """95 % interval."""
    q1: float
    q3: float
    n: int
    different: bool
    """The 99 % interval lies wholly beyond ``MARGIN``."""

    @property
    def verdict(self) -> str:
        """In words."""
        return ("slower" if self.median > 1 else "faster") if self.different else "not different"


def timed(call: Callable[[], object], prime: bool = True) -> Callable[[], float]:
    """A contender for ``measure``: runs the call and says how long it took.

    Args:
        call: the work.
        prime: run it once untimed first, so that caches hold its own data and not its rival's, and threads that the
            rival left spinning have gone to sleep.
    """

    def turn() -> float:
        if prime:
            call()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000

    return turn


def measure(
    contenders: Mapping[str, Callable[[], float]],
    rounds: int = 100,
    seconds: float = math.inf,
    least: int = 10,
    window: int = 5,
    warmup: int = 30,
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
) -> Timings:
    """Time contenders round by round; each round runs all of them once, in an order drawn anew.

    Args:
        contenders: name -> a turn that returns its milliseconds, see ``timed``.
        rounds: how many to count.
        seconds: stop earlier, after about so long, though not before ``least`` rounds.
        least: rounds at least.
        window: warm-up ends when the medians of the last ``window`` rounds and of those before agree within 5 %.
        warmup: rounds of warm-up at most; 0: none.
        seed: of the order.
        on_round: called with (rounds done, rounds in all), warm-up not counted.
    """
    names, order = tuple(contenders), np.random.default_rng(seed)
    warm: list[list[float]] = []
    rows: list[list[float]] = []
    interrupted = False
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        while len(warm) < warmup and not is_steady(np.array(warm), window):
            warm.append(one_round(contenders, names, order))
        began = time.perf_counter()
        while len(rows) < rounds and (len(rows) < least or time.perf_counter() - began < seconds):
            rows.append(one_round(contenders, names, order))
            if on_round:
                on_round(len(rows), rounds)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if was_on:
            gc.enable()
    steady = not warmup or is_steady(np.array(warm), window)
    return Timings(names, np.array(rows).reshape(-1, len(names)), len(warm), steady, interrupted)


def measure_whole(contenders: Mapping[str, Callable[[], float]], rounds: int, window: int, warmup: int) -> Timings:
    """``measure`` for a part of something larger, of no use when it is cut short.

    Raises:
        KeyboardInterrupt: Ctrl-C, for the caller to end by.
    """
    times = measure(contenders, rounds, window=window, warmup=warmup)
    if times.interrupted:
        raise KeyboardInterrupt
    return times


def one_round(
    contenders: Mapping[str, Callable[[], float]], names: Sequence[str], order: np.random.Generator
) -> list[float]:
    """Every contender once; milliseconds in the order of ``names``."""
    found = {names[i]: contenders[names[i]]() for i in order.permutation(len(names))}
    return [found[name] for name in names]


def is_steady(ms: np.ndarray, window: int) -> bool:
    """Whether the last two windows of rounds have like medians, for every contender.

    Args:
        ms: [rounds, contenders].
        window: rounds.
    """
    if len(ms) < 2 * window:
        return False
    last, before = np.median(ms[-window:], axis=0), np.median(ms[-2 * window : -window], axis=0)
    return bool((np.abs(last - before) <= STEADY * before).all())


def summarise(ms: np.ndarray) -> Summary:
    """One contender's numbers; [n] milliseconds, in the order measured."""
    q1, median, q3, p90, p99 = (float(value) for value in np.quantile(ms, [0.25, 0.5, 0.75, 0.9, 0.99]))
    reach = 3 * (q3 - q1)
    outliers = tuple(float(value) for value in ms[(ms < q1 - reach) | (ms > q3 + reach)])
    low, high = (math.exp(end) for end in median_interval(np.log(ms), CONFIDENCE))  # never below 0
    return Summary(len(ms), median, low, high, q3 - q1, p90, p99, outliers)


def compare(ms: np.ndarray, other: np.ndarray) -> Ratio:
    """How long ``ms`` takes as a multiple of ``other``, round by round.

    Args:
        ms, other: [n] milliseconds of the same rounds, in the order measured.
    """
    logs = np.log(ms / other)
    q1, median, q3 = (float(value) for value in np.exp(np.quantile(logs, [0.25, 0.5, 0.75])))
    low, high = (math.exp(end) for end in median_interval(logs, CONFIDENCE))
    surely = median_interval(logs, SURE)
    different = surely[0] > math.log1p(MARGIN) or surely[1] < -math.log1p(MARGIN)
    return Ratio(median, low, high, q1, q3, len(logs), different)


def median_interval(values: np.ndarray, confidence: float, seed: int = 0) -> tuple[float, float]:
    """Circular block bootstrap interval of the median.

    Args:
        values: [n], in the order measured.
        confidence: of the percentile interval, in (0, 1).
        seed: of the resamples.
    Returns:
        Lower and upper end; both infinite for fewer than six values, which bound no median.
    Source: Politis and Romano (1992), circular block bootstrap; the length of the blocks: ``block_length``, at least
        the cube root of n.
    Differs: the interval is widened as Student's t is against the normal, with a degree of freedom a block: few blocks
        know their own spread badly, and the plain interval then holds the truth too seldom.
    """
    n = len(values)
    if n < 6:
        return -math.inf, math.inf
    block = max(block_length(values), math.ceil(n ** (1 / 3)))
    drawn = np.random.default_rng(seed)
    medians = []
    step = max(1, 2_000_000 // n)  # resamples at once, for the memory's sake
    for first in range(0, RESAMPLES, step):
        starts = drawn.integers(0, n, (min(step, RESAMPLES - first), math.ceil(n / block), 1))
        index = ((starts + np.arange(block)) % n).reshape(len(starts), -1)[:, :n]
        medians.append(np.median(values[index], axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(medians), [tail, 1 - tail])
    middle, wider = float(np.median(values)), student_over_normal(1 - tail, n / block - 1)
    return middle + wider * (float(low) - middle), middle + wider * (float(high) - middle)


def student_over_normal(quantile: float, freedom: float) -> float:
    """The ratio of the two distributions' quantiles (Cornish and Fisher's expansion, three terms)."""
    z = NormalDist().inv_cdf(quantile)
    return 1 + (z**2 + 1) / (4 * freedom) + (5 * z**4 + 16 * z**2 + 3) / (96 * freedom**2)


def block_length(values: np.ndarray) -> int:
    """Rounds a block, by how long neighbouring rounds stay alike; 1 for independent ones, at most n / 5.

    The likeness is that of being above the median, which a spike does not blur.

    Args:
        values: [n], in the order measured.
    Source: Politis and White (2004), "Automatic block-length selection", as corrected by Patton et al. (2009).
    """
    n = len(values)
    signs = np.sign(values - np.median(values))
    spread = float((signs**2).mean())
    if n < 10 or not spread:
        return 1
    lags = min(n - 1, math.ceil(math.sqrt(n)) + 10)
    covariance = np.array([float((signs[: n - lag] * signs[lag:]).sum()) / n for lag in range(lags + 1)])
    small = np.abs(covariance[1:] / spread) < 2 * math.sqrt(math.log10(n) / n)
    quiet = 5  # this many small correlations in a row end the likeness
    last = next((m for m in range(lags - quiet + 1) if small[m : m + quiet].all()), lags // 2)
    if not last:
        return 1
    reach = min(2 * last, lags)
    k = np.arange(1, reach + 1)
    taper = np.minimum(1.0, 2 * (1 - k / (reach + 1)))
    weighted = taper * covariance[1 : reach + 1]
    long_run = float(covariance[0] + 2 * weighted.sum())
    slope = float(2 * (k * weighted).sum())
    if long_run <= 0 or slope <= 0:
        return 1
    length = (2 * slope**2 / (4 / 3 * long_run**2)) ** (1 / 3) * n ** (1 / 3)
    return int(min(max(1, math.ceil(length)), max(1, n // 5)))
