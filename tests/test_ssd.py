"""SSD: what differs from SSDLite, whose tests cover the rest."""

from __future__ import annotations

import torch
from detection_batch import SIZE, check_overfits, features
from torch import nn
from torchvision.models.detection.ssd import SSDHead

from backbones import FeatureSpec
from heads.ssd import SSD

SPECS = {"c4_expand": FeatureSpec(24, 16), "c5": FeatureSpec(32, 32)}


@torch.no_grad()
def test_predictors_are_torchvisions() -> None:
    torch.manual_seed(0)
    head = SSD(SPECS, 3, extra_depths=(16, 8)).eval()
    peer = SSDHead([24, 32, 16, 8], [6] * 4, 4)
    for ours, theirs in ((head.cls, peer.classification_head), (head.box, peer.regression_head)):
        theirs.module_list.load_state_dict({k.replace(".0.", "."): v for k, v in ours.state_dict().items()})
    maps = list(features(SPECS).values())
    for layer in head.extra:
        maps.append(layer(maps[-1]))
    output, theirs = head(features(SPECS), SIZE), peer(maps)
    torch.testing.assert_close(output["cls"], theirs["cls_logits"])
    torch.testing.assert_close(output["deltas"], theirs["bbox_regression"])


def test_convolutions_are_full() -> None:
    head = SSD(SPECS, 3)
    assert {module.groups for module in head.modules() if isinstance(module, nn.Conv2d)} == {1}
    assert [layer[1].conv.weight.shape for layer in head.extra] == [
        (512, 256, 3, 3), (256, 128, 3, 3), (256, 128, 3, 3), (128, 64, 3, 3),
    ]  # fmt: skip


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    check_overfits(SSD(SPECS, 3, extra_depths=(16,)), SPECS, learning_rate=0.005)
