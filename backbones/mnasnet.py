"""MnasNet-A1, from whose search MobileNetV3-Large started, and MnasNet-small.

Source: MnasNet: Platform-Aware Neural Architecture Search for Mobile, arXiv 1807.11626, Figure 7 (A1); small: the
authors' code, tensorflow/tpu models/official/mnasnet/mnasnet_models.py.
"""

from __future__ import annotations

from typing import NamedTuple

from backbones.blocks import BN_MOMENTUM, GATES, check_choice, round_channels
from backbones.mobilenetv2 import last_channels
from backbones.trunk import Plan, Trunk, settle


class Row(NamedTuple):
    """A stage: n blocks, the first at stride s."""

    kernel: int
    expand: int
    out: int
    n: int
    s: int
    squeeze_excite: bool
    skip: bool


YES, NO = True, False

# conv2d 3x3 at stride 2 before (32 channels, small: 8), conv2d 1x1 with 1280 channels after; ReLU throughout.
A1 = (
    #   k  e  out  n  s  SE   skip    input
    Row(3, 1, 16, 1, 1, NO, NO),  # 112² x 32: SepConv
    Row(3, 6, 24, 2, 2, NO, YES),
    Row(5, 3, 40, 3, 2, YES, YES),  # 56² x 24
    Row(3, 6, 80, 4, 2, NO, YES),  # 28² x 40
    Row(3, 6, 112, 2, 1, YES, YES),  # 14² x 80
    Row(5, 6, 160, 3, 2, YES, YES),
    Row(3, 6, 320, 1, 1, NO, YES),  # 7² x 160
)
SMALL = (
    #   k  e  out  n  s  SE   skip    input
    Row(3, 1, 8, 1, 1, NO, YES),  # 112² x 8
    Row(3, 3, 16, 1, 2, NO, YES),
    Row(3, 6, 16, 2, 2, NO, YES),  # 56² x 16
    Row(5, 6, 32, 4, 2, YES, YES),  # 28² x 16
    Row(3, 6, 32, 3, 1, YES, YES),  # 14² x 32
    Row(5, 6, 88, 3, 2, YES, YES),
    Row(3, 6, 144, 1, 1, NO, YES),  # 7² x 88
)
TABLES = {"a1": (32, A1), "small": (8, SMALL)}


class MnasNet(Trunk):
    """MnasNet as a backbone; features are described in ``Trunk``.

    Args:
        variant: "a1" or "small".
        width: multiplies all channels, > 0.
        output_stride: 32, or 16: the last stage keeps stride 16 and dilates its kernels by 2.
        reduced_tail: None, "detection" or "segmentation" (the same here): halves the outputs after stride 16.
        last_layer: "fixed", "scaled" or "none"; see ``MobileNetV2``.
        se_ratio: squeeze-excite's bottleneck over the block's *input*; 0 takes all squeeze-excite out.
        se_gate: "sigmoid" or "hard_sigmoid".
        padding: "auto", "symmetric" or "same"; see ``Trunk``.
        bn_momentum: weight of the new batch in the running statistics.
        weights: None or a file; see ``weights.load_weights``.
    Raises:
        ValueError: a value that is not allowed; weights that do not fit.
    """

    def __init__(
        self,
        variant: str,
        *,
        width: float = 1.0,
        output_stride: int = 32,
        reduced_tail: str | None = None,
        last_layer: str = "fixed",
        se_ratio: float = 0.25,
        se_gate: str = "sigmoid",
        padding: str = "auto",
        bn_momentum: float = BN_MOMENTUM,
        weights: str | None = None,
    ) -> None:
        check_choice("variant", variant, list(TABLES))
        check_choice("se_gate", se_gate, list(GATES))
        if not 0 <= se_ratio <= 1:
            raise ValueError(f"se_ratio={se_ratio} is outside [0, 1]; MnasNet has 0.25, and 0 means no squeeze-excite")
        first, table = TABLES[variant]
        rows = [row._replace(s=row.s if i == 0 else 1) for row in table for i in range(row.n)]
        stem = round_channels(first * width)
        plans = [Plan(row.kernel, row.expand, row.out, row.s, "relu", skip=row.skip) for row in rows]
        blocks = settle(plans, stem, width, output_stride, reduced_tail)
        last = last_channels(1280, last_layer, width, reduced_tail)
        super().__init__(
            (stem, "relu"),
            [
                block._replace(squeeze=max(1, round(block.inputs * se_ratio)))
                if row.squeeze_excite and se_ratio
                else block
                for block, row in zip(blocks, rows, strict=True)
            ],
            (last, "relu") if last else None,
            gate=se_gate,
            padding=padding,
            bn_momentum=bn_momentum,
            layout="v2",
            published=None,
            weights=weights,
        )
