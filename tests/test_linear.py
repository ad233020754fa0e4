"""The linear classifier against torchvision's MobileNetV2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import mobilenet_v2

from backbones import FeatureSpec
from heads.linear import Linear

SPECS = {"c5": FeatureSpec(6, 32)}


@torch.no_grad()
def test_equals_torchvision() -> None:
    torch.manual_seed(0)
    model = mobilenet_v2(weights=None, num_classes=17).eval()
    feature = torch.randn(3, 1280, 7, 5)
    head = Linear({"c5": FeatureSpec(1280, 32)}, 17).eval()
    state = {
        key.replace("classifier.1", "classifier"): v for key, v in model.state_dict().items() if "classifier" in key
    }
    head.load_state_dict(state)
    theirs = model.classifier(F.adaptive_avg_pool2d(feature, 1).flatten(1))
    torch.testing.assert_close(head({"c5": feature}, (224, 160)), theirs, rtol=1e-5, atol=1e-6)


def test_learns_one_batch() -> None:
    torch.manual_seed(0)
    head = Linear(SPECS, 4, dropout=0.0, label_smoothing=0.01)
    features, labels = {"c5": torch.randn(6, 6, 3, 3)}, torch.arange(6) % 4
    optimizer = torch.optim.Adam(head.parameters(), 0.1)
    for _ in range(150):
        loss = head.loss(head(features, (96, 96)), labels)["cross_entropy"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = head.eval().predict(head(features, (96, 96)), [(96, 96)] * 6)
    assert torch.equal(scores.argmax(1), labels)
    torch.testing.assert_close(scores.sum(1), torch.ones(6))


def test_loss_takes_labels_and_mixed_labels() -> None:
    head, logits, labels = Linear(SPECS, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    hard = head.loss(logits, labels)["cross_entropy"]
    torch.testing.assert_close(head.loss(logits, F.one_hot(labels, 3).float())["cross_entropy"], hard)


def test_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="linear needs the feature c5, but the backbone gives c4"):
        Linear({"c4": SPECS["c5"]}, 3)
