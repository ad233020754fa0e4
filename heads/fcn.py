"""FCN's head: one 3x3 convolution and a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from backbones import FeatureSpec
from backbones.blocks import ConvNormAct
from heads import Size, check_range, check_share, select
from heads.segmentation import class_maps, class_weight_tensor, pixel_loss, rename_head


class FCN(nn.Module):
    """A 3x3 convolution to a quarter of the channels, dropout, and a 1x1 convolution to the classes.

    Args:
        specs: what the backbone gives.
        num_classes: K.
        high: the feature it reads; its stride is the output's.
        dropout: share of the values that is dropped, in [0, 1).
        class_weights: K weights of the classes in the cross entropy; None: all 1.
        dice: weight of a Dice loss beside it, >= 0; see ``heads.segmentation.pixel_loss``.
        bn_eps: of the batch norm.
        bn_momentum: of the batch norm: the weight of the new batch.
    Raises:
        ValueError: the feature is missing, wrong number of class weights.
    Source: torchvision models/segmentation/fcn.py; the idea: arXiv 1411.4038.
    """

    task: ClassVar[str] = "segment"

    def __init__(
        self,
        specs: dict[str, FeatureSpec],
        num_classes: int,
        *,
        high: str = "c5",
        dropout: float = 0.1,
        class_weights: Sequence[float] | None = None,
        dice: float = 0.0,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        (spec,) = select(specs, (high,), "fcn")
        self.high = high
        self.conv = ConvNormAct(spec.channels, spec.channels // 4, 3, eps=bn_eps, momentum=bn_momentum)
        self.dropout = nn.Dropout(check_share("head.dropout", dropout))
        self.classifier = nn.Conv2d(spec.channels // 4, num_classes, 1)
        self.register_buffer("class_weights", class_weight_tensor(class_weights, num_classes), persistent=False)
        self.class_weights: Tensor
        check_range("head.dice", dice, 0)
        self.dice = float(dice)

    def forward(self, features: dict[str, Tensor], size: Size) -> Tensor:
        """Logits [B, K, h, w] at the feature's stride."""
        return self.classifier(self.dropout(self.conv(features[self.high])))

    def loss(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross entropy at the mask's size; mask [B, H, W] int64, 255 = ignored."""
        return pixel_loss(output, target, self.class_weights, self.dice)

    def predict(self, output: Tensor, sizes: list[Size]) -> list[Tensor]:
        """Class maps [H, W] uint8 of the original sizes."""
        return class_maps(output, sizes)


def torchvision_to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head's part of a state dict of one of torchvision's ``fcn_*`` models, under our names.

    Raises:
        ValueError: an entry of the head has no counterpart.
    """
    return rename_head(state, {"0": "conv.conv", "1": "conv.norm", "4": "classifier"})
