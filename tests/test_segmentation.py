"""The segmentation heads' common loss and prediction against torch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import FeatureSpec
from heads import segmentation
from heads.fcn import FCN
from heads.segmentation import class_maps, class_weight_tensor, pixel_loss, rename_head


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class maps by ``segmentation.cpp``, and by torch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(segmentation, "library", lambda *_: (None, ""))
    elif segmentation.library(segmentation.SOURCE, segmentation.EXACT)[0] is None:
        pytest.skip("no C++ compiler")


def batch(size: tuple[int, int], k: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, k, 7, 9, generator=generator)
    mask = torch.randint(0, k, (3, *size), generator=generator)
    mask[torch.rand(mask.shape, generator=generator) < 0.2] = 255
    return logits.requires_grad_(), mask


def plain_loss(logits: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    full = F.interpolate(logits, size=mask.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, mask, weights, ignore_index=255)


@pytest.mark.parametrize("size", [(56, 72), (53, 71), (7, 9), (5, 4)])
@pytest.mark.parametrize("weights", [torch.ones(5), torch.tensor([0.5, 2.0, 0.0, 1.0, 7.0])], ids=["equal", "weighted"])
def test_loss_and_gradient_equal_interpolate_and_cross_entropy(size: tuple[int, int], weights: Tensor) -> None:
    logits, mask = batch(size)
    (expected,) = torch.autograd.grad(2 * plain_loss(logits, mask, weights), logits)
    loss = pixel_loss(logits, mask, weights)["cross_entropy"]
    (gradient,) = torch.autograd.grad(2 * loss, logits, retain_graph=True)
    torch.testing.assert_close(loss, plain_loss(logits, mask, weights), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    (again,) = torch.autograd.grad(2 * loss, logits)  # what a gradient-based balancing of tasks does
    assert torch.equal(again, gradient)


def test_loss_of_extreme_logits_is_finite() -> None:
    logits, mask = batch((20, 20))
    torch.testing.assert_close(
        pixel_loss(1e4 * logits, mask, torch.ones(5))["cross_entropy"], plain_loss(1e4 * logits, mask, torch.ones(5))
    )


def test_loss_under_autocast_and_without_gradient() -> None:
    logits, mask = batch((28, 36))
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_loss(logits.bfloat16(), mask, torch.ones(5))["cross_entropy"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(pixel_loss(logits, mask, torch.ones(5))["cross_entropy"], loss, rtol=1e-2, atol=1e-2)


def test_a_scaled_loss_in_float16_keeps_its_small_gradients() -> None:
    """As ``trainer.precision=16-mixed`` scales it: a pixel's own share of the mean is below float16's least number."""
    logits, mask = batch((560, 720))
    (expected,) = torch.autograd.grad(65536 * pixel_loss(logits, mask, torch.ones(5))["cross_entropy"], logits)
    half = logits.detach().half().requires_grad_()
    (found,) = torch.autograd.grad(65536 * pixel_loss(half, mask, torch.ones(5))["cross_entropy"], half)
    assert found.dtype == torch.float16
    assert found.isfinite().all()
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().mean().item())


def test_loss_of_ignored_pixels_only_is_zero() -> None:
    logits, mask = batch((28, 36))
    loss = sum(pixel_loss(logits, torch.full_like(mask, 255), torch.ones(5), dice=2.0).values())
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def plain_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Class by class, of the definition."""
    p = F.interpolate(logits, size=mask.shape[-2:], mode="bilinear", align_corners=False).softmax(1)
    images = []
    for image, labels in zip(p, mask, strict=True):
        seen = labels != 255
        shown = labels[seen].unique().tolist()
        pairs = [(image[k][seen], (labels[seen] == k).float()) for k in shown]
        images.append(sum(1 - 2 * (q * y).sum() / (q.sum() + y.sum()) for q, y in pairs) / len(pairs))
    return sum(images) / len(images)


