"""Augmentation: what is drawn at random for one sample; the mechanism is in ``view``, ``colour``, ``pixels``.

Each public function builds a transform ``sample -> sample`` for a network input of ``size``. A sample is a dict of
``image`` (tv_tensors.Image uint8 [3, H, W]) and any of ``boxes`` (tv_tensors.BoundingBoxes xyxy float32) with
``labels`` (int64 [n]), ``mask`` (tv_tensors.Mask uint8 [H, W], 255 = ignore) and ``label`` (int); whatever is there
stays right together. Randomness comes only from torch's global generator, so a sample's seed decides everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from heads import Size, check_range
from tasks.data.colour import Photometric
from tasks.data.pixels import GREY_FILL, AutomaticPolicy, Erase
from tasks.data.view import BORDERS, Window, fit, view_boxes, view_image, view_mask
from tasks.data.windows import Item, RandomResized, ScaledCrop, Shift, ZoomAndCrop, whole

KEYS = frozenset({"image", "boxes", "labels", "mask", "label"})
SSD_COLOUR = Photometric()
STRIP = 8
"""So many times as long as the network's input an image may be, to be cropped as published; more is cut first."""


@dataclass(frozen=True)
class Augmentation:
    """Draws a window and a mirroring, shows the sample through it, then works on the pixels.

    Args:
        size: height, width of the output.
        window: (sample, image height and width) -> window in the image's pixels.
        flip, vertical_flip: probability of mirroring left to right, top to bottom.
        pixels: applied to the image [3, H, W] uint8 in turn.
        fill: RGB beyond the image, 0-255; None takes the mean of what is shown.
        border: what stands beyond the image, see ``view.BORDERS``.
        min_box: boxes that end up narrower or lower than this many pixels go.
    """

    size: Size
    window: Callable[[Item, Size], Window]
    flip: float = 0.0
    vertical_flip: float = 0.0
    pixels: tuple[Callable[[Tensor], Tensor], ...] = ()
    fill: tuple[int, ...] | None = None
    border: str = "fill"
    min_box: float = 1.0

    def __post_init__(self) -> None:
        check_range("augment.flip", self.flip, 0, 1)
        check_range("augment.vertical_flip", self.vertical_flip, 0, 1)
        if self.border not in BORDERS:
            raise ValueError(f"augment.border is {self.border!r}; expected one of {', '.join(BORDERS)}")
        if self.fill is not None and (len(self.fill) != 3 or not all(0 <= value <= 255 for value in self.fill)):
            raise ValueError(f"augment.fill is {list(self.fill)}; expected three numbers from 0 to 255, or null")

    def __call__(self, item: Item) -> Item:
        if unknown := item.keys() - KEYS:
            raise ValueError(f"augmentation cannot move {', '.join(sorted(unknown))} along with the image")
        image = item["image"].as_subclass(Tensor)
        image_size = (image.shape[-2], image.shape[-1])
        mirror = torch.rand(2).tolist()
        window = self.window(item, image_size)
        view = fit(window, image_size, self.size, (mirror[0] < self.flip, mirror[1] < self.vertical_flip))
        image = view_image(image, view, self.fill, self.border)
        for change in self.pixels:
            image = change(image)
        seen: Item = {"image": tv_tensors.Image(image)}
        if "boxes" in item:
            boxes, keep = view_boxes(item["boxes"].as_subclass(Tensor), view, self.min_box)
            seen["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=self.size)
            seen["labels"] = item["labels"][keep]
        if "mask" in item:
            seen["mask"] = tv_tensors.Mask(view_mask(item["mask"].as_subclass(Tensor), view))
        if "label" in item:
            seen["label"] = item["label"]
        return seen


def check_interval(key: str, value: Sequence[float]) -> tuple[float, float]:
    """Refuse anything but two positive numbers in rising order."""
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ValueError(f"{key} is {list(value)}; expected two positive numbers [least, most]")
    return float(value[0]), float(value[1])


def detection(
    size: Size,
    zoom_out: float = 0.5,
    zoom_out_ratio: float = 4.0,
    iou_crop: float = 1.0,
    min_scale: float = 0.3,
    max_aspect: float = 2.0,
    overlaps: Sequence[float | None] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None),
    flip: float = 0.5,
    vertical_flip: float = 0.0,
    photometric: Photometric | None = SSD_COLOUR,
    fill: Sequence[int] | None = None,
    min_box: float = 1.0,
) -> Augmentation:
    """SSD's augmentation: zoom out, IoU crop, mirror, resize to exactly ``size``, photometric distortion.

    Args:
        size: height, width of the network's input.
        zoom_out: probability of zooming out, by up to ``zoom_out_ratio`` times each side.
        iou_crop: probability of an IoU crop.
        min_scale: least side of a crop, as a share of the image's, in (0, 1].
        max_aspect: a crop's sides differ by no more than this factor, relative to pixels.
        overlaps: one is drawn: the crop's least IoU with an object; null (a must) leaves the image as it is.
        flip, vertical_flip: probability of mirroring.
        photometric: the colour changes; null for none.
        fill: RGB beyond the image; null takes the image's mean.
        min_box: least width and height of a box, px of the input.
    Raises:
        ValueError: an argument is out of its range.
    Source: SSD, section 2.2, arXiv 1512.02325; numbers as in torchvision's reference ("ssd" preset).
    Differs: colour is changed after the resize, which is cheaper; zoom out has its mean colour, not ImageNet's.
    """
    check_range("augment.zoom_out", zoom_out, 0, 1)
    check_range("augment.iou_crop", iou_crop, 0, 1)
    if zoom_out_ratio < 1:
        raise ValueError(f"augment.zoom_out_ratio is {zoom_out_ratio}; expected 1 or more")
    if not 0 < min_scale <= 1:
        raise ValueError(f"augment.min_scale is {min_scale}; expected a number above 0, up to 1")
    if max_aspect < 1:
        raise ValueError(f"augment.max_aspect is {max_aspect}; expected 1 or more")
    if None not in overlaps:
        raise ValueError(f"augment.overlaps is {list(overlaps)}; expected null among them (leaves the image as it is)")
    window = ZoomAndCrop(zoom_out, zoom_out_ratio, iou_crop, min_scale, max_aspect, tuple(overlaps))
    pixels = () if photometric is None else (photometric,)
    return Augmentation(as_size(size), window, flip, vertical_flip, pixels, as_fill(fill), min_box=min_box)


