"""What the report shows of a run folder: learning curves and pictures, small enough for one page."""

from __future__ import annotations

import base64
import csv
import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from tasks.reporting.comparison import SHOWN

LEAST_BYTES = 0.05
"""Of a JPEG a pixel at these qualities: sizes that need less are not tried."""
Curve = list[tuple[int, float]]
"""(step, value)."""


def read_curves(folder: Path, points: int = 80) -> dict[str, Curve]:
    """The validation metrics and the training loss that Lightning's CSVLogger wrote.

    Args:
        folder: of the run; its ``metrics.csv`` is read.
        points: of a curve at most; longer ones are thinned.
    Returns:
        Column -> curve; empty if there is no such file or it is none.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8", errors="replace") as lines:
        rows = csv.reader(line for line in lines if "\0" not in line)
        header = next(rows, [])
        if "step" not in header:
            return {}
        at_step = header.index("step")
        found: list[tuple[int, str, Curve]] = [(i, name, []) for i, name in enumerate(header) if _wanted(name)]
        for row in rows:
            step = _number(row[at_step]) if len(row) == len(header) else None
            if step is None:
                continue
            for i, _, curve in found:
                value = _number(row[i]) if row[i] else None
                if value is not None:
                    curve.append((int(step), round(value, 5)))
    return {name: _thinned(curve, points) for _, name, curve in found if curve}


def _wanted(name: str) -> bool:
    return (name.startswith("val/") and name.rpartition("/")[2] in SHOWN) or name == "train/loss"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _thinned(curve: Curve, points: int) -> Curve:
    if len(curve) <= points:
        return curve
    return [curve[round(i * (len(curve) - 1) / (points - 1))] for i in range(points)]


def pictures_of(folder: Path) -> list[Path]:
    """The prediction grids and confusion matrices in a run folder."""
    return [path for pattern in ("predictions*.png", "confusion*.png") for path in sorted(folder.glob(pattern))]


def data_uris(paths: Sequence[Path], total: int) -> dict[Path, str]:
    """Pictures as JPEG data URIs.

    Args:
        paths: of the pictures; those that cannot be read are left out.
        total: characters that all of them together may take.
    """
    if not paths:
        return {}
    share = min(120_000, total // len(paths))
    once = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes beside other threads
        uris = pool.map(lambda path: _data_uri(path, share), once)
        return {path: uri for path, uri in zip(once, uris, strict=True) if uri is not None}


def _data_uri(path: Path, characters: int) -> str | None:
    """The picture as large as fits; None if it cannot be read or not be made to fit."""
    try:
        with Image.open(path) as picture:
            whole = picture.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    for width, quality in ((1000, 70), (800, 55), (640, 50), (520, 45), (400, 40), (280, 35)):
        height = max(1, round(whole.height * min(1.0, width / whole.width)))
        if min(width, whole.width) * height * LEAST_BYTES * 4 / 3 > characters:
            continue
        small = whole.resize((min(width, whole.width), height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        out = io.BytesIO()
        small.save(out, "JPEG", quality=quality)
        if out.tell() * 4 / 3 + 30 <= characters:
            return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
        whole = small if width < whole.width else whole
    return None
