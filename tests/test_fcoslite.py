"""FCOSLite: its parts against torchvision's FCOS, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detection_batch import NO_BOXES, SIZE, TARGET, check_overfits, features
from torch import Tensor
from torchvision.models.detection.fcos import FCOSHead

from backbones import FeatureSpec
from backbones.mobilenetv3 import MobileNetV3
from heads.boxes import grid_cells, match_points
from heads.fcoslite import FCOSLite, centerness, decode_sides

SPECS = {
    "c3": FeatureSpec(12, 8),
    "c4": FeatureSpec(16, 16),
    "c5": FeatureSpec(24, 32),
    "c4_expand": FeatureSpec(24, 16),
}


@pytest.mark.parametrize("quality", ["centerness", "iou"])
def test_overfits_one_batch(quality: str) -> None:
    torch.manual_seed(0)
    check_overfits(FCOSLite(SPECS, 3, channels=32, depth=1, quality=quality), SPECS)


def test_losses_are_torchvisions() -> None:
    """On equal raw outputs: theirs decodes by a ReLU and normalises alike, so distances are given as such."""
    torch.manual_seed(0)
    head = FCOSLite(SPECS, 3, channels=16, depth=1)
    output = head(features(SPECS), SIZE)
    distances = torch.rand_like(output["deltas"]) * 3 + 0.1
    output |= {
        "cls": torch.randn_like(output["cls"]),
        "quality": torch.randn_like(output["quality"]),
        "deltas": distances.expm1().log(),
    }
    ours = head.loss(output, TARGET)

    matched = match_points(TARGET["boxes"], TARGET["labels"], output["anchors"], 1.5, *output["ranges"].unbind(1))
    targets = [
        {"boxes": box[label >= 0], "labels": label[label >= 0]}
        for box, label in zip(TARGET["boxes"], TARGET["labels"], strict=True)
    ]
    assert (matched >= 0).any(dim=1).all()
    peer = FCOSHead(32, 1, 3, num_convs=1)
    theirs = peer.compute_loss(
        targets,
        {"cls_logits": output["cls"], "bbox_regression": distances, "bbox_ctrness": output["quality"][..., None]},
        [output["anchors"]] * 2,
        list(matched),
    )
    torch.testing.assert_close(ours["cls"], theirs["classification"])
    torch.testing.assert_close(ours["box"], theirs["bbox_regression"])
    torch.testing.assert_close(ours["quality"], theirs["bbox_ctrness"])


def test_sides_and_centerness_by_hand() -> None:
    cells = torch.tensor([[8.0, 8.0, 16.0, 16.0]])
    distances = torch.tensor([[1.0, 0.5, 0.25, 2.0]])  # strides
    box = decode_sides(distances.expm1().log(), cells)
    torch.testing.assert_close(box, torch.tensor([[4.0, 8.0, 14.0, 28.0]]))
    torch.testing.assert_close(centerness(box, cells), torch.tensor([(0.25 * 0.25) ** 0.5]))


def test_levels_double_and_share_the_range() -> None:
    head = FCOSLite(SPECS, 3, channels=16, depth=1, extra_levels=2)
    assert head.strides == (8, 16, 32, 64, 128)
    output = head(features(SPECS, size=(96, 64)), (96, 64))
    counts = [12 * 8, 6 * 4, 3 * 2, 2 * 1, 1]
    assert [len(part) for part in output["anchors"].split(counts)] == counts
    assert torch.equal(output["anchors"][: counts[0]], grid_cells(((12, 8),), (8,), torch.device("cpu")))
    ends = [part[0].tolist() for part in output["ranges"].split(counts)]
    assert ends == [[0, 64], [64, 128], [128, 256], [256, 512], [512, float("inf")]]


@pytest.mark.parametrize("none", NO_BOXES)
@pytest.mark.parametrize("quality", ["centerness", "iou"])
def test_images_without_boxes(quality: str, none: dict[str, Tensor]) -> None:
    head = FCOSLite(SPECS, 3, channels=16, depth=1, quality=quality)
    losses = head.loss(head(features(SPECS), SIZE), none)
    assert losses["box"].item() == losses["quality"].item() == 0
    assert losses["cls"].item() > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@torch.no_grad()
def test_nothing_found() -> None:
    head = FCOSLite(SPECS, 3, channels=16, score_threshold=0.999).eval()
    for found in head.predict(head(features(SPECS), SIZE), [(100, 50), (7, 9)]):
        assert found["boxes"].shape == (0, 4)
        assert found["scores"].shape == found["labels"].shape == (0,)


@pytest.mark.parametrize("size", [(64, 64), (75, 107), (32, 33)])
@pytest.mark.parametrize("output_stride", [32, 16])
@torch.no_grad()
def test_any_size_on_a_real_backbone(size: tuple[int, int], output_stride: int) -> None:
    backbone = MobileNetV3("small", output_stride=output_stride).eval()
    head = FCOSLite(backbone.specs, 5, score_threshold=0.0).eval()
    output = head(backbone(torch.rand(1, 3, *size)), size)
    assert output["cls"].shape == (1, len(output["anchors"]), 5)
    (found,) = head.predict(output, [(1000, 700)])
    assert len(found["boxes"]) > 0
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= torch.tensor([700, 1000, 700, 1000])).all()


def test_objects_start_rare() -> None:
    head = FCOSLite(SPECS, 3, channels=16).eval()
    assert 0.005 < head(features(SPECS), SIZE)["cls"].sigmoid().mean() < 0.02


def test_batch_norms_are_each_levels_own() -> None:
    head = FCOSLite(SPECS, 3, channels=16, depth=2)
    head(features(SPECS), SIZE)
    means = [norms[0].running_mean for norms in head.cls_tower.norms]
    assert len(means) == 4
    assert not torch.allclose(means[0], means[1])
    assert len(head.cls_tower.convs) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": ("c2", "c5")}, "fcoslite needs the feature c2, but the backbone gives c3, c4, c5"),
        ({"quality": "dice"}, "quality='dice' is unknown; choose one of 'centerness', 'iou'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FCOSLite(SPECS, 3, **arguments)
