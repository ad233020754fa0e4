"""What the segmentation heads share: logits at the head's stride to a loss, and to class maps of the original size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from heads import Size

IGNORE = 255
"""The value of a mask's pixels that count in no loss."""

AT_ONCE = 1 << 25
"""Logits of a class map that are upsampled in one go: 128 MB."""


def class_weight_tensor(weights: Sequence[float] | None, num_classes: int) -> Tensor:
    """Weights of the classes in the loss as a tensor [K]; ones for None.

    Raises:
        ValueError: another number of weights than classes, or one that is not a number >= 0.
    """
    if weights is None:
        return torch.ones(num_classes)
    if len(weights) != num_classes or not all(0 <= w < float("inf") for w in weights):
        raise ValueError(
            f"class_weights={list(weights)}; expected {num_classes} finite numbers >= 0, one a class; correct "
            "the head's class_weights, or leave it null"
        )
    return torch.tensor(list(weights), dtype=torch.float32)


def pixel_loss(logits: Tensor, mask: Tensor, class_weights: Tensor, dice: float = 0.0) -> dict[str, Tensor]:
    """Cross entropy, and Dice where it has a weight, of the logits upsampled to the mask's size (bilinear).

    Args:
        logits: [B, K, h, w].
        mask: [B, H, W] int64: class, or 255 = ignored.
        class_weights: [K] float32, of the cross entropy.
        dice: weight of the Dice loss, >= 0.
    Returns:
        Scalars float32. ``cross_entropy``: the mean over the pixels by their classes' weights; 0 where every pixel is
        ignored. ``dice``, where it has a weight: that times the mean, over images, of 1 - 2 sum(p y) / sum(p + y),
        averaged over the classes that the image shows.
    Raises:
        ValueError: a value of the mask is neither a class nor 255.
    Source: Dice: V-Net, arXiv 1606.04797, section 3; with sum(p + y) for the sum of squares as is usual since.
    """
    cross_entropy, overlap = _PixelLoss.apply(logits, mask, class_weights, dice)
    return {"cross_entropy": cross_entropy, "dice": overlap} if dice else {"cross_entropy": cross_entropy}


def check_dice(weight: float) -> float:
    """The weight itself.

    Raises:
        ValueError: it is negative, infinite or no number.
    """
    if not 0 <= weight < float("inf"):
        raise ValueError(f"dice={weight}; expected a finite weight >= 0 of the Dice loss, and 0 for none")
    return float(weight)


class _PixelLoss(torch.autograd.Function):
    """Goes image by image, with upsampling as two matrix products, and takes the gradient on the way.

    Only one image's full-size logits live at a time, and they are still in cache when their gradient is due: half the
    time of ``F.interpolate`` and ``F.cross_entropy`` (8 x 11 x 360 x 480, one thread of an AMD EPYC, forward and
    backward, interleaved: 114 against 231 ms, medians of 11).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask: Tensor, class_weights: Tensor, dice: float) -> tuple[Tensor, Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            rows = upsampling(logits.shape[2], mask.shape[1], logits.device)  # [H, h]
            columns = upsampling(logits.shape[3], mask.shape[2], logits.device)  # [W, w]
            table = _pixel_weights(mask, class_weights)
            loss, overlap, grads = table.new_zeros(()), table.new_zeros(()), []
            for low, label in zip(logits.float(), mask, strict=True):
                weight, counts = table[label], label != IGNORE
                label = label.masked_fill(~counts, 0)[None]
                log_p = F.log_softmax(rows @ (low @ columns.T), 0)  # [K, H, W]
                loss -= (log_p.gather(0, label)[0] * weight).sum()
                p = log_p.exp_()
                pair = []
                if dice:  # before p is overwritten
                    scale = dice / len(mask)
                    lost, grad = _dice(p, label, counts)
                    overlap += scale * lost
                    pair.append(rows.T @ grad.mul_(scale) @ columns)
                if ctx.needs_input_grad[0]:
                    # d loss / d logit = weight x (p - one-hot), brought down by the transposed upsampling
                    p.scatter_add_(0, label, p.new_full((), -1.0).expand_as(label))
                    grads.append(torch.stack([rows.T @ p.mul_(weight) @ columns, *pair]))
        if grads:
            ctx.save_for_backward(torch.stack(grads, dim=1).to(logits.dtype))
        return loss, overlap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        total = sum(part * grad.to(part.dtype) for part, grad in zip(saved, grads, strict=False))
        assert isinstance(total, Tensor)
        return total, None, None, None


def _pixel_weights(mask: Tensor, class_weights: Tensor) -> Tensor:
    """The weight of a pixel by its value in the mask [256], so that all pixels' weights sum to 1."""
    counts = torch.bincount(mask.flatten(), minlength=IGNORE + 1)
    k = len(class_weights)
    if counts[k:IGNORE].any() or len(counts) > IGNORE + 1:
        strange = {value: int(n) for value, n in enumerate(counts.tolist()) if n and value >= k and value != IGNORE}
        raise ValueError(
            f"a mask holds values outside the head's {k} classes (value: pixels) {strange}; "
            "correct the masks, or the data set's class list"
        )
    table = F.pad(class_weights, (0, IGNORE + 1 - k))
    return table / (table * counts).sum().clamp(min=torch.finfo(table.dtype).tiny)


