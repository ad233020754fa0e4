"""SSDLite against torchvision's ssdlite320 and the paper's Table 6."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detection_batch import NO_BOXES, SIZE, check_overfits, features
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from backbones import FeatureSpec
from backbones.mobilenetv3 import MobileNetV3
from backbones.naming import IMAGENET, Conventions, to_ours
from heads.ssdlite import SSDLite, torchvision_to_ours

SPECS = {"c4_expand": FeatureSpec(24, 16), "c5": FeatureSpec(32, 32)}


@pytest.fixture(scope="module")
def peer() -> SSD:
    """torchvision's model with random weights, random batch norm statistics and scores far apart."""
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def twins(peer: SSD) -> tuple[MobileNetV3, SSDLite]:
    """The same weights under our names; ``load_state_dict`` refuses a key left over."""
    backbone = MobileNetV3("large", reduced_tail="detection")
    own, rest = to_ours(peer.state_dict(), backbone, lambda: Conventions(*IMAGENET, False, 1e-3))
    backbone.load_state_dict(own)
    head = SSDLite(backbone.specs, 90)
    state = torchvision_to_ours(rest)
    assert len(own) - 3 + len(state) == len(peer.state_dict())  # ours besides: mean, std, padding
    head.load_state_dict(state)
    return backbone.eval(), head.eval()


def test_strays_of_a_checkpoint_are_listed(peer: SSD, twins: tuple[MobileNetV3, SSDLite]) -> None:
    state = peer.state_dict()
    strays = ("head.extra_head.weight", "head.classification_head.weight", "stray")
    with pytest.raises(ValueError, match=rf"another head: {', '.join(strays)} has no counterpart"):
        torchvision_to_ours(state | {key: torch.zeros(1) for key in strays})
    odd = {"backbone.extra.0.0.2.weight": torch.zeros(1), "backbone.extra.x": torch.zeros(1)}
    ours = torchvision_to_ours(state | odd)
    assert ours.keys() - twins[1].state_dict().keys() == {"extra.0.0.2.weight", "extra.x"}  # for the loading to refuse


