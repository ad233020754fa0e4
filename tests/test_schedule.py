"""The shapes of the learning rate and what follows from a run's length."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tasks.training.schedule import Budget, Growth, Schedule, batch_norm_momentum, ema_decay


def test_cosine_is_torchs() -> None:
    schedule = Schedule("cosine", warmup=0.0, final=0.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert schedule.factor(step / 50, 0) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_poly_is_torchs() -> None:
    schedule = Schedule("poly", warmup=0.0, final=0.0, power=0.9)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=50, power=0.9)
    for step in range(50):
        assert schedule.factor(step / 50, 0) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_warmup_rises_to_one_and_the_rest_falls_to_final() -> None:
    schedule = Schedule("cosine", warmup=0.1, warmup_from=0.01, final=0.05)
    assert schedule.factor(0.0, 0) == pytest.approx(0.01)
    assert schedule.factor(0.05, 0) == pytest.approx(0.505)
    assert schedule.factor(0.1, 0) == pytest.approx(1.0)
    assert schedule.factor(1.0, 0) == pytest.approx(0.05)


def test_exponential_steps_by_passes() -> None:
    schedule = Schedule("exponential", warmup=0.0, decay=0.97, every=2.4)
    assert schedule.factor(0.5, 2.39) == 1.0
    assert schedule.factor(0.5, 4.9) == pytest.approx(0.97**2)


def test_unknown_shape_and_bad_warmup_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of cosine"):
        Schedule("cosin")
    with pytest.raises(ValueError, match="warmup is 1"):
        Schedule(warmup=1.0)
    for wrong in ({"warmup": "abc"}, {"final": -1}, {"power": None}, {"every": 0}):
        with pytest.raises(ValueError, match=f"schedule.{next(iter(wrong))} is"):
            Schedule(**wrong)


def test_budget_ends_at_what_comes_first() -> None:
    budget = Budget(100, 60.0)
    assert budget.progress(50, 6.0) == 0.5
    assert budget.progress(50, 45.0) == 0.75
    assert budget.progress(100, 1.0) == 1.0
    assert Budget(0, None).progress(0, 0.0) == 1.0
    assert Budget(None, 60.0).expected_steps(10, 6.0) == pytest.approx(100)


def test_average_covers_the_share_of_the_run() -> None:
    assert ema_decay(0, 1000, 0.05, 0.9999) == pytest.approx(0.1)
    assert ema_decay(900, 1000, 0.05, 0.9999) == pytest.approx(1 - 1 / 50)
    assert ema_decay(10**6, 10**7, 0.05, 0.9999) == 0.9999


def test_batch_norm_momentum_follows_the_length() -> None:
    assert batch_norm_momentum(290) == pytest.approx(20 / 290)
    assert batch_norm_momentum(100) == 0.1
    assert batch_norm_momentum(math.inf) == 0.01


def test_images_grow_to_their_full_size_and_stay_there() -> None:
    growth = Growth(start=0.5, until=0.8, multiple=16)
    sizes = [growth.size((64, 96), progress / 20) for progress in range(21)]
    assert sizes[0] == (32, 48)
    assert sizes == sorted(sizes)
    assert sizes[16:] == [(64, 96)] * 5
    assert all(height % 16 == 0 and width % 16 == 0 for height, width in sizes)


def test_images_do_not_grow_unless_asked_and_never_fall_below_32() -> None:
    assert Growth().size((75, 91), 0.0) == (75, 91)
    assert Growth(start=0.1).size((64, 300), 0.0) == (32, 32)
    assert Growth(start=0.9, multiple=16).size((75, 91), 0.5)[0] <= 75


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"start": 1.5}, {"until": 0.0}, {"multiple": 0}, {"start": "abc"}])
def test_a_growth_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"growth.{next(iter(wrong))} is"):
        Growth(**wrong)
