"""R-ASPP against the paper's Table 7 and a plain spelling of its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from backbones import FeatureSpec
from backbones.mobilenetv3 import MobileNetV3
from heads.raspp import RASPP

SPECS = {"c5": FeatureSpec(16, 16)}


# Table 7, Cityscapes, 19 classes, F = 256: row, tail, params and MAdds as printed, and params to the kilo.
@pytest.mark.parametrize(
    ("row", "tail", "params", "madds", "exact"),
    [(5, None, 3.60, 18.43, 3.601), (6, "segmentation", 1.76, 11.24, 1.762)],
)
def test_sizes_of_table_7(row: int, tail: str | None, params: float, madds: float, exact: float) -> None:
    backbone = MobileNetV3("large", output_stride=16, reduced_tail=tail).eval()
    head = RASPP(backbone.specs, 19).eval().to("meta")
    backbone.to("meta")
    count = sum(p.numel() for p in [*backbone.parameters(), *head.parameters()]) / 1e6
    assert round(count, 2) == params
    assert round(count, 3) == exact
    # See test_lraspp: the authors' padded size, and upsampling as three multiply-adds a value.
    size = (1025, 2049)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(backbone(torch.empty(1, 3, *size, device="meta")), size)
    convolutions = counter.get_total_flops() / 2e9
    assert convolutions == pytest.approx(madds, rel=0.04)
    assert convolutions + 3 * 19 * size[0] * size[1] / 1e9 == pytest.approx(madds, rel=0.01)


@torch.no_grad()
def test_is_two_branches_projected() -> None:
    torch.manual_seed(0)
    head = RASPP(SPECS, 3, channels=8).eval()
    x = torch.randn(2, 16, 5, 7)
    branch, pooled = head.branch(x), head.pooled(F.adaptive_avg_pool2d(x, 1))
    both = torch.cat([branch, F.interpolate(pooled, size=(5, 7), mode="bilinear", align_corners=False)], 1)
    torch.testing.assert_close(head({"c5": x}, (80, 112)), head.classifier(head.project(both)))


@pytest.mark.parametrize("size", [(64, 96), (57, 83)])
def test_output_has_the_features_size(size: tuple[int, int]) -> None:
    head = RASPP(SPECS, 5)
    output = head({"c5": torch.randn(2, 16, -(-size[0] // 16), -(-size[1] // 16))}, size)
    assert output.shape == (2, 5, -(-size[0] // 16), -(-size[1] // 16))
    assert [m.shape for m in head.predict(output, [(20, 30), (31, 7)])] == [(20, 30), (31, 7)]


def test_learns_one_batch() -> None:
    torch.manual_seed(0)
    head = RASPP(SPECS, 3, channels=16, dropout=0.0, bn_momentum=0.3)
    features, mask = {"c5": torch.randn(2, 16, 4, 4)}, torch.randint(0, 3, (2, 4, 4))
    mask[0, 0] = 255
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    for _ in range(100):
        loss = head.loss(head(features, (64, 64)), mask)["cross_entropy"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    found = torch.stack(head.predict(head(features, (64, 64)), [(4, 4)] * 2))
    assert (found == mask)[mask != 255].all()


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="raspp needs the feature c5, but the backbone gives c4"):
        RASPP({"c4": SPECS["c5"]}, 3)
    with pytest.raises(ValueError, match="expected 3 finite numbers"):
        RASPP(SPECS, 3, class_weights=[1.0])
