"""Colours, type and labels that the pictures share."""

from __future__ import annotations

import colorsys
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Rect = tuple[float, float, float, float]
"""left, top, right, bottom, px."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PALETTE: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (0, 0, 255), (238, 238, 187), (119, 102, 255), (136, 17, 34), (102, 255, 255), (136, 0, 102), (170, 238, 119),
    (0, 68, 170), (255, 34, 102), (119, 153, 255), (238, 187, 187), (85, 17, 204), (136, 68, 0), (51, 102, 68),
    (238, 136, 85), (85, 221, 136), (51, 187, 204),
)  # fmt: skip
"""Okabe and Ito's seven, then the colours farthest from all before them for normal, red-blind and green-blind eyes
(Machado et al. 2009, CIELAB): at least 15 apart for each."""

PAGE: Colour = (255, 255, 255)
INK: Colour = (24, 28, 34)
GREY: Colour = (128, 132, 138)
RIGHT: Colour = (0, 158, 115)
WRONG: Colour = (213, 94, 0)


def colour(index: int) -> Colour:
    """The colour of a class; a palette first, then hues that go on without an end."""
    if index < len(PALETTE):
        return PALETTE[index]
    hue = index * 0.61803398875 % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, (0.35, 0.55, 0.75)[index % 3], 0.8)
    return round(red * 255), round(green * 255), round(blue * 255)


def ink_on(fill: Colour) -> Colour:
    """Black or white, whichever reads better."""
    red, green, blue = ((c / 255) ** 2.2 for c in fill)
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.2 else PAGE


@cache
def fonts(size: int) -> tuple[Font, ...]:
    """Fonts to try in turn: pillow's own, then those with more scripts that happen to be installed."""
    found: list[Font] = [ImageFont.load_default(size=size)]
    for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "arial.ttf", "Arial Unicode.ttf"):
        with suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return tuple(found)


@cache
def _missing_glyph(font: Font) -> bytes:
    return bytes(font.getmask("\U0010fffe"))


@cache
def _has_glyphs(font: Font, text: str) -> bool:
    return all(c.isspace() or (c.isprintable() and bytes(font.getmask(c)) != _missing_glyph(font)) for c in text)


@cache
def readable(text: str, size: int, instead: str = "?") -> tuple[str, Font]:
    """The text and a font that has all of it.

    Args:
        text: any name.
        size: of the type, px.
        instead: what to show when no font has it.
    Returns:
        The text; without its accents, or without the letters that no font has, if it must be.
    """
    text = " ".join(text.split())
    available = fonts(size)
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    for candidate in (text, plain):
        for font in available:
            if _has_glyphs(font, candidate):
                return candidate, font
    kept = "".join(c for c in plain if _has_glyphs(available[0], c)).strip()
    return kept or instead, available[0]


def text_size(text: str, font: Font) -> tuple[int, int]:
    """Width and line height, px."""
    top = font.getbbox("Ág")
    return round(font.getlength(text)), round(top[3])


