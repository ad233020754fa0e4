"""Scores of a split: one class a task, fed batch by batch, in the pixels of the original images.

All three have the same face: ``update`` per batch, ``compute`` once, then ``per_class``. What is kept are whole numbers
or the detections themselves, so the result does not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks.data import IGNORE
from tasks.training.average_precision import Detections, Objects, evaluate

if TYPE_CHECKING:
    from tasks.data import Boxes

COCO_KEYS = (
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
)


def mean_or_nan(values: np.ndarray) -> float:
    """Mean of what is not nan; nan, without numpy's warning, where nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


class TopK:
    """Share of the images whose class is the best score (``top1``) or among the best five (``top5``).

    Equal scores: the lower class index goes first, on every machine.
    """

    main: ClassVar[str] = "top1"

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.reset()

    def reset(self) -> None:
        self.confusion = np.zeros((len(self.classes), len(self.classes)), np.int64)
        """[truth, predicted] images."""
        self.in_top5 = 0

    def update(self, predictions: Tensor, truths: Sequence[int]) -> None:
        """Count one batch.

        Args:
            predictions: [B, K] scores, finite.
            truths: B class indices.
        Raises:
            ValueError: another number of truths or classes, a label outside the class list, a score that is not finite.
        """
        k = len(self.classes)
        if predictions.shape != (len(truths), k):
            raise ValueError(f"scores of shape {tuple(predictions.shape)} for {len(truths)} labels of {k} classes")
        scores = predictions.detach().float().cpu().numpy()
        truth = np.asarray(truths, np.int64)
        if not np.isfinite(scores).all():
            raise ValueError("a class score is nan or infinite; the training has diverged: lower optimizer.lr")
        if truth.size and not 0 <= truth.min() <= truth.max() < k:
            raise ValueError(f"labels from {truth.min()} to {truth.max()}, but there are {k} classes")
        of_truth = np.take_along_axis(scores, truth[:, None], 1)  # [B, 1]
        tied_before = (scores == of_truth) & (np.arange(k) < truth[:, None])
        rank = ((scores > of_truth) | tied_before).sum(1)
        self.in_top5 += int((rank < 5).sum())
        np.add.at(self.confusion, (truth, scores.argmax(1)), 1)

    def compute(self) -> dict[str, float]:
        """``top1`` and, with more than five classes, ``top5``; in [0, 1]; nan before the first image."""
        total = int(self.confusion.sum())
        if not total:
            return {"top1": float("nan")}
        scores = {"top1": int(self.confusion.trace()) / total}
        if len(self.classes) > 5:
            scores["top5"] = self.in_top5 / total
        return scores

    def per_class(self) -> dict[str, float]:
        """Recall of each class; nan for a class without an image."""
        return by_name(self.classes, ratios(self.confusion.diagonal(), self.confusion.sum(1)))


class MeanIoU:
    """Intersection over union per class from one confusion matrix summed over all pixels, never averaged per image.

    A class that is neither in the truth nor predicted is left out of the mean.
    """

    main: ClassVar[str] = "miou"

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.reset()

    def reset(self) -> None:
        self.confusion = np.zeros((len(self.classes), len(self.classes)), np.int64)
        """[truth, predicted] pixels, without the ignored ones."""

    def update(self, predictions: Sequence[Tensor], truths: Sequence[np.ndarray]) -> None:
        """Count one batch.

        Args:
            predictions: an image's class map each, [H, W] integer.
            truths: an image's mask each, [H, W] uint8, 255 = ignored.
        Raises:
            ValueError: sizes differ, or a mask holds a value outside the class list.
        """
        k = len(self.classes)
        for prediction, truth in zip(predictions, truths, strict=True):
            if tuple(prediction.shape) != truth.shape:
                raise ValueError(f"a class map of {tuple(prediction.shape)} for a mask of {truth.shape}")
            guess = prediction.cpu().numpy()
            if guess.size and not 0 <= guess.min() <= guess.max() < k:
                raise ValueError(f"predicted classes {guess.min()} to {guess.max()}, but there are {k} classes")
            index = truth.ravel().astype(np.int64) * k + guess.ravel()
            counts = np.bincount(index, minlength=(IGNORE + 1) * k).reshape(IGNORE + 1, k)
            strange = counts[k:IGNORE].sum(1)
            if strange.any():
                found = ", ".join(f"{k + i} ({strange[i]} pixels)" for i in np.flatnonzero(strange))
                raise ValueError(
                    f"a mask holds the value {found}, but the classes are 0 to {k - 1} and {IGNORE} is ignored; "
                    "correct the masks, or the data set's class list"
                )
            self.confusion += counts[:k]

    def compute(self) -> dict[str, float]:
        """``miou``, ``mean_accuracy`` (mean recall of the classes in the truth), ``pixel_accuracy``; in [0, 1]."""
        total = int(self.confusion.sum())
        return {
            "miou": mean_or_nan(self._ious()),
            "mean_accuracy": mean_or_nan(ratios(self.confusion.diagonal(), self.confusion.sum(1))),
            "pixel_accuracy": int(self.confusion.trace()) / total if total else float("nan"),
        }

    def per_class(self) -> dict[str, float]:
        """IoU of each class; nan for one that is neither in the truth nor predicted."""
        return by_name(self.classes, self._ious())

    def _ious(self) -> np.ndarray:
        hit = self.confusion.diagonal()
        return ratios(hit, self.confusion.sum(0) + self.confusion.sum(1) - hit)


