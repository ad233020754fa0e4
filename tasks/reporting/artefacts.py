"""What the report shows of a run folder: learning curves and pictures, small enough for one page."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from tasks.reporting.comparison import SHOWN

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
    curves: dict[str, Curve] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as lines:
        for row in csv.DictReader(lines):
            step = _number(row.get("step"))
            for name, text in row.items():
                value = _number(text) if isinstance(name, str) and _wanted(name) else None
                if value is not None and step is not None:
                    curves.setdefault(name, []).append((int(step), round(value, 5)))
    return {name: _thinned(curve, points) for name, curve in curves.items()}


def _wanted(name: str) -> bool:
    return (name.startswith("val/") and name.rpartition("/")[2] in SHOWN) or name == "train/loss"


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
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
    return {path: uri for path in paths for uri in _data_uri(path, share)}


def _data_uri(path: Path, characters: int) -> Iterable[str]:
    """The picture as large as fits; nothing if it cannot be read or not be made to fit."""
    try:
        with Image.open(path) as picture:
            whole = picture.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return
    for width, quality in ((1000, 70), (800, 55), (640, 50), (520, 45), (400, 40), (280, 35)):
        height = max(1, round(whole.height * min(1.0, width / whole.width)))
        small = whole.resize((min(width, whole.width), height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        out = io.BytesIO()
        small.save(out, "JPEG", quality=quality)
        if out.tell() * 4 / 3 + 30 <= characters:
            yield "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
            return
        whole = small if width < whole.width else whole
