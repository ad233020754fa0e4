"""One scene from three numbers: backdrop, objects over each other, light, lens and sensor."""

from __future__ import annotations

import colorsys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tasks.data.shapes import SHAPES, Shape, draw_outline

VERSION = 2
"""Of what is drawn; raise it with any change of a picture, so that no stale cache is read."""

_SHAPES = tuple(SHAPES.values())
# How hard the set is. Scales are shares of the frame's side.
_MAIN_SCALE = (0.25, 0.6)  # uniform
_OTHER_SCALE = (0.08, 0.45)  # uniform
_MOST_THINGS = 4
_LEAST_VISIBLE = 0.3  # of each thing
_MOST_COVERED = 0.45  # of a thing's place, by things behind it
_OWN_HUE = 0.9  # share of the things that have about their class's hue


class Scene(NamedTuple):
    """A picture and what is on it."""

    image: np.ndarray
    """[H, W, 3] uint8 RGB."""
    instances: np.ndarray
    """[H, W] uint8: 0 = background, else 1 + the index of the object that is seen there."""
    labels: list[int]
    """Class of each object."""


class _Thing(NamedTuple):
    label: int
    matrix: np.ndarray
    centre: np.ndarray
    cover: np.ndarray
    """[h, w] uint8, the part inside the frame."""
    left: int
    top: int
    pixels: int
    """Of the whole silhouette, outside the frame too."""

    def window(self) -> tuple[slice, slice]:
        height, width = self.cover.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def draw_scene(seed: int, split: int, index: int, size: int) -> Scene:
    """A scene that depends on nothing but the arguments.

    One main object of 25 to 60 % of the frame and up to three of 8 to 45 %, turned, over each other, cut at the border;
    whatever is seen by less than 30 % is left out.

    Args:
        seed: of the data set.
        split: index of the split.
        index: of the scene in its split.
        size: height and width in pixels.
    """
    random = np.random.default_rng([seed, split, index])
    things = _place(random, size)
    canvas = _backdrop(random, size)
    instances = np.zeros((size, size), np.uint8)
    for number, thing in enumerate(things, 1):
        _paint(canvas, thing, random)
        instances[thing.window()][thing.cover > 127] = number
    return Scene(_photograph(canvas, random), instances, [thing.label for thing in things])


def _place(random: np.random.Generator, size: int) -> list[_Thing]:
    """Things from back to front, each visible enough in the end."""
    things: list[_Thing] = []
    owner = np.full((size, size), -1)
    for number in range(int(random.integers(1, _MOST_THINGS + 1))):
        scale = random.uniform(*(_MAIN_SCALE if number == 0 else _OTHER_SCALE))
        for _ in range(8):
            thing = _throw(random, size, scale)
            behind = owner[thing.window()][thing.cover > 127]
            seen = np.bincount(owner[owner >= 0], minlength=len(things))
            lost = np.bincount(behind[behind >= 0], minlength=len(things))
            visible = [(seen[i] - lost[i]) / other.pixels for i, other in enumerate(things)]
            # Enough of itself inside the frame, what is behind it still to be seen, and not a pile in one place.
            if (
                len(behind) >= max(_LEAST_VISIBLE * thing.pixels, 60 if things else 1)
                and all(share >= _LEAST_VISIBLE for share in visible)
                and lost.sum() <= _MOST_COVERED * thing.pixels
            ):
                owner[thing.window()][thing.cover > 127] = len(things)
                things.append(thing)
                break
    assert things, "the main object always has room"
    return things


def _throw(random: np.random.Generator, size: int, scale: float) -> _Thing:
    label = int(random.integers(len(_SHAPES)))
    angle = random.uniform(0, 2 * np.pi)
    stretch = random.uniform(0.85, 1.18)
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    shear = np.array([(1.0, random.uniform(-0.15, 0.15)), (0.0, 1.0)])
    matrix = turn @ shear @ np.diag([stretch, 1 / stretch]) * (scale * size / 2)
    margin = 0.3 * scale * size  # a third of the rim's positions cut a thing off
    centre = random.uniform(margin, size - margin, 2)
    cover, left, top = draw_outline(_SHAPES[label], matrix, centre)
    pixels = int((cover > 127).sum())
    cover = cover[max(-top, 0) : size - top, max(-left, 0) : size - left]
    return _Thing(label, matrix, centre, cover, max(left, 0), max(top, 0), pixels)


def _paint(canvas: np.ndarray, thing: _Thing, random: np.random.Generator) -> None:
    """Blend a thing and its shadow into the canvas."""
    shape = _SHAPES[thing.label]
    height, width = thing.cover.shape
    x = np.arange(thing.left, thing.left + width, dtype=np.float32) + 0.5 - thing.centre[0]
    y = np.arange(thing.top, thing.top + height, dtype=np.float32)[:, None] + 0.5 - thing.centre[1]
    (a, b), (c, d) = np.linalg.inv(thing.matrix).astype(np.float32)
    u, v = a * x + b * y, c * x + d * y
    first, second = _colours(shape, random)
    blend = shape.texture(u, v, random).astype(np.float32)[..., None]
    radius = float(np.sqrt(np.abs(np.linalg.det(thing.matrix))))
    soft = Image.fromarray(thing.cover).filter(ImageFilter.BoxBlur(0.12 * radius))
    bevel = 0.62 + 0.42 / 255 * np.asarray(soft, np.float32)  # darker towards its rim
    light = random.uniform(-0.18, 0.18, 2).astype(np.float32) / radius
    shade = (bevel * (1 + light[0] * x + light[1] * y))[..., None]
    colour = (first + blend * (second - first)) * shade
    _drop_shadow(canvas, thing, soft, random.uniform(0.1, 0.45), radius)
    cover = thing.cover.astype(np.float32)[..., None] / 255
    view = canvas[thing.window()]
    view += cover * (colour - view)


