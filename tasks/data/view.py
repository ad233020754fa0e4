"""Looking at an image through a window: crop, zoom, pad, resize and mirror as one step that moves all targets alike.

Every geometric augmentation here is a choice of a window, in the image's own pixels. It may reach beyond the image,
which zooms out. The window is then resized to the network's input, so no intermediate canvas exists and the work
depends on the output's size rather than on the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from heads import Size
from tasks.data import IGNORE

Window = Sequence[float]
"""Left, top, right, bottom in the image's pixels; may reach beyond the image."""

BORDERS = ("fill", "edge", "reflect")
"""What stands beyond the image: one colour, the edge's pixels, or the image mirrored."""


class View(NamedTuple):
    """Which whole pixels of the image are shown, and where they land."""

    source: tuple[int, int, int, int]
    """Left, top, right, bottom in the image."""
    place: tuple[int, int, int, int]
    """Left, top, right, bottom in the output, before mirroring."""
    size: Size
    """The output's height, width."""
    mirror: tuple[bool, bool] = (False, False)
    """Horizontally, vertically."""


def fit(window: Window, image_size: Size, size: Size, mirror: tuple[bool, bool] = (False, False)) -> View:
    """The view closest to a window.

    Both rectangles are rounded to whole pixels first; boxes follow the rounded ones, so rounding never parts them from
    the image.

    Args:
        window: what to look at.
        image_size, size: height, width of the image and of the output.
        mirror: horizontally, vertically.
    """
    spans = [
        _fit_axis(window[axis], window[axis + 2], image_size[1 - axis], size[1 - axis]) for axis in (0, 1)
    ]  # x, then y
    (left, right, to_left, to_right), (top, bottom, to_top, to_bottom) = spans
    return View((left, top, right, bottom), (to_left, to_top, to_right, to_bottom), size, mirror)


def _fit_axis(low: float, high: float, length: int, out: int) -> tuple[int, int, int, int]:
    """From, to in the image and from, to in the output; at least one pixel each."""
    low_px = round(low)
    high_px = max(round(high), low_px + 1)
    first = min(max(low_px, 0), length - 1)
    last = max(min(high_px, length), first + 1)
    scale = out / (high_px - low_px)
    to_first = min(max(round((first - low_px) * scale), 0), out - 1)
    to_last = max(min(round((last - low_px) * scale), out), to_first + 1)
    return first, last, to_first, to_last


def view_image(image: Tensor, view: View, fill: Sequence[int] | None = None, border: str = "fill") -> Tensor:
    """What the view shows of an image.

    Args:
        image: [3, H, W] uint8; fastest when channels are last in memory.
        view: of this image.
        fill: RGB beyond the image, 0-255; None takes the shown part's mean.
        border: what stands beyond the image, see ``BORDERS``; ``reflect`` needs a border narrower than the shown part.
    Returns:
        [3, *view.size] uint8, a new tensor.
    """
    left, top, right, bottom = view.source
    to_left, to_top, to_right, to_bottom = view.place
    height, width = view.size
    patch = image[:, top:bottom, left:right]
    patch_size = (to_bottom - to_top, to_right - to_left)
    resized = patch.shape[-2:] != patch_size
    if resized:
        patch = F.interpolate(patch[None], size=patch_size, mode="bilinear", antialias=True)[0]
    if patch_size == view.size:
        canvas = patch if resized else patch.clone(memory_format=torch.contiguous_format)
    elif border == "fill":
        colour = patch.float().mean((1, 2)).round() if fill is None else torch.tensor(list(fill))
        canvas = colour.to(torch.uint8)[:, None, None].repeat(1, height, width)
        canvas[:, to_top:to_bottom, to_left:to_right] = patch
    else:
        rows = _border_index(to_top, to_bottom, height, border)
        columns = _border_index(to_left, to_right, width, border)
        canvas = patch.index_select(1, rows).index_select(2, columns)
    axes = [axis for axis, flipped in ((2, view.mirror[0]), (1, view.mirror[1])) if flipped]
    return canvas.flip(axes) if axes else canvas


def _border_index(first: int, last: int, length: int, border: str) -> Tensor:
    """For each output pixel, which of the patch's pixels stands there."""
    index = torch.arange(length) - first
    top = last - first - 1
    if border == "edge":
        return index.clamp_(0, top)
    return (top - (top - index.abs()).abs()).clamp_(0, top)


def view_mask(mask: Tensor, view: View) -> Tensor:
    """What the view shows of a mask, by nearest pixel.

    Args:
        mask: [H, W] uint8.
        view: of the image it belongs to.
    Returns:
        [*view.size] uint8, 255 beyond the image.
    """
    left, top, right, bottom = view.source
    to_left, to_top, to_right, to_bottom = view.place
    patch = mask[top:bottom, left:right]
    patch_size = (to_bottom - to_top, to_right - to_left)
    if patch.shape != patch_size:
        patch = F.interpolate(patch[None, None], size=patch_size, mode="nearest-exact")[0, 0]
    canvas = mask.new_full(view.size, IGNORE)
    canvas[to_top:to_bottom, to_left:to_right] = patch
    axes = [axis for axis, flipped in ((1, view.mirror[0]), (0, view.mirror[1])) if flipped]
    return canvas.flip(axes) if axes else canvas


def view_boxes(boxes: Tensor, view: View, min_size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Boxes as seen through the view.

    A box whose centre is out of sight goes, as does one that is left smaller than ``min_size``; the others are clipped.

    Args:
        boxes: [n, 4] float32 xyxy, px of the image.
        view: of the image they belong to.
        min_size: the least width and height, px of the output.
    Returns:
        [m, 4] float32 xyxy px of the output, and [n] bool: which boxes stayed.
    Source: the rule of centres is SSD's, section 2.2, arXiv 1512.02325.
    """
    left, top, right, bottom = view.source
    to_left, to_top, to_right, to_bottom = view.place
    height, width = view.size
    scale_x, scale_y = (to_right - to_left) / (right - left), (to_bottom - to_top) / (bottom - top)
    scale = torch.tensor([scale_x, scale_y, scale_x, scale_y])
    shift_x, shift_y = to_left - left * scale_x, to_top - top * scale_y
    moved = boxes * scale + torch.tensor([shift_x, shift_y, shift_x, shift_y])
    limit = torch.tensor([width, height], dtype=torch.float32)
    centre = (moved[:, :2] + moved[:, 2:]) / 2
    low, high = moved[:, :2].clamp_min(0), torch.minimum(moved[:, 2:], limit)
    keep = ((centre > 0) & (centre < limit) & (high - low >= min_size)).all(1)
    flipped = torch.tensor(view.mirror)
    low, high = torch.where(flipped, limit - high, low), torch.where(flipped, limit - low, high)
    return torch.cat([low, high], 1)[keep], keep
