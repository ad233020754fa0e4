"""A training batch at another size: images and targets together, for progressive resizing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heads import Size
from tasks.data.loader import Batch


def resized(batch: Batch, size: Size) -> Batch:
    """The batch with images and targets of ``size`` (height, width); itself where it has that size already."""
    before = (batch.image.shape[-2], batch.image.shape[-1])
    if size == before:
        return batch
    image = F.interpolate(batch.image, size=size, mode="bilinear", antialias=True, align_corners=False)
    targets = {task: RESIZE[task](target, before, size) for task, target in batch.targets.items()}
    return batch._replace(image=image, targets=targets)


def resize_labels(labels: Tensor, _before: Size, _after: Size) -> Tensor:
    """A class stays what it is."""
    return labels


def resize_boxes(target: dict[str, Tensor], before: Size, after: Size) -> dict[str, Tensor]:
    """Boxes in the pixels of the new size."""
    scale = target["boxes"].new_tensor([after[1] / before[1], after[0] / before[0]] * 2)
    return target | {"boxes": target["boxes"] * scale}


def resize_masks(masks: Tensor, _before: Size, after: Size) -> Tensor:
    """Masks by nearest pixel."""
    return F.interpolate(masks[:, None].to(torch.uint8), size=after, mode="nearest-exact")[:, 0].long()


RESIZE: dict[str, Callable[[Any, Size, Size], Any]] = {
    "classify": resize_labels,
    "detect": resize_boxes,
    "segment": resize_masks,
}
"""task -> how its target follows the image."""