def shortened(text: str, font: Font, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than ``width`` px."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text.rstrip() + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def plate(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, font: Font, fill: Colour) -> None:
    """Text on a filled plate whose left top corner is ``at``."""
    width, height = text_size(text, font)
    left, top = round(at[0]), round(at[1])
    draw.rectangle((left, top, left + width + 5, top + height + 2), fill=fill, outline=INK)
    draw.text((left + 3, top + 1), text, font=font, fill=ink_on(fill))


def dashed_rectangle(draw: ImageDraw.ImageDraw, box: Rect, fill: Colour, dash: int = 6) -> None:
    """A thin dashed outline on a dark one, visible on any ground."""
    left, top, right, bottom = (round(v) for v in box)
    draw.rectangle((left, top, right, bottom), outline=INK, width=2)
    for x in range(left, right + 1, 2 * dash):
        end = min(x + dash, right)
        draw.line((x, top, end, top), fill=fill, width=2)
        draw.line((x, bottom - 1, end, bottom - 1), fill=fill, width=2)
    for y in range(top, bottom + 1, 2 * dash):
        end = min(y + dash, bottom)
        draw.line((left, y, left, end), fill=fill, width=2)
        draw.line((right - 1, y, right - 1, end), fill=fill, width=2)


def mark(draw: ImageDraw.ImageDraw, at: tuple[int, int], size: int, right: bool) -> None:
    """A round tick or a square cross: told apart without colour."""
    x, y = at
    box = (x, y, x + size, y + size)

    def line(*points: float) -> None:
        places = [(x + points[i] * size, y + points[i + 1] * size) for i in range(0, len(points), 2)]
        draw.line(places, fill=PAGE, width=2)

    if right:
        draw.ellipse(box, fill=RIGHT)
        line(0.22, 0.52, 0.42, 0.72, 0.78, 0.3)
    else:
        draw.rectangle(box, fill=WRONG)
        line(0.27, 0.27, 0.73, 0.73)
        line(0.73, 0.27, 0.27, 0.73)


def as_array(value: Any) -> np.ndarray:
    """The value of an array, a tensor or a mask that is read when asked for."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    elif hasattr(value, "load"):
        value = value.load()
    return np.asarray(value)


def fitting(text: str, size: int, width: float) -> tuple[str, Any]:
    """The text, cut to ``width`` px, and a font that has it."""
    text, font = readable(text, size)
    return shortened(text, font, width), font


def text_line(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, width: float, fill: Colour) -> None:
    """One line of text, cut to ``width`` px."""
    text, font = fitting(text, 14, width)
    draw.text(at, text, font=font, fill=fill)


class Labels:
    """Finds places for the labels of one tile, so that they stay inside it and off each other."""

    def __init__(self, draw: ImageDraw.ImageDraw, area: Rect, size: int) -> None:
        self.draw, self.area, self.size = draw, area, size
        self.taken: list[Rect] = []

    def add(self, name: str, score: str, box: Rect, fill: Colour) -> None:
        """Label a box with name and score, the score where there is no room, nothing where that would hide others.

        A long name is cut to half the tile; the score stays.
        """
        text, font = readable(name, self.size)
        name = shortened(text, font, (self.area[2] - self.area[0]) / 2)
        for text in (f"{name} {score}".strip(), score.removeprefix("0")):
            if not text:
                return
            width, height = text_size(text, font)
            places = [self._inside(at, width + 6, height + 3) for at in _corners(box, width + 6, height + 3)]
            covered = [self._covered(place) for place in places]
            best = covered.index(min(covered))
            if covered[best] <= 0.15:
                self.taken.append(places[best])
                plate(self.draw, places[best][:2], text, font, fill)
                return

    def _inside(self, at: tuple[float, float], width: float, height: float) -> Rect:
        left = max(self.area[0], min(at[0], self.area[2] - width))
        top = max(self.area[1], min(at[1], self.area[3] - height))
        return left, top, left + width, top + height

    def _covered(self, place: Rect) -> float:
        """The share of the place that labels already take."""
        if not self.taken:
            return 0.0
        others = np.array(self.taken)
        wide = np.minimum(others[:, 2], place[2]) - np.maximum(others[:, 0], place[0])
        high = np.minimum(others[:, 3], place[3]) - np.maximum(others[:, 1], place[1])
        overlap = (wide.clip(0) * high.clip(0)).sum()
        return float(overlap / ((place[2] - place[0]) * (place[3] - place[1])))


def _corners(box: Rect, width: float, height: float) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    return [
        (left, top - height + 1), (left, top), (right - width, top - height + 1), (left, bottom - 1),
        (left, bottom - height), (right - width, bottom - 1), (right - width, bottom - height),
        ((left + right - width) / 2, (top + bottom - height) / 2),
    ]  # fmt: skip


def hatched(size: tuple[int, int], period: int = 8) -> np.ndarray:
    """[H, W, 3] uint8 grey stripes, for pixels that do not count.

    Args:
        size: height, width.
        period: of the stripes, px.
    """
    rows, columns = np.ogrid[: size[0], : size[1]]
    stripe = ((rows + columns) % period < period // 2)[..., None]
    return np.where(stripe, np.uint8(150), np.uint8(105)).repeat(3, axis=2)


def legend(width: int, entries: Sequence[tuple[str, Any, str]], size: int = 14, rows: int = 4) -> Image.Image:
    """A strip of swatches with names.

    Args:
        width: of the strip, px; entries wrap.
        entries: (kind, colour, name); kinds: ``fill``, ``box``, ``dashed``, ``hatch``, ``tick``, ``cross``, ``text``.
        size: of the type, px.
        rows: at most; what does not fit is counted.
    """
    line, pad = size + 10, 12
    placed: list[tuple[float, int, tuple[str, Any, str]]] = []
    x, row = float(pad), 0
    for number, entry in enumerate(entries):
        text, font = readable(entry[2], size, f"class {number}")
        text = shortened(text, font, width - 2 * pad - size - 8)
        wide = size + 8 + font.getlength(text) + 18
        last = row == rows - 1 and number < len(entries) - 1
        if x > pad and x + wide + (80 if last else 0) > width:
            if row == rows - 1:
                placed.append((x, row, ("text", INK, f"and {len(entries) - number} more")))
                break
            x, row = float(pad), row + 1
        placed.append((x, row, (entry[0], entry[1], text)))
        x += wide
    strip = Image.new("RGB", (width, (row + 1) * line + 8), PAGE)
    draw = ImageDraw.Draw(strip)
    for x, row, (kind, fill, text) in placed:
        _swatch(strip, draw, (round(x), row * line + 8), size, kind, fill)
        text, font = readable(text, size)
        draw.text((x + size + 6, row * line + 7), text, font=font, fill=INK)
    return strip


def _swatch(
    strip: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], size: int, kind: str, fill: Colour
) -> None:
    box = (at[0], at[1], at[0] + size, at[1] + size)
    if kind == "fill":
        draw.rectangle(box, fill=fill, outline=GREY)
    elif kind == "box":
        draw.rectangle(box, outline=fill, width=3)
    elif kind == "dashed":
        draw.rectangle(box, fill=GREY)
        dashed_rectangle(draw, box, fill, dash=4)
    elif kind in ("tick", "cross"):
        mark(draw, at, size, kind == "tick")
    elif kind == "hatch":
        strip.paste(Image.fromarray(hatched((size, size), 6)), at)
