"""MobileNetV1, built from its paper's Table 1.

Source: MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications, arXiv 1704.04861.
"""

from __future__ import annotations

from typing import NamedTuple

from backbones.blocks import BN_MOMENTUM, round_channels
from backbones.trunk import Plan, Trunk, settle


class Row(NamedTuple):
    """Two rows of the paper's table: a depthwise 3x3 at this stride, then a 1x1 with this many outputs."""

    stride: int
    out: int


# A full 3x3 convolution with 32 channels at stride 2 before.
TABLE = (
    Row(1, 64),  # 112² x 32
    Row(2, 128),
    Row(1, 128),  # 56² x 128
    Row(2, 256),
    Row(1, 256),  # 28² x 256
    Row(2, 512),
    Row(1, 512),  # 14² x 512, five times
    Row(1, 512),
    Row(1, 512),
    Row(1, 512),
    Row(1, 512),
    Row(2, 1024),
    Row(1, 1024),  # 7² x 1024; the table prints stride 2, its size and all code say 1
)


class MobileNetV1(Trunk):
    """MobileNetV1 as a backbone; features are described in ``Trunk``. There is no expansion: c4_expand is c4.

    Args:
        width: multiplies all channels, > 0; the paper's alpha.
        output_stride: 32, or 16: the last stage keeps stride 16 and dilates its kernels by 2.
        reduced_tail: None, "detection" or "segmentation" (the same here): 1024, 1024 become 512, 512.
        padding: "auto", "symmetric" or "same"; see ``Trunk``.
        bn_momentum: weight of the new batch in the running statistics.
        weights: None or a file; see ``weights.load_weights``.
    Raises:
        ValueError: a value that is not allowed; weights that do not fit.
    Differs: ReLU6 where the paper says ReLU, as in the authors' code; batch norm's eps is 1e-3 as there.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        output_stride: int = 32,
        reduced_tail: str | None = None,
        padding: str = "auto",
        bn_momentum: float = BN_MOMENTUM,
        weights: str | None = None,
    ) -> None:
        plans = [Plan(3, 1, row.out, row.stride, "relu6", output_activation="relu6", skip=False) for row in TABLE]
        stem = round_channels(32 * width)
        super().__init__(
            (stem, "relu6"),
            settle(plans, stem, width, output_stride, reduced_tail),
            None,
            gate="sigmoid",
            padding=padding,
            bn_momentum=bn_momentum,
            layout="v2",
            published=None,
            weights=weights,
        )
