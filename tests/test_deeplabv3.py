"""DeepLabV3 against torchvision's model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from backbones import FeatureSpec
from backbones.mobilenetv3 import MobileNetV3
from backbones.naming import Conventions, to_ours
from heads.deeplabv3 import DeepLabV3, torchvision_to_ours

SPECS = {"c5": FeatureSpec(16, 16)}


def randomised(model: nn.Module) -> nn.Module:
    """Random weights and batch norm statistics, ready to be evaluated."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("aux", [False, True])
@torch.no_grad()
def test_equals_torchvision_whole_model_at_an_odd_size(aux: bool) -> None:
    torch.manual_seed(0)
    model = randomised(deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=7, aux_loss=aux))
    backbone = MobileNetV3("large", output_stride=16)
    imagenet = Conventions((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), False, 1e-3)
    own, rest = to_ours(model.state_dict(), backbone, lambda: imagenet)
    backbone.load_state_dict(own)
    head = DeepLabV3(backbone.specs, 7).eval()
    head.load_state_dict(torchvision_to_ours(rest))
    image = torch.rand(1, 3, 75, 107)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in imagenet[:2])
    ours = head(backbone.eval()(image), (75, 107))
    full = F.interpolate(ours, size=(75, 107), mode="bilinear", align_corners=False)
    torch.testing.assert_close(full, model((image - mean) / std)["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (57, 83)])
def test_output_has_the_features_size(size: tuple[int, int]) -> None:
    head = DeepLabV3(SPECS, 5)
    output = head({"c5": torch.randn(2, 16, -(-size[0] // 16), -(-size[1] // 16))}, size)
    assert output.shape == (2, 5, -(-size[0] // 16), -(-size[1] // 16))
    assert [m.shape for m in head.predict(output, [(20, 30), (31, 7)])] == [(20, 30), (31, 7)]


def test_learns_one_batch() -> None:
    torch.manual_seed(0)
    head = DeepLabV3(SPECS, 3, channels=16, dropout=0.0, bn_momentum=0.3)
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
    with pytest.raises(ValueError, match="deeplabv3 needs the feature c5, but the backbone gives c4"):
        DeepLabV3({"c4": SPECS["c5"]}, 3)
    with pytest.raises(ValueError, match="expected 3 finite numbers"):
        DeepLabV3(SPECS, 3, class_weights=[1.0])
