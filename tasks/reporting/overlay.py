"""What a model sees, drawn on one image; legible whether the image has 32 pixels or 40 million.

The picture is scaled first, type and lines follow its size. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tasks.data import IGNORE
from tasks.reporting.drawing import GREY, INK, PAGE, Labels, as_array, colour, legend, readable, text_size
from tasks.reporting.pictures import FLOOR

LONGEST, SHORTEST, NARROWEST = 1600, 480, 160
"""px: the longer side of a picture at most and at least; its shorter side at least, with a floor beside the image."""
BACKGROUND = ("background", "_background_", "__background__")
"""Classes of this name are left unpainted."""
TINT = 0.5
"""Share of a class's colour over the image."""
PALETTE_BYTES = bytes(channel for i in range(256) for channel in colour(i))
"""Of masks as palette images: the colour of every class."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image scaled to be looked at."""

    image: Image.Image
    """The image on its floor."""
    place: tuple[int, int, int, int]
    """Where the image lies: left, top, right, bottom."""
    size: tuple[int, int]
    """The image's own height and width, px."""

    @property
    def type_size(self) -> int:
        """Of letters, px: the same share of every picture."""
        return max(13, round(max(self.image.size) / 56))

    @property
    def line(self) -> int:
        """Width of lines, px."""
        return max(2, round(max(self.image.size) / 320))


def picture(pixels: np.ndarray) -> Picture:
    """Scale an image to be looked at.

    Args:
        pixels: [H, W, 3] uint8.
    """
    height, width = pixels.shape[:2]
    side = min(max(height, width, SHORTEST), LONGEST)
    scale = side / max(height, width)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(pixels)
    if scale < 1:  # reducing first is several times faster and leaves nothing to see
        image = image.resize((wide, high), Image.Resampling.LANCZOS, reducing_gap=1.5)
    elif scale > 1:
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    canvas = (max(wide, NARROWEST), max(high, NARROWEST))
    left, top = (canvas[0] - wide) // 2, (canvas[1] - high) // 2
    if canvas != (wide, high):
        floor = Image.new("RGB", canvas, FLOOR)
        floor.paste(image, (left, top))
        image = floor
    return Picture(image, (left, top, left + wide, top + high), (height, width))


def draw(
    shown: Picture, predictions: Mapping[str, Any], classes: Mapping[str, Sequence[str]], threshold: float
) -> Image.Image:
    """Draw every task's prediction on a picture; what it means stands below.

    Args:
        shown: the image.
        predictions: task -> prediction of one image in its own pixels, see ``heads.Head``.
        classes: task -> class names.
        threshold: detections of a lower score are left out.
    Returns:
        A new picture, as wide.
    """
    image = shown.image.copy()
    strips = []
    for task in sorted(predictions, key=list(DRAW).index):  # masks lie under boxes
        image, strip = DRAW[task](image, shown, predictions[task], classes[task], threshold)
        strips.append(strip)
    whole = Image.new("RGB", (image.width, image.height + sum(strip.height for strip in strips)), PAGE)
    whole.paste(image, (0, 0))
    top = image.height
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole


def draw_mask(
    image: Image.Image, shown: Picture, prediction: Any, classes: Sequence[str], _threshold: float
) -> tuple[Image.Image, Image.Image]:
    """Classes as colours over the image, with a fine line between them; the legend has their shares."""
    left, top, right, bottom = shown.place
    mask = Image.fromarray(as_array(prediction).astype(np.uint8, copy=False))
    mask = mask.resize((right - left, bottom - top), Image.Resampling.NEAREST)
    small = np.asarray(mask)
    counts = np.bincount(small.ravel(), minlength=256)
    clear = [i for i, name in enumerate(classes) if name.casefold() in BACKGROUND]
    painted = mask.point([0 if i in (*clear, IGNORE) else round(255 * TINT) for i in range(256)])
    mask.putpalette(PALETTE_BYTES)
    image.paste(mask.convert("RGB"), (left, top), painted)
    line = Image.fromarray(_edges(small, max(1, shown.line // 2)))
    image.paste(INK, (left, top, right, bottom), line)
    entries: list[tuple[str, Any, str]] = [
        ("fill", PAGE if i in clear else colour(int(i)), f"{_name(classes, i)} {_percent(counts[i] / small.size)}")
        for i in np.argsort(-counts, kind="stable")
        if counts[i]
    ]
    return image, legend(image.width, entries, shown.type_size)


def draw_boxes(
    image: Image.Image, shown: Picture, prediction: Any, classes: Sequence[str], threshold: float
) -> tuple[Image.Image, Image.Image]:
    """Boxes with name and score, best on top; the legend counts them."""
    scores = as_array(prediction["scores"]).astype(np.float64)
    keep = np.argsort(-scores, kind="stable")
    keep = keep[scores[keep] >= threshold]
    left, top, right, bottom = shown.place
    scale = np.array([(right - left) / shown.size[1], (bottom - top) / shown.size[0]] * 2)
    boxes = as_array(prediction["boxes"]).astype(np.float64).reshape(-1, 4)[keep] * scale + [left, top, left, top]
    names, line = as_array(prediction["labels"])[keep].tolist(), shown.line
    brush = ImageDraw.Draw(image)
    low, high = np.array([left, top] * 2), np.array([right - 1, bottom - 1] * 2)
    boxes = boxes.clip(low, high)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    for box, label in reversed(list(zip(boxes, names, strict=True))):
        outer = (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)
        brush.rectangle(outer, outline=INK, width=line + 2)
        brush.rectangle(tuple(box), outline=colour(label), width=line)
    labels = Labels(brush, (0, 0, image.width - 1, image.height - 1), shown.type_size)
    for box, label, score in zip(boxes, names, scores[keep], strict=True):
        labels.add(_name(classes, label), f"{score:.2f}", (box[0], box[1], box[2], box[3]), colour(label))
    entries: list[tuple[str, Any, str]] = [
        ("box", colour(label), f"{_name(classes, label)}: {names.count(label)}")
        for label in sorted(set(names), key=lambda label: (-names.count(label), label))
    ]
    return image, legend(
        image.width, entries or [("text", INK, f"nothing with score >= {threshold:g}")], shown.type_size
    )


def draw_classes(
    image: Image.Image, shown: Picture, prediction: Any, classes: Sequence[str], _threshold: float
) -> tuple[Image.Image, Image.Image]:
    """The three best classes below the image, each with a bar as long as its score."""
    scores = as_array(prediction).astype(np.float64)
    best = np.argsort(-scores, kind="stable")[:3]
    size = shown.type_size
    line, pad = round(size * 1.7), round(size * 0.6)
    strip = Image.new("RGB", (image.width, len(best) * line + pad), PAGE)
    brush = ImageDraw.Draw(strip)
    room = image.width - 2 * pad
    for row, label in enumerate(best.tolist()):
        top = pad // 2 + row * line
        brush.rectangle((pad, top + line - 5, pad + room, top + line - 3), fill=FLOOR)
        brush.rectangle((pad, top + line - 5, pad + room * float(scores[label]), top + line - 3), fill=colour(label))
        number, font = readable(f"{scores[label]:.2f}", size)
        name, name_font = readable(_name(classes, label), size)
        while name and text_size(name, name_font)[0] > room - text_size(number, font)[0] - size:
            name = name[:-1]
        brush.text((pad, top), name, font=name_font, fill=INK if row == 0 else GREY)
        brush.text((pad + room - text_size(number, font)[0], top), number, font=font, fill=INK if row == 0 else GREY)
    return image, strip


DRAW: dict[str, Callable[..., tuple[Image.Image, Image.Image]]] = {
    "segment": draw_mask,
    "detect": draw_boxes,
    "classify": draw_classes,
}
"""task -> (image, picture, prediction, classes, threshold) -> image drawn on, strip below; in this order."""


def _edges(mask: np.ndarray, width: int) -> np.ndarray:
    """[H, W] bool: a class ends here."""
    edge = np.zeros(mask.shape, bool)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
    for _ in range(width - 1):
        edge[:, 1:] |= edge[:, :-1]
        edge[1:] |= edge[:-1]
    return edge


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def _name(classes: Sequence[str], label: int) -> str:
    return str(classes[label]) if 0 <= label < len(classes) else f"class {label}"