def _dice(p: Tensor, label: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """One image's Dice loss, and its gradient by the logits.

    Args:
        p: [K, H, W], softmax.
        label: [1, H, W] int64.
        counts: [H, W] bool: whether a pixel does.
    """
    k = len(p)
    right = p.gather(0, label)[0] * counts  # p of a pixel's own class
    flat = label.flatten()
    area = torch.bincount(flat, weights=counts.flatten().float(), minlength=k).to(p.dtype)
    both = torch.bincount(flat, weights=right.flatten(), minlength=k).to(p.dtype)
    total = (p.flatten(1) @ counts.flatten().to(p.dtype) + area).clamp(min=1)  # of a class that is shown: >= 1
    share = (area > 0) / (area > 0).sum().clamp(min=1)
    loss = (share * (1 - 2 * both / total)).sum()
    # d loss / d p = a_k - b_k [k is the pixel's class]; softmax takes its mean under p off, and multiplies by p
    a, b = share * 2 * both / total**2, share * 2 / total
    own = b[flat].view_as(right) * right
    mean = (a @ p.flatten(1)).view_as(right) * counts - own
    grad = p * (a[:, None, None] * counts - mean)
    return loss, grad.scatter_add_(0, label, -own[None])


def upsampling(size: int, to: int, device: torch.device) -> Tensor:
    """The matrix [to, size] of linear resampling, corners not aligned: ``F.interpolate`` of the unit matrix."""
    unit = torch.eye(size, device=device)[None]
    return F.interpolate(unit, size=to, mode="linear", align_corners=False)[0].T.contiguous()


def class_maps(logits: Tensor, sizes: list[Size]) -> list[Tensor]:
    """The most likely class of every pixel of the original images.

    Args:
        logits: [B, K, h, w].
        sizes: height and width of each original image, pixels.
    Returns:
        For each image a map [H, W] uint8; of equal logits the lower class.
    """
    maps = []
    for low, size in zip(logits.float().split(1), sizes, strict=True):
        # With the channels last, the search runs along memory: a third of the time.
        low = low.contiguous(memory_format=torch.channels_last)
        if not torch.compiler.is_compiling() and low.shape[1] * size[0] * size[1] > AT_ONCE:
            maps.append(_large_map(low, size))
            continue
        full = F.interpolate(low, size=size, mode="bilinear", align_corners=False)
        maps.append(_best(full[0].permute(1, 2, 0)))
    return maps


def _best(logits: Tensor) -> Tensor:
    """Where the largest is along the last dimension, of equals the first; exporters know argmax, max is quicker."""
    found = logits.argmax(-1) if torch.compiler.is_compiling() else logits.max(-1).indices
    return found.to(torch.uint8)


def _large_map(low: Tensor, size: Size) -> Tensor:
    """One class map, some rows at a time: the logits of a 40-megapixel photo of 12 classes would take 2 GB."""
    wide = F.interpolate(low, size=(low.shape[2], size[1]), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    place = ((torch.arange(size[0], device=low.device) + 0.5) * (low.shape[2] / size[0]) - 0.5).clamp_(min=0)
    above = place.long()
    below, share = (above + 1).clamp_(max=low.shape[2] - 1), (place - above)[:, None, None]
    full = torch.empty(size, dtype=torch.uint8, device=low.device)
    for rows in torch.arange(size[0], device=low.device).split(max(1, AT_ONCE // (8 * size[1] * low.shape[1]))):
        full[rows] = _best(torch.lerp(wide[above[rows]], wide[below[rows]], share[rows]))
    return full


def rename_head(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The entries ``classifier.*`` of one of torchvision's segmentation models, under our names; no others.

    Args:
        state: of the whole model, or what is left of it without the backbone.
        names: layer below ``classifier`` -> our layer.
    Raises:
        ValueError: a layer is not in ``names``; lists all of them.
    """
    split = {key: key.removeprefix("classifier.").rpartition(".") for key in state if key.startswith("classifier.")}
    unknown = [key for key, (layer, _, _) in split.items() if layer not in names]
    if unknown or not split:
        raise ValueError(
            f"the checkpoint is of another head: {', '.join(unknown) or 'no entry classifier.*'} has no counterpart; "
            "choose the head it was trained with"
        )
    return {f"{names[layer]}.{part}": state[key] for key, (layer, _, part) in split.items()}
