"""The ten things that scenes are made of: each has an outline and a texture of its own.

Coordinates ``u, v`` are the object's own: its centre is 0, its furthest point at 1, and they turn with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Points = np.ndarray
"""[n, 2] float: u, v of an outline's corners."""
Texture = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
"""(u [h, w], v [h, w], random) -> [h, w] float32 in [0, 1]: how much of the second colour."""

_OVERSAMPLE = 3


class Shape(NamedTuple):
    """A class of object."""

    outline: Points
    texture: Texture
    hue: float
    """In turns. Most of its objects have about this hue, some have any: colour is a hint and no proof."""
    hole: Points | None = None


def draw_outline(shape: Shape, matrix: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, int, int]:
    """An object's silhouette, with smooth edges.

    Args:
        shape: what to draw.
        matrix: [2, 2], from u, v to pixels.
        centre: [2], x and y in pixels.
    Returns:
        Coverage [h, w] uint8 of 0 to 255, and the frame's x and y of its first column and row (may be negative).
    """
    corners = shape.outline @ matrix.T + centre
    low = np.floor(corners.min(axis=0)).astype(int) - 1
    width, height = np.ceil(corners.max(axis=0)).astype(int) + 1 - low
    canvas = Image.new("L", (width * _OVERSAMPLE, height * _OVERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    pen.polygon(((corners - low) * _OVERSAMPLE).ravel().tolist(), fill=255)
    if shape.hole is not None:
        pen.polygon(((shape.hole @ matrix.T + centre - low) * _OVERSAMPLE).ravel().tolist(), fill=0)
    return np.asarray(canvas.reduce(_OVERSAMPLE)), int(low[0]), int(low[1])


def _polar(radii: np.ndarray, turn: float = 0.0) -> Points:
    angles = 2 * np.pi * (np.arange(len(radii)) / len(radii) + turn)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _circle(radius: float) -> Points:
    return _polar(np.full(72, radius))


def _gear() -> Points:
    return _polar(np.tile([1.0, 1.0, 1.0, 0.76, 0.76, 0.76], 9))


def _cross() -> Points:
    arm, end = 0.32, 0.95
    quarter = np.array([(end, arm), (arm, arm), (arm, end)])
    turns = [np.array([(c, -s), (s, c)]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([quarter @ turn.T for turn in turns])


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 17


def _moon() -> Points:
    outer = np.linspace(0.9, 2 * np.pi - 0.9, 60)
    tip = np.array([np.cos(0.9), np.sin(0.9)])
    inner_centre = 0.62
    radius = np.hypot(tip[0] - inner_centre, tip[1])
    inner = np.linspace(2 * np.pi - np.pi / 2, np.pi / 2, 40)
    arc = np.stack([inner_centre + radius * np.cos(inner), radius * np.sin(inner)], axis=1)
    points = np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), arc])
    points[:, 0] += 0.15
    return points


def _arrow() -> Points:
    half = [(0.95, 0.0), (0.1, 0.68), (0.1, 0.27), (-0.95, 0.27)]
    return np.array(half + [(x, -y) for x, y in half[:0:-1]])


def _leaf() -> Points:
    x = np.linspace(-1, 1, 40)
    y = 0.5 * (1 - x**2) * (1 + 0.25 * x)
    return np.concatenate([np.stack([x, y], axis=1), np.stack([x[-2:0:-1], -y[-2:0:-1]], axis=1)])


def _edge(wave: np.ndarray) -> np.ndarray:
    """A wave around 0 with its slopes made steep: two colours and a soft seam."""
    return np.clip(wave * 3 + 0.5, 0, 1)


def _dots(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    pitch = random.uniform(0.42, 0.6)
    across, down = u / pitch % 1 - 0.5, v / pitch % 1 - 0.5
    return np.clip((0.3 - np.hypot(across, down)) * 8 + 0.5, 0, 1)


def _glow(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.clip(1.05 - np.hypot(u, v) * random.uniform(1.1, 1.7), 0, 1)


def _checker(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    frequency = np.pi / random.uniform(0.28, 0.36)
    return _edge(np.sin(u * frequency) * np.sin(v * frequency))


def _gloss(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    x, y = random.uniform(-0.45, -0.25), random.uniform(-0.45, -0.25)
    return np.clip(1.1 - np.hypot(u - x, v - y) * 2.6, 0, 1)


def _craters(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    depth = np.zeros_like(u)
    for x, y, radius in random.uniform((-0.9, -0.9, 0.08), (0.5, 0.9, 0.24), (14, 3)):
        depth = np.maximum(depth, np.clip((radius - np.hypot(u - x, v - y)) * 14, 0, 1))
    return depth


def _stripes(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return _edge(np.sin(u * random.uniform(9, 13) + random.uniform(0, 6)))


def _grooves(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(np.hypot(u, v) * random.uniform(20, 26))


def _sectors(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return _edge(2 * np.sin(np.arctan2(v, u) * int(random.integers(3, 6))))


def _facets(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    faces = np.floor((np.arctan2(v, u) / (2 * np.pi) + 0.5) * 6).astype(int) % 6
    core = np.hypot(u, v) < 0.42
    tones = random.permutation(np.linspace(0, 1, 6, dtype=np.float32))
    return np.where(core, 0.5, tones[faces])


def _veins(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    side = np.sin((u - 1.1 * np.abs(v)) * random.uniform(15, 19)) - 0.55
    rib = 0.06 - np.abs(v)
    return np.clip(np.maximum(side * 2, rib * 20) + 0.5, 0, 1)


_STAR = _polar(np.tile([1.0, 0.45], 5), 0.05)
SHAPES = {
    "ball": Shape(_circle(0.9), _dots, hue=0.58),
    "star": Shape(_STAR, _glow, hue=0.15),
    "cross": Shape(_cross(), _checker, hue=0.78),
    "heart": Shape(_heart(), _gloss, hue=0.92),
    "moon": Shape(_moon(), _craters, hue=0.08),
    "arrow": Shape(_arrow(), _stripes, hue=0.40),
    "gear": Shape(_gear(), _grooves, hue=0.68, hole=_circle(0.3)),
    "ring": Shape(_circle(0.95), _sectors, hue=0.0, hole=_circle(0.55)),
    "crystal": Shape(_polar(np.full(6, 0.95)), _facets, hue=0.50),
    "leaf": Shape(_leaf(), _veins, hue=0.29),
}
"""By class name, in label order."""
