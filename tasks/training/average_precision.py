"""COCO's average precision and recall for boxes, on arrays: equal to pycocotools' and far faster.

pycocotools goes through images, classes, area ranges and detections one at a time. Here the r-th best detections of all
images and classes are matched at once, for all IoU thresholds and area ranges; only r is a loop.

Source: pycocotools 2.0 ``COCOeval`` (evaluateImg, accumulate, summarize) and ``maskApi.c`` (bbIou).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU from which a detection counts as found."""
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
"""px^2, both ends included: all, small, medium, large."""
MAX_DETECTIONS = (1, 10, 100)
"""Of one class in one image, best scores first."""
IMAGES_AT_ONCE = 512  # bounds the memory of the detection-object pairs


class Detections(NamedTuple):
    image: np.ndarray
    """[n] int64: number of the image, ascending."""
    labels: np.ndarray
    """[n] int64."""
    boxes: np.ndarray
    """[n, 4] float64 xyxy."""
    scores: np.ndarray
    """[n] float64."""


class Objects(NamedTuple):
    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    """[n] bool: matches any number of detections, and none of them counts."""
    area: np.ndarray
    """[n] float64 px^2."""


class Scores(NamedTuple):
    """With T thresholds, R recalls, K classes, A areas, M limits of detections; nan for a class without an object."""

    precision: np.ndarray
    """[T, R, K, A] at 100 detections."""
    recall: np.ndarray
    """[T, K, A] at 100 detections."""
    recall_at: np.ndarray
    """[T, K, M] for all areas."""


def evaluate(found: Detections, real: Objects, classes: int, images: int) -> Scores:
    """Match detections with objects and sum up by class.

    Args:
        found: all detections of the split.
        real: all objects of the split.
        classes: how many there are.
        images: how many there are; the image numbers lie below.
    """
    group = found.image * classes + found.labels  # one for each image and class
    order, rank = best_first(group, found.scores)
    group, found = group[order], Detections(*(part[order] for part in found))
    real_group = real.image * classes + real.labels
    order = np.argsort(real_group, kind="stable")
    real_group, real = real_group[order], Objects(*(part[order] for part in real))
    area = real.area[:, None]
    void = real.crowd[:, None] | (area < AREAS[:, 0]) | (area > AREAS[:, 1])  # [G, A]: not to be found

    shape = (len(group), len(THRESHOLDS), len(AREAS))
    hit, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    for first in range(0, images, IMAGES_AT_ONCE):
        ends = np.array([first, first + IMAGES_AT_ONCE]) * classes
        d, g = (slice(*np.searchsorted(keys, ends)) for keys in (group, real_group))
        pairs = overlaps(group[d], found.boxes[d], real_group[g], real.boxes[g], real.crowd[g])
        match(pairs, rank[d], real.crowd[g], void[g], hit[d], ignored[d])
    width_height = found.boxes[:, 2:] - found.boxes[:, :2]
    size = width_height.prod(1)[:, None]
    ignored |= ~hit & ((size < AREAS[:, 0]) | (size > AREAS[:, 1]))[:, None]
    to_find = np.zeros((classes, len(AREAS)), np.int64)
    np.add.at(to_find, real.labels, ~void)
    return accumulate(found, rank, hit & ~ignored, ~hit & ~ignored, to_find)


