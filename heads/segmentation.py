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


def pixel_loss(logits: Tensor, mask: Tensor, class_weights: Tensor) -> Tensor:
    """Cross entropy of the logits upsampled (bilinear, corners not aligned) to the mask's size.

    Args:
        logits: [B, K, h, w].
        mask: [B, H, W] int64: class, or 255 = ignored.
        class_weights: [K] float32.
    Returns:
        Scalar float32: the mean over the pixels by their classes' weights; 0 where every pixel is ignored.
    Raises:
        ValueError: a value of the mask is neither a class nor 255.
    """
    return _PixelLoss.apply(logits, mask, class_weights)


class _PixelLoss(torch.autograd.Function):
    """Goes image by image, with upsampling as two matrix products, and takes the gradient on the way.

    Only one image's full-size logits live at a time, and they are still in cache when their gradient is due: half the
    time of ``F.interpolate`` and ``F.cross_entropy`` (8 x 11 x 360 x 480, one thread of an AMD EPYC, forward and
    backward, interleaved: 114 against 231 ms, medians of 11).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask: Tensor, class_weights: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            rows = upsampling(logits.shape[2], mask.shape[1], logits.device)  # [H, h]
            columns = upsampling(logits.shape[3], mask.shape[2], logits.device)  # [W, w]
            counts = torch.bincount(mask.flatten(), minlength=IGNORE + 1)
            k = len(class_weights)
            if counts[k:IGNORE].any() or len(counts) > IGNORE + 1:
                strange = {
                    value: int(n) for value, n in enumerate(counts.tolist()) if n and value >= k and value != IGNORE
                }
                raise ValueError(
                    f"a mask holds values outside the head's {k} classes (value: pixels) {strange}; "
                    "correct the masks, or the data set's class list"
                )
            table = F.pad(class_weights, (0, IGNORE + 1 - k))
            table /= (table * counts).sum().clamp(min=torch.finfo(table.dtype).tiny)
            loss, grads = table.new_zeros(()), []
            for low, label in zip(logits.float(), mask, strict=True):
                weight, label = table[label], label.masked_fill(label == IGNORE, 0)[None]
                log_p = F.log_softmax(rows @ (low @ columns.T), 0)  # [K, H, W]
                loss -= (log_p.gather(0, label)[0] * weight).sum()
                if ctx.needs_input_grad[0]:
                    # d loss / d logit = weight x (p - one-hot), brought down by the transposed upsampling
                    p = log_p.exp_().scatter_add_(0, label, log_p.new_full((), -1.0).expand_as(label))
                    grads.append(rows.T @ p.mul_(weight) @ columns)
        if grads:
            ctx.save_for_backward(torch.stack(grads).to(logits.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grads,) = ctx.saved_tensors
        return grads * grad.to(grads.dtype), None, None


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
        # With the channels last, argmax runs along memory: a third of the time.
        low = low.contiguous(memory_format=torch.channels_last)
        if not torch.compiler.is_compiling() and low.shape[1] * size[0] * size[1] > AT_ONCE:
            maps.append(_large_map(low, size))
            continue
        full = F.interpolate(low, size=size, mode="bilinear", align_corners=False)
        maps.append(full[0].permute(1, 2, 0).argmax(-1).to(torch.uint8))
    return maps


def _large_map(low: Tensor, size: Size) -> Tensor:
    """One class map, some rows at a time: the logits of a 40-megapixel photo of 12 classes would take 2 GB."""
    wide = F.interpolate(low, size=(low.shape[2], size[1]), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    place = ((torch.arange(size[0], device=low.device) + 0.5) * (low.shape[2] / size[0]) - 0.5).clamp_(min=0)
    above = place.long()
    below, share = (above + 1).clamp_(max=low.shape[2] - 1), (place - above)[:, None, None]
    full = torch.empty(size, dtype=torch.uint8, device=low.device)
    for rows in torch.arange(size[0], device=low.device).split(max(1, AT_ONCE // (8 * size[1] * low.shape[1]))):
        full[rows] = torch.lerp(wide[above[rows]], wide[below[rows]], share[rows]).argmax(-1).to(torch.uint8)
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
