"""Mixup and CutMix: pairs of a batch's images become one, and so do their labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def mix_labels(labels: Tensor, num_classes: int, share: float) -> Tensor:
    """[B, K] float32, rows sum to 1: ``share`` of each label, the rest of the one before it in the batch."""
    known = labels.dtype == torch.int64 and labels.ndim == 1 and bool(((labels >= 0) & (labels < num_classes)).all())
    if not known:
        raise ValueError(
            f"mix got labels {labels.dtype} {tuple(labels.shape)}; expected int64 [B] from 0 to {num_classes - 1}"
        )
    soft = F.one_hot(labels, num_classes).float()
    return soft.roll(1, 0).lerp_(soft, share)


def mixup(images: Tensor, labels: Tensor, num_classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Blend every image with the one before it in the batch, by one share drawn from Beta(alpha, alpha).

    Args:
        images: [B, 3, H, W] float32.
        labels: [B] int64.
        num_classes: K.
        alpha: above 0; small is timid.
    Returns:
        Images as given, labels [B, K] float32 whose rows sum to 1.
    Source: arXiv 1710.09412; paired with the neighbour, as in torchvision.transforms.v2.MixUp.
    """
    share = draw_share(alpha)
    return images.roll(1, 0).lerp_(images, share), mix_labels(labels, num_classes, share)


def cutmix(images: Tensor, labels: Tensor, num_classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of the image before it in the batch into every image; labels mix by area.

    Args:
        images, labels, num_classes, alpha: as for ``mixup``.
    Returns:
        As ``mixup``.
    Source: arXiv 1905.04899; clipped at the border, as in torchvision.transforms.v2.CutMix.
    """
    side = math.sqrt(1 - draw_share(alpha)) / 2
    height, width = images.shape[-2:]
    x, y = (torch.rand(2) * torch.tensor([width, height])).int().tolist()
    left, right = max(x - int(side * width), 0), min(x + int(side * width), width)
    top, bottom = max(y - int(side * height), 0), min(y + int(side * height), height)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    share = 1 - (right - left) * (bottom - top) / (height * width)
    return mixed, mix_labels(labels, num_classes, share)


def draw_share(alpha: float) -> float:
    """A number in [0, 1] from Beta(alpha, alpha), by torch's global generator."""
    return float(torch.distributions.Beta(alpha, alpha).sample())


class Mix:
    """Mixup, CutMix or one of the two by chance, on a whole batch.

    Args:
        num_classes: K.
        mixup_alpha: of mixup; 0 turns it off.
        cutmix_alpha: of CutMix; 0 turns it off.
        p: probability that a batch is mixed.
    Raises:
        ValueError: both are off, or an argument is out of its range.
    """

    def __init__(self, num_classes: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, p: float = 1.0) -> None:
        alphas = (mixup_alpha, cutmix_alpha)
        if not all(0 <= alpha < float("inf") for alpha in alphas) or not any(alphas):
            raise ValueError(
                f"mix.mixup_alpha is {mixup_alpha}, mix.cutmix_alpha is {cutmix_alpha}; "
                "expected finite numbers, one of them above 0, none below"
            )
        if not 0 <= p <= 1:
            raise ValueError(f"mix.p is {p}; expected a probability from 0 to 1")
        self.num_classes = num_classes
        self.ways = [(way, alpha) for way, alpha in ((mixup, mixup_alpha), (cutmix, cutmix_alpha)) if alpha > 0]
        self.p = p

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] float32 and labels [B] int64 -> images, soft labels [B, K] float32."""
        if float(torch.rand(())) >= self.p:
            return images, mix_labels(labels, self.num_classes, 1.0)
        way, alpha = self.ways[int(torch.randint(len(self.ways), ()))]
        return way(images, labels, self.num_classes, alpha)
