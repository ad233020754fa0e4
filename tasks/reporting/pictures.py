"""Pictures of test images with what is true and what was predicted, legible at any image size.

``GRIDS`` has one function a task, all of one signature, so that the caller needs no cases. Arrays and torch tensors are
accepted; nothing here needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tasks.data import IGNORE
from tasks.reporting.drawing import (
    GREY,
    INK,
    PAGE,
    RIGHT,
    WRONG,
    Colour,
    Labels,
    Rect,
    as_array,
    colour,
    dashed_rectangle,
    hatched,
    legend,
    mark,
    plate,
    readable,
    text_line,
)

GAP = 8
TRUTH: Colour = (255, 255, 255)
FLOOR: Colour = (226, 229, 233)


def detection_grid(
    images: Sequence[Any],
    truths: Sequence[Any],
    predictions: Sequence[Any],
    classes: Sequence[str],
    columns: int = 4,
    threshold: float = 0.3,
) -> Image.Image:
    """Images with their true boxes (dashed, white) and predicted ones (solid, the class's colour, name and score).

    A true box is named only where no prediction of its class lies on it (IoU 0.5): those are the misses.

    Args:
        images: [H, W, 3] uint8 each.
        truths: ``tasks.data.Boxes``, or a dict of ``boxes`` [n, 4] xyxy px and ``labels`` [n]; None = not known.
        predictions: dicts of ``boxes`` [n, 4] xyxy px, ``scores`` [n] in [0, 1] and ``labels`` [n]; None = none.
        classes: names by label.
        columns: of the grid.
        threshold: predictions below this score are left out.
    Returns:
        The grid with a legend below.
    Raises:
        ValueError: no image, lists of different lengths, or an image of another shape.
    """
    pixels = _checked(images, truths, predictions)
    size = _tile_size(pixels, 400)
    tiles, seen = [], set()
    for image, truth, prediction in zip(pixels, truths, predictions, strict=True):
        boxes, labels, scores = _boxes(prediction)
        keep = np.argsort(-scores, kind="stable")
        keep = keep[scores[keep] >= threshold]
        true_boxes, true_labels, _ = _boxes(truth)
        tile, offset, scale = _fit(image, size)
        shift = np.array([offset[0], offset[1]] * 2)
        truth_here = (true_boxes * scale + shift, true_labels)
        _draw_boxes(tile, truth_here, (boxes[keep] * scale + shift, labels[keep], scores[keep]), classes)
        seen |= set(true_labels.tolist()) | set(labels[keep].tolist())
        tiles.append(tile)
    entries: list[tuple[str, Any, str]] = [("dashed", TRUTH, "true box (named where missed)")]
    entries += [("text", INK, f"predictions with score >= {threshold:g}:")]
    entries += [("box", colour(i), _name(classes, i)) for i in sorted(seen)]
    return _sheet(tiles, columns, entries)


def classification_grid(
    images: Sequence[Any],
    truths: Sequence[Any],
    predictions: Sequence[Any],
    classes: Sequence[str],
    columns: int = 4,
) -> Image.Image:
    """Images with the predicted name and score, a tick or a cross, and the true name where they differ.

    Args:
        images: [H, W, 3] uint8 each.
        truths: labels; None = not known.
        predictions: scores [K] each, sum 1.
        classes: names by label.
        columns: of the grid.
    Returns:
        The grid with a legend below.
    Raises:
        ValueError: no image, lists of different lengths, or an image of another shape.
    """
    pixels = _checked(images, truths, predictions)
    width, height = _tile_size(pixels, 260)
    tiles = []
    all_scores = [as_array(prediction) for prediction in predictions]
    wrong = any(truth is not None and int(truth) != s.argmax() for truth, s in zip(truths, all_scores, strict=True))
    for image, truth, scores in zip(pixels, truths, all_scores, strict=True):
        label = int(scores.argmax())
        tile = Image.new("RGB", (width, height + (46 if wrong else 26)), PAGE)
        tile.paste(_fit(image, (width, height))[0], (0, 0))
        draw = ImageDraw.Draw(tile)
        true = None if truth is None else int(truth)
        if true is not None:
            mark(draw, (3, height + 6), 15, true == label)
        text_line(draw, (24, height + 4), f"{_name(classes, label)}  {scores[label]:.2f}", width - 26, INK)
        if true is not None and true != label:
            text_line(draw, (24, height + 24), f"is {_name(classes, true)}", width - 26, GREY)
        tiles.append(tile)
    entries = [("tick", RIGHT, "right"), ("cross", WRONG, "wrong: predicted name and score, then the true name")]
    return _sheet(tiles, columns, entries)


def segmentation_grid(
    images: Sequence[Any],
    truths: Sequence[Any],
    predictions: Sequence[Any],
    classes: Sequence[str],
    columns: int = 2,
) -> Image.Image:
    """Image, truth and prediction side by side; what does not count is hatched grey.

    Args:
        images: [H, W, 3] uint8 each.
        truths: [H, W] class indices, 255 = ignore, or a ``tasks.data.Mask``; None = not known.
        predictions: [H, W] class indices.
        classes: names by index.
        columns: triples in a row.
    Returns:
        The grid with a legend of the classes that occur.
    Raises:
        ValueError: no image, lists of different lengths, or an image of another shape.
    """
    pixels = _checked(images, truths, predictions)
    size = _tile_size(pixels, 280)
    tiles, seen = [], set()
    for image, truth, prediction in zip(pixels, truths, predictions, strict=True):
        masks = [None if truth is None else as_array(truth), as_array(prediction)]
        triple = Image.new("RGB", (3 * size[0] + 4, size[1]), PAGE)
        for i, (mask, caption) in enumerate(zip([None, *masks], ("image", "truth", "prediction"), strict=True)):
            panel, offset, _ = _fit(image, size)
            if mask is not None:
                inner = (size[0] - 2 * offset[0], size[1] - 2 * offset[1])
                panel.paste(_overlay(panel.crop((*offset, offset[0] + inner[0], offset[1] + inner[1])), mask), offset)
                seen |= set(np.unique(mask).tolist())
            text, font = readable(caption if i != 1 or truth is not None else "truth: none", 12)
            plate(ImageDraw.Draw(panel), (0, size[1] - 18), text, font, PAGE)
            triple.paste(panel, (i * (size[0] + 2), 0))
        tiles.append(triple)
    entries: list[tuple[str, Any, str]] = [("fill", colour(i), _name(classes, i)) for i in sorted(seen) if i != IGNORE]
    entries += [("hatch", GREY, "does not count")] if IGNORE in seen else []
    return _sheet(tiles, columns, entries)


GRIDS: dict[str, Callable[..., Image.Image]] = {
    "classify": classification_grid,
    "detect": detection_grid,
    "segment": segmentation_grid,
}
"""task -> (images, truths, predictions, classes, columns) -> picture."""


def save(picture: Image.Image, path: str | Path) -> None:
    """Write a picture so that a reader sees the old one or the new one, never half of one.

    Args:
        picture: what to write.
        path: its suffix names the format; the folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        picture.save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _checked(images: Sequence[Any], truths: Sequence[Any], predictions: Sequence[Any]) -> list[np.ndarray]:
    if not len(images) or not len(images) == len(truths) == len(predictions):
        found = f"{len(images)}, {len(truths)}, {len(predictions)}"
        raise ValueError(f"a grid needs images and one truth and prediction for each; got {found}")
    pixels = [as_array(image) for image in images]
    for i, image in enumerate(pixels):
        if image.dtype != np.uint8 or image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]):
            raise ValueError(f"image {i} is {image.dtype} {image.shape}; expected uint8 [H, W, 3]")
    return [image if image.shape[2] == 3 else image.transpose(1, 2, 0) for image in pixels]


