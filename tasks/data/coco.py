"""COCO's own layout: boxes and instance masks from JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tasks.data import IGNORE, Boxes, DataSet, Problems, Sample, check_splits, images
from tasks.data.arguments import Names, arrange_splits, check_tasks, did_you_mean, open_root


def read(
    root: str | None,
    train: Names,
    val: Names | float | None,
    test: Names | float | None,
    annotations: str,
    folder: str,
    on_error: str,
    tasks: Sequence[str],
    seed: int,
) -> DataSet:
    """Read a data set in COCO's layout; images without an object stay in, as empty ones.

    Sizes are taken from the JSON, not from 118,000 headers; the loader compares them when it decodes.

    Args:
        root: the folder that ``annotations`` and ``folder`` start from.
        train: a split's name, as ``train2017``, or several to join.
        val: likewise, or a share of train to hold out, in (0, 1), or None.
        test: likewise.
        annotations: where a split's JSON lies, ``{split}`` standing for its name.
        folder: where a split's images lie.
        on_error: ``fail`` where an annotation or a file is faulty, or ``skip`` it, counted and named.
        tasks: targets wanted, of ``detect`` and ``segment``.
        seed: which samples are held out.
    Returns:
        Labels count the categories in the order of their ids, without gaps. ``iscrowd`` is kept as ``crowd``.
        ``segment`` has ``background`` as class 0; of overlapping objects the smaller is on top, a crowd is 255.
    Raises:
        FileNotFoundError: the root is not set or missing.
        ValueError: whatever is wrong with the annotations or the images; names the file and the value.
    Source: https://cocodataset.org/#format-data
    """
    path = open_root("coco", root)
    wanted = check_tasks("coco", tasks, ("detect", "segment"))
    problems = Problems(path.name, on_error)
    categories: dict[int, str] = {}

    def load(split: str) -> list[Sample]:
        file = path / annotations.format(split=split)
        table = _Table(file, path / folder.format(split=split), problems, _load_json(file, path, split))
        _merge_categories(categories, table.categories(), file)
        return table.samples(sorted(categories), wanted)

    splits = arrange_splits(load, train, val, test, seed)
    skipped = problems.settle()
    names = tuple(categories[key] for key in sorted(categories))
    classes = {"detect": names, "segment": ("background", *names)}
    return check_splits(DataSet(path.name, {task: classes[task] for task in wanted}, splits, skipped))


@dataclass(frozen=True, slots=True)
class InstanceMask:
    """The objects of one image as a semantic mask, drawn when asked for."""

    file: str
    image: str
    size: tuple[int, int]
    parts: list[tuple[int, Any]] = field(repr=False)
    """(mask value, COCO segmentation), from back to front."""

    def load(self) -> np.ndarray:
        """[H, W] uint8: 0 = background, 1 + label, ``IGNORE`` in crowds.

        Raises:
            ValueError: a polygon or run-length code that cannot be drawn; names the file and the image.
        """
        mask = np.zeros(self.size, np.uint8)
        try:
            for value, segmentation in self.parts:
                mask[_draw(segmentation, self.size)] = value
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{self.file}: the mask of {self.image} cannot be drawn: {error}; mend it") from error
        return mask


@dataclass
class _Table:
    """One instances_*.json with its image folder; what is faulty goes to ``problems``."""

    file: Path
    folder: Path
    problems: Problems
    content: dict[str, Any]

    def categories(self) -> dict[int, str]:
        entries = self.content["categories"]
        try:
            table = {int(entry["id"]): str(entry["name"]) for entry in entries}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.file}: a category has no id or no name ({error!r}); expected both") from error
        for kind, values in (("id", [int(entry["id"]) for entry in entries]), ("name", list(table.values()))):
            if len(set(values)) < len(values):
                twice = Counter(values).most_common(1)[0][0]
                raise ValueError(f"{self.file} has the category {kind} {twice!r} twice; make it unique")
        return table

    def samples(self, category_ids: list[int], tasks: Sequence[str]) -> list[Sample]:
        pictures = self._pictures()
        if not self.content["annotations"]:
            raise ValueError(f"{self.file} has no annotations at all; there is nothing to learn or to score")
        entries = self._annotations(set(pictures), category_ids)
        rank = {key: position for position, key in enumerate(pictures)}
        owner = np.fromiter((rank[entry["image_id"]] for entry in entries), np.int64, len(entries))
        sizes = np.array([sample.size for sample in pictures.values()], np.float64)[owner]
        boxes, good = self._boxes(entries, sizes)
        order = np.flatnonzero(good)[np.argsort(owner[good], kind="stable")]
        labels = np.searchsorted(category_ids, [entry["category_id"] for entry in entries])
        crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in entries], bool)
        width_height = boxes[:, 2:] - boxes[:, :2]
        area = np.array([_number(entry.get("area")) for entry in entries], np.float32)
        area = np.where(np.isfinite(area) & (area > 0), area, width_height[:, 0] * width_height[:, 1])
        bounds = np.searchsorted(owner[order], np.arange(len(pictures) + 1))
        for sample, start, stop in zip(pictures.values(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            chosen = order[start:stop]
            found = Boxes(boxes[chosen], labels[chosen], crowd[chosen], area[chosen])
            if "detect" in tasks:
                sample.targets["detect"] = found
            if "segment" in tasks:
                sample.targets["segment"] = self._mask(sample, found, [entries[i] for i in chosen])
        return list(pictures.values())

    def _pictures(self) -> dict[int, Sample]:
        """Image id -> sample, in the file's order."""
        if not self.folder.is_dir():
            raise ValueError(f"{self.file} has images of {self.folder}, which does not exist; set data.folder")
        there = {entry.name for entry in os.scandir(self.folder)}
        samples: dict[int, Sample] = {}
        seen: set[tuple[str, Any]] = set()
        for entry in self.content["images"]:
            sample = self._picture(entry, there, seen)
            if sample is not None:
                samples[entry["id"]] = sample
        if not samples:
            self.problems.settle()
            raise ValueError(f"{self.file} lists no usable image of {self.folder}; check data.folder")
        return samples

    def _picture(self, entry: Any, there: set[str], seen: set[tuple[str, Any]]) -> Sample | None:
        try:
            key, name = entry["id"], entry["file_name"]
            if ("name", name) in seen or ("id", key) in seen:
                raise ValueError(f"it has the image {name} or its id {key} twice")
            if ".." in name.split("/") or PurePosixPath(name).is_absolute():
                raise ValueError(f"it has the image {name}, which points outside {self.folder}")
            if name not in there and not ("/" in name and (self.folder / name).is_file()):
                raise ValueError(f"it has the image {name} (id {key}), which is missing in {self.folder}")
            source = f"{self.folder}{os.sep}{name}"
            stated = entry.get("height"), entry.get("width")
            known = all(isinstance(side, int) and side > 0 for side in stated)
            size = stated if known else images.size(source)
        except (KeyError, TypeError, AttributeError):
            self.problems.add(f"{self.file.name} has the image {str(entry)[:200]}; expected id and file_name")
            return None
        except ValueError as error:
            self.problems.add(f"{self.file.name}: {error}")
            return None
        seen |= {("name", name), ("id", key)}
        return Sample(source, size)

    def _annotations(self, image_ids: set[int], category_ids: list[int]) -> list[dict[str, Any]]:
        """Those that can be understood."""
        listed = {entry.get("id") for entry in self.content["images"] if isinstance(entry, dict)}
        known = set(category_ids)
        seen: set[Any] = set()
        good = []
        for entry in self.content["annotations"]:
            if not _well_formed(entry):
                reason = f"{str(entry)[:200]}; expected image_id, category_id and a bbox of four finite numbers"
            elif entry["category_id"] not in known:
                reason = f"of the category_id {entry['category_id']}, which categories does not list"
            elif entry["image_id"] not in image_ids:
                if entry["image_id"] in listed:
                    continue  # its image has been named already
                reason = f"of the image_id {entry['image_id']}, which images does not list"
            elif entry.get("id") in seen:
                reason = "a second time"
            else:
                if "id" in entry:
                    seen.add(entry["id"])
                good.append(entry)
                continue
            self.problems.add(f"{self.file.name} has {_called(entry)} {reason}")
        return good

    def _boxes(self, entries: list[dict[str, Any]], sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n, 4] float32 xyxy inside the images, and [n] which are sound; overhangs below a pixel are rounding."""
        given = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
        corners = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1)
        limits = np.tile(sizes[:, ::-1], 2).reshape(-1, 4)
        empty = (given[:, 2:] <= 0).any(axis=1)
        outside = ((corners <= -1) | (corners >= limits + 1)).any(axis=1)
        inside = np.clip(corners, 0, limits).astype(np.float32)
        empty |= (inside[:, 2:] <= inside[:, :2]).any(axis=1) & ~outside
        for i in np.flatnonzero(empty | outside):
            what = "without area" if empty[i] else f"outside its image of {sizes[i, 1]:.0f} x {sizes[i, 0]:.0f} pixels"
            box = ", ".join(f"{value:g}" for value in given[i])
            image = entries[i]["image_id"]
            self.problems.add(f"{self.file.name} has {_called(entries[i])} (image {image}) with bbox [{box}] {what}")
        return inside, ~(empty | outside)

    def _mask(self, sample: Sample, found: Boxes, entries: list[dict[str, Any]]) -> InstanceMask:
        order = sorted(range(len(entries)), key=lambda i: (not found.crowd[i], -found.area[i]))
        parts = []
        for i in order:
            segmentation = entries[i].get("segmentation")
            if segmentation:
                parts.append((IGNORE if found.crowd[i] else int(found.labels[i]) + 1, segmentation))
            else:
                self.problems.add(f"{self.file.name} has {_called(entries[i])} without a segmentation")
        assert sample.size is not None
        return InstanceMask(str(self.file), sample.image, sample.size, parts)


def _load_json(file: Path, root: Path, split: str) -> dict[str, Any]:
    if not file.is_file():
        known = [str(other.relative_to(root)) for other in sorted([*root.glob("*.json"), *root.glob("*/*.json")])]
        wanted = str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
        raise ValueError(f"{root.name}: split {split!r} has no {wanted} in {root}{did_you_mean(wanted, known)}")
    try:
        content = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is not readable JSON: {error.msg} in line {error.lineno}, column {error.colno} "
            f"(character {error.pos}); restore it"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}; restore it") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file} has no list {key!r}; expected COCO instances (images, annotations, categories)")
    return content


def _merge_categories(known: dict[int, str], new: dict[int, str], file: Path) -> None:
    if known and known != new:
        odd = sorted(set(known.items()) ^ set(new.items()))[0]
        raise ValueError(f"{file} has other categories than the split before it, as {odd}; make them equal")
    if not new:
        raise ValueError(f"{file} has no categories; expected a list of id and name")
    known.update(new)


def _well_formed(entry: Any) -> bool:
    try:
        x, y, width, height = entry["bbox"]
        hash((entry["image_id"], entry["category_id"], entry.get("id")))
        return abs(x) + abs(y) + abs(width) + abs(height) < 1e9  # false for NaN, too
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _called(entry: Any) -> str:
    return f"annotation {entry['id']}" if isinstance(entry, dict) and "id" in entry else "an annotation"


def _draw(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """[H, W] bool, of polygons or of a run-length code, compressed or not."""
    from pycocotools import mask as coco_mask  # only who asks for masks needs it

    height, width = size
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(np.asarray(polygon, np.float64)).all():
                raise ValueError(f"a polygon of {len(polygon)} numbers; expected x, y of at least three corners")
        code = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    else:
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"a run-length code for height, width {segmentation['size']}; expected {list(size)}")
        code = segmentation
        if isinstance(code["counts"], list):
            if sum(code["counts"]) != height * width:
                raise ValueError(f"run lengths that add up to {sum(code['counts'])}; expected {height * width}")
            code = coco_mask.frPyObjects(code, height, width)
    return coco_mask.decode(code).astype(bool)
