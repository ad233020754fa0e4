"""The confusion matrix as a picture: legible from two classes to a hundred, a map of a thousand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tasks.reporting.drawing import INK, PAGE, as_array, fitting, hatched, ink_on, readable, text_line, text_size

NAMED = 120
"""Classes at most whose names stand beside the matrix."""
GRID = (226, 229, 233)
"""The colour of the lines between cells."""


def confusion_picture(matrix: Any, classes: Sequence[str]) -> Image.Image:
    """A confusion matrix, each row shaded by its share.

    Args:
        matrix: [K, K] counts; row = true class, column = predicted class.
        classes: K names.
    Returns:
        The picture; up to 30 classes each cell has its percentage, up to 120 each row its name, beyond that a cell is a
        pixel or more; rows without a sample are hatched.
    Raises:
        ValueError: the matrix is not [K, K].
    """
    counts = np.asarray(as_array(matrix), dtype=np.float64)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"the confusion matrix is {counts.shape}; expected K x K for {len(classes)} classes")
    k = len(classes)
    named = k <= NAMED
    cell = max(14 if named else 1, min(52, 900 // max(k, 1)))
    type_size = 12 if k > 30 else 14
    names = [fitting(str(classes[i]), type_size, 190) for i in range(k if named else 0)]
    margin = 34 + max((text_size(text, font)[0] for text, font in names), default=0)
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    side = k * cell
    picture = Image.new("RGB", (max(margin + side + 20, 420), margin + side + 40), PAGE)
    draw = ImageDraw.Draw(picture)
    shaded = _shade(shares).repeat(cell, axis=0).repeat(cell, axis=1)
    for row in np.flatnonzero(total[:, 0] == 0):
        shaded[row * cell : (row + 1) * cell] = hatched((cell, side))
    picture.paste(Image.fromarray(shaded), (margin, margin))
    for i, (text, font) in enumerate(names):
        wide, high = text_size(text, font)
        middle = margin + i * cell + (cell - high) // 2
        draw.text((margin - 6 - wide, middle), text, font=font, fill=INK)
        upright = Image.new("RGB", (wide + 2, high + 2), PAGE)
        ImageDraw.Draw(upright).text((0, 0), text, font=font, fill=INK)
        picture.paste(upright.rotate(90, expand=True), (middle, margin - 8 - wide))
    for i in range(k + 1 if cell > 16 else 0):
        draw.line((margin, margin + i * cell, margin + side, margin + i * cell), fill=GRID)
        draw.line((margin + i * cell, margin, margin + i * cell, margin + side), fill=GRID)
    if k <= 30:
        _percentages(draw, shares, total[:, 0], margin, cell)
    right = np.trace(counts) / max(counts.sum(), 1)
    caption = f"rows: true, columns: predicted; % of the row; {right:.1%} right"
    text_line(draw, (14, margin + side + 12), caption, picture.width - 20, INK)
    return picture


def _shade(shares: np.ndarray) -> np.ndarray:
    """[K, K, 3] uint8: white to deep blue, the diagonal of the same scale."""
    stops = np.array([(255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107)], np.float64)
    # the square root shows the few per cent of a confusion
    at = np.sqrt(shares.clip(0, 1)) * (len(stops) - 1)
    low = np.minimum(at.astype(int), len(stops) - 2)
    part = (at - low)[..., None]
    return np.asarray((stops[low] * (1 - part) + stops[low + 1] * part).round().astype(np.uint8))


def _percentages(draw: ImageDraw.ImageDraw, shares: np.ndarray, total: np.ndarray, margin: int, cell: int) -> None:
    shaded = _shade(shares)
    size = max(10, min(14, cell * 2 // 5))
    for row, column in np.argwhere((shares > 0) & (total > 0)[:, None]):
        share = 100 * shares[row, column]
        text, font = readable(f"{share:.0f}" if share >= 0.5 else "<1", size)
        wide, high = text_size(text, font)
        at = (margin + column * cell + (cell - wide) / 2, margin + row * cell + (cell - high) / 2)
        red, green, blue = (int(c) for c in shaded[row, column])
        draw.text(at, text, font=font, fill=ink_on((red, green, blue)))
