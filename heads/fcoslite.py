"""FCOSLite: detection without anchors, by separable convolutions on a light feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import FeatureSpec
from backbones.blocks import BN_EPS, ConvNormAct, check_choice
from heads import Size, check_count, check_range, select
from heads.boxes import clip_boxes, grid_cells, match_points, paired_iou
from heads.detections import Limits, detect, to_images
from heads.losses import PRIOR, focal_loss, giou_loss

FIRST_REACH = 2.0
"""Strides from a point to each side that the head starts from: the middle of what a level is for."""


class FCOSLite(nn.Module):
    """Each cell of a feature pyramid names a class and the distances to the four sides of its object.

    Args:
        specs: what the backbone gives.
        num_classes: object classes K.
        features: the backbone's maps to read, finest first.
        extra_levels: maps added above the last one, each at half the resolution.
        channels: of the pyramid and the towers.
        depth: separable convolutions in each of the two towers.
        range_factor: a level is for objects whose farthest side is up to this many strides away.
        radius: only points so near an object's centre learn it, strides.
        quality: what ranks boxes of equal class score: "centerness" of the point, or "iou" of the box.
        box_weight: factor of the box loss.
        focal_alpha: weight of objects in the class loss, [0, 1].
        focal_gamma: its exponent.
        score_threshold: detections score above it.
        candidates: best boxes a class that go into the suppression.
        nms_iou: of two boxes of a class that overlap more, the better stays.
        detections: most detections an image.
        bn_momentum: weight of the new batch in BatchNorm's running statistics.
    Raises:
        ValueError: a feature that the backbone does not give; a value that is not allowed.

    Output: {"cls" [B, A, K] logits, "deltas" [B, A, 4] (left, top, right, bottom; softplus of it is in strides),
        "quality" [B, A] logit, "anchors" [A, 4] the cells, xyxy in pixels of the input, "ranges" [A, 2] pixels, "size"
        [2] int64 height and width of the input}.
    Source: FCOS, arXiv 1904.01355.
    Differs: separable convolutions; batch norms of each level's own in the shared towers (as in EfficientDet, arXiv
        1911.09070) for group norm; softplus for exp, which cannot overflow.
    """

    task: ClassVar[str] = "detect"

    def __init__(
        self,
        specs: dict[str, FeatureSpec],
        num_classes: int,
        *,
        features: Sequence[str] = ("c3", "c4", "c5"),
        extra_levels: int = 1,
        channels: int = 128,
        depth: int = 2,
        range_factor: float = 8.0,
        radius: float = 1.5,
        quality: str = "centerness",
        box_weight: float = 1.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        score_threshold: float = 0.05,
        candidates: int = 300,
        nms_iou: float = 0.6,
        detections: int = 100,
        bn_momentum: float = 0.03,
    ) -> None:
        super().__init__()
        check_choice("quality", quality, ("centerness", "iou"))
        if num_classes < 1:
            raise ValueError(f"head.num_classes is {num_classes}; expected at least one class")
        numbers = {"range_factor": range_factor, "radius": radius, "box_weight": box_weight, "focal_gamma": focal_gamma}
        for name, value in numbers.items():
            check_range(f"head.{name}", value, 0)
        check_range("head.focal_alpha", focal_alpha, 0, 1)
        if type(extra_levels) is not int or extra_levels < 0:
            raise ValueError(f"head.extra_levels is {extra_levels}; expected a whole number, 0 or more")
        check_count("head.channels", channels)
        check_count("head.depth", depth)
        self.features = tuple(features)
        chosen = select(specs, self.features, "fcoslite")
        last = chosen[-1].stride
        self.strides = (*(spec.stride for spec in chosen), *(last * 2 ** (i + 1) for i in range(extra_levels)))
        self.range_factor, self.radius = range_factor, radius
        self.quality_is_iou = quality == "iou"
        self.box_weight = box_weight
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.limits = Limits(score_threshold, candidates, nms_iou, detections).checked()

        self.lateral = nn.ModuleList(
            ConvNormAct(spec.channels, channels, activation="none", momentum=bn_momentum) for spec in chosen
        )
        self.smooth = nn.ModuleList(_separable(channels, 1, bn_momentum) for _ in chosen)
        self.higher = nn.ModuleList(_separable(channels, 2, bn_momentum) for _ in range(extra_levels))
        levels = len(self.strides)
        self.cls_tower = Tower(channels, depth, levels, bn_momentum)
        self.box_tower = Tower(channels, depth, levels, bn_momentum)
        self.cls = nn.Conv2d(channels, num_classes, 1)
        self.box = nn.Conv2d(channels, 4, 1)
        self.quality = nn.Conv2d(channels, 1, 1)
        first = {
            self.cls: math.log(PRIOR / (1 - PRIOR)),
            self.box: math.log(math.expm1(FIRST_REACH)),
            self.quality: 0.0,
        }
        for conv, bias in first.items():
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.constant_(conv.get_parameter("bias"), bias)

    def forward(self, features: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
        """Raw output (see the class) for the features of images of ``size`` (height, width in pixels)."""
        maps = self._pyramid([features[name] for name in self.features])
        cls, box, quality = [], [], []
        for level, map_ in enumerate(maps):
            cls.append(_rows(self.cls(self.cls_tower(map_, level))))
            reach = self.box_tower(map_, level)
            box.append(_rows(self.box(reach)))
            quality.append(_rows(self.quality(reach)))
        grid = grid_cells.__wrapped__ if torch.compiler.is_compiling() else grid_cells
        cells = grid(tuple((m.shape[-2], m.shape[-1]) for m in maps), self.strides, maps[0].device)
        return {
            "cls": torch.cat(cls, dim=1),
            "deltas": torch.cat(box, dim=1),
            "quality": torch.cat(quality, dim=1).squeeze(2),
            "anchors": cells,
            "ranges": self._ranges(maps),
            "size": torch.tensor([size[0], size[1]]),
        }

    def _pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        merged = [lateral(map_) for lateral, map_ in zip(self.lateral, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:])
        levels = [smooth(map_) for smooth, map_ in zip(self.smooth, merged, strict=True)]
        for higher in self.higher:
            levels.append(higher(levels[-1]))
        return levels

    def _ranges(self, maps: list[Tensor]) -> Tensor:
        """[A, 2] float: how far the farthest side of an object may be, more than and less than, pixels."""
        ends = [self.range_factor * stride for stride in self.strides[:-1]]
        ranges = torch.tensor([[0.0, *ends], [*ends, torch.inf]], device=maps[0].device).t()
        cells = torch.tensor([m.shape[-2] * m.shape[-1] for m in maps], device=maps[0].device)
        return ranges.repeat_interleave(cells, dim=0)

    def loss(self, output: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
        """Class, box and quality loss, each summed over points and divided by the number of matched ones.

        Args:
            output: of ``forward``.
            target: {"boxes" [B, N, 4] float xyxy in pixels of the input, "labels" [B, N] int64, -1 = padding}.
        Returns:
            {"cls": scalar, "box": scalar, "quality": scalar}.
        """
        cells = output["anchors"]
        least, largest = output["ranges"].unbind(1)
        matched = match_points(target["boxes"], target["labels"], cells, self.radius, least, largest)  # [B, A]
        image, cell = (matched >= 0).nonzero(as_tuple=True)
        box = matched[image, cell]
        labels = torch.full_like(matched, -1).index_put_((image, cell), target["labels"][image, box])
        wanted = target["boxes"][image, box]
        at = image * len(cells) + cell
        boxes = decode_sides(output["deltas"].flatten(0, 1).index_select(0, at).float(), cells[cell])
        with torch.no_grad():
            good = paired_iou(boxes, wanted) if self.quality_is_iou else centerness(wanted, cells[cell])
        quality = output["quality"].flatten().index_select(0, at).float()
        count = max(1, len(image))
        return {
            "cls": focal_loss(output["cls"].float(), labels, self.focal_alpha, self.focal_gamma) / count,
            "box": self.box_weight * giou_loss(boxes, wanted) / count,
            "quality": F.binary_cross_entropy_with_logits(quality, good, reduction="sum") / count,
        }

    def predict(self, output: dict[str, Tensor], sizes: list[Size]) -> list[dict[str, Tensor]]:
        """Detections in the pixels of the original images.

        Args:
            output: of ``forward``.
            sizes: height and width of each original image, pixels.
        Returns:
            For each image {"boxes" [n, 4] float32 xyxy inside the image, "scores" [n] float32 in (0, 1], "labels" [n]
            int64}, n <= ``detections``, by falling score; n may be 0. The score is the geometric mean of class and
            quality.
        """
        height, width = output["size"].tolist()
        boxes, scores = self.scored_boxes(output, (height, width))
        found = detect(boxes, scores, self.limits, exact=output["deltas"].dtype == torch.float32)
        return to_images(found, (height, width), sizes)

    def scored_boxes(self, output: dict[str, Tensor], size: Size) -> tuple[Tensor, Tensor]:
        """Every cell's box [B, A, 4] float32 xyxy inside the input of ``size``, and scores [B, A, K] float32."""
        scores = (output["cls"].float().sigmoid() * output["quality"].float().sigmoid()[..., None]).sqrt()
        return clip_boxes(decode_sides(output["deltas"].float(), output["anchors"]), size), scores