def best_first(group: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order by group and falling score, without what is beyond the 100 best of its group.

    Returns:
        order: [n] int64, indices of what stays.
        rank: [n] int64, place in the group, from 0.
    """
    order = np.lexsort((-scores, group))
    ordered = group[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    stays = rank < MAX_DETECTIONS[-1]
    return order[stays], rank[stays]


def overlaps(
    group: np.ndarray, boxes: np.ndarray, real_group: np.ndarray, real_boxes: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of one image and class whose IoU reaches the lowest threshold.

    Returns:
        detection, object: [P] int64 each, ordered.
        iou: [P] float64; for a crowd the share of the detection that lies in it.
    """
    first = np.searchsorted(real_group, group)
    count = np.searchsorted(real_group, group, "right") - first
    detection = np.repeat(np.arange(len(group)), count)
    start = np.cumsum(count) - count
    thing = np.arange(len(detection)) - np.repeat(start - first, count)
    # As pycocotools: x + width, not x2, so that an IoU of exactly 0.5 falls on the same side.
    size, real_size = boxes[:, 2:] - boxes[:, :2], real_boxes[:, 2:] - real_boxes[:, :2]
    low = np.maximum(boxes[detection, :2], real_boxes[thing, :2])
    high = np.minimum((boxes[:, :2] + size)[detection], (real_boxes[:, :2] + real_size)[thing])
    shared = np.clip(high - low, 0, None).prod(1)
    area, real_area = size.prod(1)[detection], real_size.prod(1)[thing]
    union = np.where(crowd[thing], area, area + real_area - shared)
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
    near = iou >= THRESHOLDS[0]
    return detection[near], thing[near], iou[near]


def match(
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
    rank: np.ndarray,
    crowd: np.ndarray,
    void: np.ndarray,
    hit: np.ndarray,
    ignored: np.ndarray,
) -> None:
    """Give each detection the free object it overlaps most, the best score first; writes ``hit`` and ``ignored``.

    Objects to be found go before void ones; of equal overlaps the last object wins; a crowd is never used up.

    Args:
        pairs: what ``overlaps`` returns.
        rank: [D] place of each detection in its image and class.
        crowd: [G] bool.
        void: [G, A] bool.
        hit: [D, T, A] bool, false; true where the detection has an object.
        ignored: [D, T, A] bool, false; true where that object is void.
    """
    detection, thing, iou = pairs
    if not len(detection):
        return
    new = np.flatnonzero(np.diff(detection, prepend=-1))  # where the pairs of a detection begin
    width = np.diff(new, append=len(detection))
    close = detection[new]
    place = new[:, None] + np.arange(width.max())
    real = place < (new + width)[:, None]  # [N, W]: a pair, not padding
    place = np.minimum(place, len(detection) - 1)
    things, ious = thing[place], np.where(real, iou[place], -1.0)
    taken = np.zeros((len(crowd), len(THRESHOLDS), len(AREAS)), bool)
    by_rank = np.argsort(rank[close], kind="stable")
    # Two detections of one rank are of different images or classes: they never want the same object.
    for some in np.split(by_rank, np.flatnonzero(np.diff(rank[close][by_rank])) + 1):
        candidates, overlap = things[some], ious[some]  # [n, W]
        free = ~taken[candidates] & (overlap[..., None] >= THRESHOLDS)[..., None]  # [n, W, T, A]
        worth = (
            overlap[:, :, None, None] - 2 * void[candidates][:, :, None]
        )  # a void object is worth less than any other
        worth = np.where(free, worth, -np.inf)
        best = worth.shape[1] - 1 - worth[:, ::-1].argmax(1)  # [n, T, A]: the last of the best
        ok = np.take_along_axis(free, best[:, None], 1)[:, 0]
        chosen = np.take_along_axis(candidates[:, :, None, None], best[:, None], 1)[:, 0]  # [n, T, A]
        n, t, a = np.nonzero(ok)
        won = chosen[n, t, a]
        hit[close[some][n], t, a] = True
        ignored[close[some][n], t, a] = void[won, a]
        taken[won, t, a] = ~crowd[won]


def accumulate(
    found: Detections, rank: np.ndarray, right: np.ndarray, wrong: np.ndarray, to_find: np.ndarray
) -> Scores:
    """Precision over recall for each class.

    Args:
        found: the detections that count, by image.
        rank: [D] place in its image and class.
        right: [D, T, A] bool.
        wrong: [D, T, A] bool.
        to_find: [K, A] objects.
    """
    classes, t, a = len(to_find), len(THRESHOLDS), len(AREAS)
    shapes = (t, len(RECALLS), classes, a), (t, classes, a), (t, classes, len(MAX_DETECTIONS))
    scores = Scores(*(np.full(shape, np.nan) for shape in shapes))
    goals = np.where(to_find, to_find, np.nan)  # nan makes what is divided by it nan
    order = np.lexsort((-found.scores, found.labels))
    ends = np.searchsorted(found.labels[order], np.arange(classes + 1))
    for label in np.flatnonzero(to_find.any(1)):
        mine, goal = order[ends[label] : ends[label + 1]], goals[label]
        hits, false = right[mine], wrong[mine]  # [n, T, A]
        yes, no = (np.cumsum(part.reshape(-1, t * a).T, 1, dtype=float) for part in (hits, false))  # [T * A, n]
        precision = np.maximum.accumulate((yes / (yes + no + np.spacing(1)))[:, ::-1], 1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))  # 0 beyond the recall reached
        at = np.stack([np.searchsorted(row, RECALLS) for row in yes / np.tile(goal, t)[:, None]])
        curve = np.take_along_axis(precision, at, 1).reshape(t, a, -1).transpose(0, 2, 1)
        scores.precision[:, :, label] = np.where(np.isnan(goal), np.nan, curve)
        scores.recall[:, label] = hits.sum(0) / goal
        for i, limit in enumerate(MAX_DETECTIONS):
            scores.recall_at[:, label, i] = hits[rank[mine] < limit, :, 0].sum(0) / goal[0]
    return scores
