"""Post-processing against torchvision's, box for box."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD

from heads import detections
from heads.boxes import clip_boxes, decode_boxes
from heads.detections import Found, Limits, detect, to_images


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with ``detections.cpp`` and with torch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(detections, "library", lambda *_: (None, ""))
    elif detections.library(detections.SOURCE, detections.EXACT)[0] is None:
        pytest.skip("no C++ compiler")
    return str(request.param)


LIMITS = Limits(score_threshold=0.001, candidates=300, nms_iou=0.55, detections=300)
SIZE = (320, 320)
COUNT = 1600


def anchors() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    corner, side = torch.rand(COUNT, 2, generator=generator) * 300, 10 + torch.rand(COUNT, 2, generator=generator) * 90
    return torch.cat((corner, corner + side), dim=1)


def theirs(logits: Tensor, deltas: Tensor, limits: Limits) -> list[Found]:
    head = SimpleNamespace(
        box_coder=BoxCoder((10.0, 10.0, 5.0, 5.0)), score_thresh=limits.score_threshold, nms_thresh=limits.nms_iou,
        topk_candidates=limits.candidates, detections_per_img=limits.detections,
    )  # fmt: skip
    batch = len(logits)
    found = SSD.postprocess_detections(
        head, {"cls_logits": logits, "bbox_regression": deltas}, [anchors()] * batch, [SIZE] * batch
    )
    return [Found(each["boxes"], each["scores"], each["labels"] - 1) for each in found]


def ours(logits: Tensor, deltas: Tensor, limits: Limits) -> list[Found]:
    boxes = clip_boxes(decode_boxes(deltas, anchors()), SIZE)
    return detect(boxes, logits.softmax(dim=-1)[..., 1:], limits)


def background(by: float) -> Callable[[Tensor], Tensor]:
    def more(logits: Tensor) -> Tensor:
        logits[..., 0] += by
        return logits

    return more


def copies(logits: Tensor) -> Tensor:
    return logits[:, torch.arange(COUNT) % (COUNT // 5)]


def one_empty(logits: Tensor) -> Tensor:
    logits[1, :, 0] += 30
    return logits


def one_class_rules(logits: Tensor) -> Tensor:
    return 0.1 * logits + torch.arange(logits.shape[-1]) / 5


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda logits: logits,
    "peaked": background(8.0),
    "few": background(11.0),
    "none": background(40.0),
    "one image empty": one_empty,
    "saturated": lambda logits: 8 * logits,
    "equal between anchors": copies,
    "equal between classes": lambda logits: logits.round(),
    "all equal": torch.zeros_like,
    "one class rules": one_class_rules,
}


@pytest.mark.parametrize("classes", [1, 5, 40])
@pytest.mark.parametrize("scores", SCORES)
def test_equals_torchvision(scores: str, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = SCORES[scores](2 * torch.randn(2, COUNT, classes + 1, generator=generator))
    deltas = torch.randn(2, COUNT, 4, generator=generator)
    for mine, peer in zip(ours(logits, deltas, LIMITS), theirs(logits, deltas, LIMITS), strict=True):
        for one, other in zip(mine, peer, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "limits", [Limits(0.02, 50, 0.3, 20), Limits(0.0, 10, 1.0, 500), Limits(0.001, 2000, 0.5, 100)]
)
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_equals_torchvision_under_other_limits(limits: Limits, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, COUNT, 21, generator=generator)
    deltas = spread * torch.randn(3, COUNT, 4, generator=generator)
    for mine, peer in zip(ours(logits, deltas, limits), theirs(logits, deltas, limits), strict=True):
        for one, other in zip(mine, peer, strict=True):
            assert torch.equal(one, other)


def test_chains_of_overlaps_end_as_in_a_plain_loop() -> None:
    """Each box overlaps the next one only: the first stays, the second goes, the third stays ..."""
    count = 200
    left = torch.arange(count) * 2.0
    boxes = torch.stack((left, torch.zeros(count), left + 10, torch.full((count,), 10.0)), dim=1)[None]
    scores = torch.linspace(0.9, 0.1, count)[None, :, None]
    (found,) = detect(boxes, scores, Limits(0.05, 300, 0.5, 300))
    assert found.boxes[:, 0].tolist() == left[::2].tolist()


@pytest.mark.parametrize("classes", [1, 5, 40])
def test_in_any_order_equal_scores_take_one_search(classes: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores as a network in bfloat16 gives them: the same scores come out, each at a box and a class that has it."""
    generator = torch.Generator().manual_seed(classes)
    logits = (2 * torch.randn(2, COUNT, classes + 1, generator=generator)).bfloat16().float()
    logits[:, 1::2] = logits[:, ::2]
    boxes = clip_boxes(decode_boxes(torch.randn(2, COUNT, 4, generator=generator), anchors()), SIZE)
    scores = logits.softmax(dim=-1)[..., 1:]
    exact = detect(boxes, scores, LIMITS)
    if way == "compiled":
        monkeypatch.setattr(detections, "_search", lambda *_: pytest.fail("searched again"))
    for i, found in enumerate(detect(boxes, scores, LIMITS, exact=False)):
        assert len(found.scores) == len(exact[i].scores)
        torch.testing.assert_close(found.scores, exact[i].scores, rtol=0, atol=0.01)
        place = (boxes[i][:, None] == found.boxes).all(dim=2)  # [A, n]
        assert (place & (scores[i][:, found.labels] == found.scores)).any(dim=0).all()


def test_scores_that_are_a_view_of_others(way: str) -> None:
    """As softmax's are without the background, and as those that another layout has."""
    scores = torch.rand(2, COUNT, 6, generator=torch.Generator().manual_seed(0))
    boxes = anchors().expand(2, -1, -1)
    for view in (scores[..., 1:], scores.transpose(1, 2).contiguous().transpose(1, 2)[..., 1:]):
        for one, other in zip(detect(boxes, view, LIMITS), detect(boxes, view.clone(), LIMITS), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_boxes_without_area_are_kept_as_torchvision_keeps_them() -> None:
    boxes = torch.zeros(1, 30, 4)
    (found,) = detect(boxes, torch.linspace(0.1, 0.9, 30)[None, :, None], LIMITS)
    assert len(found.boxes) == 30


def test_an_image_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, deltas = torch.randn(4, COUNT, 41, generator=generator), torch.randn(4, COUNT, 4, generator=generator)
    together = ours(logits, deltas, LIMITS)
    for i in range(4):
        (alone,) = ours(logits[i : i + 1], deltas[i : i + 1], LIMITS)
        assert all(torch.equal(one, other) for one, other in zip(alone, together[i], strict=True))


def test_boxes_go_to_the_original_image_and_stay_in_it() -> None:
    found = Found(torch.tensor([[32.0, 64.0, 320.0, 320.0]]), torch.tensor([0.5]), torch.tensor([3]))
    (image,) = to_images([found], (320, 320), [(427, 641)])
    torch.testing.assert_close(image["boxes"], torch.tensor([[64.1, 85.4, 641.0, 427.0]]))
    assert (image["boxes"] <= torch.tensor([641, 427, 641, 427])).all()
    with pytest.raises(ValueError, match="1 images but 2 sizes"):
        to_images([found], (320, 320), [(1, 1), (2, 2)])
