"""Changes of the finished image in classification: automatic policies and random erasing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from tasks.data.windows import draw_rectangle

GREY_FILL = (124, 116, 104)
"""ImageNet's mean colour."""


class AutomaticPolicy:
    """RandAugment, TrivialAugment or AutoAugment of torchvision, on a PIL image (2-3 times faster than on a tensor)."""

    def __init__(self, name: str, magnitude: int, fill: tuple[int, ...]) -> None:
        if not 0 <= magnitude <= 30:
            raise ValueError(f"augment.magnitude is {magnitude}; expected 0 to 30")
        colour = list(fill)
        policies: dict[str, Callable[[], v2.Transform]] = {
            "rand": lambda: v2.RandAugment(2, magnitude, fill=colour),
            "trivial": lambda: v2.TrivialAugmentWide(fill=colour),
            "auto": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=colour),
            "auto_cifar10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=colour),
        }
        if name not in policies:
            raise ValueError(f"augment.auto is {name!r}; expected null or one of {', '.join(policies)}")
        self.policy = policies[name]()

    def __call__(self, image: Tensor) -> Tensor:
        changed = self.policy(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


@dataclass(frozen=True)
class Erase:
    """Random erasing: paints over a rectangle with ``fill``, or with the image's mean."""

    p: float
    fill: tuple[int, ...] | None
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def __call__(self, image: Tensor) -> Tensor:
        if float(torch.rand(())) >= self.p:
            return image
        height, width = image.shape[-2:]
        left, top, right, bottom = (round(side) for side in draw_rectangle((height, width), self.scale, self.ratio))
        colour = image.float().mean((1, 2)).round() if self.fill is None else torch.tensor(self.fill)
        image = image.clone()
        image[:, top:bottom, left:right] = colour.to(torch.uint8)[:, None, None]
        return image
