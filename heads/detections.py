"""From scored boxes to detections: threshold, best of each class, non-maximum suppression, best of each image.

The result is torchvision's ``SSD.postprocess_detections``, box for box. That goes through all classes of all images one
after the other; but an image keeps a few hundred detections only, so ``detections.cpp`` takes the best scores one after
the other until it has them. Where that cannot be compiled, and on a GPU, torch suppresses a pool of the best-scored
candidates of the whole batch at once. An image that is not settled so (fewer survivors than wanted though there are
more candidates, or equal scores) is searched again with the best of each class, as torchvision does.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from backbones.compiled import EXACT, call, library
from heads import check_count, check_range

SOURCE = Path(__file__).with_name("detections.cpp")

POOL = 1024
"""Candidates an image that are looked at first; more than the 1,000 boxes of ``_shift``."""

FEW_CLASSES = 16
"""Up to here the best of each class are found as fast as the best of the image."""

WIDTHS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Groups up to the same of these sizes are compared together."""

PAIRS = 500_000
"""Pairs of boxes compared at once: small enough for the processor's cache."""


class Limits(NamedTuple):
    """What becomes a detection."""

    score_threshold: float
    """Only scores above it count."""
    candidates: int
    """Best boxes of a class of an image that go into the suppression."""
    nms_iou: float
    """Of two boxes of one class that overlap more, the better one stays."""
    detections: int
    """Most detections an image."""

    def checked(self) -> Limits:
        """Itself.

        Raises:
            ValueError: a value out of its range.
        """
        check_range("head.score_threshold", self.score_threshold, 0, 1)
        check_range("head.nms_iou", self.nms_iou, 0, 1)
        check_count("head.candidates", self.candidates)
        check_count("head.detections", self.detections)
        return self


class Found(NamedTuple):
    """The detections of an image, by falling score."""

    boxes: Tensor
    """[n, 4] float32 xyxy."""
    scores: Tensor
    """[n] float32."""
    labels: Tensor
    """[n] int64."""


class Candidates(NamedTuple):
    """What goes into the suppression, by image, class and falling score; all [n]."""

    image: Tensor
    label: Tensor
    anchor: Tensor
    score: Tensor
    rank: Tensor
    """Place in the class of the image, from 0."""
    size: Tensor
    """Candidates in the class of the image."""


@torch.no_grad()
def detect(boxes: Tensor, scores: Tensor, limits: Limits, exact: bool = True) -> list[Found]:
    """The detections of a batch.

    Args:
        boxes: [B, A, 4] float32, xyxy, inside the image.
        scores: [B, A, K] float32 in [0, 1].
        limits: what becomes a detection.
        exact: equal scores in torchvision's order, which takes a second search; else in any. Scores of a network in
            bfloat16 are often equal, and which comes first is chance there.
    Returns:
        One ``Found`` an image, at most ``limits.detections`` long.
    Source: SSD, section 2; boxes, scores, labels and their order as in torchvision's ``SSD.postprocess_detections``,
        whose sorting calls are repeated where scores are equal (their order differs between CPUs).
    """
    if boxes.device.type == "cpu" and library(SOURCE, EXACT)[0] is not None:
        found, settled = _best_first(boxes, scores, limits)
        if not exact:
            return found
    elif scores.shape[2] <= FEW_CLASSES:
        return _search(boxes, *_best_of_class(scores, limits), limits)[0]
    else:
        found, settled = _search(boxes, *_best_of_image(scores, limits), limits)
    rest = (~settled).nonzero().flatten()
    if len(rest):
        again, _ = _search(boxes[rest], *_best_of_class(scores[rest], limits), limits)
        for i, one in zip(rest.tolist(), again, strict=True):
            found[i] = one
    return found


def _best_first(boxes: Tensor, scores: Tensor, limits: Limits) -> tuple[list[Found], Tensor]:
    """By ``detections.cpp``; and [B] bool: whether no equal scores leave the order open."""
    compiled = library(SOURCE, EXACT)[0]
    assert compiled is not None
    batch, anchors, classes = scores.shape
    if scores.stride(2) != 1:
        scores = scores.contiguous()
    room = min(limits.detections, anchors * classes)
    found = Found(torch.empty(batch, room, 4), torch.empty(batch, room), torch.empty(batch, room, dtype=torch.int64))
    counts, settled = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.bool)
    call(
        compiled, "detect", boxes.contiguous(), scores, batch, anchors, classes, *scores.stride()[:2],
        float(limits.score_threshold), limits.candidates, float(limits.nms_iou), limits.detections, room,
        *found, counts, settled, min(batch, torch.get_num_threads()),
    )  # fmt: skip
    return [Found(*(part[i, :n] for part in found)) for i, n in enumerate(counts.tolist())], settled


