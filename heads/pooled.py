"""The paper's efficient last stage: pool first, and only then widen."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from backbones import FeatureSpec
from backbones.blocks import ACTIVATIONS, check_choice
from heads import Size, check_count, check_share, select


class Pooled(nn.Module):
    """Global average, a 1x1 convolution without batch norm, h-swish, dropout, classifier.

    On one pixel a 1x1 convolution is a linear layer, and is one here. ``backbones.naming`` knows the names that
    torchvision and timm have for ``hidden`` and ``classifier``.

    Args:
        specs: what the backbone gives.
        num_classes: K.
        feature: the feature that is pooled.
        hidden: width of the layer before the classifier: 1280 for Large, 1024 for Small, whatever the width multiplier.
        activation: "hswish", or "relu" for the minimalistic networks.
        dropout: share of the hidden values that is dropped, in [0, 1).
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
    Raises:
        ValueError: the feature is missing, unknown activation.
    Source: the paper, section 5.1 and the last rows of Tables 1 and 2. The printed dropout of 0.8 is what is kept.
    """

    task: ClassVar[str] = "classify"

    def __init__(
        self,
        specs: dict[str, FeatureSpec],
        num_classes: int,
        *,
        feature: str = "c5",
        hidden: int = 1280,
        activation: str = "hswish",
        dropout: float = 0.2,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, list(ACTIVATIONS))
        check_count("head.hidden", hidden)
        (spec,) = select(specs, (feature,), "pooled")
        self.feature, self.label_smoothing = feature, check_share("head.label_smoothing", label_smoothing)
        self.hidden = nn.Linear(spec.channels, hidden)
        self.act: nn.Module = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(check_share("head.dropout", dropout))
        self.classifier = nn.Linear(hidden, num_classes)
        for layer in (self.hidden, self.classifier):
            nn.init.normal_(layer.weight, 0.0, 0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: dict[str, Tensor], size: Size) -> Tensor:
        """Logits [B, K]."""
        x = self.act(self.hidden(features[self.feature].mean((2, 3))))
        return self.classifier(self.dropout(x))

    def loss(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross entropy; target [B] int64, or [B, K] float shares of the classes (mixup)."""
        return {"cross_entropy": F.cross_entropy(output, target, label_smoothing=self.label_smoothing)}

    def predict(self, output: Tensor, sizes: list[Size]) -> Tensor:
        """Probabilities [B, K] float32."""
        return output.float().softmax(1)
