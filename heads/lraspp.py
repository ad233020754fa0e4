"""LR-ASPP, the paper's light segmentation head, and torchvision's variant of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import FeatureSpec
from backbones.blocks import GATES, ConvNormAct, check_choice
from heads import Size, check_count, check_range, select
from heads.segmentation import class_maps, class_weight_tensor, pixel_loss, rename_head

TORCHVISION_NAMES = {
    "cbr.0": "branch.conv",
    "cbr.1": "branch.norm",
    "scale.1": "gate_conv",
    "low_classifier": "low_classifier",
    "high_classifier": "high_classifier",
}
"""Layers of torchvision's head, and ours with ``gate_bias=False``."""

PRINTED_MAP = (65, 129)
"""The map at stride 16 of Cityscapes' 1024 x 2048 as the authors pad it (1025 x 2049); the printed windows fill it."""


class LRASPP(nn.Module):
    """A 1x1 convolution on the last features, gated by their average over large windows; plus a skip from stride 8.

    ``pool``, ``pool_stride`` and ``gate`` tell the paper's form from torchvision's (``pool=None, gate="sigmoid",
    gate_bias=False, low="c3_first"``).

    Args:
        specs: what the backbone gives.
        num_classes: K.
        high: the feature that is pooled and gated.
        low: the feature of the skip; its stride is the output's.
        channels: F of the paper's Table 7, of the gated branch.
        pool: height and width of the averaging windows on a map of ``PRINTED_MAP``; windows and strides shrink with the
            map. None: one window over the whole map.
        pool_stride: their vertical and horizontal distance on that map.
        gate: "hard_sigmoid" or "sigmoid".
        gate_bias: whether the gate's convolution has biases.
        class_weights: K weights of the classes in the cross entropy; None: all 1.
        dice: weight of a Dice loss beside it, >= 0; see ``heads.segmentation.pixel_loss``.
        bn_eps: of the batch norm.
        bn_momentum: of the batch norm: the weight of the new batch.
    Raises:
        ValueError: a feature is missing, unknown gate, wrong number of class weights.
    Source: the paper, section 6.4 and Figure 10; the authors' tensorflow/models research/deeplab (hard sigmoid, skip
        from a depthwise output, windows); torchvision models/segmentation/lraspp.py.
    Differs: corners are not aligned when upsampling (as torchvision, and unlike the authors' code); a window that
        reaches over the border averages what is inside.
    """

    task: ClassVar[str] = "segment"

    def __init__(
        self,
        specs: dict[str, FeatureSpec],
        num_classes: int,
        *,
        high: str = "c5",
        low: str = "c3_depthwise",
        channels: int = 128,
        pool: Sequence[int] | None = (49, 49),
        pool_stride: Sequence[int] = (16, 20),
        gate: str = "hard_sigmoid",
        gate_bias: bool = True,
        class_weights: Sequence[float] | None = None,
        dice: float = 0.0,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("gate", gate, list(GATES))
        check_count("head.channels", channels)
        for name, lengths in (("pool", (1, 1) if pool is None else pool), ("pool_stride", pool_stride)):
            if len(lengths) != 2 or not all(type(length) is int and length > 0 for length in lengths):
                raise ValueError(f"head.{name} is {list(lengths)}; expected [height, width], whole numbers above 0")
        high_spec, low_spec = select(specs, (high, low), "lraspp")
        self.high, self.low = high, low
        self.pool, self.pool_stride = pool and tuple(pool), tuple(pool_stride)
        self.branch = ConvNormAct(high_spec.channels, channels, eps=bn_eps, momentum=bn_momentum)
        self.gate_conv = nn.Conv2d(high_spec.channels, channels, 1, bias=gate_bias)
        self.gate = GATES[gate]()
        self.high_classifier = nn.Conv2d(channels, num_classes, 1)
        self.low_classifier = nn.Conv2d(low_spec.channels, num_classes, 1)
        self.register_buffer("class_weights", class_weight_tensor(class_weights, num_classes), persistent=False)
        self.class_weights: Tensor
        check_range("head.dice", dice, 0)
        self.dice = float(dice)

    def forward(self, features: dict[str, Tensor], size: Size) -> Tensor:
        """Logits [B, K, h, w] at the low feature's stride."""
        high, low = features[self.high], features[self.low]
        x = self.branch(high) * self._gates(high)
        x = F.interpolate(x, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.high_classifier(x) + self.low_classifier(low)

    def _gates(self, high: Tensor) -> Tensor:
        if self.pool is None:
            return self.gate(self.gate_conv(high.mean((2, 3), keepdim=True)))
        if any(isinstance(side, torch.SymInt) for side in high.shape[-2:]):  # exported for any size
            return self._gates_of_any_size(high)
        window, stride = (scale(lengths, high.shape[-2:]) for lengths in (self.pool, self.pool_stride))
        gates = self.gate(self.gate_conv(F.avg_pool2d(high, window, stride, ceil_mode=True)))
        return F.interpolate(gates, size=high.shape[-2:], mode="bilinear", align_corners=False)

    def _gates_of_any_size(self, high: Tensor) -> Tensor:
        """The same by matrix products, for a pooling's window is a constant of an exported graph."""
        assert self.pool is not None
        rows, columns = (
            windows(side, *lengths)
            for side, *lengths in zip(high.shape[-2:], self.pool, self.pool_stride, PRINTED_MAP, strict=True)
        )
        gates = self.gate(self.gate_conv(rows.means @ high @ columns.means.T))
        return rows.spread @ gates @ columns.spread.T

    def loss(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross entropy at the mask's size; mask [B, H, W] int64, 255 = ignored."""
        return pixel_loss(output, target, self.class_weights, self.dice)

    def predict(self, output: Tensor, sizes: list[Size]) -> list[Tensor]:
        """Class maps [H, W] uint8 of the original sizes."""
        return class_maps(output, sizes)


class Windows(NamedTuple):
    """Of one side of a map of n cells, for at most N windows."""

    means: Tensor
    """[N, n]: cells to the windows' means; zeros for windows that the side is too short for."""
    spread: Tensor
    """[n, N]: the means back to cells, bilinearly."""


def windows(side: int, pool: int, stride: int, printed: int) -> Windows:
    """``F.avg_pool2d`` with ``ceil_mode`` and ``F.interpolate`` as matrices whose sizes alone depend on ``side``.

    Args:
        side: cells, n; may be symbolic.
        pool, stride: of the windows, on a side of ``printed`` cells.
        printed: cells.
    """
    most = math.ceil((printed - pool) / stride) + 1 if printed > pool else 1
    cell = torch.arange(side, dtype=torch.float32)
    length = cell[-1] + 1  # a tensor: exporters know its arithmetic better than that of symbolic numbers
    window, step = (length * pool / printed).ceil(), (length * stride / printed).ceil()
    count = torch.minimum(((length - window) / step).ceil(), ((length - 1) / step).floor()) + 1
    number = torch.arange(most, dtype=torch.float32)
    first = (number * step)[:, None]
    last = torch.minimum(first + window, length)
    inside = (cell >= first) & (cell < last) & (number < count)[:, None]
    means = inside / (last - first).clamp(min=1)
    place = ((cell + 0.5) * count / length - 0.5).clamp(min=0)
    below = torch.minimum(place.floor(), count - 1)[:, None]
    above, share = torch.minimum(below + 1, count - 1), place[:, None] - below
    return Windows(means, (number == below) * (1 - share) + (number == above) * share)


def scale(lengths: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """Lengths on ``PRINTED_MAP`` carried over to a map of ``size``, rounded up.

    Up, because then the 64 x 128 map of an unpadded 1024 x 2048 keeps the printed 49 x 49 and (16, 20).
    """
    height, width = (math.ceil(n * s / full) for n, s, full in zip(lengths, size, PRINTED_MAP, strict=True))
    return height, width


def torchvision_to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head's part of a state dict of torchvision's ``lraspp_mobilenet_v3_large``, under our names.

    Raises:
        ValueError: an entry of the head has no counterpart.
    """
    return rename_head(state, TORCHVISION_NAMES)