class Tower(nn.Module):
    """Separable convolutions that all levels share; the batch norms are each level's own, for so are the statistics.

    Args:
        channels: in and out.
        depth: number of convolutions.
        levels: of the pyramid.
        bn_momentum: weight of the new batch in the running statistics.
    """

    def __init__(self, channels: int, depth: int, levels: int, bn_momentum: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
                nn.Conv2d(channels, channels, 1, bias=False),
            )
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(channels, BN_EPS, bn_momentum) for _ in range(depth)) for _ in range(levels)
        )

    def forward(self, x: Tensor, level: int) -> Tensor:
        """[B, channels, H, W] to the same shape."""
        for conv, norm in zip(self.convs, cast(nn.ModuleList, self.norms[level]), strict=True):
            x = F.relu6(norm(conv(x)), inplace=True)
        return x


def decode_sides(deltas: Tensor, cells: Tensor) -> Tensor:
    """Boxes around the centres of cells.

    Args:
        deltas: [..., A, 4] float; softplus of it is the distance to left, top, right, bottom in strides.
        cells: [A, 4] float, xyxy, pixels.
    Returns:
        [..., A, 4] float, xyxy, pixels; not clipped to the image.
    """
    centre = (cells[:, :2] + cells[:, 2:]) / 2
    reach = F.softplus(deltas) * (cells[:, 2:] - cells[:, :2]).repeat(1, 2)
    return torch.cat((centre - reach[..., :2], centre + reach[..., 2:]), dim=-1)


def centerness(boxes: Tensor, cells: Tensor) -> Tensor:
    """How near the middle of its box [P, 4] the centre of each cell [P, 4] lies: [P] in [0, 1].

    Source: FCOS, arXiv 1904.01355, equation 3.
    """
    centre = (cells[:, :2] + cells[:, 2:]) / 2
    before, after = centre - boxes[:, :2], boxes[:, 2:] - centre
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(dim=1).sqrt()


def _separable(channels: int, stride: int, bn_momentum: float) -> nn.Sequential:
    return nn.Sequential(
        ConvNormAct(channels, channels, 3, stride=stride, groups=channels, activation="none", momentum=bn_momentum),
        ConvNormAct(channels, channels, activation="relu6", momentum=bn_momentum),
    )


def _rows(map_: Tensor) -> Tensor:
    return map_.permute(0, 2, 3, 1).flatten(1, 2)  # [B, cells, columns]
