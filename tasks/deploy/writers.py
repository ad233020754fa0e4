"""What ``predict`` leaves behind: pictures, and the data beside them, written as it comes.

Every file gets its name when it is whole. The lists (JSON, CSV) grow under a temporary name and are closed properly
whatever ends the run, so that what was done is valid.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, TextIO

import numpy as np
from PIL import Image

from heads import Size
from tasks.data.arguments import expanded
from tasks.deploy.frames import Frame
from tasks.deploy.video import Video
from tasks.reporting.drawing import as_array, colour
from tasks.reporting.overlay import PALETTE_BYTES

SKIPPED = "skipped.txt"
VIDEO = "drawn.mp4"
ROOM = 0.15
"""Of a video, for each legend that grows from one line to its four."""
TAIL = 2**20
"""Bytes in which the last rows of a list lie."""

_numbers = itertools.count()


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{os.getpid()}-{next(_numbers)}.partial"  # short: a name may be as long as is allowed
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Growing:
    """A text file that others see once it is whole.

    Args:
        path: of the file.
        start, end: what stands around the rows.
        between: two rows.
    """

    def __init__(self, path: Path, start: str = "", between: str = "", end: str = "") -> None:
        self.path, self.between, self.end = path, between, end
        path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self.begin = len(start.encode())
        self.rows = 0
        self.file: TextIO = self.partial.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self.full: OSError | None = None
        self.file.write(start)

    def write(self, text: str) -> None:
        """Append as it stands; once that has failed the file has a gap, and nothing follows it."""
        try:
            self.file.write(text)
        except OSError as error:
            self.full = error
            raise

    def add(self, row: str) -> None:
        """Append a row."""
        self.write(self.between + row if self.rows else row)
        self.rows += 1

    def close(self, keep: bool) -> None:
        """End the file; without ``keep`` nothing is left of it.

        Raises:
            OSError: it cannot be written to its end, as on a full disk; it holds the rows that fitted.
        """
        full = self.full
        try:
            with self.file:
                self.file.write("" if full else self.end)
        except OSError as error:
            full = error
        if keep:
            try:
                if full:
                    self.cut()
                self.partial.replace(self.path)
            except OSError as error:
                raise OSError(
                    f"{self.path} cannot be written ({full or error}); what there is of it lies in {self.partial}"
                ) from error
        self.partial.unlink(missing_ok=True)
        if keep and full:
            raise OSError(f"{self.path} ends with what fitted ({full}); free space") from full

    def cut(self) -> None:
        """End the file behind its last whole rows, so many that the end fits into the space of what is taken away."""
        between, end = (self.between or "\n").encode(), self.end.encode()
        with self.partial.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size < self.begin:
                raise OSError("not even its beginning fits")
            first = max(self.begin, size - TAIL)
            file.seek(first)
            tail = file.read()
            place = tail.rfind(between, 0, max(0, len(tail) - len(end)))
            kept = self.begin if place < 0 else first + place + (not self.between)  # a line keeps its end
            file.truncate(kept)
            file.seek(kept)
            file.write(end)


class Ids:
    """Ids of images and categories in a COCO file: of a data set's own annotations, else counted from 1.

    Args:
        classes: names by label.
        annotations: a COCO JSON whose ``images`` and ``categories`` have the ids, or None.
    Raises:
        ValueError: no such file, or one that lacks a class.
    """

    def __init__(self, classes: Sequence[str], annotations: str | None) -> None:
        self.categories = {label: label + 1 for label in range(len(classes))}
        self.images: dict[str, int] = {}
        self.given: dict[int, str] = {}
        """Of ``images`` -> the path that it went to."""
        self.count = 0
        if annotations is None:
            return
        try:
            content = json.loads(expanded(annotations).read_text(encoding="utf-8"))
            known = {str(entry["name"]): int(entry["id"]) for entry in content["categories"]}
            self.images = {str(entry["file_name"]): int(entry["id"]) for entry in content["images"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"annotations={annotations} is no COCO file with images and categories ({type(error).__name__}: "
                f"{error}); leave it out to count ids from 1"
            ) from error
        missing = [name for name in classes if name not in known]
        if missing:
            raise ValueError(f"annotations={annotations} has no category {missing[0]!r}, which the model predicts")
        self.categories = {label: known[name] for label, name in enumerate(classes)}
        self.count = max(self.images.values(), default=0)

    def image(self, name: str) -> int:
        """The id of an image, by its path, else by its file name, else the next free number."""
        for key in (name, name.rpartition("/")[2]):
            if key in self.images:
                known = self.images[key]
                if self.given.setdefault(known, name) != name:
                    raise ValueError(
                        f"{name} and {self.given[known]} are both image {known} of annotations=, by the name {key}; "
                        "predict them in runs of their own"
                    )
                return known
        self.count += 1
        return self.count


class Writer(Protocol):
    """Writes one task's predictions."""

    FILES: ClassVar[tuple[str, ...]]
    """All that it leaves in the folder."""

    def save(self, frame: Frame, prediction: Any) -> None:
        """Write the image's own files; called from several threads."""
        ...

    def add(self, frame: Frame, size: Size, prediction: Any) -> None:
        """Append to the lists; called in order."""
        ...

    def close(self, keep: bool) -> list[Path]:
        """End the lists; without ``keep`` none is left. Returns what there is now."""
        ...


