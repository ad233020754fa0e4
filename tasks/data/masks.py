"""Folders of images and masks with a class list: CamVid, and any other set of that kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.data import IGNORE, DataSet, Problems, Sample, check_splits
from tasks.data.arguments import Names, arrange_splits, check_names, check_tasks, did_you_mean, open_root
from tasks.data.folder import EXTENSIONS, walk
from tasks.data.images import decode_mask
from tasks.data.images import size as image_size

MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm")
UNKNOWN = -1


def read(
    root: str | None,
    images: str,
    masks: str,
    mask_suffix: str,
    train: Names,
    val: Names | float | None,
    test: Names | float | None,
    classes: Sequence[str] | None,
    values: Sequence[int] | None,
    ignore: Sequence[int],
    on_error: str,
    tasks: Sequence[str],
    seed: int,
) -> DataSet:
    """Read pairs of an image and a mask that share a name, folders within the split's included (``city/frame``).

    Headers are checked here (both files readable, of one size); the mask's values when it is loaded.

    Args:
        root: the data set's folder.
        images: the folder of a split's images; ``{split}`` stands for its name. Where neither folder has it, ``val``
            and ``test`` are shares of train, or None.
        masks: the folder of its masks.
        mask_suffix: a mask is ``<image's name><mask_suffix>.png`` (or another lossless format), also in the images' own
            folder.
        train: the name of a split, or several to join.
        val: likewise, or a share of train to hold out, in (0, 1), or None.
        test: likewise.
        classes: names in label order.
        values: the value of each class in the mask files; None: 0, 1, 2, ...
        ignore: values that are void, which 255 always is.
        on_error: ``fail`` at a missing, orphaned or wrongly sized mask, or ``skip`` the sample, counted and named.
        tasks: ``segment``.
        seed: which samples are held out.
    Raises:
        FileNotFoundError: the root is not set or missing.
        ValueError: a faulty argument, folder or file; names it.
    """
    path = open_root("masks", root)
    check_tasks("masks", tasks, ("segment",))
    for split, choice in (("val", val), ("test", test)):
        if "{split}" not in images + masks and not isinstance(choice, int | float | None):
            raise ValueError(
                f"data.{split} is {choice}, but without {{split}} in data.images and data.masks that is train again; "
                "set data.val=0.1 data.test=0.1 (shares of train), or null"
            )
    table = value_table(classes, values, ignore)
    pairs = Pairs(path, Problems(path.name, on_error), table)

    def load(split: str) -> list[Sample]:
        pictures = _files(path, "images", images, split, EXTENSIONS, apart=masks)
        if mask_suffix and Path(images) == Path(masks):
            pictures = {name: file for name, file in pictures.items() if not name.endswith(mask_suffix)}
        return pairs.match(
            pictures,
            {
                name.removesuffix(mask_suffix): file
                for name, file in _files(path, "masks", masks, split, MASK_EXTENSIONS, apart=images).items()
                if name.endswith(mask_suffix)
            },
        )

    splits = arrange_splits(load, train, val, test, seed)
    skipped = pairs.problems.settle()
    return check_splits(DataSet(path.name, {"segment": tuple(classes or ())}, splits, skipped))


def value_table(classes: Sequence[str] | None, values: Sequence[int] | None, ignore: Sequence[int]) -> np.ndarray:
    """[256] int16: a file's value -> class index, ``IGNORE`` or ``UNKNOWN``.

    Raises:
        ValueError: no list of classes or numbers, a value twice or out of range, or more or fewer values than classes.
    """
    if not classes:
        raise ValueError("data.classes is not set; list the classes' names in the order of their labels")
    for key, given in (("values", values), ("ignore", ignore)):
        if isinstance(given, int):
            raise ValueError(f"data.{key} is {given}; expected a list: data.{key}=[{given}]")
    of_class = list(range(len(check_names(classes)))) if values is None else list(values)
    if len(of_class) != len(classes):
        raise ValueError(f"data.values has {len(of_class)} numbers for {len(classes)} classes; expected one a class")
    used = [*of_class, *ignore]
    wrong = [value for value in used if not 0 <= value <= 255 or used.count(value) > 1]
    if wrong:
        raise ValueError(
            f"data.values {of_class} and data.ignore {list(ignore)} have {wrong[0]} twice or out of range; expected "
            "each value from 0 to 255 once"
        )
    table = np.full(256, UNKNOWN, np.int16)
    table[IGNORE] = IGNORE
    table[list(ignore)] = IGNORE
    table[of_class] = np.arange(len(classes))
    return table


@dataclass(frozen=True, slots=True, eq=False)
class TableMask:
    """A mask in a file whose values stand for classes by a table."""

    source: str
    table: np.ndarray
    """See ``value_table``; shared by all masks of a data set."""

    def load(self) -> np.ndarray:
        """[H, W] uint8: class index, ``IGNORE`` for void.

        Raises:
            ValueError: unreadable, or a value that is not in the table; names the file, the value and its count.
        """
        raw = decode_mask(self.source)
        mask = self.table[raw]
        if mask.min() == UNKNOWN:
            values, counts = np.unique(raw[mask == UNKNOWN], return_counts=True)
            more = f" (and {len(values) - 1} other values)" if len(values) > 1 else ""
            known = np.flatnonzero((self.table != UNKNOWN) & (self.table != IGNORE))
            raise ValueError(
                f"{self.source} has the mask value {values[0]} in {counts[0]} pixels{more}, but the classes are "
                f"{known[0]} to {known[-1]}: complete data.classes, or add it to data.ignore"
            )
        return mask.astype(np.uint8)


@dataclass
class Pairs:
    """Puts images and masks together and notes what does not fit."""

    root: Path
    problems: Problems
    table: np.ndarray

    def match(self, pictures: dict[str, Path], masks: dict[str, Path]) -> list[Sample]:
        """The samples of the names that both have."""
        for name in sorted(masks.keys() - pictures.keys()):
            self.problems.add(f"mask {masks[name].relative_to(self.root)} has no image")
        samples = [self._sample(picture, masks.get(name)) for name, picture in sorted(pictures.items())]
        return [sample for sample in samples if sample is not None]

    def _sample(self, picture: Path, mask: Path | None) -> Sample | None:
        shown = picture.relative_to(self.root)
        if mask is None:
            self.problems.add(f"image {shown} has no mask")
            return None
        try:
            size, mask_size = image_size(str(picture)), image_size(str(mask))
        except ValueError as error:
            self.problems.add(str(error))
            return None
        if size != mask_size:
            self.problems.add(
                f"mask {mask.relative_to(self.root)} is of {mask_size[1]} x {mask_size[0]} pixels, but its image has "
                f"{size[1]} x {size[0]}"
            )
            return None
        return Sample(str(picture), size, {"segment": TableMask(str(mask), self.table)})


def _files(root: Path, key: str, pattern: str, split: str, extensions: tuple[str, ...], apart: str) -> dict[str, Path]:
    """Name without extension -> file, of one folder and all below it but for that of the counterparts (``apart``)."""
    folder, other = (root / text.replace("{split}", split) for text in (pattern, apart))
    if not folder.is_dir():
        above = (root / pattern.split("{split}")[0].rstrip("/")) if "{split}" in pattern else folder.parent
        known = sorted(entry.name for entry in above.iterdir() if entry.is_dir()) if above.is_dir() else []
        raise ValueError(
            f"{root} has no folder {folder.relative_to(root)} (data.{key} is {pattern})"
            f"{did_you_mean(split if '{split}' in pattern else folder.name, known)}"
        )
    found: dict[str, Path] = {}
    for file in sorted(folder / name for name in walk(folder)):
        name = file.relative_to(folder).with_suffix("").as_posix()
        inside_other = folder in other.parents and other in file.parents
        if file.suffix.lower() in extensions and not inside_other:
            if name in found:
                raise ValueError(f"{file} and {found[name].name} have one name; remove one of the two")
            found[name] = file
    if not found:
        raise ValueError(f"{folder} has no {'masks' if key == 'masks' else 'images'} ({', '.join(extensions)})")
    return found
