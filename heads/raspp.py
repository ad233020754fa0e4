"""R-ASPP: MobileNetV2's reduction of DeepLab's pyramid to two branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from backbones import FeatureSpec
from backbones.blocks import ConvNormAct
from heads import Size, check_count, check_range, check_share, select
from heads.segmentation import class_maps, class_weight_tensor, pixel_loss


class RASPP(nn.Module):
    """A 1x1 convolution and the global average of the last features, concatenated, projected and classified.

    Args:
        specs: what the backbone gives.
        num_classes: K.
        high: the feature that both branches read; its stride is the output's.
        channels: F of the paper's Table 7, of each branch and of the projection.
        dropout: share of the projected channels' values that is dropped, in [0, 1).
        class_weights: K weights of the classes in the cross entropy; None: all 1.
        dice: weight of a Dice loss beside it, >= 0; see ``heads.segmentation.pixel_loss``.
        bn_eps: of the batch norms.
        bn_momentum: of the batch norms: the weight of the new batch.
    Raises:
        ValueError: the feature is missing, wrong number of class weights.
    Source: MobileNetV2, section 6.3, arXiv 1801.04381; Table 7 of the MobileNetV3 paper, rows 5 and 6.
    """

    task: ClassVar[str] = "segment"

    def __init__(
        self,
        specs: dict[str, FeatureSpec],
        num_classes: int,
        *,
        high: str = "c5",
        channels: int = 256,
        dropout: float = 0.1,
        class_weights: Sequence[float] | None = None,
        dice: float = 0.0,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_count("head.channels", channels)
        (spec,) = select(specs, (high,), "raspp")
        self.high = high
        self.branch = ConvNormAct(spec.channels, channels, eps=bn_eps, momentum=bn_momentum)
        self.pooled = ConvNormAct(spec.channels, channels, eps=bn_eps, momentum=bn_momentum)
        self.project = ConvNormAct(2 * channels, channels, eps=bn_eps, momentum=bn_momentum)
        self.dropout = nn.Dropout(check_share("head.dropout", dropout))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.register_buffer("class_weights", class_weight_tensor(class_weights, num_classes), persistent=False)
        self.class_weights: Tensor
        check_range("head.dice", dice, 0)
        self.dice = float(dice)

    def forward(self, features: dict[str, Tensor], size: Size) -> Tensor:
        """Logits [B, K, h, w] at the feature's stride."""
        high = features[self.high]
        x = self.branch(high)
        pooled = self.pooled(high.mean((2, 3), keepdim=True)).expand_as(x)
        return self.classifier(self.dropout(self.project(torch.cat([x, pooled], 1))))

    def loss(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross entropy at the mask's size; mask [B, H, W] int64, 255 = ignored."""
        return pixel_loss(output, target, self.class_weights, self.dice)

    def predict(self, output: Tensor, sizes: list[Size]) -> list[Tensor]:
        """Class maps [H, W] uint8 of the original sizes."""
        return class_maps(output, sizes)