@torch.no_grad()
def test_whole_model_equals_torchvision(peer: SSD, twins: tuple[MobileNetV3, SSDLite]) -> None:
    backbone, head = twins
    image = torch.rand(2, 3, 320, 320)
    ours = head(backbone(image), (320, 320))
    images, _ = peer.transform(list(image))
    maps = list(peer.backbone(images.tensors).values())
    theirs = peer.head(maps)
    torch.testing.assert_close(ours["cls"], theirs["cls_logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["deltas"], theirs["bbox_regression"], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours["anchors"], peer.anchor_generator(images, maps)[0])

    found = head.predict(ours, [(320, 320)] * 2)
    for mine, other in zip(found, peer(list(image)), strict=True):
        assert len(mine["boxes"]) == len(other["boxes"]) == 300
        torch.testing.assert_close(mine["scores"], other["scores"], rtol=1e-4, atol=1e-6)
        same = (mine["labels"] + 1 == other["labels"]) & ((mine["boxes"] - other["boxes"]).abs() < 0.01).all(1)
        assert same.float().mean() > 0.97  # scores that differ in the last bit may change places


@torch.no_grad()
def test_equal_raw_outputs_give_equal_detections(peer: SSD, twins: tuple[MobileNetV3, SSDLite]) -> None:
    sizes = [(427, 640), (500, 333)]
    image = [torch.rand(3, *size) for size in sizes]
    images, _ = peer.transform(image)
    maps = list(peer.backbone(images.tensors).values())
    output = twins[1]({"c4_expand": maps[0], "c5": maps[1]}, (320, 320))
    for mine, other in zip(twins[1].predict(output, sizes), peer(image), strict=True):
        torch.testing.assert_close(mine["boxes"], other["boxes"])
        assert torch.equal(mine["scores"], other["scores"])
        assert torch.equal(mine["labels"] + 1, other["labels"])


def test_loss_and_gradient_equal_torchvision(peer: SSD, twins: tuple[MobileNetV3, SSDLite]) -> None:
    """On the same raw outputs; one image has no box, the others are padded."""
    head = twins[1]
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(4, 9, 2, 2, generator=generator) * 300
    boxes = torch.cat((corners.min(2).values, corners.max(2).values + 8), dim=-1)
    labels = torch.randint(0, 90, (4, 9), generator=generator)
    for i, count in enumerate((9, 0, 3, 1)):
        labels[i, count:] = -1
    cls = torch.randn(4, 3234, 91, generator=generator).requires_grad_()
    deltas = torch.randn(4, 3234, 4, generator=generator).requires_grad_()
    anchors = head(
        {"c4_expand": torch.zeros(1, 672, 20, 20), "c5": torch.zeros(1, 480, 10, 10)}, (320, 320)
    )["anchors"]  # fmt: skip
    ours = head.loss({"cls": cls, "deltas": deltas, "anchors": anchors}, {"boxes": boxes, "labels": labels})

    targets = [{"boxes": b[n >= 0], "labels": n[n >= 0] + 1} for b, n in zip(boxes, labels, strict=True)]
    matched = []
    for each in targets:
        nothing = torch.full((len(anchors),), -1)
        some = len(each["boxes"]) > 0
        matched.append(peer.proposal_matcher(box_iou(each["boxes"], anchors)) if some else nothing)
    theirs = peer.compute_loss(targets, {"cls_logits": cls, "bbox_regression": deltas}, [anchors] * 4, matched)
    torch.testing.assert_close(ours["cls"], theirs["classification"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["box"], theirs["bbox_regression"], rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(ours["cls"] + ours["box"], (cls, deltas)),
        torch.autograd.grad(theirs["classification"] + theirs["bbox_regression"], (cls, deltas)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_parameters_of_torchvisions_model() -> None:
    backbone = MobileNetV3("large", reduced_tail="detection")
    head = SSDLite(backbone.specs, 90)
    assert sum(p.numel() for module in (backbone, head) for p in module.parameters()) == 3_440_060


# Table 6, by TensorFlow's count: 90 classes and background, 3 boxes on the first map, no batch norm parameters.
ROWS = [
    ("large", None, 4.967, 0.613),
    ("large", "detection", 3.215, 0.507),
    ("small", None, 2.493, 0.210),
    ("small", "detection", 1.765, 0.162),
]


@pytest.mark.parametrize(("variant", "tail", "params", "madds"), ROWS)
@torch.no_grad()
def test_parameters_and_madds_of_table_6(variant: str, tail: str | None, params: float, madds: float) -> None:
    backbone = MobileNetV3(variant, reduced_tail=tail).eval()
    head = SSDLite(backbone.specs, 90, first_map_anchors=3).eval()
    convs = [module for part in (backbone, head) for module in part.modules() if isinstance(module, nn.Conv2d)]
    count = sum(p.numel() for conv in convs for p in conv.parameters())
    assert round(count / 1e6, 3) == params
    with FlopCounterMode(display=False) as flops:
        head(backbone(torch.rand(1, 3, 320, 320)), (320, 320))
    assert round(flops.get_total_flops() / 2e9, 3) == madds


@pytest.mark.parametrize(
    ("loss", "box_loss", "first_map_anchors"),
    [("multibox", "smooth_l1", 6), ("focal", "smooth_l1", 3), ("focal", "giou", 6)],
)
def test_overfits_one_batch(loss: str, box_loss: str, first_map_anchors: int) -> None:
    torch.manual_seed(0)
    head = SSDLite(SPECS, 3, extra_depths=(16,), loss=loss, box_loss=box_loss, first_map_anchors=first_map_anchors)
    check_overfits(head, SPECS)


@pytest.mark.parametrize("loss", ["multibox", "focal"])
@pytest.mark.parametrize("none", NO_BOXES)
def test_images_without_boxes(loss: str, none: dict[str, Tensor]) -> None:
    head = SSDLite(SPECS, 3, extra_depths=(16,), loss=loss)
    losses = head.loss(head(features(SPECS), SIZE), none)
    assert losses["box"].item() == 0
    assert losses["cls"].isfinite()
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@torch.no_grad()
def test_nothing_found() -> None:
    head = SSDLite(SPECS, 3, extra_depths=(16,), score_threshold=0.999).eval()
    for found in head.predict(head(features(SPECS), SIZE), [(100, 50), (7, 9)]):
        assert found["boxes"].shape == (0, 4)
        assert found["scores"].shape == found["labels"].shape == (0,)


def test_focal_loss_starts_from_rare_objects() -> None:
    head = SSDLite(SPECS, 3, loss="focal").eval()
    scores = head(features(SPECS), SIZE)["cls"].sigmoid()
    assert 0.005 < scores.mean() < 0.02


@pytest.mark.parametrize("size", [(64, 64), (75, 107), (32, 33)])
def test_any_size(size: tuple[int, int]) -> None:
    head = SSDLite(SPECS, 3).eval()
    maps = {n: torch.randn(1, s.channels, -(-size[0] // s.stride), -(-size[1] // s.stride)) for n, s in SPECS.items()}
    output = head(maps, size)
    assert output["cls"].shape[:2] == output["deltas"].shape[:2] == (1, len(output["anchors"]))
    (found,) = head.predict(output, [(1000, 700)])
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= torch.tensor([700, 1000, 700, 1000])).all()
    assert found["labels"].max() <= 2


def test_raw_output_can_be_exported() -> None:
    head = SSDLite(SPECS, 3, extra_depths=(16,)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    maps = features(SPECS)
    shapes = ({name: {0: batch} for name in maps}, (None, None))
    program = torch.export.export(head, (maps, SIZE), dynamic_shapes=shapes)
    more = features(SPECS, batch=5)
    for name, value in head(more, SIZE).items():  # eager after the export: nothing of it was cached
        torch.testing.assert_close(program.module()(more, SIZE)[name], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": ("c4", "c5")}, "needs the feature c4, but the backbone gives c4_expand, c5"),
        ({"features": ()}, "head.features is empty; SSDLite needs at least one of c4_expand, c5"),
        ({"features": ("c5",), "extra_depths": ()}, "head.extra_depths is empty"),
        ({"first_map_anchors": 4}, "first_map_anchors=4 is unknown; choose one of 3, 6"),
        ({"loss": "hinge"}, "loss='hinge' is unknown"),
        ({"box_loss": "l2"}, "box_loss='l2' is unknown"),
        ({"match_iou": 0.0}, "match_iou is 0.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSDLite(SPECS, 3, **arguments)
    with pytest.raises(ValueError, match="num_classes is 0"):
        SSDLite(SPECS, 0)


def test_batch_norm_settings() -> None:
    head = SSDLite(SPECS, 3, bn_momentum=0.1)
    norms = [module for module in head.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.1)}
