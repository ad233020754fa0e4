"""Where to look: each augmentation draws a window in the image's own pixels (see ``view``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heads import Size
from tasks.data.view import Window

Item = dict[str, Any]


def whole(item: Item, size: Size) -> Window:
    """All of the image."""
    return (0, 0, size[1], size[0])


@dataclass(frozen=True)
class ZoomAndCrop:
    """SSD's zoom out, then a crop that overlaps an object by a drawn least IoU.

    An image without boxes is cropped as if it were one object itself, so that the crop shows some of it.
    """

    zoom_out: float
    zoom_out_ratio: float
    iou_crop: float
    min_scale: float
    max_aspect: float
    overlaps: tuple[float | None, ...]
    trials: int = 40

    def __call__(self, item: Item, size: Size) -> Window:
        height, width = size
        draw = torch.rand(5).tolist()
        window: Window = (0.0, 0.0, width, height)
        if draw[0] < self.zoom_out:
            ratio = 1 + draw[1] * (self.zoom_out_ratio - 1)
            left, top = -draw[2] * (ratio - 1) * width, -draw[3] * (ratio - 1) * height
            window = (left, top, left + ratio * width, top + ratio * height)
        if draw[4] >= self.iou_crop:
            return window
        boxes = item["boxes"].as_subclass(Tensor).numpy() if "boxes" in item else np.empty((0, 4), np.float32)
        return self._crop(window, boxes if len(boxes) else np.array([[0, 0, width, height]], np.float32))

    def _crop(self, window: Window, boxes: np.ndarray) -> Window:
        """A window inside this one; every trial of one overlap is drawn and judged at once."""
        corner, extent = np.array(window[:2]), np.array(window[2:]) - np.array(window[:2])
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        while True:  # ends: "as it is" is among the overlaps
            overlap = self.overlaps[int(torch.randint(len(self.overlaps), ()))]
            if overlap is None:
                return window
            draw = torch.rand(self.trials, 4).numpy()
            extents = extent * (self.min_scale + (1 - self.min_scale) * draw[:, :2])
            low = corner + (extent - extents) * draw[:, 2:]
            high = low + extents
            aspect = extents[:, 0] / extents[:, 1]
            inside = ((centres > low[:, None]) & (centres < high[:, None])).all(2)  # [trials, n]
            shared = np.minimum(boxes[:, 2:], high[:, None]) - np.maximum(boxes[:, :2], low[:, None])
            shared = shared.clip(0).prod(2)
            iou = shared / (areas + extents.prod(1)[:, None] - shared)
            good = (inside & (iou >= overlap)).any(1) & (aspect <= self.max_aspect) & (aspect >= 1 / self.max_aspect)
            if good.any():
                first = int(good.argmax())
                return (*low[first].tolist(), *high[first].tolist())


@dataclass(frozen=True)
class ScaledCrop:
    """A crop at a drawn scale; beyond scale 1 it is smaller than the image, below 1 larger.

    At scale 1 the image has ``base`` pixels and ``size`` of them are looked at.
    """

    size: Size
    scale: tuple[float, float]
    base: Size

    def __call__(self, item: Item, size: Size) -> Window:
        u, across, down = torch.rand(3).tolist()
        scale = self.scale[0] + u * (self.scale[1] - self.scale[0])
        height = size[0] * self.size[0] / (self.base[0] * scale)
        width = size[1] * self.size[1] / (self.base[1] * scale)
        left, top = across * (size[1] - width), down * (size[0] - height)
        return (left, top, left + width, top + height)


@dataclass(frozen=True)
class RandomResized:
    """A crop of a drawn share of the area and a drawn width / height, as GoogLeNet's training did."""

    scale: tuple[float, float]
    ratio: tuple[float, float]

    def __call__(self, item: Item, size: Size) -> Window:
        return draw_rectangle(size, self.scale, self.ratio)


@dataclass(frozen=True)
class Shift:
    """All of the image, moved by up to ``most`` of its own pixels each way."""

    most: int

    def __call__(self, item: Item, size: Size) -> Window:
        across, down = (torch.randint(-self.most, self.most + 1, (2,))).tolist()
        return (across, down, size[1] + across, size[0] + down)


def draw_rectangle(size: Size, scale: tuple[float, float], ratio: tuple[float, float], trials: int = 10) -> Window:
    """A rectangle inside an image; one that does not fit is drawn anew.

    Args:
        size: the image's height, width.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width / height, in pixels; drawn evenly in its logarithm.
        trials: after so many, the largest centred rectangle of an allowed ratio.
    Returns:
        Left, top, right, bottom.
    Source: torchvision's RandomResizedCrop, which states GoogLeNet (arXiv 1409.4842, section 6) in numbers.
    """
    height, width = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for share, slant, across, down in torch.rand(trials, 4).tolist():
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = math.exp(low + slant * (high - low))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = across * (width - w), down * (height - h)
            return (left, top, left + w, top + h)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, height * aspect), min(height, width / aspect)
    return ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
