"""FCN's head against torchvision's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.segmentation.fcn import FCNHead

from backbones import FeatureSpec
from heads.fcn import FCN, torchvision_to_ours

SPECS = {"c5": FeatureSpec(64, 16)}


def randomised(model: nn.Module) -> nn.Module:
    """Random weights and batch norm statistics, ready to be evaluated."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@torch.no_grad()
def test_equals_torchvision() -> None:
    torch.manual_seed(0)
    peer = randomised(FCNHead(64, 7))
    head = FCN(SPECS, 7).eval()
    head.load_state_dict(torchvision_to_ours({f"classifier.{key}": value for key, value in peer.state_dict().items()}))
    feature = torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(head({"c5": feature}, (80, 112)), peer(feature), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (57, 83)])
def test_output_has_the_features_size(size: tuple[int, int]) -> None:
    head = FCN(SPECS, 5)
    output = head({"c5": torch.randn(2, 64, -(-size[0] // 16), -(-size[1] // 16))}, size)
    assert output.shape == (2, 5, -(-size[0] // 16), -(-size[1] // 16))
    assert [m.shape for m in head.predict(output, [(20, 30), (31, 7)])] == [(20, 30), (31, 7)]


def test_learns_one_batch() -> None:
    torch.manual_seed(0)
    head = FCN(SPECS, 3, dropout=0.0, bn_momentum=0.3)
    features, mask = {"c5": torch.randn(2, 64, 4, 4)}, torch.randint(0, 3, (2, 4, 4))
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
    with pytest.raises(ValueError, match="fcn needs the feature c5, but the backbone gives c4"):
        FCN({"c4": SPECS["c5"]}, 3)
    with pytest.raises(ValueError, match="expected 3 finite numbers"):
        FCN(SPECS, 3, class_weights=[1.0])