class Classes:
    """``classes.csv``: file, then the best classes with their scores."""

    FILES: ClassVar[tuple[str, ...]] = ("classes.csv",)

    def __init__(self, out: Path, classes: Sequence[str], _annotations: str | None) -> None:
        self.classes, self.best = classes, min(5, len(classes))
        self.list = Growing(out / self.FILES[0])
        self.rows = csv.writer(self.list)
        self.rows.writerow(["file", *(f"{key}_{i + 1}" for i in range(self.best) for key in ("class", "score"))])

    def save(self, frame: Frame, prediction: Any) -> None:
        """Nothing: all is in the list."""

    def add(self, frame: Frame, size: Size, prediction: Any) -> None:
        """See ``Writer``."""
        found = class_entries(prediction, self.classes, self.best)
        self.rows.writerow([frame.name, *(entry[key] for entry in found for key in ("class", "score"))])

    def close(self, keep: bool) -> list[Path]:
        """See ``Writer``."""
        self.list.close(keep)
        return [self.list.path] if keep else []


class Detections:
    """``detections.json`` as COCO has results, and ``images.json``, which names images and categories by their ids.

    Together they load as ``COCO("images.json").loadRes("detections.json")``.
    """

    FILES: ClassVar[tuple[str, ...]] = ("detections.json", "images.json")

    def __init__(self, out: Path, classes: Sequence[str], annotations: str | None) -> None:
        self.classes, self.ids = classes, Ids(classes, annotations)
        categories = [{"id": self.ids.categories[label], "name": name} for label, name in enumerate(classes)]
        self.list = Growing(out / self.FILES[0], "[\n", ",\n", "\n]\n")
        start = f'{{"categories": {json.dumps(categories)},\n"annotations": [],\n"images": [\n'
        self.images = Growing(out / self.FILES[1], start, ",\n", "\n]}\n")

    def save(self, frame: Frame, prediction: Any) -> None:
        """Nothing: all is in the lists."""

    def add(self, frame: Frame, size: Size, prediction: Any) -> None:
        """See ``Writer``."""
        image = self.ids.image(frame.name)
        entry = {"id": image, "file_name": frame.name, "height": size[0], "width": size[1]}
        self.images.add(json.dumps(entry))
        labels = as_array(prediction["labels"]).tolist()
        for label, found in zip(labels, box_entries(prediction, self.classes), strict=True):
            head = {"image_id": image, "file_name": frame.name, "category_id": self.ids.categories[label]}
            self.list.add(json.dumps(head | found))

    def close(self, keep: bool) -> list[Path]:
        """See ``Writer``."""
        with ExitStack() as last:  # each, whatever becomes of the other
            last.callback(self.images.close, keep)
            last.callback(self.list.close, keep)
        return [self.list.path, self.images.path] if keep else []


class Masks:
    """``masks/<image>.png``: class indices under a palette; ``masks.json``: index, name and colour of the classes."""

    FILES: ClassVar[tuple[str, ...]] = ("masks", "masks.json")

    def __init__(self, out: Path, classes: Sequence[str], _annotations: str | None) -> None:
        self.out, self.classes = out, classes

    def save(self, frame: Frame, prediction: Any) -> None:
        """See ``Writer``."""
        mask = Image.fromarray(as_array(prediction).astype(np.uint8, copy=False))
        mask.putpalette(PALETTE_BYTES)
        put(self.out / self.FILES[0] / f"{frame.stem}.png", lambda path: mask.save(path, "PNG", compress_level=3))

    def add(self, frame: Frame, size: Size, prediction: Any) -> None:
        """Nothing: each image has its own file."""

    def close(self, keep: bool) -> list[Path]:
        """See ``Writer``."""
        if not keep:
            return []
        classes = [{"index": i, "name": name, "colour": colour(i)} for i, name in enumerate(self.classes)]
        text = json.dumps({"classes": classes}, indent=1)
        put(self.out / self.FILES[1], lambda path: path.write_text(text + "\n", encoding="utf-8"))
        return [self.out / name for name in self.FILES]


WRITERS: dict[str, type[Classes] | type[Detections] | type[Masks]] = {
    "classify": Classes,
    "detect": Detections,
    "segment": Masks,
}
"""task -> (out, classes, annotations) -> its writer."""