def classification(
    size: Size,
    crop: str | None = "random_resized",
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (0.75, 1.3333),
    shift: int = 4,
    border: str = "fill",
    flip: float = 0.5,
    vertical_flip: float = 0.0,
    auto: str | None = None,
    magnitude: int = 9,
    photometric: Photometric | None = None,
    erase: float = 0.0,
    fill: Sequence[int] | None = None,
) -> Augmentation:
    """Crop or shift, mirror, resize to exactly ``size``, an automatic policy, colour, random erasing.

    Args:
        size: height, width of the network's input.
        crop: ``random_resized`` (by ``scale`` and ``ratio``), ``shift`` (for small images such as CIFAR's) or null.
        scale: least and greatest share of the image's area that a crop takes.
        ratio: a crop's least and greatest width / height, in the image's pixels.
        shift: most pixels of the image to move by, each way.
        border: what a shift brings into sight: ``fill``, ``edge`` or ``reflect``.
        flip, vertical_flip: probability of mirroring.
        auto: ``rand`` (RandAugment, two operations of ``magnitude``), ``trivial`` (TrivialAugment), ``auto``,
            ``auto_cifar10`` (AutoAugment's policies for ImageNet and CIFAR-10) or null.
        magnitude: of RandAugment, 0-30.
        photometric: the colour changes; null for none.
        erase: probability of erasing a rectangle of 2 to 33 % of the area.
        fill: RGB beyond the image and of what is erased; null takes the image's mean.
    Raises:
        ValueError: an argument is out of its range.
    Source: torchvision's classification reference; random erasing: arXiv 1708.04896.
    """
    windows: dict[str | None, Callable[[Item, Size], Window]] = {
        "random_resized": RandomResized(check_interval("augment.scale", scale), check_interval("augment.ratio", ratio)),
        "shift": Shift(shift),
        None: whole,
    }
    if crop not in windows:
        raise ValueError(f"augment.crop is {crop!r}; expected random_resized, shift or null")
    if shift < 0:
        raise ValueError(f"augment.shift is {shift}; expected 0 or more pixels")
    check_range("augment.erase", erase, 0, 1)
    pixels: list[Callable[[Tensor], Tensor]] = []
    if auto is not None:
        pixels.append(AutomaticPolicy(auto, magnitude, as_fill(fill) or GREY_FILL))
    if photometric is not None:
        pixels.append(photometric)
    if erase:
        pixels.append(Erase(erase, as_fill(fill)))
    return Augmentation(as_size(size), windows[crop], flip, vertical_flip, tuple(pixels), as_fill(fill), border)


