"""Box functions against torchvision's anchors, coder, matchers and overlaps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.ops import box_iou, clip_boxes_to_image

from heads.boxes import (
    anchor_shapes,
    clip_boxes,
    decode_boxes,
    default_boxes,
    encode_boxes,
    grid_cells,
    match_anchors,
    match_points,
    paired_iou,
    pairwise_iou,
)

CPU = torch.device("cpu")
MAPS = ((20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1))


def anchors() -> Tensor:
    return default_boxes(MAPS, (320, 320), anchor_shapes(6, 0.2, 0.95, 6), CPU)


def random_boxes(*shape: int, seed: int = 0, side: float = 320) -> Tensor:
    corners = torch.rand(*shape, 2, 2, generator=torch.Generator().manual_seed(seed)) * side
    low, high = corners.min(dim=-2).values, corners.max(dim=-2).values
    return torch.cat((low, high + 1), dim=-1)


def padded(counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    boxes = random_boxes(len(counts), max(counts), seed=seed)
    labels = torch.full(boxes.shape[:2], -1)
    for i, count in enumerate(counts):
        labels[i, :count] = torch.arange(count)
    return boxes, labels


@pytest.mark.parametrize("size", [(320, 320), (300, 421), (64, 640)])
@pytest.mark.parametrize(("least", "most"), [(0.2, 0.95), (0.1, 0.9)])
def test_default_boxes_are_torchvisions(size: tuple[int, int], least: float, most: float) -> None:
    maps = tuple((-(-size[0] // s), -(-size[1] // s)) for s in (16, 32, 64, 128, 256, 512))
    generator = DefaultBoxGenerator([[2, 3] for _ in maps], min_ratio=least, max_ratio=most)
    images = SimpleNamespace(tensors=torch.zeros(1, 3, *size), image_sizes=[size])
    (theirs,) = generator(images, [torch.zeros(1, 1, *map_) for map_ in maps])
    assert torch.equal(default_boxes(maps, size, anchor_shapes(6, least, most, 6), CPU), theirs)


def test_three_boxes_on_the_first_map_are_tensorflows() -> None:
    first, second = anchor_shapes(6, 0.2, 0.95, 3)[:2]
    wide, high = 0.2 * 2**0.5, 0.2 / 2**0.5
    assert first == ((0.1, 0.1), pytest.approx((wide, high)), pytest.approx((high, wide)))
    assert len(second) == 6


def test_default_boxes_made_in_inference_mode_can_be_trained_on() -> None:
    default_boxes.cache_clear()
    with torch.inference_mode():
        anchors()
    assert not anchors().is_inference()
    assert anchors() is anchors()


def test_coder_is_torchvisions() -> None:
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes, deltas = random_boxes(3234), 3 * torch.randn(2, 3234, 4)
    assert torch.equal(encode_boxes(boxes, anchors()), coder.encode_single(boxes, anchors()))
    assert torch.equal(decode_boxes(deltas, anchors())[1], coder.decode_single(deltas[1], anchors()))
    again = decode_boxes(encode_boxes(boxes, anchors()), anchors())
    torch.testing.assert_close(again, boxes, rtol=1e-4, atol=1e-2)
    huge = decode_boxes(torch.full((1, 3234, 4), 1e4), anchors())
    assert huge.isfinite().all()


def test_clipping_is_torchvisions() -> None:
    boxes = 400 * torch.randn(2, 50, 4)
    assert torch.equal(clip_boxes(boxes, (200, 300))[1], clip_boxes_to_image(boxes[1], (200, 300)))


def test_overlaps_are_torchvisions() -> None:
    boxes, others = random_boxes(2, 9), random_boxes(9, seed=1)
    theirs = torch.stack([box_iou(each, others) for each in boxes])
    assert torch.equal(pairwise_iou(boxes, others), theirs)
    torch.testing.assert_close(paired_iou(boxes[0], others), theirs[0].diagonal())
    assert (pairwise_iou(torch.zeros(1, 1, 4), others) == 0).all()


def reference_matches(boxes: Tensor, labels: Tensor) -> Tensor:
    matched = []
    for each, label in zip(boxes, labels, strict=True):
        real = (label >= 0).nonzero().squeeze(1)
        if len(real) == 0:
            matched.append(torch.full((len(anchors()),), -1))
            continue
        found = SSDMatcher(0.5)(box_iou(each[real], anchors()))
        matched.append(torch.where(found >= 0, real[found.clamp(min=0)], -1))
    return torch.stack(matched)


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_torchvisions(seed: int) -> None:
    boxes, labels = padded([7, 0, 30, 1], seed)
    boxes[labels < 0] = float("nan")  # what stands in the padding does not matter
    assert torch.equal(match_anchors(boxes, labels, anchors(), 0.5), reference_matches(boxes, labels))


def test_matching_with_ties_and_holes_is_torchvisions() -> None:
    boxes, labels = padded([12, 12])
    boxes[0, 3:6] = anchors()[1900]  # three boxes want one anchor
    boxes[0, 7] = torch.tensor([400.0, 400.0, 410.0, 410.0])  # overlaps none
    boxes[1, :] = torch.tensor([80.0, 80.0, 240.0, 240.0])  # as far from four anchors
    labels[1, 4] = -1  # padding in between
    ours = match_anchors(boxes, labels, anchors(), 0.5)
    assert torch.equal(ours, reference_matches(boxes, labels))
    assert ours[0, 1900] == 5
    assert set(labels[0][labels[0] >= 0].tolist()) - {3, 4} <= set(ours[0].tolist())


def test_nothing_matches_where_there_are_no_boxes() -> None:
    empty, labels = torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.int64)
    assert (match_anchors(empty, labels, anchors(), 0.5) == -1).all()
    cells = grid_cells(((4, 4),), (8,), CPU)
    assert (match_points(empty, labels, cells, 1.5, torch.zeros(16), torch.ones(16)) == -1).all()


def test_cells_are_squares_in_row_order() -> None:
    cells = grid_cells(((2, 3), (1, 1)), (8, 16), CPU)
    assert cells.tolist() == [
        [0, 0, 8, 8], [8, 0, 16, 8], [16, 0, 24, 8], [0, 8, 8, 16], [8, 8, 16, 16], [16, 8, 24, 16], [0, 0, 16, 16],
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_points_match_as_in_torchvisions_fcos(seed: int) -> None:
    strides, maps = (8, 16, 32, 64), ((40, 40), (20, 20), (10, 10), (5, 5))
    cells = grid_cells(maps, strides, CPU)
    counts = [height * width for height, width in maps]
    each = torch.tensor(strides, dtype=torch.float).repeat_interleave(torch.tensor(counts))
    least, largest = 4 * each, 8 * each
    least[: counts[0]], largest[-counts[-1] :] = 0, torch.inf
    boxes, labels = padded([9, 0, 25], seed)
    caught: dict[str, list[Tensor]] = {}

    def catch(targets: object, head_outputs: object, anchors: object, matched: list[Tensor]) -> None:
        caught["matched"] = matched

    FCOS.compute_loss(
        SimpleNamespace(  # its matching stands in the loss and reads these alone
            center_sampling_radius=1.5,
            box_coder=BoxLinearCoder(normalize_by_size=True),
            head=SimpleNamespace(compute_loss=catch),
        ),
        [{"boxes": box[label >= 0], "labels": label[label >= 0]} for box, label in zip(boxes, labels, strict=True)],
        {},
        [cells] * 3,
        counts,
    )
    ours = match_points(boxes, labels, cells, 1.5, least, largest)
    assert torch.equal(ours, torch.stack(caught["matched"]))
    assert (ours >= 0).any()
