"""The plainest classifier: pool and one linear layer."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from backbones import FeatureSpec
from heads import Size, check_share, select


class Linear(nn.Module):
    """Global average, dropout, linear classifier: MobileNetV1's, V2's and MnasNet's own head.

    Args:
        specs: what the backbone gives.
        num_classes: K.
        feature: the feature that is pooled.
        dropout: share of the pooled values that is dropped, in [0, 1).
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
    Raises:
        ValueError: the feature is missing.
    """

    task: ClassVar[str] = "classify"

    def __init__(
        self,
        specs: dict[str, FeatureSpec],
        num_classes: int,
        *,
        feature: str = "c5",
        dropout: float = 0.2,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        (spec,) = select(specs, (feature,), "linear")
        self.feature, self.label_smoothing = feature, check_share("head.label_smoothing", label_smoothing)
        self.dropout = nn.Dropout(check_share("head.dropout", dropout))
        self.classifier = nn.Linear(spec.channels, num_classes)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: dict[str, Tensor], size: Size) -> Tensor:
        """Logits [B, K]."""
        return self.classifier(self.dropout(features[self.feature].mean((2, 3))))

    def loss(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross entropy; target [B] int64, or [B, K] float shares of the classes (mixup)."""
        return {"cross_entropy": F.cross_entropy(output, target, label_smoothing=self.label_smoothing)}

    def predict(self, output: Tensor, sizes: list[Size]) -> Tensor:
        """Probabilities [B, K] float32."""
        return output.float().softmax(1)
