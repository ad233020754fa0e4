"""Both sides of the COCO rows: drawn objects and detections, scored by us and by the peers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from tasks.data import Boxes
from tasks.deploy.peer_worker import Work
from tasks.training.metrics import CocoBoxes

CLASSES, OBJECTS, DETECTIONS = 80, 7, 100


def drawn(images: int) -> tuple[list[Boxes], list[dict[str, torch.Tensor]]]:
    """Objects of images, and 100 detections for each: half near an object, half anywhere."""
    random = np.random.default_rng(0)
    truths, found = [], []
    for _ in range(images):
        count = int(random.integers(1, 2 * OBJECTS))
        size = np.exp(random.uniform(np.log(8), np.log(300), (count, 2)))
        corner = random.uniform(0, 1, (count, 2)) * (640 - size)
        boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
        labels = random.integers(0, CLASSES, count)
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        truths.append(Boxes(boxes, labels, random.random(count) < 0.01, area))
        which = random.integers(0, count, DETECTIONS)
        near = boxes[which] + random.normal(0, 6, (DETECTIONS, 4))
        far_size = random.uniform(8, 200, (DETECTIONS, 2))
        far_corner = random.uniform(0, 440, (DETECTIONS, 2))
        is_near = random.random(DETECTIONS) < 0.5
        guess = np.where(is_near[:, None], near, np.concatenate([far_corner, far_corner + far_size], 1))
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        named = np.where(random.random(DETECTIONS) < 0.7, labels[which], random.integers(0, CLASSES, DETECTIONS))
        scores = np.sort(random.random(DETECTIONS))[::-1].copy()
        found.append(
            {
                "boxes": torch.from_numpy(guess.astype(np.float32)),
                "scores": torch.from_numpy(scores.astype(np.float32)),
                "labels": torch.from_numpy(named),
            }
        )
    return truths, found


def score(asked: Mapping[str, Any], ours: bool) -> Work:
    """The twelve numbers, from detections as a head gives them, and from COCO's dicts for the peer."""
    truths, found = drawn(asked["images"])
    if ours:
        return once(lambda: our_numbers(truths, found), asked["images"])
    if asked["row"] == "coco_faster":
        try:
            import faster_coco_eval as faster
        except ImportError as error:
            raise ValueError("faster-coco-eval is not installed: pip install faster-coco-eval") from error
        return once(lambda: their_numbers(faster.COCO, faster.COCOeval_faster, truths, found), asked["images"])
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return once(lambda: their_numbers(COCO, COCOeval, truths, found), asked["images"])


def once(numbers: Callable[[], list[float]], images: int) -> Work:
    """What a timed call gives is compared."""
    return Work(numbers, images, "", f"{images} images, {DETECTIONS} detections each, {CLASSES} classes", late=True)


def our_numbers(truths: list[Boxes], found: list[dict[str, torch.Tensor]]) -> list[float]:
    """Fed in batches of 16, as a test split is."""
    metric = CocoBoxes([str(i) for i in range(CLASSES)])
    for first in range(0, len(truths), 16):
        metric.update(found[first : first + 16], truths[first : first + 16])
    return list(metric.compute().values())


def their_numbers(coco: Any, evaluation: Any, truths: list[Boxes], found: list[dict[str, torch.Tensor]]) -> list[float]:
    """Loading included: their dicts are made from the same tensors."""
    with contextlib.redirect_stdout(io.StringIO()):
        real = coco()
        real.dataset = as_dataset(truths)
        real.createIndex()
        evaluated = evaluation(real, real.loadRes(as_results(found)), "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return [float(value) for value in evaluated.stats[:12]]


def as_dataset(truths: list[Boxes]) -> dict[str, Any]:
    """COCO's JSON as a dict."""
    annotations: list[dict[str, Any]] = []
    for image, truth in enumerate(truths, 1):
        for box, label, crowd, area in zip(truth.xyxy, truth.labels, truth.crowd, truth.area, strict=True):
            left, top, right, bottom = (float(side) for side in box)
            entry = {"bbox": [left, top, right - left, bottom - top], "category_id": int(label) + 1}
            entry |= {"image_id": image, "iscrowd": int(crowd), "area": float(area)}
            annotations.append(entry | {"id": len(annotations) + 1})
    return {
        "info": {},
        "images": [{"id": image + 1, "width": 640, "height": 640} for image in range(len(truths))],
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": str(label)} for label in range(CLASSES)],
    }


def as_results(found: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """COCO's results as dicts."""
    results = []
    for image, one in enumerate(found, 1):
        sides = one["boxes"].double()
        boxes = torch.cat((sides[:, :2], sides[:, 2:] - sides[:, :2]), dim=1).tolist()
        for box, value, label in zip(boxes, one["scores"].tolist(), one["labels"].tolist(), strict=True):
            results.append({"image_id": image, "category_id": label + 1, "bbox": box, "score": value})
    return results


WORKS = {"coco": score, "coco_faster": score}