def _boxes(target: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """boxes [n, 4] float64, labels [n] int64, scores [n] (1 where there are none); padding labels are dropped."""
    if target is None:
        return np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0)
    fields = target if isinstance(target, dict) else {"boxes": target.xyxy, "labels": target.labels}
    boxes = as_array(fields["boxes"]).astype(np.float64).reshape(-1, 4)
    labels = as_array(fields["labels"]).astype(np.int64)
    scores = as_array(fields["scores"]).astype(np.float64) if "scores" in fields else np.ones(len(labels))
    real = (labels >= 0) & np.isfinite(boxes).all(axis=1)
    return boxes[real], labels[real], scores[real]


def _tile_size(images: Sequence[np.ndarray], side: int) -> tuple[int, int]:
    """Width and height of the tiles: of the images' usual shape, the longer side ``side`` px."""
    ratio = float(np.median([image.shape[1] / image.shape[0] for image in images]))
    ratio = min(max(ratio, 0.6), 2.0)
    return (side, max(1, round(side / ratio))) if ratio >= 1 else (max(1, round(side * ratio)), side)


def _fit(image: np.ndarray, size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int], np.ndarray]:
    """A tile with the image scaled into its middle, its left top corner there, and the scale of x1 y1 x2 y2."""
    height, width = image.shape[:2]
    scale = min(size[0] / width, size[1] / height)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    wide, high = wide - (size[0] - wide) % 2 * (wide > 1), high - (size[1] - high) % 2 * (high > 1)
    offset = ((size[0] - wide) // 2, (size[1] - high) // 2)
    tile = Image.new("RGB", size, FLOOR)
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    tile.paste(Image.fromarray(np.ascontiguousarray(image)).resize((wide, high), how), offset)
    return tile, offset, np.array([wide / width, high / height] * 2)


def _draw_boxes(
    tile: Image.Image,
    truth: tuple[np.ndarray, np.ndarray],
    prediction: tuple[np.ndarray, np.ndarray, np.ndarray],
    classes: Sequence[str],
) -> None:
    """Draw on a tile; boxes in its pixels, predictions best first."""
    draw = ImageDraw.Draw(tile)
    area: Rect = (0, 0, tile.width - 1, tile.height - 1)
    labels = Labels(draw, area, 12)
    boxes = [_clip(box, area) for box in prediction[0]]
    for box, label in reversed(list(zip(boxes, prediction[1], strict=True))):
        outer = (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)
        draw.rectangle(outer, outline=INK, width=4)
        draw.rectangle(box, outline=colour(int(label)), width=2)
    for box in truth[0]:
        dashed_rectangle(draw, _clip(box, area), TRUTH)
    for box, label, score in zip(boxes, prediction[1], prediction[2], strict=True):
        labels.add(_name(classes, label), f"{score:.2f}", box, colour(int(label)))
    found = _found(truth, prediction)
    for box, label in zip(truth[0][~found], truth[1][~found], strict=True):
        labels.add(_name(classes, label), "", _clip(box, area), TRUTH)


def _clip(box: np.ndarray, area: Rect) -> Rect:
    left, top, right, bottom = (float(v) for v in box)
    left, top = min(max(left, area[0]), area[2] - 2), min(max(top, area[1]), area[3] - 2)
    return left, top, min(max(right, left + 2), area[2]), min(max(bottom, top + 2), area[3])


def _found(truth: tuple[np.ndarray, np.ndarray], prediction: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """[n] bool: a prediction of the true class lies on the box."""
    if not len(prediction[0]):
        return np.zeros(len(truth[0]), bool)
    a, b = truth[0][:, None], prediction[0][None]
    sides = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0)
    both = sides.prod(axis=2)
    union = (a[..., 2:] - a[..., :2]).prod(axis=2) + (b[..., 2:] - b[..., :2]).prod(axis=2) - both
    same = truth[1][:, None] == prediction[1][None]
    return np.asarray(((both >= 0.5 * union) & same).any(axis=1))


def _overlay(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image under the classes' colours."""
    small = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    table = np.array([colour(i) for i in range(256)], np.float32)
    mixed = np.asarray(image, np.float32) * 0.4 + table[small] * 0.6
    void = (small == IGNORE)[..., None]
    mixed = np.where(void, np.asarray(image, np.float32) * 0.25 + hatched(small.shape) * 0.75, mixed)
    return Image.fromarray(mixed.round().astype(np.uint8))


def _name(classes: Sequence[str], label: int) -> str:
    return str(classes[label]) if 0 <= label < len(classes) else f"class {label}"


def _sheet(tiles: Sequence[Image.Image], columns: int, entries: Sequence[tuple[str, Any, str]]) -> Image.Image:
    """Tiles of one size in a grid, the legend below."""
    columns = max(1, min(columns, len(tiles)))
    rows = -(-len(tiles) // columns)
    wide, high = tiles[0].size
    width = columns * (wide + GAP) + GAP
    strip = legend(width, entries)
    sheet = Image.new("RGB", (width, rows * (high + GAP) + GAP + strip.height), PAGE)
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (GAP + i % columns * (wide + GAP), GAP + i // columns * (high + GAP)))
    sheet.paste(strip, (0, sheet.height - strip.height))
    return sheet
