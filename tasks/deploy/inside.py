"""Post-processing as part of the graph: scores, detections and class maps of fixed shapes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads import Head, Size
from heads.detections import Found, Limits, to_images


class Scores(nn.Module):
    """Classification: logits [B, K] to probabilities [B, K]."""

    def __init__(self, head: Head) -> None:
        super().__init__()

    def forward(self, output: Tensor, size: Size) -> Tensor:
        """For images of ``size``."""
        return output.softmax(1)

    @staticmethod
    def finish(output: Tensor, size: Size, sizes: list[Size]) -> Tensor:
        """What the head's ``predict`` gives."""
        return output


class ClassMap(nn.Module):
    """Segmentation: logits [B, K, h, w] to the likeliest class of every pixel of the input, [B, H, W] uint8."""

    def __init__(self, head: Head) -> None:
        super().__init__()

    def forward(self, output: Tensor, size: Size) -> Tensor:
        """For images of ``size``."""
        return F.interpolate(output, size=size, mode="bilinear", align_corners=False).argmax(1).to(torch.uint8)

    @staticmethod
    def finish(output: Tensor, size: Size, sizes: list[Size]) -> list[Tensor]:
        """Maps of the original sizes, by nearest pixel: coarser than the head's ``predict``, which resizes logits."""
        return [
            F.interpolate(each[None, None], size=original, mode="nearest-exact")[0, 0]
            for each, original in zip(output, sizes, strict=True)
        ]


class Detections(nn.Module):
    """Detection: raw output to {"boxes" [B, n, 4] xyxy px of the input, "scores" [B, n], "labels" [B, n], "count" [B]}.

    n is the head's ``detections``, or all classes' ``candidates`` where those are fewer; behind the ``count`` found
    ones stand boxes and scores of 0 and labels of -1.

    Raises:
        ValueError: the head does not say how its raw output becomes scored boxes.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        if not hasattr(head, "scored_boxes"):
            raise ValueError(f"{type(head).__name__} has no scored_boxes; export it with postprocess=outside")
        self.scored_boxes = head.scored_boxes
        self.limits: Limits = head.limits

    def forward(self, output: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
        """For images of ``size``."""
        boxes, scores = self.scored_boxes(output, size)  # [B, A, 4], [B, A, K]
        anchors, classes = scores.shape[1:]
        most = self.limits.candidates
        known = not isinstance(anchors, torch.SymInt)  # images of any size have an unknown number
        if blanks := max(0, most - anchors) if known else most:  # so that a fixed number can be taken
            boxes, scores = (F.pad(each, (0, 0, 0, blanks)) for each in (boxes, scores))
        score, anchor = scores.transpose(1, 2).topk(most, dim=2)  # [B, K, C]
        box = boxes.gather(1, anchor.flatten(1)[..., None].expand(-1, -1, 4))  # [B, K * C, 4]
        kept = torch.ops.mobilenetv3_bench.suppress(
            box.reshape(-1, most, 4), score.reshape(-1, most), self.limits.nms_iou, self.limits.score_threshold
        )
        best, place = kept.reshape(-1, classes * most).topk(min(self.limits.detections, classes * most), dim=1)
        real = best > 0
        return {
            "boxes": box.gather(1, place[..., None].expand(-1, -1, 4)) * real[..., None],
            "scores": best,
            "labels": torch.where(real, place.div(most, rounding_mode="floor"), -1),
            "count": real.sum(1),
        }

    @staticmethod
    def finish(output: dict[str, Tensor], size: Size, sizes: list[Size]) -> list[dict[str, Tensor]]:
        """Detections in the pixels of the original images."""
        rows = zip(*(output[key] for key in ("boxes", "scores", "labels")), output["count"].tolist(), strict=True)
        found = [Found(boxes[:n], scores[:n], labels[:n]) for boxes, scores, labels, n in rows]
        return to_images(found, size, sizes)


ENDINGS: dict[str, type[Scores] | type[ClassMap] | type[Detections]] = {
    "classify": Scores,
    "detect": Detections,
    "segment": ClassMap,
}
"""By ``head.task``."""


@torch.library.custom_op("mobilenetv3_bench::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou: float, threshold: float) -> Tensor:
    """Greedy non-maximum suppression in groups; an operator of its own, for ONNX has one for it.

    Args:
        boxes: [G, C, 4] float32, xyxy, by falling score.
        scores: [G, C] float32.
        iou: of two boxes that overlap more, the better stays.
        threshold: scores must be above it.
    Returns:
        [G, C] the scores, 0 where suppressed.
    """
    left, top, right, bottom = boxes.unbind(2)
    area = (right - left) * (bottom - top)
    shared = _shared(left, right) * _shared(top, bottom)  # [G, C, C]
    over = shared / (area[:, :, None] + area[:, None, :] - shared) > iou
    keep = scores > threshold
    for i in range(boxes.shape[1] - 1):
        keep[:, i + 1 :] &= ~(over[:, i, i + 1 :] & keep[:, i : i + 1])
    return scores * keep


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, threshold: float) -> Tensor:
    return torch.empty_like(scores)


def _shared(low: Tensor, high: Tensor) -> Tensor:
    return (torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(low[:, :, None], low[:, None])).clamp(min=0)
