"""What several tests need: where things lie, a tiny data set."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
SHARED = ROOT / ".." / "shared"

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def write_voc(root: Path, train: int = 8, val: int = 3, test: int = 4) -> Path:
    """A Pascal VOC folder of 64 px images with one bright square or dark bar each."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    number = 0
    for split, count in (("train", train), ("val", val), ("test", test)):
        ids = []
        for _ in range(count):
            name = f"{number:03}"
            pixels = rng.integers(90, 130, (64, 64, 3), dtype=np.uint8)
            left, top = rng.integers(0, 30, 2)
            kind, width, height, colour = (("square", 24, 24, 250), ("bar", 30, 12, 5))[number % 2]
            pixels[top : top + height, left : left + width] = colour
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            (root / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><size><width>64</width><height>64</height><depth>3</depth></size><object><name>{kind}</name>"
                f"<bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{left + width}</xmax>"
                f"<ymax>{top + height}</ymax></bndbox></object></annotation>"
            )
            ids.append(name)
            number += 1
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root
