"""Pascal VOC folders: boxes from XML, and the segmentation masks beside them."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.data import Boxes, DataSet, Problems, Sample, check_splits, images
from tasks.data.arguments import Names, arrange_splits, check_names, check_tasks, did_you_mean, open_root
from tasks.data.folder import EXTENSIONS

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read(
    root: str | None,
    train: Names,
    val: Names | float | None,
    test: Names | float | None,
    classes: Sequence[str] | None,
    one_based: bool,
    on_error: str,
    tasks: Sequence[str],
    seed: int,
) -> DataSet:
    """Read a folder in the Pascal VOC layout: ``JPEGImages``, ``Annotations``, ``ImageSets``, ``SegmentationClass``.

    Headers of images are checked against the annotations; pixels are decoded when asked for. With both tasks the lists
    in ``ImageSets/Main`` rule, and a mask is taken where there is one; ``segment`` alone uses
    ``ImageSets/Segmentation``.

    Args:
        root: the folder that holds ``JPEGImages``.
        train: a list in ``ImageSets``, or several to join.
        val: likewise, or a share of train to hold out, in (0, 1), or None.
        test: likewise.
        classes: names in label order; None takes the sorted names that the annotations have (VOC's own order, too): of
            the images in the lists or, with masks, whose values count them all, of the whole folder.
        one_based: pixels count from 1 and the last one is inside, as VOC's do: left and top are lowered by 1.
        on_error: ``fail`` where a box or a file is faulty, or ``skip`` it, counted and named.
        tasks: targets wanted, of ``detect`` and ``segment``.
        seed: which samples are held out.
    Returns:
        ``difficult`` objects have ``crowd`` set: not trained on, ignored by the scores. ``segment`` has ``background``
        as its class 0, and 255 as void.
    Differs: the development kit counts one detection of a difficult object as neither right nor wrong, from the usual
        IoU on; here, as COCO's protocol does with crowds, any number of those that lie in it by half.
    Raises:
        FileNotFoundError: the root is not set or missing.
        ValueError: whatever is wrong with the layout, the annotations or the images; names the file and the value.
    Source: Everingham et al., The Pascal VOC challenge, IJCV 2010; the development kit's documentation.
    """
    path = open_root("voc", root)
    wanted = check_tasks("voc", tasks, ("detect", "segment"))
    folder = _Folder(path, Problems(path.name, on_error), detect="detect" in wanted, segment="segment" in wanted)
    splits = arrange_splits(folder.samples, train, val, test, seed)
    names = check_names(classes) if classes is not None else folder.found_classes()
    if not names:
        raise ValueError(f"{path.name}: no object in any file of {path / 'Annotations'}; there is nothing to learn")
    samples = [sample for split in splits.values() for sample in split]
    for sample in samples:
        folder.fill(sample, names, one_based)
    skipped = folder.problems.settle()
    if "detect" in wanted and not any(len(sample.targets["detect"].labels) for sample in samples):
        raise ValueError(f"{path.name}: not one of {len(samples)} images has a box; check data.classes and Annotations")
    if "segment" in wanted and not any("segment" in sample.targets for sample in samples):
        raise ValueError(f"{path.name}: not one of {len(samples)} images has a mask in {path / 'SegmentationClass'}")
    table = {"detect": names, "segment": ("background", *names)}
    return check_splits(DataSet(path.name, {task: table[task] for task in wanted}, splits, skipped))


class _Object(NamedTuple):
    name: str
    corners: tuple[float, ...]
    difficult: bool


@dataclass
class _Folder:
    """A VOC folder that has been checked, and what was read of it."""

    root: Path
    problems: Problems
    detect: bool
    segment: bool
    pictures: dict[str, Path] = field(default_factory=dict)
    objects: dict[str, list[_Object]] = field(default_factory=dict)
    """By image."""

    def __post_init__(self) -> None:
        for part in ("JPEGImages", "Annotations", "ImageSets"):
            if not (self.root / part).is_dir():
                inside = [child.parent.name for child in self.root.glob("*/JPEGImages")]
                hint = f"; did you mean data.root={self.root / inside[0]}?" if inside else "; set data.root"
                raise ValueError(f"{self.root} is not a Pascal VOC folder: it has no {part}{hint}")
        files = [file for file in (self.root / "JPEGImages").iterdir() if file.suffix.lower() in EXTENSIONS]
        files.sort(key=lambda file: (file.suffix == ".jpg", file.name))
        self.pictures = {file.stem: file for file in files}  # the .jpg wins over others of its name
        if self.detect and not any((self.root / "Annotations").glob("*.xml")):
            raise ValueError(f"{self.root / 'Annotations'} has no annotations at all; expected <image>.xml files")

    def samples(self, split: str) -> list[Sample]:
        """The images of a list, as far as they are usable; the targets are filled in once the classes are known."""
        found = (self._sample(identity) for identity in self._ids(split))
        return [sample for sample in found if sample is not None]

    def found_classes(self) -> tuple[str, ...]:
        names = {thing.name for things in self.objects.values() for thing in things}
        if self.segment:  # masks hold no names, and their values count the classes of all annotations
            for file in sorted((self.root / "Annotations").glob("*.xml")):
                if file.stem not in self.objects:
                    names |= self._names(file)
        return tuple(sorted(names))

    def _names(self, file: Path) -> set[str]:
        try:
            return {thing.name for thing in _parse(file)[1]}
        except ValueError as error:
            if str(error) not in self.problems.found:  # a listed image's annotation has been named already
                self.problems.add(str(error))
            return set()

    def fill(self, sample: Sample, names: tuple[str, ...], one_based: bool) -> None:
        """Add the targets."""
        identity = Path(sample.image).stem
        if self.detect:
            sample.targets["detect"] = self._boxes(sample, identity, names, one_based)
        mask = self.root / "SegmentationClass" / f"{identity}.png"
        if self.segment and (not self.detect or mask.exists()):
            sample.targets["segment"] = images.MaskFile(str(mask), len(names) + 1)

    def _ids(self, split: str) -> list[str]:
        lists = self.root / "ImageSets" / ("Main" if self.detect else "Segmentation")
        file = lists / f"{split}.txt"
        if not file.is_file() or file.parent != lists:
            every = {entry.stem for entry in lists.glob("*.txt")}
            known = sorted(stem for stem in every if stem.rpartition("_")[2] not in every - {stem})  # not cat_train
            raise ValueError(f"{self.root.name}: no split {split!r} in {lists}{did_you_mean(split, known)}")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 at byte {error.start}; save it so") from error
        names = [line.strip() for line in lines if line.strip()]
        # A second column, as in cat_train.txt, says whether the class is there: the annotations say so, too.
        ids = [name if name in self.pictures else re.sub(r"\s+(-1|0|1)$", "", name) for name in names]
        if not ids:
            raise ValueError(f"{file} is empty; expected one image name a line, or name another split")
        return list(dict.fromkeys(ids))

    def _sample(self, identity: str) -> Sample | None:
        picture = self.pictures.get(identity)
        file = self.root / "Annotations" / f"{identity}.xml"
        try:
            if picture is None:
                raise ValueError(f"{identity} stands in a list of ImageSets, but JPEGImages has no image of that name")
            size = images.size(str(picture))
            if self.detect:
                if not file.exists():
                    raise ValueError(
                        f"{identity} stands in a list of ImageSets, but Annotations/{file.name} is missing"
                    )
                stated, self.objects[identity] = _parse(file)
                _check_size(file.name, stated, picture.name, size)
            if self.segment:
                self._check_mask(identity, size)
        except ValueError as error:
            self.problems.add(str(error))
            self.objects.pop(identity, None)
            return None
        return Sample(str(picture), size)

    def _check_mask(self, identity: str, size: tuple[int, int]) -> None:
        mask = self.root / "SegmentationClass" / f"{identity}.png"
        if not mask.exists():
            if self.detect:
                return  # most images of VOC have boxes only
            raise ValueError(f"{identity} stands in a list of ImageSets, but SegmentationClass/{mask.name} is missing")
        _check_size(f"mask {mask.name}", images.size(str(mask)), identity, size)

    def _boxes(self, sample: Sample, identity: str, names: tuple[str, ...], one_based: bool) -> Boxes:
        assert sample.size is not None
        boxes: list[tuple[float, ...]] = []
        labels: list[int] = []
        crowd: list[bool] = []
        for thing in self.objects[identity]:
            try:
                box = _check_box(thing.corners, sample.size, one_based)
                if thing.name not in names:
                    raise ValueError(f"class {thing.name!r}, not in data.classes{did_you_mean(thing.name, names)}")
            except ValueError as error:
                self.problems.add(f"{identity}.xml has {error}")
                continue
            boxes.append(box)
            labels.append(names.index(thing.name))
            crowd.append(thing.difficult)
        xyxy = np.array(boxes, np.float32).reshape(-1, 4)
        area = (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1])
        return Boxes(xyxy, np.array(labels, np.int64), np.array(crowd, bool), area)


def _parse(file: Path) -> tuple[tuple[int, int] | None, list[_Object]]:
    """(height, width) if stated, and the objects of an annotation."""
    content = file.read_bytes()
    # VOC files declare no document type; one is where entity bombs live. A null byte: UTF-16, which would hide it.
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content or b"\0" in content:
        raise ValueError(
            f"{file.name} declares a document type or entities, or is not UTF-8; expected a plain VOC file"
        )
    try:
        tree = ElementTree.fromstring(content)
        width, height = (int(float(tree.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
        things = [_parse_object(element) for element in tree.findall("object")]
    except (ElementTree.ParseError, ValueError, OverflowError, LookupError) as error:
        raise ValueError(f"{file.name} is not a readable annotation: {error}") from error
    return (height, width) if height and width else None, things


def _parse_object(element: ElementTree.Element) -> _Object:
    texts = [element.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    name = (element.findtext("name") or "").strip()
    if not name or None in texts:
        raise ValueError(f"an <object> has no <name>, or its <bndbox> lacks one of {', '.join(_CORNERS)}")
    difficult = (element.findtext("difficult") or "0").strip()
    return _Object(name, tuple(float(text or "") for text in texts), difficult not in ("0", ""))


def _check_size(what: str, stated: tuple[int, int] | None, picture: str, size: tuple[int, int]) -> None:
    if stated is None or stated == size:
        return
    turned = " (its EXIF tag turns it: annotate the upright picture)" if stated == size[::-1] else ""
    raise ValueError(
        f"{what} is of {stated[1]} x {stated[0]} pixels, but image {picture} has {size[1]} x {size[0]}{turned}"
    )


def _check_box(corners: tuple[float, ...], size: tuple[int, int], one_based: bool) -> tuple[float, ...]:
    """The box from 0, its right and bottom edge outside the last pixel; overhangs below a pixel are rounding."""
    shown = "box (" + ", ".join(f"{value:g}" for value in corners) + ")"
    if not all(map(math.isfinite, corners)):
        raise ValueError(f"{shown}, which is not finite")
    left, top, right, bottom = corners
    if right <= left or bottom <= top:
        sides = {"width": right - left, "height": bottom - top}
        wrong = [f"{'negative' if length < 0 else 'zero'} {side}" for side, length in sides.items() if length <= 0]
        raise ValueError(f"{shown} of {'zero area' if right == left and bottom == top else ' and '.join(wrong)}")
    left, top = left - one_based, top - one_based
    height, width = size
    if min(left, top) <= -1 or right >= width + 1 or bottom >= height + 1:
        from_zero = one_based and min(corners[:2]) == 0 and right <= width and bottom <= height
        hint = "; if the set counts pixels from 0, set data.one_based=false" if from_zero else ""
        raise ValueError(f"{shown} outside the image of {width} x {height} pixels{hint}")
    return max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