def _best_of_image(scores: Tensor, limits: Limits) -> tuple[Candidates, Tensor, Tensor]:
    """All candidates down to a floor, the score of the ``POOL``-th best.

    Returns:
        Candidates; [B] bool: whether there are no others; [B] bool: whether equal scores leave their order open.
    """
    batch, count, classes = scores.shape
    best = scores.amax(dim=2)  # [B, A]
    most = max(POOL, 4 * limits.detections)
    # At least as many scores as anchors reach the floor of the anchors' best: a cheap first cut.
    floor = best.topk(min(most, count), dim=1, sorted=False).values.amin(dim=1)  # [B]
    lowest = torch.nextafter(scores.new_tensor(limits.score_threshold), scores.new_tensor(torch.inf))
    floor = floor.maximum(lowest)
    image, anchor = (best >= floor[:, None]).nonzero(as_tuple=True)
    rows = scores[image, anchor]  # [R, K]
    row, label = (rows >= floor[image, None]).nonzero(as_tuple=True)
    image, anchor, score = image[row], anchor[row], rows[row, label]

    order, _ = _by_group(image, score)
    last = _places(image[order], torch.bincount(image, minlength=batch)) == most - 1
    floor = floor.index_copy_(0, image[order[last]], score[order[last]])
    above = score >= floor[image]
    image, anchor, label, score = image[above], anchor[above], label[above], score[above]
    complete = floor <= lowest

    group = image * classes + label
    order, equal = _by_group(group, score)
    unclear = torch.zeros_like(complete).index_fill_(0, image[order[1:][equal]], True)
    sizes = torch.bincount(group, minlength=batch * classes)
    rank = _places(group[order], sizes)
    order, rank = order[rank < limits.candidates], rank[rank < limits.candidates]
    size = sizes.clamp_(max=limits.candidates)[group[order]]
    return Candidates(image[order], label[order], anchor[order], score[order], rank, size), complete, unclear


def _best_of_class(scores: Tensor, limits: Limits) -> tuple[Candidates, Tensor, Tensor]:
    """The best of each class of each image; returns as ``_best_of_image``, complete and in a clear order."""
    batch, count, classes = scores.shape
    columns = scores.transpose(1, 2).reshape(-1, count)  # [B * K, A]
    most = min(limits.candidates, count)
    score, anchor = columns.topk(min(most + 1, count), dim=1)
    above = score > limits.score_threshold
    equal = ((score[:, 1:] == score[:, :-1]) & above[:, 1:]).any(dim=1)
    for i in equal.nonzero().flatten().tolist():  # which of them comes first depends on all that stand in the call
        passed = (columns[i] > limits.score_threshold).nonzero().squeeze(1)
        chosen = columns[i, passed].topk(min(most, len(passed))).indices
        anchor[i, : len(chosen)] = passed[chosen]

    above = above[:, :most]
    group, rank = above.nonzero(as_tuple=True)
    image, label = group.div(classes, rounding_mode="floor"), group % classes
    size = above.sum(dim=1)[group]
    complete = torch.ones(batch, dtype=torch.bool, device=scores.device)
    return Candidates(image, label, anchor[group, rank], score[group, rank], rank, size), complete, ~complete


def _search(
    boxes: Tensor, pool: Candidates, complete: Tensor, unclear: Tensor, limits: Limits
) -> tuple[list[Found], Tensor]:
    """Suppresses and cuts; and [B] bool: whether the image's result is right."""
    batch = len(boxes)
    box = boxes[pool.image, pool.anchor]
    few = torch.bincount(pool.image, minlength=batch) <= (1_000 if box.device.type == "cpu" else 25_000)
    settled = ~unclear & (complete | ~few)
    stays = _suppress(_shift(box, pool, few), pool, limits.nms_iou)

    keep = stays.nonzero().squeeze(1)
    order, equal = _by_group(pool.image[keep], pool.score[keep])
    keep = keep[order]
    left = torch.bincount(pool.image[keep], minlength=batch)
    place = _places(pool.image[keep], left)
    open_ = torch.zeros_like(few).index_fill_(0, pool.image[keep[1:][equal & (place[1:] <= limits.detections)]], True)
    open_ &= ~few  # there torchvision sorts with a stable order, as was done here
    settled &= complete | ((left >= limits.detections) & ~open_)
    for i in (open_ & complete).nonzero().flatten().tolist():
        survivors = (stays & (pool.image == i)).nonzero().squeeze(1)
        keep[pool.image[keep] == i] = survivors[pool.score[survivors].sort(descending=True).indices]

    keep = keep[place < limits.detections]
    lengths = left.clamp(max=limits.detections).tolist()
    parts = (each.split(lengths) for each in (box[keep], pool.score[keep], pool.label[keep]))
    return [Found(*part) for part in zip(*parts, strict=True)], settled


