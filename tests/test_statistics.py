"""The arithmetic of comparisons against numpy and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tasks.reporting.statistics import Stat, paired_difference, pareto_front, places, summarise


def test_summaries_are_numpy_s() -> None:
    values = np.random.default_rng(0).random(9)
    assert summarise(list(values)) == pytest.approx((values.mean(), values.std(ddof=1), 9))
    assert summarise([0.25]) == (0.25, None, 1)
    assert summarise([]) is None


def dominated(i: int, costs: list[float | None], scores: list[float | None]) -> bool:
    """By definition: somebody is no worse in both and better in one."""
    return any(
        c <= costs[i] and s >= scores[i] and (c < costs[i] or s > scores[i])
        for c, s in zip(costs, scores, strict=True)
        if c is not None and s is not None
    )


@pytest.mark.parametrize("seed", range(20))
def test_front_is_brute_force_s(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n = int(draw.integers(1, 40))
    # few values: many ties in one and in both
    costs = [None if draw.random() < 0.1 else float(v) for v in draw.integers(0, 6, n)]
    scores = [None if draw.random() < 0.1 else float(v) / 7 for v in draw.integers(0, 6, n)]
    known = [c is not None and s is not None for c, s in zip(costs, scores, strict=True)]
    assert pareto_front(costs, scores) == [known[i] and not dominated(i, costs, scores) for i in range(n)]


def test_front_of_nothing() -> None:
    assert pareto_front([], []) == []
    assert pareto_front([None], [1.0]) == [False]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_interval_of_few_pairs_counts_every_resample(n: int) -> None:
    draw = np.random.default_rng(n)
    a, b = ({seed: float(v) for seed, v in enumerate(draw.random(n))} for _ in range(2))
    differences = [a[seed] - b[seed] for seed in a]
    means = sorted(sum(taken) / n for taken in itertools.product(differences, repeat=n))
    low, high = means[math.floor(0.025 * (n**n - 1))], means[math.ceil(0.975 * (n**n - 1))]
    assert paired_difference(a, b) == pytest.approx((np.mean(differences), low, high, n))


def test_two_seeds_on_either_side_are_no_difference() -> None:
    found = paired_difference({0: 0.6, 1: 0.497}, {0: 0.5, 1: 0.5})
    assert found == pytest.approx((0.0485, -0.003, 0.1, 2))


def test_interval_of_many_pairs_holds_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    holds = 0
    for _ in range(200):
        noise = draw.normal(0.1, 1, 20)
        found = paired_difference(dict(enumerate(noise)), dict.fromkeys(range(20), 0.0))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        holds += found.low <= 0.1 <= found.high
    assert 0.87 <= holds / 200 <= 0.99


def test_only_common_seeds_pair() -> None:
    assert paired_difference({0: 0.5, 1: 0.7, 9: 0.0}, {1: 0.4, 2: 0.1}) == pytest.approx(
        (0.3, None, None, 1), nan_ok=True
    )
    assert paired_difference({0: 0.5}, {1: 0.5}) is None


@pytest.mark.parametrize("seed", range(10))
def test_places_are_brute_force_s(seed: int) -> None:
    """Place every order that contradicts no separation of spreads; a row's places are those it takes in one of them."""
    draw = np.random.default_rng(seed)
    stats = [Stat(float(m), float(d), 3) for m, d in zip(draw.random(6), draw.random(6) * 0.15, strict=True)]
    taken: list[set[int]] = [set() for _ in stats]
    for order in itertools.permutations(range(6)):
        fits = all(
            stats[hi].mean + stats[hi].deviation >= stats[lo].mean - stats[lo].deviation  # type: ignore[operator]
            for hi, lo in itertools.combinations(order, 2)
        )
        if fits:
            for place, row in enumerate(order, start=1):
                taken[row].add(place)
    assert places(stats) == [(min(t), max(t)) for t in taken]


def test_what_has_no_spread_has_no_place() -> None:
    assert places([Stat(0.9, None, 1), None, Stat(0.5, 0.01, 2), Stat(0.4, 0.01, 2)]) == [None, None, (1, 1), (2, 2)]
    assert places([Stat(0.5, 0.1, 2), Stat(0.5, 0.1, 2)]) == [(1, 2), (1, 2)]
    assert places([Stat(0.5, 0.125, 2), Stat(0.75, 0.125, 2)]) == [(1, 2), (1, 2)]  # they touch
    assert places([]) == []
