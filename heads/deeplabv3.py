"""DeepLabV3: atrous spatial pyramid pooling, the heavy head that R-ASPP and LR-ASPP reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from backbones import FeatureSpec
from backbones.blocks import ConvNormAct
from heads import Size, check_count, check_range, check_share, select
from heads.segmentation import class_maps, class_weight_tensor, pixel_loss, rename_head


class DeepLabV3(nn.Module):
    """A 1x1 and three dilated 3x3 convolutions and the global average side by side, projected, refined and classified.

    Args:
        specs: what the backbone gives.
        num_classes: K.
        high: the feature it reads; its stride is the output's.
        channels: of each branch, the projection and the refinement.
        dilations: of the 3x3 branches, pixels of the feature map.
        dropout: share of the projected values that is dropped, in [0, 1).
        class_weights: K weights of the classes in the cross entropy; None: all 1.
        dice: weight of a Dice loss beside it, >= 0; see ``heads.segmentation.pixel_loss``.
        bn_eps: of the batch norms.
        bn_momentum: of the batch norms: the weight of the new batch.
    Raises:
        ValueError: the feature is missing, wrong number of class weights.
    Source: arXiv 1706.05587, section 3.3; torchvision models/segmentation/deeplabv3.py (whose dilations are the paper's
        for output stride 8).
    """

    task: ClassVar[str] = "segment"

    def __init__(
        self,
        specs: dict[str, FeatureSpec],
        num_classes: int,
        *,
        high: str = "c5",
        channels: int = 256,
        dilations: Sequence[int] = (12, 24, 36),
        dropout: float = 0.5,
        class_weights: Sequence[float] | None = None,
        dice: float = 0.0,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_count("head.channels", channels)
        check_count("head.dilations", *dilations)
        (spec,) = select(specs, (high,), "deeplabv3")
        self.high = high
        inputs, eps, momentum = spec.channels, bn_eps, bn_momentum
        self.branches = nn.ModuleList([ConvNormAct(inputs, channels, eps=eps, momentum=momentum)])
        for dilation in dilations:
            self.branches.append(ConvNormAct(inputs, channels, 3, dilation=dilation, eps=eps, momentum=momentum))
        self.pooled = ConvNormAct(inputs, channels, eps=eps, momentum=momentum)
        self.project = ConvNormAct((len(self.branches) + 1) * channels, channels, eps=eps, momentum=momentum)
        self.dropout = nn.Dropout(check_share("head.dropout", dropout))
        self.refine = ConvNormAct(channels, channels, 3, eps=eps, momentum=momentum)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.register_buffer("class_weights", class_weight_tensor(class_weights, num_classes), persistent=False)
        self.class_weights: Tensor
        check_range("head.dice", dice, 0)
        self.dice = float(dice)

    def forward(self, features: dict[str, Tensor], size: Size) -> Tensor:
        """Logits [B, K, h, w] at the feature's stride."""
        high = features[self.high]
        maps = [branch(high) for branch in self.branches]
        maps.append(self.pooled(high.mean((2, 3), keepdim=True)).expand_as(maps[0]))
        x = self.dropout(self.project(torch.cat(maps, 1)))
        return self.classifier(self.refine(x))

    def loss(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross entropy at the mask's size; mask [B, H, W] int64, 255 = ignored."""
        return pixel_loss(output, target, self.class_weights, self.dice)

    def predict(self, output: Tensor, sizes: list[Size]) -> list[Tensor]:
        """Class maps [H, W] uint8 of the original sizes."""
        return class_maps(output, sizes)


def torchvision_to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head's part of a state dict of torchvision's ``deeplabv3_mobilenet_v3_large``, under our names.

    Raises:
        ValueError: an entry of the head has no counterpart.
    """
    names = {f"0.convs.{i}.{j}": f"branches.{i}.{part}" for i in range(4) for j, part in enumerate(("conv", "norm"))}
    names |= {"0.convs.4.1": "pooled.conv", "0.convs.4.2": "pooled.norm"}
    names |= {"0.project.0": "project.conv", "0.project.1": "project.norm"}
    return rename_head(state, names | {"1": "refine.conv", "2": "refine.norm", "4": "classifier"})