def _by_group(group: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """The order by group and falling score; [n - 1] bool: whether an element equals the one before it."""
    # The bits of a positive float, read as an integer, keep its order.
    key, order = ((group << 32) - score.contiguous().view(torch.int32)).sort(stable=True)
    return order, key[1:] == key[:-1]


def _places(group: Tensor, sizes: Tensor) -> Tensor:
    """[n] place of each element in its group, from 0, for sorted groups of ``sizes``."""
    return torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group]


def _shift(box: Tensor, pool: Candidates, few: Tensor) -> Tensor:
    """Boxes as torchvision compares them: in images with few candidates, each class is moved to a place of its own.

    Suppression in groups needs no move, but the move rounds, which decides where the overlap is just the threshold.
    """
    limit = box.new_zeros(len(few)).scatter_reduce_(0, pool.image, box.amax(dim=1), "amax")
    move = (pool.label + 1).to(box) * (limit + 1)[pool.image] * few[pool.image]
    return box + move[:, None]


def _suppress(box: Tensor, pool: Candidates, nms_iou: float) -> Tensor:
    """Greedy non-maximum suppression in each class of each image: [n] bool, whether the box [n, 4] stays."""
    keep = torch.ones_like(pool.rank, dtype=torch.bool)
    sides = box.t().contiguous()
    sizes, order = pool.size[pool.rank == 0].sort()
    starts = (pool.rank == 0).nonzero().squeeze(1)[order]
    edges = torch.searchsorted(sizes, torch.tensor(WIDTHS, device=sizes.device), right=True).tolist()
    for first, end in zip(edges, [*edges[1:], len(sizes)], strict=True):
        if first < end:  # groups of similar size, padded to the largest of them
            most = int(sizes[end - 1])
            step = max(1, PAIRS // most**2)
            for i in range(first, end, step):
                part = slice(i, min(i + step, end))
                _greedy(keep, *_overlaps(sides, starts[part], sizes[part], most, nms_iou))
    return keep


def _overlaps(sides: Tensor, starts: Tensor, sizes: Tensor, most: int, nms_iou: float) -> tuple[Tensor, Tensor]:
    """The pairs of a group that overlap too much, with the arithmetic of torchvision's kernel.

    Args:
        sides: [4, n] left, top, right, bottom, by group and falling score.
        starts: [G] first box of each group.
        sizes: [G] boxes of each group.
        most: the largest of ``sizes``.
        nms_iou: largest overlap.
    Returns:
        The better and the worse box of each pair, [P] indices into n.
    """
    place = torch.arange(most, device=sides.device)
    index = (starts[:, None] + place).clamp_(max=sides.shape[1] - 1)  # [G, L]
    left, top, right, bottom = sides[:, index]
    area = (right - left) * (bottom - top)
    shared = _shared(left, right).mul_(_shared(top, bottom))  # [G, L, L]
    union = (area[:, :, None] + area[:, None, :]).sub_(shared)
    limit = torch.tensor(nms_iou, dtype=sides.dtype)
    if limit.double() > nms_iou:  # the kernel compares as double; the next float below gives the same answers
        limit = torch.nextafter(limit, torch.tensor(0.0, dtype=sides.dtype))
    over = shared.div_(union) > limit.item()
    over &= (place[:, None] < place) & (place < sizes[:, None])[:, None, :]
    group, better, worse = over.nonzero(as_tuple=True)
    return index[group, better], index[group, worse]


def _shared(low: Tensor, high: Tensor) -> Tensor:
    least = torch.minimum(high[:, :, None], high[:, None, :])
    return least.sub_(torch.maximum(low[:, :, None], low[:, None, :])).clamp_(min=0)


def _greedy(keep: Tensor, better: Tensor, worse: Tensor) -> None:
    """Clears in ``keep`` what a better box that stays suppresses."""
    while len(worse):
        # A box that no open pair calls the worse one stays for sure, so its partners go; the first one is always such.
        unsure = torch.zeros_like(keep).index_fill_(0, worse, True)
        keep.index_fill_(0, worse[~unsure[better]], False)
        open_ = keep[better] & keep[worse]
        better, worse = better[open_], worse[open_]


def to_images(found: list[Found], size: tuple[int, int], sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Detections of the network's input, in the pixels of the original images.

    Args:
        found: one an image.
        size: height and width of the network's input, pixels.
        sizes: height and width of each original image, pixels.
    Returns:
        For each image {"boxes" [n, 4], "scores" [n], "labels" [n]}.
    Raises:
        ValueError: not as many sizes as images.
    """
    if len(found) != len(sizes):
        raise ValueError(f"there are {len(found)} images but {len(sizes)} sizes; give one (height, width) an image")
    images = []
    for (boxes, scores, labels), (height, width) in zip(found, sizes, strict=True):
        limits = boxes.new_tensor([width, height, width, height])
        scale = limits / boxes.new_tensor([size[1], size[0], size[1], size[0]])
        images.append({"boxes": (boxes * scale).minimum(limits), "scores": scores, "labels": labels})
    return images