@pytest.mark.parametrize("shown", [5, 2])
def test_dice_and_its_gradient_equal_the_definition(shown: int) -> None:
    logits, mask = batch((28, 36))
    mask[(mask >= shown) & (mask != 255)] = 0
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 7.0])
    losses = pixel_loss(logits, mask, weights, dice=0.7)
    torch.testing.assert_close(losses["dice"], 0.7 * plain_dice(logits, mask), rtol=1e-5, atol=1e-6)
    total = plain_loss(logits, mask, weights) + 3 * 0.7 * plain_dice(logits, mask)
    (expected,) = torch.autograd.grad(total, logits)
    (gradient,) = torch.autograd.grad(losses["cross_entropy"] + 3 * losses["dice"], logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_dice_s_weight_is_checked(weight: float) -> None:
    with pytest.raises(ValueError, match=r"head\.dice is"):
        FCN({"c5": FeatureSpec(8, 32)}, 3, dice=weight)


@pytest.mark.parametrize("value", [5, 254, 300])
def test_loss_names_values_outside_the_classes(value: int) -> None:
    logits, mask = batch((28, 36))
    mask[0, 0, :3] = value
    with pytest.raises(ValueError, match=rf"5 classes.*\{{{value}: 3\}}"):
        pixel_loss(logits, mask, torch.ones(5))


def test_class_maps_are_the_argmax_of_the_upsampled_logits(way: None) -> None:
    logits, _ = batch((1, 1))
    sizes = [(30, 41), (7, 9), (4, 100)]
    maps = class_maps(logits.detach(), sizes)
    for low, size, found in zip(logits.detach(), sizes, maps, strict=True):
        full = F.interpolate(low[None], size=size, mode="bilinear", align_corners=False)
        assert found.dtype == torch.uint8
        assert torch.equal(found.long(), full[0].argmax(0))


def test_class_maps_give_the_lower_class_of_equal_logits(way: None) -> None:
    (found,) = class_maps(torch.zeros(1, 4, 3, 3), [(6, 6)])
    assert not found.any()


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0]])
def test_class_weights_must_be_one_number_a_class(weights: list[float]) -> None:
    assert torch.equal(class_weight_tensor(None, 3), torch.ones(3))
    with pytest.raises(ValueError, match="expected 3 finite numbers"):
        class_weight_tensor(weights, 3)


def test_another_heads_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match=r"classifier\.7\.weight has no counterpart"):
        rename_head({"classifier.7.weight": torch.zeros(1), "backbone.x": torch.zeros(1)}, {"0": "conv"})
    keys = ("classifier.0.weight", "aux_classifier.0.weight", "stray", "head.x", "backbone.x")
    with pytest.raises(ValueError, match=r"another head: stray, head\.x has no counterpart"):
        rename_head({key: torch.zeros(1) for key in keys}, {"0": "conv"})
    with pytest.raises(ValueError, match="no entry classifier"):
        rename_head({"backbone.x": torch.zeros(1)}, {"0": "conv"})


@pytest.mark.parametrize("size", [(301, 203), (64, 96), (9, 7), (5, 40), (4, 3), (1, 1)])
@pytest.mark.parametrize("scale", [1, 3])
def test_class_maps_settle_cells_as_full_upsampling_does(
    size: tuple[int, int], scale: int, way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(2, 5, 9 // scale, 7 // scale, generator=torch.Generator().manual_seed(0))
    logits = F.interpolate(logits, size=(9, 7), mode="bicubic")  # smooth: most neighbours agree
    full = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    best, second = full.topk(2, dim=1).values.unbind(1)
    for at_once in (segmentation.AT_ONCE, 3):  # all cells together, and one after the other
        monkeypatch.setattr(segmentation, "AT_ONCE", at_once)
        found = torch.stack(class_maps(logits, [size, size]))
        assert found.dtype == torch.uint8
        wrong = found != full.argmax(1)
        assert not (wrong & (best - second > 1e-5)).any()  # rounding may decide where two classes are equal
        assert wrong.float().mean() < 1e-2


def test_class_maps_of_logits_in_training(way: None) -> None:
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (found,) = class_maps(logits, [(16, 16)])
    assert torch.equal(found, class_maps(logits.detach(), [(16, 16)])[0])


def test_a_class_that_wins_at_no_logit_can_win_between_them(way: None) -> None:
    logits = torch.tensor([[[[9.0, 0.0]], [[0.0, 9.0]], [[8.0, 8.0]]]])
    (found,) = class_maps(logits, [(1, 16)])
    assert found.unique().tolist() == [0, 1, 2]
