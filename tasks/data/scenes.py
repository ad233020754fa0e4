"""The data set that comes with the suite: scenes drawn from one seed, for all tasks at once, with no download.

Drawn once, written as JPEG, COCO JSON and PNG masks, and from then on read like any other data set.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from backbones import cache_folder
from tasks.data import SPLITS, DataSet, Sample, coco
from tasks.data.arguments import check_tasks, expanded
from tasks.data.drawing import VERSION, draw_scene
from tasks.data.images import MaskFile
from tasks.data.shapes import SHAPES

_CHUNK = 25
_QUALITY = 90
_STALE_SECONDS = 3600


def read(
    root: str | None,
    image_size: int,
    train: int,
    val: int,
    test: int,
    workers: int | None,
    tasks: Sequence[str],
    seed: int,
) -> DataSet:
    """Read the scenes of these arguments, drawing them first where they are not on disk yet.

    Args:
        root: folder of the cache; None takes ``mobilenetv3-bench`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.
        image_size: height and width in pixels, 64 to 1024.
        train: number of scenes.
        val: number of scenes.
        test: number of scenes.
        workers: processes that draw; None takes one for each core. The scenes do not depend on it.
        tasks: targets wanted, of ``classify`` (the class of the largest visible object), ``detect`` and ``segment``.
        seed: which scenes.
    Raises:
        ValueError: an argument out of range.
        OSError: the cache cannot be written; names ``data.root``.
    """
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    wanted = check_tasks("scenes", tasks, ("classify", "detect", "segment"))
    if not 64 <= image_size <= 1024:
        raise ValueError(f"scenes: data.image_size is {image_size}; expected 64 to 1024 pixels")
    if train < 1 or min(val, test) < 0 or max(counts.values()) > 999_999:
        raise ValueError(f"scenes: data.train, val and test are {train}, {val}, {test}; expected 1, 0, 0 or more")
    folder = _cached(cache_folder() if root is None else expanded(root), _Plan(seed, image_size, counts), workers)
    names = [split if counts[split] else None for split in SPLITS]
    data = coco.read(
        str(folder),
        "train",
        names[1],
        names[2],
        "annotations/instances_{split}.json",
        "{split}",
        "fail",
        ["detect"],
        seed,
    )
    for split, samples in data.splits.items():
        data.splits[split] = [_with_targets(sample, wanted) for sample in samples]
    classes = {"classify": tuple(SHAPES), "detect": tuple(SHAPES), "segment": ("background", *SHAPES)}
    return DataSet("scenes", {task: classes[task] for task in wanted}, data.splits, note="synthetic")


class _Plan(NamedTuple):
    seed: int
    image_size: int
    counts: dict[str, int]

    def name(self) -> str:
        text = json.dumps([VERSION, *self], sort_keys=True)
        return f"scenes-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def chunks(self) -> list[tuple[str, int, int]]:
        """(split, first, one behind the last)."""
        return [
            (split, start, min(start + _CHUNK, count))
            for split, count in self.counts.items()
            for start in range(0, count, _CHUNK)
        ]


def _with_targets(sample: Sample, tasks: Sequence[str]) -> Sample:
    boxes = sample.targets["detect"]
    image = Path(sample.image)
    mask = image.parents[1] / "masks" / image.parent.name / f"{image.stem}.png"
    targets = {
        "classify": int(boxes.labels[np.argmax(boxes.area)]),
        "detect": boxes,
        "segment": MaskFile(str(mask), len(SHAPES) + 1),
    }
    return Sample(sample.image, sample.size, {task: targets[task] for task in tasks})


def _cached(root: Path, plan: _Plan, workers: int | None) -> Path:
    """The folder of the plan's scenes. It appears when it is complete, and is drawn anew when it has lost a file."""
    folder = root / plan.name()
    if _complete(folder, plan):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        if folder.is_dir():
            shutil.rmtree(folder)
        partial = Path(tempfile.mkdtemp(prefix=f"{plan.name()}.partial-", dir=root))
        try:
            _write(partial, plan, workers)
            partial.chmod(0o755)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster: its scenes are the same
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OSError(
            f"scenes: cannot write to {root}: {error}; free space, or set data.root=<another folder>"
        ) from error
    return folder


def _complete(folder: Path, plan: _Plan) -> bool:
    """Whether all is there, and no file has been lost since it was drawn."""
    return all(
        (folder / "annotations" / f"instances_{split}.json").is_file()
        and len(list((folder / split).glob("*.jpg"))) >= count
        and len(list((folder / "masks" / split).glob("*.png"))) >= count
        for split, count in plan.counts.items()
    )


def _remove_stale(root: Path) -> None:
    """What killed runs have left. A living one writes all the time."""
    for old in root.glob("scenes-*.partial-*"):
        newest = max((file.stat().st_mtime for file in (old, *old.glob("*"))), default=0.0)
        if time.time() - newest > _STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, plan: _Plan, workers: int | None) -> None:
    for split in plan.counts:
        (folder / split).mkdir()
        (folder / "masks" / split).mkdir(parents=True)
    (folder / "annotations").mkdir()
    total, done, start = sum(plan.counts.values()), 0, time.perf_counter()
    print(f"scenes: drawing {total:,} images once, into {folder.parent / plan.name()}", file=sys.stderr)
    parts: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for chunk, part in _draw_all(folder, plan, workers):
        parts[chunk] = part
        done += chunk[2] - chunk[1]
        if sys.stderr.isatty():
            print(f"\rscenes: {done:,} of {total:,}", end="", file=sys.stderr, flush=True)
    end = "\n" if sys.stderr.isatty() else ""
    print(f"{end}scenes: drawn in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for split in plan.counts:
        _write_json(folder, plan, split, [parts[chunk] for chunk in plan.chunks() if chunk[0] == split])


def _draw_all(
    folder: Path, plan: _Plan, workers: int | None
) -> Iterator[tuple[tuple[str, int, int], list[dict[str, Any]]]]:
    pending = plan.chunks()
    count = min(workers or _cores(), len(pending))
    if count > 1:
        # spawn: a fork of a process in which torch has threads may hang
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=_follow_parent)
        try:
            jobs = {pool.submit(_draw_chunk, folder, plan, chunk): chunk for chunk in pending}
            for job in as_completed(jobs):
                yield jobs[job], job.result()
                pending.remove(jobs[job])
        except BrokenProcessPool:
            pass  # a script without `if __name__ == "__main__"` cannot spawn: this process draws what is left
        finally:
            pool.shutdown(cancel_futures=True)
    for chunk in pending:
        yield chunk, _draw_chunk(folder, plan, chunk)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it does: a pool's workers would outlive a SIGKILL of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _draw_chunk(folder: Path, plan: _Plan, chunk: tuple[str, int, int]) -> list[dict[str, Any]]:
    """Draw and write some scenes; their COCO annotations, without ids."""
    split, first, end = chunk
    entries = []
    for index in range(first, end):
        scene = draw_scene(plan.seed, SPLITS.index(split), index, plan.image_size)
        labels = np.array([0, *(label + 1 for label in scene.labels)], np.uint8)
        Image.fromarray(scene.image).save(folder / split / f"{index:06}.jpg", quality=_QUALITY)
        Image.fromarray(labels[scene.instances]).save(folder / "masks" / split / f"{index:06}.png")
        entries += [_annotation(scene.instances == number, index, labels[number]) for number in range(1, len(labels))]
    return entries


def _annotation(mask: np.ndarray, index: int, category: int) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    left, top = int(columns[0]), int(rows[0])
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        "image_id": index,
        "category_id": int(category),
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode("ascii")},
        "iscrowd": 0,
    }


def _write_json(folder: Path, plan: _Plan, split: str, parts: list[list[dict[str, Any]]]) -> None:
    side = plan.image_size
    content = {
        "info": {"description": "scenes, drawn by mobilenetv3-bench", "version": str(VERSION), "seed": plan.seed},
        "images": [
            {"id": index, "file_name": f"{index:06}.jpg", "height": side, "width": side}
            for index in range(plan.counts[split])
        ],
        "annotations": [{"id": number, **entry} for number, entry in enumerate((e for part in parts for e in part), 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(SHAPES, 1)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
