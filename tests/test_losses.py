"""Detection losses against torchvision's."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from heads.losses import focal_loss, hard_negative_loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.75, 2.0), (0.25, 2.0), (0.5, 0.0)])
def test_focal_loss_and_its_gradient_are_torchvisions(alpha: float, gamma: float) -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(2, 50, 7)).requires_grad_()
    labels = torch.randint(-1, 7, (2, 50)).where(torch.rand(2, 50) < 0.3, -1)
    hot = torch.nn.functional.one_hot(labels + 1, 8)[..., 1:].float()
    ours, theirs = (
        focal_loss(logits, labels, alpha, gamma),
        sigmoid_focal_loss(logits, hot, alpha, gamma, reduction="sum"),
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


def test_hard_negatives_are_each_images_own() -> None:
    """By hand: one object in the first image, none in the second, three background anchors an object."""
    logits = torch.zeros(2, 6, 2)
    logits[0, :, 1] = torch.tensor([0.0, 5.0, -5.0, 3.0, 4.0, -9.0])  # how much an anchor looks like an object
    labels = torch.tensor([[0, -1, -1, -1, -1, -1], [-1] * 6])
    cross = torch.nn.functional.softplus
    wanted = cross(torch.tensor(0.0)) + cross(torch.tensor([5.0, 4.0, 3.0])).sum()
    torch.testing.assert_close(hard_negative_loss(logits, labels, 3.0), wanted)


def test_hard_negatives_run_out() -> None:
    logits, labels = torch.zeros(1, 4, 2, requires_grad=True), torch.tensor([[0, 0, 0, -1]])
    loss = hard_negative_loss(logits, labels, 3.0)
    torch.testing.assert_close(loss, 4 * torch.tensor(2.0).log())
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient[0, 0], torch.tensor([0.5, -0.5]))  # an object counts once


def test_no_object_no_loss() -> None:
    logits = torch.randn(2, 5, 3, requires_grad=True)
    loss = hard_negative_loss(logits, torch.full((2, 5), -1), 3.0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()
