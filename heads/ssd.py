"""SSD: default boxes on six feature maps, classified and moved by full 3x3 convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import FeatureSpec
from backbones.blocks import ConvNormAct, check_choice
from heads import Size, check_count, check_range, select
from heads.boxes import anchor_shapes, clip_boxes, decode_boxes, default_boxes, encode_boxes, match_anchors
from heads.detections import Limits, detect, to_images
from heads.losses import PRIOR, focal_loss, giou_loss, hard_negative_loss


class SSD(nn.Module):
    """Single-shot detector over default boxes.

    Args:
        specs: what the backbone gives.
        num_classes: object classes K, without background.
        features: the backbone's maps to read, finest first; the last feeds the extra layers.
        extra_depths: output channels of the extra layers, each at half the resolution before it.
        first_map_anchors: boxes a cell of the first map, 6 or (as in the paper's Table 6) 3.
        min_scale: side of the first map's default boxes, fraction of the image.
        max_scale: side of the last map's default boxes, fraction of the image.
        loss: "multibox" (softmax with a background class, hard negatives) or "focal" (a sigmoid a class).
        box_loss: "smooth_l1" on the offsets or "giou" on the boxes.
        box_weight: factor of the box loss.
        match_iou: least overlap of an anchor with the object it answers for, (0, 1].
        negatives: multibox: background anchors an object.
        focal_alpha: focal: weight of objects, [0, 1].
        focal_gamma: focal: exponent.
        score_threshold: detections score above it.
        candidates: best boxes a class that go into the suppression.
        nms_iou: of two boxes of a class that overlap more, the better stays.
        detections: most detections an image.
        bn_momentum: weight of the new batch in BatchNorm's running statistics.
    Raises:
        ValueError: a feature that the backbone does not give; a value that is not allowed.

    Output: {"cls" [B, A, K+1] logits, background first (focal: [B, A, K]), "deltas" [B, A, 4] offsets (dx, dy, dw, dh)
        by variance, "anchors" [A, 4] xyxy in pixels of the input, "size" [2] int64 height and width of the input}.
    Source: SSD, arXiv 1512.02325; extra layers and anchors as in TensorFlow's SSD with MobileNets.
    """

    task: ClassVar[str] = "detect"

    def __init__(
        self,
        specs: dict[str, FeatureSpec],
        num_classes: int,
        *,
        features: Sequence[str] = ("c4_expand", "c5"),
        extra_depths: Sequence[int] = (512, 256, 256, 128),
        first_map_anchors: int = 6,
        min_scale: float = 0.2,
        max_scale: float = 0.95,
        loss: str = "multibox",
        box_loss: str = "smooth_l1",
        box_weight: float = 1.0,
        match_iou: float = 0.5,
        negatives: float = 3.0,
        focal_alpha: float = 0.75,
        focal_gamma: float = 2.0,
        score_threshold: float = 0.001,
        candidates: int = 300,
        nms_iou: float = 0.55,
        detections: int = 300,
        bn_momentum: float = 0.03,
    ) -> None:
        super().__init__()
        check_choice("first_map_anchors", first_map_anchors, (3, 6))
        check_choice("loss", loss, ("multibox", "focal"))
        check_choice("box_loss", box_loss, ("smooth_l1", "giou"))
        if num_classes < 1:
            raise ValueError(f"head.num_classes is {num_classes}; expected at least one class (without background)")
        if not 0 < match_iou <= 1:
            raise ValueError(f"head.match_iou is {match_iou}; expected an overlap in (0, 1], such as 0.5")
        for name, value in (("box_weight", box_weight), ("negatives", negatives), ("focal_gamma", focal_gamma)):
            check_range(f"head.{name}", value, 0)
        check_range("head.focal_alpha", focal_alpha, 0, 1)
        if not 0 < min_scale <= max_scale <= 1:
            raise ValueError(
                f"head.min_scale is {min_scale}, head.max_scale {max_scale}; expected 0 < min_scale <= max_scale <= 1"
            )
        check_count("head.extra_depths", *extra_depths)
        self.features = tuple(features)
        depths = [spec.channels for spec in select(specs, self.features, type(self).__name__)]
        if len(depths) + len(extra_depths) < 2:
            raise ValueError("head.extra_depths is empty; expected one or more beside a single one of head.features")
        self.focal = loss == "focal"
        self.box_loss = box_loss
        self.box_weight = box_weight
        self.match_iou = match_iou
        self.negatives = negatives
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.limits = Limits(score_threshold, candidates, nms_iou, detections).checked()

        self.extra = nn.ModuleList()
        for depth in extra_depths:
            self.extra.append(self.extra_layer(depths[-1], depth, bn_momentum))
            depths.append(depth)
        self.shapes = anchor_shapes(len(depths), min_scale, max_scale, first_map_anchors)
        self.columns = num_classes if self.focal else num_classes + 1
        counts = [len(pairs) for pairs in self.shapes]
        self.cls = nn.ModuleList(
            self.predictor(depth, count * self.columns, bn_momentum)
            for depth, count in zip(depths, counts, strict=True)
        )
        self.box = nn.ModuleList(
            self.predictor(depth, count * 4, bn_momentum) for depth, count in zip(depths, counts, strict=True)
        )
        self._initialise()

    def extra_layer(self, inputs: int, outputs: int, bn_momentum: float) -> nn.Sequential:
        """Halves the resolution."""
        half = outputs // 2
        return nn.Sequential(
            ConvNormAct(inputs, half, activation="relu6", momentum=bn_momentum),
            ConvNormAct(half, outputs, 3, stride=2, activation="relu6", momentum=bn_momentum),
        )

    def predictor(self, inputs: int, outputs: int, bn_momentum: float) -> nn.Sequential:
        """Reads classes or offsets off a feature map."""
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1))

    def initialise_conv(self, conv: nn.Conv2d) -> None:
        """First weights of a convolution; biases are zero.

        Source: torchvision's ``SSDHead``.
        """
        nn.init.xavier_uniform_(conv.weight)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                self.initialise_conv(module)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.focal:
            for predictor in self.cls:
                nn.init.constant_(cast(nn.Sequential, predictor)[-1].get_parameter("bias"), -math.log(1 / PRIOR - 1))

    def forward(self, features: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
        """Raw output (see the class) for the features of images of ``size`` (height, width in pixels)."""
        maps = [features[name] for name in self.features]
        for layer in self.extra:
            maps.append(layer(maps[-1]))
        boxes = default_boxes.__wrapped__ if torch.compiler.is_compiling() else default_boxes
        cells = tuple((map_.shape[-2], map_.shape[-1]) for map_ in maps)
        return {
            "cls": _predict(self.cls, maps, self.columns),
            "deltas": _predict(self.box, maps, 4),
            "anchors": boxes(cells, (size[0], size[1]), self.shapes, maps[0].device),
            "size": torch.tensor([size[0], size[1]]),
        }

    def loss(self, output: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
        """Classification and box loss, each summed over anchors and divided by the number of matched ones.

        Args:
            output: of ``forward``.
            target: {"boxes" [B, N, 4] float xyxy in pixels of the input, "labels" [B, N] int64, -1 = padding}.
        Returns:
            {"cls": scalar, "box": scalar}.
        """
        anchors = output["anchors"]
        matched = match_anchors(target["boxes"], target["labels"], anchors, self.match_iou)  # [B, A]
        image, anchor = (matched >= 0).nonzero(as_tuple=True)
        box = matched[image, anchor]
        labels = torch.full_like(matched, -1).index_put_((image, anchor), target["labels"][image, box])

        logits = output["cls"].float()
        if self.focal:
            cls = focal_loss(logits, labels, self.focal_alpha, self.focal_gamma)
        else:
            cls = hard_negative_loss(logits, labels, self.negatives)

        wanted = target["boxes"][image, box]
        deltas = output["deltas"].flatten(0, 1).index_select(0, image * len(anchors) + anchor).float()
        if self.box_loss == "giou":
            moved = giou_loss(decode_boxes(deltas, anchors[anchor]), wanted)
        else:
            moved = F.smooth_l1_loss(deltas, encode_boxes(wanted, anchors[anchor]), reduction="sum")
        count = max(1, len(image))
        return {"cls": cls / count, "box": self.box_weight * moved / count}

    def predict(self, output: dict[str, Tensor], sizes: list[Size]) -> list[dict[str, Tensor]]:
        """Detections in the pixels of the original images.

        Args:
            output: of ``forward``.
            sizes: height and width of each original image, pixels.
        Returns:
            For each image {"boxes" [n, 4] float32 xyxy inside the image, "scores" [n] float32 in (0, 1], "labels" [n]
            int64, 0-based without background}, n <= ``detections``, by falling score; n may be 0.
        """
        height, width = output["size"].tolist()
        boxes, scores = self.scored_boxes(output, (height, width))
        found = detect(boxes, scores, self.limits, exact=output["deltas"].dtype == torch.float32)
        return to_images(found, (height, width), sizes)

    def scored_boxes(self, output: dict[str, Tensor], size: Size) -> tuple[Tensor, Tensor]:
        """Every anchor's box [B, A, 4] float32 xyxy inside the input of ``size``, and scores [B, A, K] float32."""
        logits = output["cls"].float()
        scores = logits.sigmoid() if self.focal else logits.softmax(dim=-1)[..., 1:]
        return clip_boxes(decode_boxes(output["deltas"].float(), output["anchors"]), size), scores


def _predict(predictors: nn.ModuleList, maps: list[Tensor], columns: int) -> Tensor:
    """[B, A, columns]: by map, row, column and shape, as the anchors are."""
    rows = [
        predictor(map_).permute(0, 2, 3, 1).reshape(map_.shape[0], -1, columns)
        for predictor, map_ in zip(predictors, maps, strict=True)
    ]
    return torch.cat(rows, dim=1)
