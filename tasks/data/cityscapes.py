"""Cityscapes in its own layout: ``leftImg8bit/<split>/<city>`` and ``gtFine/<split>/<city>``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tasks.data import DataSet, Problems, Sample, check_splits
from tasks.data.arguments import Names, arrange_splits, check_tasks, did_you_mean, open_root
from tasks.data.masks import Pairs, value_table

CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
"""Name -> id in ``*_labelIds.png``; the order is that of the 19 train ids.

Source: cityscapesscripts/helpers/labels.py.
"""
LAST_ID = 33
"""The other ids up to this one are void: too rare, or no class of the benchmark."""


def read(
    root: str | None,
    annotations: str,
    train: Names,
    val: Names | float | None,
    test: Names | float | None,
    on_error: str,
    tasks: Sequence[str],
    seed: int,
) -> DataSet:
    """Read Cityscapes' frames with the 19 classes that its benchmark scores.

    Args:
        root: the folder that holds ``leftImg8bit`` and the annotations.
        annotations: ``gtFine`` or ``gtCoarse``.
        train: a split, or several to join.
        val: likewise, or None, or a share of train to hold out: whole cities, drawn until they are at least this share
            (neighbouring frames of a drive are too alike to be told apart by chance).
        test: a split, or None; ``val`` for figures that compare with published ones.
        on_error: ``fail`` at a missing, orphaned or wrongly sized mask, or ``skip`` the sample, counted and named.
        tasks: ``segment``.
        seed: which cities are held out.
    Raises:
        FileNotFoundError: the root is not set or missing.
        ValueError: a faulty argument, folder or file; names it.
    Source: Cordts et al., The Cityscapes Dataset, arXiv 1604.01685.
    """
    path = open_root("cityscapes", root)
    check_tasks("cityscapes", tasks, ("segment",))
    if annotations not in ("gtFine", "gtCoarse"):
        raise ValueError(f"data.annotations is {annotations!r}; expected gtFine or gtCoarse")
    void = sorted(set(range(LAST_ID + 1)) - set(CLASSES.values()))
    table = value_table(list(CLASSES), list(CLASSES.values()), void)
    pairs = Pairs(path, Problems(path.name, on_error), table)

    def load(split: str) -> list[Sample]:
        if split == "test":
            raise ValueError("the annotations of Cityscapes' own test split are not public; use data.test=val")
        return pairs.match(
            _files(path, "leftImg8bit", split, "_leftImg8bit.png"),
            _files(path, annotations, split, f"_{annotations}_labelIds.png"),
        )

    if test is not None and not isinstance(test, str | Sequence):
        raise ValueError(
            f"data.test is {test}; expected a split: frames of a drive are too alike to be held out singly"
        )
    by_city = isinstance(val, float)
    splits = arrange_splits(load, train, None if by_city else val, test, seed)
    if isinstance(val, float):
        splits["train"], splits["val"] = hold_out_cities(splits["train"], val, seed)
    skipped = pairs.problems.settle()
    return check_splits(DataSet(path.name, {"segment": tuple(CLASSES)}, splits, skipped))


def hold_out_cities(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split frames in two by whole cities: (rest, held out); at least ``share`` of them is held out.

    Raises:
        ValueError: the share is not in (0, 1), or there are too few cities.
    """
    if not 0 < share < 1:
        raise ValueError(f"data.val is {share}; expected a split's name, or a share of train in (0, 1)")
    city_of = [Path(sample.image).parent.name for sample in samples]
    cities = sorted(set(city_of))
    held: set[str] = set()
    for place in np.random.default_rng(seed).permutation(len(cities)):
        if sum(city in held for city in city_of) >= share * len(samples):
            break
        held.add(cities[place])
    if len(held) == len(cities):
        raise ValueError(
            f"data.val={share} would hold out all of {len(cities)} cities; set data.val to a split or null"
        )
    pairs = list(zip(samples, city_of, strict=True))
    return [s for s, city in pairs if city not in held], [s for s, city in pairs if city in held]


def _files(root: Path, kind: str, split: str, ending: str) -> dict[str, Path]:
    """<city>_<sequence>_<frame> -> file."""
    folder = root / kind / split
    if not folder.is_dir():
        known = sorted(entry.name for entry in (root / kind).glob("*") if entry.is_dir())
        raise ValueError(f"{root} has no folder {kind}/{split}{did_you_mean(split, known)}")
    files = {file.name.removesuffix(ending): file for file in sorted(folder.glob(f"*/*{ending}"))}
    if not files:
        raise ValueError(f"{folder} has no files <city>/*{ending}; unpack Cityscapes' archives as they are")
    return files