class Output:
    """All files of one run of ``predict``.

    Args:
        out: the folder; made when it is entered.
        classes: task -> class names.
        annotations: see ``Ids``.
        rate: of the video that drawings become, frames a second; None: each becomes a picture.
    """

    def __init__(
        self,
        out: Path,
        classes: Mapping[str, Sequence[str]],
        annotations: str | None = None,
        rate: Fraction | None = None,
    ) -> None:
        self.out, self.classes, self.annotations = out, classes, annotations
        self.video = None if rate is None else Video(out / VIDEO, rate, ROOM * len(set(classes) - {"classify"}))
        self.writers: dict[str, Writer] = {}
        self.skipped: Growing | None = None
        self.count = 0
        self.drawn = False
        self.files: list[Path] = []

    def __enter__(self) -> Output:
        try:
            for task, names in self.classes.items():
                self.writers[task] = WRITERS[task](self.out, names, self.annotations)
            self.skipped = Growing(self.out / SKIPPED)
        except (ValueError, OSError):
            self.close()
            raise
        return self

    def save(self, frame: Frame, predictions: Mapping[str, Any], drawing: Image.Image | None) -> None:
        """Write an image's own files; in any order."""
        if drawing is not None and self.video is None:
            self.drawn = True
            put(self.out / "drawn" / f"{frame.stem}.jpg", lambda path: drawing.save(path, "JPEG", quality=90))
        for task, prediction in predictions.items():
            self.writers[task].save(frame, prediction)

    def add(self, frame: Frame, size: Size, predictions: Mapping[str, Any], drawing: Image.Image | None = None) -> None:
        """Append an image to the lists, and to the video."""
        if drawing is not None and self.video is not None:
            self.video.add(drawing)
        for task, prediction in predictions.items():
            self.writers[task].add(frame, size, prediction)
        self.count += 1

    def skip(self, reason: str) -> None:
        """Note an image that nothing came of."""
        if self.skipped is not None:
            self.skipped.add(f"{reason}\n")

    def earlier(self) -> list[str]:
        """What another run has left in the folder."""
        of_tasks = [name for writer in WRITERS.values() for name in writer.FILES]
        return [name for name in ("drawn", VIDEO, *of_tasks) if (self.out / name).exists()]

    def pictures(self) -> list[Path]:
        """The folders that images are written to, absolute."""
        return [self.out.resolve() / name for name in ("drawn", "masks")]

    def contents(self) -> str:
        """What there is in the folder: ``drawn, detections.json, images.json``."""
        skipped = [SKIPPED] if self.skipped is not None and self.skipped.rows else []
        drawn = ["drawn"] if self.drawn else [VIDEO] if self.video is not None and self.video.frames else []
        return ", ".join([*drawn, *(path.name for path in self.files), *skipped])

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End video and lists, each whatever becomes of the others; where no image went well, no list of results."""
        with ExitStack() as last:  # calls the last one first
            if self.skipped is not None:
                last.callback(self.close_skipped, self.skipped)
            for writer in reversed(self.writers.values()):
                last.callback(self.close_writer, writer)
            if self.video is not None:
                last.callback(self.video.close)

    def close_writer(self, writer: Writer) -> None:
        """End a task's lists."""
        self.files += writer.close(self.count > 0)

    def close_skipped(self, skipped: Growing) -> None:
        """End the list of what was skipped; one of a run before does not stay beside results that it is not of."""
        skipped.close(skipped.rows > 0)
        if self.count and not skipped.rows:
            skipped.path.unlink(missing_ok=True)


def class_entries(prediction: Any, classes: Sequence[str], best: int = 5) -> list[dict[str, Any]]:
    """The best classes of an image, by falling score."""
    scores = as_array(prediction)
    order = np.argsort(-scores, kind="stable")[:best]
    return [{"class": classes[i], "score": round(float(scores[i]), 5)} for i in order.tolist()]


def box_entries(prediction: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The detections of an image as COCO has them: ``bbox`` is left, top, width, height in px."""
    boxes, scores = as_array(prediction["boxes"]).astype(np.float64), as_array(prediction["scores"])
    boxes = boxes.reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(as_array(prediction["labels"]).tolist(), boxes.round(2).tolist(), scores.tolist(), strict=True)
    return [{"category_name": classes[label], "bbox": box, "score": round(score, 5)} for label, box, score in rows]


def mask_entries(prediction: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The classes in a mask, each with its share of the image and its pixels as COCO's run lengths."""
    from pycocotools import mask as coco_mask

    mask = as_array(prediction)
    counts = np.bincount(mask.reshape(-1), minlength=len(classes))
    found = []
    for label in np.flatnonzero(counts[: len(classes)]).tolist():
        runs = coco_mask.encode(np.asfortranarray(mask == label, dtype=np.uint8))
        runs["counts"] = runs["counts"].decode("ascii")
        found.append({"class": classes[label], "share": round(float(counts[label] / mask.size), 5), "rle": runs})
    return found


ENTRIES: dict[str, Callable[[Any, Sequence[str]], Any]] = {
    "classify": class_entries,
    "detect": box_entries,
    "segment": mask_entries,
}
"""task -> (prediction, classes) -> plain data, for one image as JSON."""