def _drop_shadow(canvas: np.ndarray, thing: _Thing, soft: Image.Image, depth: float, radius: float) -> None:
    shift = max(1, round(0.09 * radius))
    rows, columns = thing.window()
    below = canvas[rows.start + shift : rows.stop + shift, columns.start + shift : columns.stop + shift]
    shadow = np.asarray(soft, np.float32)[: below.shape[0], : below.shape[1], None]
    below *= 1 - depth / 255 * shadow


def _colours(shape: Shape, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A thing's two colours, of unlike brightness; most have about their class's hue."""
    hue = shape.hue + random.normal(0, 0.035) if random.random() < _OWN_HUE else random.random()
    light = _rgb(hue + random.uniform(-0.08, 0.08), random.uniform(0.05, 0.4), random.uniform(0.85, 1.0))
    dark = _rgb(hue, random.uniform(0.6, 0.95), random.uniform(0.45, 0.85))
    return (dark, light) if random.random() < 0.8 else (light, dark)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32) * 255


def _backdrop(random: np.random.Generator, size: int) -> np.ndarray:
    """[size, size, 3] float32: a coloured ground with grain, perhaps a pattern, and clutter that is of no class."""
    hue, value = random.random(), random.uniform(0.3, 0.85)
    cells = int(random.integers(2, 6))
    tints = [
        _rgb(hue + random.normal(0, 0.07), random.uniform(0.05, 0.45), np.clip(value + random.normal(0, 0.12), 0.1, 1))
        for _ in range(cells * cells)
    ]
    grid = np.clip(tints, 0, 255).astype(np.uint8).reshape(cells, cells, 3)
    ground = Image.fromarray(grid).resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
    _clutter(ImageDraw.Draw(ground, "RGBA"), random, 2 * size, hue, value)
    canvas = np.asarray(ground.reduce(2), np.float32)
    return canvas + (_grain(random, size) + _pattern(random, size))[..., None]


def _grain(random: np.random.Generator, size: int) -> np.ndarray:
    """Cloudy to fine noise, perhaps drawn out to one side as grass and wood are."""
    shape = np.maximum(2, size / np.exp(random.uniform(0.7, 3.2, 2))).astype(int)
    noise = Image.fromarray(random.standard_normal(shape, dtype=np.float32))
    return np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) * random.uniform(4, 18)


def _pattern(random: np.random.Generator, size: int) -> np.ndarray | float:
    """Planks, tiles, waves, or nothing; fainter than a thing's texture."""
    kind = int(random.integers(5))
    if kind > 2:
        return 0.0
    angle, period = random.uniform(0, np.pi), random.uniform(0.05, 0.3) * size
    x = np.arange(size, dtype=np.float32)
    along = (np.cos(angle) * x + np.sin(angle) * x[:, None]) / period
    across = (np.cos(angle) * x[:, None] - np.sin(angle) * x) / period
    amount = random.uniform(5, 16)
    if kind == 0:
        return amount * np.sin(2 * np.pi * along + np.sin(across))
    seams = np.abs(along % 1 - 0.5) > 0.46
    if kind == 1:
        seams = seams | (np.abs(across % 1 - 0.5) > 0.46)
    return np.where(seams, np.float32(-2 * amount), np.float32(0))


def _clutter(pen: ImageDraw.ImageDraw, random: np.random.Generator, size: int, hue: float, value: float) -> None:
    """Strokes, scribbles and pebbles: plain, so that no class's texture is among them."""
    for _ in range(int(random.integers(4, 16))):
        tint = _rgb(
            hue + random.normal(0, 0.2), random.uniform(0.05, 0.6), np.clip(value + random.normal(0, 0.22), 0, 1)
        )
        fill = (*tint.astype(int).tolist(), int(random.integers(90, 230)))
        x, y = random.uniform(0, size, 2)
        reach = size * random.uniform(0.03, 0.22)
        if random.random() < 0.5:
            steps = random.normal(0, 0.5 * reach, (int(random.integers(2, 7)), 2)).cumsum(axis=0)
            steps += (x, y)
            pen.line(steps.ravel().tolist(), fill=fill, width=int(random.integers(2, 11)), joint="curve")
        else:
            radii = 0.5 * reach * random.uniform(0.55, 1.0, int(random.integers(5, 10)))
            turns = np.sort(random.uniform(0, 2 * np.pi, len(radii)))
            corners = np.stack([x + radii * np.cos(turns), y + radii * np.sin(turns)], axis=1)
            pen.polygon(corners.ravel().tolist(), fill=fill)


def _photograph(canvas: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Light from one side with a colour of its own, focus, and the sensor's noise."""
    size = len(canvas)
    x = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    slope = random.uniform(-0.5, 0.5, 2).astype(np.float32)
    cast = (random.uniform(0.75, 1.15) * random.uniform(0.9, 1.1, 3)).astype(np.float32)
    canvas *= (1 + slope[0] * x + slope[1] * x[:, None])[..., None]
    canvas *= cast
    if random.random() < 0.3:
        lens = ImageFilter.BoxBlur(random.uniform(0.4, 1.1))
        canvas = np.asarray(Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).filter(lens), np.float32)
    # The sum of two bytes is close to normal, and five times as fast; 104 is its standard deviation.
    dice = np.frombuffer(random.bytes(2 * canvas.size), np.uint8).reshape(2, *canvas.shape)
    noise = np.add(dice[0], dice[1], dtype=np.float32)
    noise -= 255
    noise *= np.float32(random.uniform(1, 8) / 104)
    noise += canvas
    return np.clip(noise, 0, 255).astype(np.uint8)
