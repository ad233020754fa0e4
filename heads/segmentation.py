"""What the segmentation heads share: logits at the head's stride to a loss, and to class maps of the original size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.compiled import EXACT, call, library
from heads import Size

SOURCE = Path(__file__).with_name("segmentation.cpp")

IGNORE = 255
"""The value of a mask's pixels that count in no loss."""

AUXILIARY = "aux_classifier."
"""A second head that torchvision's segmentation models may have, for training only; ours do without."""

AT_ONCE = 1 << 17
"""Pixels of a class map that are calculated in one go: 512 KB a class, which stays in a core's cache."""


def class_weight_tensor(weights: Sequence[float] | None, num_classes: int) -> Tensor:
    """Weights of the classes in the loss as a tensor [K]; ones for None.

    Raises:
        ValueError: more than 255 classes, another number of weights than classes, one that is no number >= 0, or no
            weight above 0.
    """
    if num_classes > IGNORE:
        raise ValueError(
            f"head.num_classes is {num_classes}; expected {IGNORE} at most: maps hold bytes, {IGNORE} is void"
        )
    if weights is None:
        return torch.ones(num_classes)
    if len(weights) != num_classes or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise ValueError(
            f"head.class_weights is {list(weights)}; expected {num_classes} finite numbers >= 0, one a class and not "
            "all 0; correct it, or leave it null"
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
            ctx.save_for_backward(torch.stack(grads, dim=1))  # float32: a pixel's share is too small for float16
            ctx.dtype = logits.dtype
        return loss, overlap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        total = sum(part * grad.to(part.dtype) for part, grad in zip(saved, grads, strict=False))
        assert isinstance(total, Tensor)
        return total.to(ctx.dtype), None, None, None


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
    """The most likely class of every pixel of the original images, by their logits upsampled (bilinear).

    Args:
        logits: [B, K, h, w].
        sizes: height and width of each original image, pixels.
    Returns:
        For each image a map [H, W] uint8; of equal logits the lower class.
    """
    pairs = zip(logits.float(), sizes, strict=True)
    if torch.compiler.is_compiling():  # exporters know these operators
        wide = (F.interpolate(low[None], size=size, mode="bilinear", align_corners=False)[0] for low, size in pairs)
        return [full.argmax(0).to(torch.uint8) for full in wide]
    if logits.device.type == "cpu" and (compiled := library(SOURCE, EXACT)[0]) is not None:
        maps = []
        for low, size in pairs:
            maps.append(torch.empty(size, dtype=torch.uint8))
            call(
                compiled, "class_map", low.detach(), *low.shape, *low.stride(), maps[-1], *size, torch.get_num_threads()
            )
        return maps
    return [_class_map(low.permute(1, 2, 0).contiguous(), size) for low, size in pairs]


@torch.no_grad()
def _class_map(low: Tensor, size: Size) -> Tensor:
    """One image's map from its logits [h, w, K].

    A pixel lies in a cell between four logits. Where their best classes agree, so does that of all between them, which
    settles most of an image. In the other cells few classes can win: none that another one beats at all four corners.
    """
    rows, columns = _Axis.of(low.shape[0], size[0], low.device), _Axis.of(low.shape[1], size[1], low.device)
    best = low.max(2).indices.to(torch.uint8)  # of equals the first
    above, below = best[rows.before], best[rows.after]
    corner = above[:, columns.before]
    full = corner[:, columns.cell].index_select(0, rows.cell)
    same = (above[:, columns.after] == corner) & (below[:, columns.before] == corner)
    same &= below[:, columns.after] == corner
    row, column = (~same & rows.filled[:, None] & columns.filled).nonzero(as_tuple=True)  # [n]
    if not len(row):
        return full
    top, bottom, left, right = rows.before[row], rows.after[row], columns.before[column], columns.after[column]
    corners = torch.stack([low[top, left], low[top, right], low[bottom, left], low[bottom, right]])  # [4, n, K]
    middle = corners.sum(0).max(1, keepdim=True).indices
    wins = (corners >= corners.gather(2, middle.expand(4, -1, -1))).any(0)  # [n, K] bool: whether a class can
    many, order = wins.sum(1).sort(descending=True)
    labels = wins.sort(dim=1, descending=True, stable=True).indices  # those that can, by number
    step = max(1, AT_ONCE // (rows.pixels.shape[1] * columns.pixels.shape[1]))
    for cells, counts in zip(order.split(step), many.split(step), strict=True):
        y, x = rows.pixels[row[cells]].T, columns.pixels[column[cells]].T  # [p, n], [q, n]
        ends = (counts[:, None] > torch.arange(int(counts[0]), device=low.device)).sum(0).tolist()
        found = _likeliest(corners[:, cells], labels[cells], ends, rows.share[y], columns.share[x])
        full[y[:, None], x] = found
    return full


def _likeliest(corners: Tensor, labels: Tensor, ends: list[int], down: Tensor, across: Tensor) -> Tensor:
    """The likeliest class of every pixel of some cells, [p, q, n] uint8.

    Args:
        corners: [4, n, K] logits.
        labels: [n, K] the classes to compare first.
        ends: how many cells, from the first, have more than 0, 1, ... classes to compare.
        down: [p, n] of the way from the upper corners to the lower ones.
        across: [q, n] of the way from the left corners to the right ones.
    """
    most = corners.new_full((len(down), *across.shape), -torch.inf)
    found = torch.zeros_like(most, dtype=torch.uint8)
    for rank, n in enumerate(ends):
        label = labels[:n, rank]
        upper_left, upper_right, lower_left, lower_right = corners[:, torch.arange(n, device=label.device), label]
        left = torch.lerp(upper_left, lower_left, down[:, :n])  # [p, n]
        right = torch.lerp(upper_right, lower_right, down[:, :n])
        logit = torch.lerp(left[:, None], right[:, None], across[:, :n])  # [p, q, n]
        found[..., :n] = torch.where(logit > most[..., :n], label.to(torch.uint8), found[..., :n])
        torch.maximum(logit, most[..., :n], out=most[..., :n])
    return found


class _Axis(NamedTuple):
    """The cells of one axis, between ``size`` logits and before the first and behind the last; ``to`` pixels."""

    before: Tensor
    """[size + 1] the logit before each cell; of the first, the one after it."""
    after: Tensor
    """[size + 1] the logit after each cell; of the last, the one before it."""
    cell: Tensor
    """[to] of each pixel."""
    share: Tensor
    """[to] of the way from the logit before a pixel to the one after it, in [0, 1)."""
    filled: Tensor
    """[size + 1] bool: whether a cell has pixels."""
    pixels: Tensor
    """[size + 1, most] the pixels of each cell, the last one repeated."""

    @classmethod
    def of(cls, size: int, to: int, device: torch.device) -> _Axis:
        place = (torch.arange(to, device=device) + 0.5) * (size / to) + 0.5
        cell = place.long()
        count = torch.bincount(cell, minlength=size + 1)
        last = count.cumsum(0) - 1
        pixels = torch.minimum(
            (last - count + 1)[:, None] + torch.arange(int(count.max()), device=device), last[:, None]
        )
        logit = torch.arange(size + 1, device=device)
        return cls((logit - 1).clamp_(min=0), logit.clamp(max=size - 1), cell, place - cell, count > 0, pixels)


def rename_head(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The entries ``classifier.*`` of one of torchvision's segmentation models, under our names.

    Left out are the backbone's and those of ``AUXILIARY``.

    Args:
        state: of the whole model, or what is left of it without the backbone.
        names: layer below ``classifier`` -> our layer.
    Raises:
        ValueError: any other entry, or a layer that is not in ``names``; lists all of them.
    """
    split = {key: key.removeprefix("classifier.").rpartition(".") for key in state if key.startswith("classifier.")}
    unknown = [key for key, (layer, _, _) in split.items() if layer not in names]
    unknown += [key for key in state if not key.startswith(("classifier.", AUXILIARY, "backbone."))]
    if unknown or not split:
        raise ValueError(
            f"the checkpoint is of another head: {', '.join(unknown) or 'no entry classifier.*'} has no counterpart; "
            "choose the head it was trained with"
        )
    return {f"{names[layer]}.{part}": state[key] for key, (layer, _, part) in split.items()}
