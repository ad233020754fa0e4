"""Weights of several tasks' losses."""

from __future__ import annotations

import pytest
import torch

from tasks.training.balance import Balance, shortest_in_hull


def losses(**values: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    return {task: {"loss": value} for task, value in values.items()}


def test_fixed_weights_are_factors_and_one_task_is_itself() -> None:
    balance = Balance(("detect", "segment"), "fixed", {"segment": 0.5})
    both = losses(detect=torch.tensor(2.0), segment=torch.tensor(4.0))
    assert balance(both, []).item() == 4.0
    assert balance(losses(detect=torch.tensor(2.0)), []).item() == 2.0


def test_uncertainty_settles_where_variance_equals_twice_the_loss() -> None:
    balance = Balance(("a", "b"), "uncertainty", {})
    optimizer = torch.optim.SGD(balance.parameters(), lr=0.1)
    for _ in range(2000):
        optimizer.zero_grad()
        balance(losses(a=torch.tensor(3.0), b=torch.tensor(0.2)), []).backward()
        optimizer.step()
    assert balance.log_variance["a"].exp().item() == pytest.approx(6.0, rel=1e-3)
    assert balance.log_variance["b"].exp().item() == pytest.approx(0.4, rel=1e-3)


def test_shortest_vector_equals_a_search_over_the_simplex() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor([(i, j, 50 - i - j) for i in range(51) for j in range(51 - i)], dtype=torch.float64) / 50
    for _ in range(20):
        vectors = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        found = shortest_in_hull(vectors @ vectors.T)
        assert found.sum().item() == pytest.approx(1.0)
        assert (found @ vectors).norm() <= (grid @ vectors).norm(dim=1).min() + 1e-2


def test_mgda_harms_no_task() -> None:
    shared = torch.randn(40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    a, b = (shared - 1).pow(2).sum() * 1000, (shared + 1).pow(2).sum()
    total = Balance(("a", "b"), "mgda", {})(losses(a=a, b=b), [shared])
    step, of_a, of_b = (torch.autograd.grad(loss, shared, retain_graph=True)[0] for loss in (total, a, b))
    assert step @ of_a >= -1e-3 * step.norm() * of_a.norm()
    assert step @ of_b >= -1e-3 * step.norm() * of_b.norm()


def test_mgda_leaves_a_task_without_gradient_out_of_the_hull() -> None:
    shared = torch.randn(40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    own = torch.tensor(3.0, requires_grad=True)
    balance = Balance(("a", "b", "c"), "mgda", {})

    def a_and_b() -> dict[str, torch.Tensor]:
        return {"a": (shared - 1).pow(2).sum() * 1000, "b": (shared + 1).pow(2).sum()}

    for still in (own + 0 * shared.sum(), own.square()):  # a gradient of zeros, and none
        total = balance(losses(**a_and_b(), c=still), [shared])
        expected = Balance(("a", "b"), "mgda", {})(losses(**a_and_b()), [shared])
        torch.testing.assert_close(total, expected + still)
        assert torch.autograd.grad(total, shared)[0].norm() < 1e6
    one = balance(losses(a=shared.sum(), c=own.square()), [shared])
    torch.testing.assert_close(one, shared.sum() + 9)
    assert balance(losses(a=0 * shared.sum() + 2, c=own.square()), [shared]).item() == 11.0


def test_mgda_under_a_frozen_backbone_is_a_plain_sum() -> None:
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    assert Balance(("a", "b"), "mgda", {})(losses(a=a, b=b), [torch.rand(4)]).item() == 5.0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of fixed"):
        Balance(("a",), "uncertain", {})
    with pytest.raises(ValueError, match="names b; trained are a"):
        Balance(("a",), "fixed", {"b": 1.0})


@pytest.mark.parametrize("weight", [-1, float("inf"), float("nan"), "much"])
def test_a_weight_that_would_raise_a_loss_is_refused(weight: object) -> None:
    with pytest.raises(ValueError, match=r"balance\.weights\.a is .*; expected a finite factor"):
        Balance(("a", "b"), "fixed", {"a": weight})  # type: ignore[dict-item]
