"""Pure box functions: anchors, overlap, matching, offsets. Boxes are xyxy in pixels unless the name says otherwise."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from heads import Size

ASPECT_RATIOS = (2.0, 3.0)
"""Width over height of the anchors; each stands for its inverse too, and 1 is always there."""

CENTRE_SCALE, SIZE_SCALE = 10.0, 5.0
"""Offsets are multiplied by these, the inverse of SSD's variances 0.1 and 0.2."""

LARGEST_GROWTH = math.log(1000 / 16)
"""A decoded box is at most 62.5 times its anchor; keeps exp() finite."""


def anchor_shapes(
    maps: int, min_scale: float, max_scale: float, first_map_anchors: int
) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Width and height of the anchors of every feature map, as fractions of the image.

    Args:
        maps: number of feature maps, finest first; >= 2.
        min_scale: side of the finest map's anchors, in (0, 1].
        max_scale: side of the coarsest map's anchors, in (0, 1].
        first_map_anchors: 6 as on all other maps, or 3: a small square (0.1) and the ratios 2 and 1/2.
    Returns:
        For each map a tuple of (width, height), each in (0, 1].
    Source: SSD, section 2.2; three boxes: ``reduce_boxes_in_lowest_layer`` of TensorFlow's
        multiple_grid_anchor_generator.py. The order of the six is torchvision's.
    """
    scales = [min_scale + (max_scale - min_scale) * i / (maps - 1.0) for i in range(maps)] + [1.0]
    shapes = []
    for scale, following in pairwise(scales):
        between = math.sqrt(scale * following)
        pairs = [(scale, scale), (between, between)]
        for ratio in ASPECT_RATIOS:
            width, height = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            pairs += [(width, height), (height, width)]
        shapes.append(pairs)
    if first_map_anchors == 3:
        shapes[0] = [(0.1, 0.1), *shapes[0][2:4]]
    return tuple(tuple((min(w, 1.0), min(h, 1.0)) for w, h in pairs) for pairs in shapes)


@lru_cache(maxsize=64)
def default_boxes(
    maps: tuple[Size, ...],
    size: Size,
    shapes: tuple[tuple[tuple[float, float], ...], ...],
    device: torch.device,
) -> Tensor:
    """The anchors of an image: map after map, row after row, column after column, shape after shape.

    Args:
        maps: height and width of each feature map, cells.
        size: height and width of the image, pixels.
        shapes: for each map the anchors' width and height, fractions of the image.
        device: where to put them.
    Returns:
        [A, 4] float32, xyxy, pixels; may reach over the image's border. Cached: do not write into it.
    Source: SSD, section 2.2; equal to torchvision's ``DefaultBoxGenerator``, bit by bit.
    """
    with torch.inference_mode(False):  # validation may come first, and training cannot use inference tensors
        parts = []
        for (height, width), pairs in zip(maps, shapes, strict=True):
            y, x = torch.meshgrid(
                (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
            )
            centre = torch.stack((x, y), dim=-1).view(-1, 1, 2)
            half = 0.5 * torch.tensor(pairs)
            parts.append(torch.cat(torch.broadcast_tensors(centre - half, centre + half), dim=-1).view(-1, 4))
        limits = torch.tensor([size[1], size[0], size[1], size[0]])
        return (torch.cat(parts) * limits).to(device)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Offsets that move each anchor onto its box.

    Args:
        boxes: [P, 4] float, xyxy, pixels, positive width and height.
        anchors: [P, 4] float, xyxy, pixels.
    Returns:
        [P, 4] float (dx, dy, dw, dh), divided by variances 0.1, 0.1, 0.2, 0.2.
    Source: SSD, section 2.2, arXiv 1512.02325 (variances: the authors' code, not the paper).
    """
    box_size = boxes[:, 2:] - boxes[:, :2]
    anchor_size = anchors[:, 2:] - anchors[:, :2]
    move = (boxes[:, :2] + 0.5 * box_size) - (anchors[:, :2] + 0.5 * anchor_size)
    growth = (box_size / anchor_size).log()
    return torch.cat((CENTRE_SCALE * move / anchor_size, SIZE_SCALE * growth), dim=1)


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Moves anchors by offsets, the inverse of ``encode_boxes``.

    Args:
        deltas: [..., A, 4] float (dx, dy, dw, dh).
        anchors: [A, 4] float, xyxy, pixels.
    Returns:
        [..., A, 4] float, xyxy, pixels; not clipped to the image.
    """
    anchor_size = anchors[:, 2:] - anchors[:, :2]
    centre = deltas[..., :2] / CENTRE_SCALE * anchor_size + (anchors[:, :2] + 0.5 * anchor_size)
    growth = (deltas[..., 2:] / SIZE_SCALE).clamp(max=LARGEST_GROWTH)
    half = 0.5 * (growth.exp() * anchor_size)
    return torch.cat((centre - half, centre + half), dim=-1)


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """Cuts boxes [..., 4] xyxy at the border of an image of ``size`` (height, width)."""
    # not new_tensor, which would hold an export of any size to the one that it was traced with
    limits = torch.tensor([size[1], size[0], size[1], size[0]], device=boxes.device)
    return boxes.clamp(min=0).minimum(limits.to(boxes.dtype))


def pairwise_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Overlap of every box with every anchor.

    Args:
        boxes: [B, N, 4] float, xyxy.
        anchors: [A, 4] float, xyxy, positive area.
    Returns:
        [B, N, A] float in [0, 1]; 0 for a box without area.
    """
    left, top, right, bottom = boxes[..., None].unbind(2)  # [B, N, 1]
    anchor_left, anchor_top, anchor_right, anchor_bottom = anchors.t().contiguous()  # [A]
    # In place, for at 3,234 anchors every pass over [B, N, A] costs as much as the arithmetic.
    overlap = torch.minimum(right, anchor_right).sub_(torch.maximum(left, anchor_left)).clamp_(min=0)
    overlap.mul_(torch.minimum(bottom, anchor_bottom).sub_(torch.maximum(top, anchor_top)).clamp_(min=0))
    anchor_area = (anchor_right - anchor_left) * (anchor_bottom - anchor_top)
    union = ((right - left) * (bottom - top) + anchor_area).sub_(overlap)
    return overlap.div_(union)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Overlap of boxes [P, 4] xyxy with one other each: [P] in [0, 1]."""
    sides = torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])
    shared = sides.clamp(min=0).prod(dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) + (others[:, 2:] - others[:, :2]).prod(dim=1)
    return shared / (areas - shared)


def match_anchors(boxes: Tensor, labels: Tensor, anchors: Tensor, threshold: float) -> Tensor:
    """Which box each anchor answers for.

    An anchor takes the box it overlaps most if that is at least ``threshold``; besides, every box gets the anchor that
    overlaps it most, the last box where several want the same one.

    Args:
        boxes: [B, N, 4] float, xyxy, pixels; N may be 0.
        labels: [B, N] int64, -1 = padding.
        anchors: [A, 4] float, xyxy, pixels.
        threshold: least overlap, in (0, 1].
    Returns:
        [B, A] int64: index of the box, -1 = background.
    Source: SSD, section 2.2; ties fall as in torchvision's ``SSDMatcher``.
    """
    batch, count = labels.shape
    if count == 0:
        return labels.new_full((batch, len(anchors)), -1)
    real = labels >= 0
    iou = pairwise_iou(boxes.masked_fill(~real[..., None], 0), anchors)
    overlap, matched = iou.max(dim=1)  # [B, A]
    matched = matched.masked_fill(overlap < threshold, -1)
    box = torch.arange(count, device=labels.device).where(real, -1)
    forced = torch.full_like(matched, -1).scatter_reduce(1, iou.argmax(dim=2), box, "amax")
    return matched.where(forced < 0, forced)


@lru_cache(maxsize=64)
def grid_cells(maps: tuple[Size, ...], strides: tuple[int, ...], device: torch.device) -> Tensor:
    """The cells of feature maps as boxes, in the order of ``default_boxes``.

    Args:
        maps: height and width of each feature map, cells.
        strides: of each map, pixels.
        device: where to put them.
    Returns:
        [A, 4] float32, xyxy, pixels; squares whose side is the stride. Cached: do not write into it.
    """
    with torch.inference_mode(False):
        parts = []
        for (height, width), stride in zip(maps, strides, strict=True):
            y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
            corner = torch.stack((x, y), dim=-1).view(-1, 2)
            parts.append(torch.cat((corner, corner + stride), dim=1))
        return torch.cat(parts).float().to(device)


def match_points(boxes: Tensor, labels: Tensor, cells: Tensor, radius: float, least: Tensor, largest: Tensor) -> Tensor:
    """Which box the centre of each cell answers for: the smallest of those that qualify.

    A box qualifies if the point lies in it and within ``radius`` strides of its centre in x and y, and if the farthest
    side is within the range of the cell's level.

    Args:
        boxes: [B, N, 4] float, xyxy, pixels; N may be 0.
        labels: [B, N] int64, -1 = padding.
        cells: [A, 4] float, xyxy, pixels.
        radius: in strides.
        least: [A] float: the farthest side is more than that away, pixels ...
        largest: [A] float: ... and less than that.
    Returns:
        [B, A] int64: index of the box, -1 = background.
    Source: FCOS, arXiv 1904.01355, section 3; centre sampling: the authors' code. Equal to torchvision's FCOS.
    """
    if labels.shape[1] == 0:
        return labels.new_full((len(labels), len(cells)), -1)
    left, top, right, bottom = boxes[..., None].unbind(2)  # [B, N, 1]
    x, y = ((cells[:, :2] + cells[:, 2:]) / 2).t().contiguous()  # [A]
    reach = radius * (cells[:, 2] - cells[:, 0])
    far_x, far_y = torch.maximum(x - left, right - x), torch.maximum(y - top, bottom - y)  # [B, N, A]
    farthest = torch.maximum(far_x, far_y)
    near = torch.minimum(torch.minimum(x - left, right - x), torch.minimum(y - top, bottom - y))
    aside = torch.maximum((x - (left + right) / 2).abs(), (y - (top + bottom) / 2).abs())
    fits = (near > 0) & (aside < reach) & (farthest > least) & (farthest < largest) & (labels >= 0)[..., None]
    area = ((right - left) * (bottom - top)).masked_fill(~fits, torch.inf)
    smallest, index = area.min(dim=1)
    return index.masked_fill(smallest == torch.inf, -1)