def ratios(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """[K] float64, part / whole; nan where whole is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def by_name(classes: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Class name -> its value."""
    return dict(zip(classes, values.tolist(), strict=True))


class CocoBoxes:
    """COCO's twelve numbers for boxes, equal to pycocotools'.

    Detections with equal scores in different images are ranked in the order of the updates, as pycocotools ranks them
    in the order of the image ids.

    Differs: nan instead of -1 where there is no object to find.
    """

    main: ClassVar[str] = "map"

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.reset()

    def reset(self) -> None:
        self.images = 0
        self.found: list[Detections] = []
        self.real: list[Objects] = []
        self.ap = np.full(len(self.classes), np.nan)

    def update(self, predictions: Sequence[dict[str, Tensor]], truths: Sequence[Boxes]) -> None:
        """Keep one batch.

        Args:
            predictions: an image's {"boxes" [n, 4] xyxy px of the original image, "scores" [n], "labels" [n]} each.
            truths: an image's objects each.
        Raises:
            ValueError: another number of images, a label outside the class list, a box or score that is not finite.
        """
        if len(predictions) != len(truths):
            raise ValueError(f"detections of {len(predictions)} images for {len(truths)} truths")
        if not predictions:
            return
        numbers = np.arange(self.images, self.images + len(predictions))
        boxes, scores = (stack(predictions, key) for key in ("boxes", "scores"))
        found = Detections(
            image=np.repeat(numbers, [len(p["labels"]) for p in predictions]),
            labels=stack(predictions, "labels").astype(np.int64),
            boxes=boxes,
            scores=scores,
        )
        real = Objects(
            image=np.repeat(numbers, [len(truth.labels) for truth in truths]),
            labels=np.concatenate([truth.labels for truth in truths]).astype(np.int64),
            boxes=np.concatenate([truth.xyxy for truth in truths]).astype(np.float64),
            crowd=np.concatenate([truth.crowd for truth in truths]).astype(bool),
            area=np.concatenate([truth.area for truth in truths]).astype(np.float64),
        )
        for labels in (found.labels, real.labels):
            if labels.size and not 0 <= labels.min() <= labels.max() < len(self.classes):
                raise ValueError(f"labels {labels.min()} to {labels.max()}, but there are {len(self.classes)} classes")
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError("a detection's box or score is nan or infinite; training has diverged: lower optimizer.lr")
        self.found.append(found)
        self.real.append(real)
        self.images += len(predictions)

    def compute(self) -> dict[str, float]:
        """The twelve numbers, in [0, 1].

        ``map`` (IoU 0.50 to 0.95) ``map_50 map_75 map_small map_medium map_large``; ``mar_1 mar_10 mar_100`` (recall
        with so many detections of a class in an image) ``mar_small mar_medium mar_large``. nan where there is no such
        object.
        """
        if not self.images:
            return dict.fromkeys(COCO_KEYS, float("nan"))
        found = Detections(*(np.concatenate(part) for part in zip(*self.found, strict=True)))
        real = Objects(*(np.concatenate(part) for part in zip(*self.real, strict=True)))
        scores = evaluate(found, real, len(self.classes), self.images)
        self.ap = np.array([mean_or_nan(scores.precision[:, :, k, 0]) for k in range(len(self.classes))])
        precision = scores.precision  # [T, R, K, A]
        parts = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]  # IoU 0.50 to 0.95, 0.50, 0.75
        parts += [precision[..., area] for area in (1, 2, 3)]
        parts += [scores.recall_at[..., limit] for limit in (0, 1, 2)]
        parts += [scores.recall[..., area] for area in (1, 2, 3)]
        return {key: mean_or_nan(part) for key, part in zip(COCO_KEYS, parts, strict=True)}

    def per_class(self) -> dict[str, float]:
        """Average precision (IoU 0.50 to 0.95) of each class as of the last ``compute``; nan without an object."""
        return by_name(self.classes, self.ap)


def stack(predictions: Sequence[dict[str, Tensor]], key: str) -> np.ndarray:
    """One entry of all predictions in one array."""
    part = torch.cat([p[key].detach() for p in predictions]).cpu()
    return (part.double() if part.is_floating_point() else part).numpy()


METRICS: dict[str, type[TopK] | type[CocoBoxes] | type[MeanIoU]] = {
    "classify": TopK,
    "detect": CocoBoxes,
    "segment": MeanIoU,
}
"""By ``head.task``."""