def segmentation(
    size: Size,
    scale: Sequence[float] = (0.5, 2.0),
    base: Size | None = None,
    flip: float = 0.5,
    vertical_flip: float = 0.0,
    photometric: Photometric | None = SSD_COLOUR,
    fill: Sequence[int] | None = None,
    min_box: float = 1.0,
) -> Augmentation:
    """Scale jitter, crop with padding (the mask is 255 there), mirror, photometric distortion.

    Args:
        size: height, width of the network's input.
        scale: least and greatest factor; below 1 the image is smaller than the input and stands at a drawn place in it.
        base: height, width of the image at scale 1; null: ``size``, so that at scale 1 all of the image is seen, as in
            evaluation. Larger than ``size`` for crops (Cityscapes: base [1024, 2048], image_size [769, 769]).
        flip, vertical_flip: probability of mirroring.
        photometric: the colour changes; null for none.
        fill: RGB beyond the image; null takes the image's mean.
        min_box: least width and height of a box, px of the input (where the sample has boxes).
    Raises:
        ValueError: an argument is out of its range.
    Source: the DeepLab papers' scale jitter (arXiv 1706.05587, section 4.1) as torchvision's reference does it.
    """
    full = as_size(size) if base is None else as_size(base, "augment.base")
    window = ScaledCrop(as_size(size), check_interval("augment.scale", scale), full)
    pixels = () if photometric is None else (photometric,)
    return Augmentation(as_size(size), window, flip, vertical_flip, pixels, as_fill(fill), min_box=min_box)


def none(size: Size) -> Augmentation:
    """Only the resize to exactly ``size``; targets follow."""
    return Augmentation(as_size(size), whole)


def evaluation(size: Size, resize: str = "squash", ratio: float = 0.875) -> Evaluation:
    """The resize of evaluation; targets stay as they are, in the pixels of the original image.

    Args:
        size: height, width of the network's input.
        resize: ``squash`` shows all of the image; ``crop`` resizes it to cover ``size / ratio`` and takes the centre
            (classification only: boxes and masks would need what is cut off).
        ratio: side of the crop over side of the resized image, in (0, 1]; 0.875 is 224 of 256.
    Raises:
        ValueError: an argument is out of its range.
    """
    if resize not in ("squash", "crop"):
        raise ValueError(f"evaluation.resize is {resize!r}; expected squash or crop")
    if not 0 < ratio <= 1:
        raise ValueError(f"evaluation.ratio is {ratio}; expected a number above 0, up to 1")
    return Evaluation(as_size(size), resize == "crop", ratio)


@dataclass(frozen=True)
class Evaluation:
    """See ``evaluation``."""

    size: Size
    crops: bool
    ratio: float

    def __call__(self, item: Item) -> Item:
        image = item["image"].as_subclass(Tensor)
        height, width = image.shape[-2:]
        if self.crops:
            most = STRIP * max(self.size) / min(self.size)  # the far ends of a strip would be resized to be cut off
            image = centre(image, (min(height, math.ceil(most * width)), min(width, math.ceil(most * height))))
            height, width = image.shape[-2:]
            scale = max(self.size[0] / height, self.size[1] / width) / self.ratio
            resized = (int(height * scale + 1e-6), int(width * scale + 1e-6))  # rounded as torchvision's Resize does
            if resized != (height, width):
                image = F.resize(image, list(resized), antialias=True)
            image = centre(image, self.size)
        else:
            image = view_image(image, fit(whole(item, (height, width)), (height, width), self.size))
        return item | {"image": tv_tensors.Image(image)}


def centre(image: Tensor, size: Size) -> Tensor:
    """The middle [3, *size] of an image that is no smaller; not a copy."""
    top, left = (round((have - want) / 2) for have, want in zip(image.shape[-2:], size, strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def as_size(size: Sequence[int], key: str = "image_size") -> Size:
    """A yaml's list as height, width."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{key} is {list(size)}; expected [height, width] in pixels")
    return (size[0], size[1])


def as_fill(fill: Sequence[int] | None) -> tuple[int, ...] | None:
    """A yaml's list as the tuple that ``Augmentation`` keeps."""
    return None if fill is None else tuple(fill)
