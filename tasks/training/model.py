"""The model: one backbone and a dict of heads. A single task is the joint case with one head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from heads import Head, Size
from tasks.data.arguments import expanded
from tasks.data.images import as_rgb, decode

PIXELS = "an image of Pillow's, or uint8 RGB: an array [H, W, 3] or a tensor [3, H, W]"


class Model(nn.Module):
    """One backbone under one or more heads.

    Args:
        backbone: a module that keeps the ``Backbone`` contract.
        heads: task -> a module that keeps the ``Head`` contract.
        classes: task -> class names; empty where nobody has named them (``build`` without data).
        image_size: height and width of the network's input in pixels.
        view: fits an image to ``image_size`` for ``predict``, as ``tasks.data.augment.evaluation`` does.
    Raises:
        ValueError: a head stands under another task's name.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, nn.Module],
        classes: Mapping[str, tuple[str, ...]],
        image_size: Size,
        view: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        super().__init__()
        for task, head in heads.items():
            check_task(type(head), task)
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.classes = dict(classes)
        self.image_size = image_size
        self.view = view

    def forward(self, image: Tensor, rows: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Raw outputs of every head from one pass through the backbone.

        Args:
            image: [B, 3, H, W] float32 in [0, 1].
            rows: task -> int64 indices of the samples that its head is to see; a task that is missing sees all of them.
        Returns:
            task -> the head's raw output (see ``heads.Head``); a head that is to see no sample is left out.
        """
        return self.read(self.backbone(image), (image.shape[-2], image.shape[-1]), rows)

    def read(
        self, features: Mapping[str, Tensor], size: Size, rows: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """The heads' part of ``forward``: raw outputs from the backbone's features of images of ``size``."""
        outputs = {}
        for task, head in self.heads.items():
            seen = (rows or {}).get(task)
            if seen is None:
                outputs[task] = head(features, size)
            elif len(seen):
                outputs[task] = head({name: feature[seen] for name, feature in features.items()}, size)
        return outputs

    def single(self, task: str) -> Model:
        """The same weights with one head alone."""
        return Model(self.backbone, {task: self.heads[task]}, {task: self.classes[task]}, self.image_size, self.view)

    def head(self, task: str) -> Head:
        """A task's head, typed by its contract."""
        return cast(Head, self.heads[task])

    def losses(self, outputs: Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Every head's loss terms: task -> term -> scalar."""
        return {task: self.head(task).loss(output, targets[task]) for task, output in outputs.items()}

    @torch.inference_mode()
    def predict(self, image: str | Path | Image.Image | np.ndarray | Tensor) -> dict[str, Any]:
        """What the net sees on one image, in that image's own pixels.

        Args:
            image: a path, an image of Pillow's, or uint8 RGB: an array [H, W, 3] or a tensor [3, H, W].
        Returns:
            task -> prediction (see ``heads.Head``) without the batch dimension.
        """
        pixels = as_pixels(image)
        size = (pixels.shape[-2], pixels.shape[-1])
        device = next(self.parameters()).device
        seen = self.fit(pixels).to(device)
        was_training = self.training
        self.eval()
        outputs = self(seen[None].float().div_(255))
        self.train(was_training)
        return {task: self.head(task).predict(output, [size])[0] for task, output in outputs.items()}

    def fit(self, pixels: Tensor) -> Tensor:
        """An image [3, H, W] uint8 as the network sees it: [3, *image_size] uint8."""
        return self.view({"image": tv_tensors.Image(pixels)})["image"].as_subclass(Tensor)


def check_task(head: type, task: str) -> None:
    """Refuse a head under another task's name.

    Raises:
        ValueError: names both tasks.
    """
    own = getattr(head, "task", None)
    if own != task:
        raise ValueError(
            f"{head.__name__} is a head for {own}, not for {task}; choose another head, or run python -m tasks.{own}"
        )


def as_pixels(image: str | Path | Image.Image | np.ndarray | Tensor) -> Tensor:
    """An image in any form that ``predict`` takes, as a tensor [3, H, W] uint8.

    Raises:
        ValueError: neither a path, an image of Pillow's nor uint8 RGB; or a file that cannot be decoded.
    """
    if isinstance(image, str | Path):
        image = decode(str(expanded(image)))
    elif isinstance(image, Image.Image):
        try:
            image = as_rgb(image.copy(), "the image")
        except OSError as error:  # opened, but not decoded until now
            raise ValueError(f"the image cannot be decoded ({error}); it is damaged or cut short") from error
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(f"predict got {type(image).__name__}; expected a path, {PIXELS}")
    channels = image.shape[0 if isinstance(image, Tensor) else -1] if image.ndim == 3 else 0
    if image.dtype not in (torch.uint8, np.uint8) or channels != 3 or 0 in image.shape:
        raise ValueError(f"predict got {image.dtype} {tuple(image.shape)}; expected {PIXELS}")
    if isinstance(image, np.ndarray):  # torch warns of arrays that are read-only
        return torch.from_numpy(np.require(image, requirements=["C", "W"])).movedim(-1, 0)
    return image
