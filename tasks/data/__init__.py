"""The sample contract: what every reader returns and everything behind it works on.

A reader is one file here and one yaml under ``conf/data``. It turns a folder into a ``DataSet``: light records that say
where an image lies and what is on it. Nothing is decoded before it is needed, and every error names the file.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

IGNORE = 255
"""The value of a mask's pixels that count neither in the loss nor in the score."""

NOT_ARGUMENTS = ("name", "smallest_object")
"""Keys of a data yaml that are for people and other yamls, not for its reader."""

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Boxes:
    """The objects of one image, in the pixels of the decoded (EXIF-rotated) image."""

    xyxy: np.ndarray
    """[n, 4] float32: left, top, right, bottom; positive width and height, inside the image."""
    labels: np.ndarray
    """[n] int64: index into the data set's classes."""
    crowd: np.ndarray
    """[n] bool: a region of many (COCO ``iscrowd``) or ``difficult`` (VOC): not trained on, ignored by scores."""
    area: np.ndarray
    """[n] float32: px^2; COCO's segment area, else width x height. Decides small, medium, large in the scores."""


class Mask(Protocol):
    """A semantic mask that is read when asked for."""

    def load(self) -> np.ndarray:
        """[H, W] uint8: class index, ``IGNORE`` for void. Raises ValueError naming the file."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and what is known of it."""

    image: str
    """A path, or ``archive.zip!/member``."""
    size: tuple[int, int] | None = None
    """Height, width in pixels as the annotation says; None where it does not. Checked against the decoded image."""
    targets: dict[str, Any] = field(default_factory=dict)
    """task -> int (classify), Boxes (detect), Mask (segment). A missing task is simply not trained or scored."""


@dataclass(slots=True)
class DataSet:
    """A data set with its splits."""

    name: str
    classes: dict[str, tuple[str, ...]]
    """task -> class names; the label is the index."""
    splits: dict[str, list[Sample]]
    """``train``, ``val``, ``test``; one may be empty, none may overlap."""
    skipped: list[str] = field(default_factory=list)
    """What ``on_error=skip`` left out, one line each."""
    note: str = ""
    """For the titles of tables: ``synthetic``, ``10 % of train`` ..."""


@dataclass
class Problems:
    """Collects what is wrong with a data set, so that the user sees it at once and not one by one."""

    name: str
    on_error: str = "fail"
    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_error not in ("fail", "skip"):
            raise ValueError(f"data.on_error is {self.on_error!r}; expected fail or skip")

    def add(self, message: str) -> None:
        """Note one problem; the message names the file and what is wrong with it."""
        self.found.append(message)

    def settle(self) -> list[str]:
        """The problems that were skipped.

        Raises:
            ValueError: there are problems and ``on_error`` is ``fail``.
        """
        if self.found and self.on_error == "fail":
            more = f" (and {len(self.found) - 1} more)" if len(self.found) > 1 else ""
            raise ValueError(f"{self.name}: {self.found[0]}{more}; fix it, or set data.on_error=skip")
        return self.found


def check_splits(data: DataSet) -> DataSet:
    """Refuse overlapping splits, a training set without a sample, a class twice, and more than a mask can hold.

    Raises:
        ValueError: names an image that stands in two splits, the empty split, the class, or the number of classes.
    """
    for task, names in data.classes.items():
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            added = " (voc and coco add it for masks by themselves)" if twice == "background" else ""
            raise ValueError(
                f"{data.name} has the class {twice!r} twice for {task}{added}; remove or rename one, in data.classes "
                "or in the annotations"
            )
    if len(data.classes.get("segment", ())) > IGNORE:
        raise ValueError(
            f"{data.name} has {len(data.classes['segment'])} classes for masks, the background among them if there is "
            f"one; expected at most {IGNORE}, as {IGNORE} means ignored: merge some, or leave segmentation out"
        )
    seen: dict[str, str] = {}
    for split, samples in data.splits.items():
        for sample in samples:
            other = seen.setdefault(sample.image, split)
            if other != split:
                raise ValueError(
                    f"{data.name}: {sample.image} is in both {other} and {split}; a score on it would be worthless: "
                    f"remove it from one of the two"
                )
    if not data.splits.get("train"):
        raise ValueError(f"{data.name}: no training sample left; check data.root and the splits' names")
    return data


def hold_out(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split samples in two by a seed: (rest, held out). Their order does not matter, the image names do.

    Args:
        samples: what to split.
        share: of the samples to hold out, in (0, 1).
        seed: which ones.
    """
    if not 0 < share < 1:
        raise ValueError(f"the held-out share is {share}; expected a number between 0 and 1")
    ordered = sorted(samples, key=lambda sample: sample.image)
    order = np.random.default_rng(seed).permutation(len(ordered))
    cut = max(1, round(share * len(ordered)))
    held = {ordered[i].image for i in order[:cut]}
    return [s for s in samples if s.image not in held], [s for s in samples if s.image in held]
