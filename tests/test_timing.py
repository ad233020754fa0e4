"""The statistics of timings on simulated ones, whose truth is known; no clock decides a test."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.deploy import timing


def autocorrelated(seed: int, n: int, likeness: float, deviation: float) -> np.ndarray:
    """[n] a first-order autoregression of mean 0; 0 is independent noise."""
    draw = np.random.default_rng(seed)
    steps = draw.normal(0, deviation * math.sqrt(1 - likeness**2), n)
    values = np.empty(n)
    values[0] = draw.normal(0, deviation)
    for i in range(1, n):
        values[i] = likeness * values[i - 1] + steps[i]
    return values


@pytest.mark.parametrize("likeness", [0.0, 0.5])
def test_interval_of_the_median_holds_the_truth_as_often_as_it_says(likeness: float) -> None:
    holds = 0
    for seed in range(150):
        low, high = timing.median_interval(autocorrelated(seed, 80, likeness, 1.0), 0.95)
        holds += low <= 0 <= high
    assert holds >= 0.88 * 150


def test_plain_resampling_would_be_too_sure() -> None:
    """What the blocks are for: single values drawn from alike neighbours give intervals that miss the truth."""
    holds = {"plain": 0, "blocks": 0}
    for seed in range(150):
        values = autocorrelated(seed, 80, 0.7, 1.0)
        draws = np.random.default_rng(seed).integers(0, 80, (500, 80))
        low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
        holds["plain"] += low <= 0 <= high
        low, high = timing.median_interval(values, 0.95)
        holds["blocks"] += low <= 0 <= high
    assert holds["plain"] < 0.75 * 150
    assert holds["blocks"] > 0.8 * 150


def test_blocks_grow_with_likeness() -> None:
    means = [
        np.mean([timing.block_length(autocorrelated(seed, 200, likeness, 1.0)) for seed in range(20)])
        for likeness in (0.0, 0.5, 0.8)
    ]
    assert means[0] < 1.5 < means[1] < means[2]
    assert timing.block_length(np.ones(50)) == 1


def simulated(seed: int, factor: float, n: int = 100, noise: float = 0.06) -> tuple[np.ndarray, np.ndarray]:
    """Two contenders in the same rounds: drift that both share, own noise, and one spike in twenty rounds."""
    draw = np.random.default_rng(seed)
    drift = np.exp(autocorrelated(seed + 10_000, n, 0.95, 0.2))
    first, second = (
        np.exp(draw.normal(0, noise, n)) * np.where(draw.random(n) < 0.05, draw.uniform(2, 20, n), 1) for _ in range(2)
    )
    return factor * 10 * drift * first, 10 * drift * second


def test_the_same_model_is_called_different_in_at_most_5_percent() -> None:
    assert sum(timing.compare(*simulated(seed, 1.0)).different for seed in range(200)) <= 0.05 * 200


def test_a_delay_of_10_percent_is_found_in_at_least_95_percent() -> None:
    found = [timing.compare(*simulated(seed, 1.1)) for seed in range(100)]
    assert sum(ratio.verdict == "slower" for ratio in found) >= 95
    assert np.median([ratio.median for ratio in found]) == pytest.approx(1.1, abs=0.01)
    assert sum(timing.compare(*reversed(simulated(seed, 1.1))).verdict == "faster" for seed in range(20)) >= 18


def test_shared_drift_would_hide_it_without_pairing() -> None:
    slow, fast = simulated(3, 1.1)
    low, _ = timing.median_interval(slow, 0.95)
    _, high = timing.median_interval(fast, 0.95)
    assert low < high
    assert timing.compare(slow, fast).different


def test_less_than_the_margin_is_no_difference_however_sure() -> None:
    base = np.full(100, 10.0)
    assert not timing.compare(1.015 * base, base).different
    assert timing.compare(1.03 * base, base).different


def test_summary_is_numpys_and_keeps_outliers() -> None:
    values = np.concatenate([np.linspace(9, 11, 98), [100.0, 200.0]])
    summary = timing.summarise(values)
    assert len(summary.outliers) == 2
    assert summary.n == 100
    assert summary.median == np.median(values)
    assert summary.p99 == np.quantile(values, 0.99)
    assert summary.iqr == pytest.approx(np.quantile(values, 0.75) - np.quantile(values, 0.25))
    assert summary.low <= summary.median <= summary.high


def test_few_values_bound_nothing() -> None:
    assert timing.median_interval(np.ones(5), 0.95) == (-math.inf, math.inf)
    assert not timing.compare(np.full(3, 9.0), np.ones(3)).different


def test_widening_is_students() -> None:
    """Against the table of Student's t: 2.262 with 9 degrees of freedom, 2.045 with 29, at 97.5 %."""
    assert 1.95996 * timing.student_over_normal(0.975, 9) == pytest.approx(2.262, abs=0.005)
    assert 1.95996 * timing.student_over_normal(0.975, 29) == pytest.approx(2.045, abs=0.002)


def test_each_round_runs_everyone_once_in_drawn_order() -> None:
    seen: list[str] = []

    def turn(name: str, ms: float) -> float:
        seen.append(name)
        return ms

    contenders = {name: (lambda name=name, ms=ms: turn(name, ms)) for name, ms in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    done: list[tuple[int, int]] = []
    times = timing.measure(contenders, rounds=40, window=3, on_round=lambda i, n: done.append((i, n)))
    assert times.warmup == 6
    assert times.steady
    assert (times.ms == [1.0, 2.0, 3.0]).all()
    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6
    assert done[-1] == (40, 40)


def test_warm_up_ends_when_steady_or_says_that_it_is_not() -> None:
    falling = iter([100.0 * 0.8**i for i in range(15)] + [3.0] * 1000)
    times = timing.measure({"a": lambda: next(falling)}, rounds=10, window=3, warmup=100)
    assert times.steady
    assert 15 < times.warmup < 25
    assert (times.ms == 3.0).all()
    restless = iter(2.0**i for i in range(1000))
    assert not timing.measure({"a": lambda: next(restless)}, rounds=10, window=3, warmup=8).steady


def test_ctrl_c_keeps_what_was_measured() -> None:
    count = iter(range(100))

    def turn() -> float:
        if next(count) == 7:
            raise KeyboardInterrupt
        return 1.0

    times = timing.measure({"a": turn}, rounds=50, warmup=0)
    assert times.interrupted
    assert len(times.ms) == 7
    count = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        timing.measure_whole({"a": turn}, 50, window=2, warmup=6)
