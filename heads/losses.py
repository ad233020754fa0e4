"""Losses that detection heads share. Sums, not means: the head divides by the number of matched anchors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

PRIOR = 0.01
"""Probability of an object that a focal-loss head starts from, lest the background drown the first steps."""


def hard_negative_loss(logits: Tensor, labels: Tensor, negatives: float) -> Tensor:
    """Softmax cross-entropy over all objects and the background that is most often taken for one.

    Args:
        logits: [B, A, K+1] float; class 0 is the background.
        labels: [B, A] int64, index of the class without background, -1 = background.
        negatives: background anchors an object, each image's hardest first.
    Returns:
        Scalar, sum over the chosen anchors; 0 without any object.
    Source: SSD, section 2.2 ("hard negative mining"). Equal to torchvision's ``SSD.compute_loss`` times its N.
    Differs: torchvision counts objects twice where an image has too few background anchors to choose from.
    """
    count = logits.shape[1]
    positive = labels >= 0
    with torch.no_grad():  # only a few anchors in a hundred get a gradient: choose first, differentiate then
        wanted = (negatives * positive.sum(1)).ceil()
        most = min(int(wanted.max()), count)
        background = -logits.log_softmax(dim=2)[..., 0]  # half the time of logsumexp
        hardness, index = background.masked_fill_(positive, -torch.inf).topk(most, dim=1, sorted=True)
        hard = (torch.arange(most, device=labels.device) < wanted[:, None]) & (hardness > -torch.inf)
        chosen = (positive | torch.zeros_like(positive).scatter_(1, index, hard)).flatten().nonzero().squeeze(1)
    rows = logits.flatten(0, 1).index_select(0, chosen)
    return F.cross_entropy(rows, labels.flatten()[chosen] + 1, reduction="sum")


def focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss over all anchors and classes.

    Args:
        logits: [B, A, K] float.
        labels: [B, A] int64, -1 = background.
        alpha: weight of objects, in [0, 1]; the background has 1 - alpha.
        gamma: how fast well-classified anchors lose weight, >= 0.
    Returns:
        Scalar, sum over anchors and classes.
    Source: Focal Loss for Dense Object Detection, arXiv 1708.02002, equation 5.
    """
    width = logits.shape[-1]
    anchor = (labels.flatten() >= 0).nonzero().squeeze(1)
    hit = logits.reshape(-1)[anchor * width + labels.flatten()[anchor]]  # [P], the only ones with target 1
    missed = alpha * (-hit).sigmoid().pow(gamma) * F.softplus(-hit)
    return (1 - alpha) * (_background(logits, gamma).sum() - _background(hit, gamma).sum()) + missed.sum()


def _background(logits: Tensor, gamma: float) -> Tensor:
    return logits.sigmoid().pow(gamma) * F.softplus(logits)


def giou_loss(boxes: Tensor, wanted: Tensor) -> Tensor:
    """Sum of 1 - generalised IoU over pairs of boxes [P, 4] xyxy.

    Source: Generalized Intersection over Union, arXiv 1902.09630.
    """
    return generalized_box_iou_loss(boxes, wanted, reduction="sum")
