"""MobileNetV2, built from its paper's Table 2.

Source: MobileNetV2: Inverted Residuals and Linear Bottlenecks, arXiv 1801.04381.
"""

from __future__ import annotations

from typing import NamedTuple

from backbones.blocks import BN_MOMENTUM, check_choice, round_channels
from backbones.trunk import Plan, Trunk, settle

PUBLISHED = "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth"  # torchvision's IMAGENET1K_V1
LAST_LAYERS = ("fixed", "scaled", "none")


class Row(NamedTuple):
    """A row of the paper's table: n blocks, the first at stride s."""

    t: int
    """Expansion factor."""
    c: int
    n: int
    s: int


# conv2d 3x3 with 32 channels at stride 2 before, conv2d 1x1 with 1280 channels after.
TABLE = (
    #   t   c  n  s    input
    Row(1, 16, 1, 1),  # 112² x 32
    Row(6, 24, 2, 2),  # 112² x 16
    Row(6, 32, 3, 2),  # 56² x 24
    Row(6, 64, 4, 2),  # 28² x 32
    Row(6, 96, 3, 1),  # 14² x 64
    Row(6, 160, 3, 2),  # 14² x 96
    Row(6, 320, 1, 1),  # 7² x 160
)


class MobileNetV2(Trunk):
    """MobileNetV2 as a backbone; features are described in ``Trunk``.

    Args:
        width: multiplies all channels, > 0.
        output_stride: 32, or 16: the last stage keeps stride 16 and dilates its kernels by 2.
        reduced_tail: None, "detection" or "segmentation" (the same here: the sizes printed in the V3 paper's Table 7
            come out so): 160, 160, 160, 320, 1280 become half.
        last_layer: "fixed": the 1x1 convolution before the pooling keeps its 1280 channels below width 1; "scaled": it
            does not (TensorFlow's detectors); "none": there is none, c5 has 320 channels (the V3 paper's Table 7).
        padding: "auto", "symmetric" or "same"; see ``Trunk``.
        bn_momentum: weight of the new batch in the running statistics.
        weights: None, "imagenet" or a file; see ``weights.load_weights``.
    Raises:
        ValueError: a value that is not allowed; weights that do not fit.
    Differs: batch norm's eps is 1e-3 as in TensorFlow (loaded weights keep their function; see ``naming``).
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        output_stride: int = 32,
        reduced_tail: str | None = None,
        last_layer: str = "fixed",
        padding: str = "auto",
        bn_momentum: float = BN_MOMENTUM,
        weights: str | None = None,
    ) -> None:
        plans = [Plan(3, row.t, row.c, row.s if i == 0 else 1, "relu6") for row in TABLE for i in range(row.n)]
        stem = round_channels(32 * width)
        last = last_channels(1280, last_layer, width, reduced_tail)
        super().__init__(
            (stem, "relu6"),
            settle(plans, stem, width, output_stride, reduced_tail),
            (last, "relu6") if last else None,
            gate="sigmoid",
            padding=padding,
            bn_momentum=bn_momentum,
            layout="v2",
            published=PUBLISHED,
            weights=weights,
        )


def last_channels(printed: int, last_layer: str, width: float, reduced_tail: str | None) -> int:
    """Channels of the 1x1 convolution before the pooling; 0: there is none.

    Raises:
        ValueError: unknown ``last_layer``.
    """
    check_choice("last_layer", last_layer, LAST_LAYERS)
    if last_layer == "none":
        return 0
    scale = width if last_layer == "scaled" else max(1.0, width)
    return round_channels((printed // 2 if reduced_tail else printed) * scale)
