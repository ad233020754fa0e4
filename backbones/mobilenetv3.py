"""MobileNetV3 Large and Small, built from the paper's Tables 1 and 2.

Source: Searching for MobileNetV3, arXiv 1905.02244; widths and tails as in the authors' code (tensorflow/models
research/slim/nets/mobilenet/mobilenet_v3.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from backbones.blocks import BN_MOMENTUM, GATES, check_choice, round_channels
from backbones.trunk import Plan, Trunk, settle


class Row(NamedTuple):
    """A row of the paper's tables."""

    operator: str
    kernel: int
    expand: int | None
    out: int
    squeeze_excite: bool
    nonlinearity: str
    stride: int


RE, HS, SE, NO = "relu", "hswish", True, False

# Pooling and the two 1x1 convolutions without batch norm, the last rows of both tables, are the classification head's.
LARGE = (
    #    operator  k   exp   out  SE  NL  s     input
    Row("conv2d", 3, None, 16, NO, HS, 2),  # 224² x 3
    Row("bneck", 3, 16, 16, NO, RE, 1),  # 112² x 16
    Row("bneck", 3, 64, 24, NO, RE, 2),
    Row("bneck", 3, 72, 24, NO, RE, 1),  # 56² x 24
    Row("bneck", 5, 72, 40, SE, RE, 2),
    Row("bneck", 5, 120, 40, SE, RE, 1),  # 28² x 40
    Row("bneck", 5, 120, 40, SE, RE, 1),
    Row("bneck", 3, 240, 80, NO, HS, 2),
    Row("bneck", 3, 200, 80, NO, HS, 1),  # 14² x 80
    Row("bneck", 3, 184, 80, NO, HS, 1),
    Row("bneck", 3, 184, 80, NO, HS, 1),
    Row("bneck", 3, 480, 112, SE, HS, 1),
    Row("bneck", 3, 672, 112, SE, HS, 1),  # 14² x 112
    Row("bneck", 5, 672, 160, SE, HS, 2),
    Row("bneck", 5, 960, 160, SE, HS, 1),  # 7² x 160
    Row("bneck", 5, 960, 160, SE, HS, 1),
    Row("conv2d", 1, None, 960, NO, HS, 1),
)

# Table 2 ticks squeeze-excite for the 576-channel convolution; its printed parameters and all code are without it.
SMALL = (
    #    operator  k   exp   out  SE  NL  s     input
    Row("conv2d", 3, None, 16, NO, HS, 2),  # 224² x 3
    Row("bneck", 3, 16, 16, SE, RE, 2),  # 112² x 16
    Row("bneck", 3, 72, 24, NO, RE, 2),  # 56² x 16
    Row("bneck", 3, 88, 24, NO, RE, 1),  # 28² x 24
    Row("bneck", 5, 96, 40, SE, HS, 2),
    Row("bneck", 5, 240, 40, SE, HS, 1),  # 14² x 40
    Row("bneck", 5, 240, 40, SE, HS, 1),
    Row("bneck", 5, 120, 48, SE, HS, 1),
    Row("bneck", 5, 144, 48, SE, HS, 1),  # 14² x 48
    Row("bneck", 5, 288, 96, SE, HS, 2),
    Row("bneck", 5, 576, 96, SE, HS, 1),  # 7² x 96
    Row("bneck", 5, 576, 96, SE, HS, 1),
    Row("conv2d", 1, None, 576, NO, HS, 1),
)

TABLES = {"large": LARGE, "small": SMALL}
PUBLISHED = {
    # torchvision's IMAGENET1K_V1
    "large": "https://download.pytorch.org/models/mobilenet_v3_large-8738ca79.pth",
    "small": "https://download.pytorch.org/models/mobilenet_v3_small-047dcff4.pth",
}
ORIGINAL_LAST_STAGE = (
    # The paper's Figure 5, above: what the last stage was before it was made cheap; pooling and classifier follow.
    Row("bneck", 3, 960, 320, NO, HS, 1),
    Row("conv2d", 1, None, 1280, NO, HS, 1),
)


class MobileNetV3(Trunk):
    """MobileNetV3 as a backbone; features are described in ``Trunk``.

    Args:
        variant: "large" or "small".
        width: multiplies all channels, > 0; the paper uses 0.35, 0.5, 0.75, 1.0, 1.25.
        output_stride: 32, or 16: the last stage keeps stride 16 and dilates its kernels by 2.
        reduced_tail: None; "detection": the last stage's outputs are halved (672 -> 80 ... 480); "segmentation":
            its first expansion too (336 -> 80 ... 480).
        minimalistic: no squeeze-excite, no h-swish, no 5x5.
        nonlinearity: "table"; "relu" everywhere; "swish" where the table has h-swish; "hswish@N": h-swish in the
            blocks with N or more output channels (at width 1) and in the last layer, ReLU before. "table" is
            hswish@80 for Large.
        stem_width: channels of the first layer, before the width multiplier.
        stem_nonlinearity: of the first layer; None: as the table and ``nonlinearity`` say (h-swish@N: h-swish).
        se_ratio: squeeze-excite's bottleneck over the expansion; 0 takes all squeeze-excite out.
        se_of: what ``se_ratio`` is of: "expansion" (section 5.3), or "input" of the block, as in MnasNet before.
        se_gate: "hard_sigmoid" or "sigmoid".
        last_stage: "efficient", or (large only) "original": the paper's Figure 5 before the redesign; then c5 has 1280
            channels and the classifier follows the pooling directly.
        padding: "auto", "symmetric" or "same"; see ``Trunk``.
        bn_momentum: weight of the new batch in the running statistics.
        weights: None, "imagenet" or a file; see ``weights.load_weights``.
    Raises:
        ValueError: a value that is not allowed, with the list of those that are; weights that do not fit.
    Source: the paper, Tables 1 and 2; reduced tails: section 6.3 and 6.4 with the authors' code.
    Differs: the expansion of a widened net is a multiple of its rounded input (the authors' code, and the printed
        sizes of Table 9), where torchvision scales the printed expansion. With output_stride=16 all kernels of the last
        stage are dilated as in torchvision; the authors' code leaves the first block's as it is.
    """

    def __init__(
        self,
        variant: str,
        *,
        width: float = 1.0,
        output_stride: int = 32,
        reduced_tail: str | None = None,
        minimalistic: bool = False,
        nonlinearity: str = "table",
        stem_width: int = 16,
        stem_nonlinearity: str | None = None,
        se_ratio: float = 0.25,
        se_of: str = "expansion",
        se_gate: str = "hard_sigmoid",
        last_stage: str = "efficient",
        padding: str = "auto",
        bn_momentum: float = BN_MOMENTUM,
        weights: str | None = None,
    ) -> None:
        check_choice("variant", variant, list(TABLES))
        check_choice("stem_nonlinearity", stem_nonlinearity, (None, "relu", "hswish", "swish"))
        check_choice("se_of", se_of, ("expansion", "input"))
        check_choice("se_gate", se_gate, list(GATES))
        check_choice("last_stage", last_stage, ("efficient", "original") if variant == "large" else ("efficient",))
        if not 0 <= se_ratio <= 1:
            raise ValueError(
                f"se_ratio={se_ratio} is outside [0, 1]; the paper uses 0.25, and 0 means no squeeze-excite"
            )

        rows = list(TABLES[variant])
        if last_stage == "original":
            rows[-1:] = ORIGINAL_LAST_STAGE
        if minimalistic:
            rows = [row._replace(kernel=min(row.kernel, 3), squeeze_excite=False, nonlinearity=RE) for row in rows]
        stem, *bnecks, last = _set_nonlinearity(rows, nonlinearity)
        stem_channels = round_channels(stem_width * width)
        blocks = settle(
            list(_plans(bnecks, stem.out)),
            stem_channels,
            width,
            output_stride,
            reduced_tail,
            halves_expansion=reduced_tail == "segmentation",
        )
        last_channels = last.out // 2 if reduced_tail else last.out
        super().__init__(
            (stem_channels, stem_nonlinearity or stem.nonlinearity),
            [
                block._replace(
                    squeeze=round_channels((block.expand if se_of == "expansion" else block.inputs) * se_ratio)
                )
                if row.squeeze_excite and se_ratio
                else block
                for block, row in zip(blocks, bnecks, strict=True)
            ],
            (round_channels(last_channels * width), last.nonlinearity),
            gate=se_gate,
            padding=padding,
            bn_momentum=bn_momentum,
            layout="v3",
            published=None if minimalistic else PUBLISHED[variant],
            weights=weights,
        )


def _set_nonlinearity(rows: Sequence[Row], choice: str) -> Iterator[Row]:
    first, _, at = choice.partition("@")
    if choice not in ("table", "relu", "swish") and not (first == "hswish" and at.isdecimal()):
        raise ValueError(
            f"nonlinearity={choice!r} is unknown; choose one of 'table', 'relu', 'swish', 'hswish@N' (say 'hswish@112')"
        )
    for row in rows:
        if choice == "relu":
            yield row._replace(nonlinearity=RE)
        elif choice == "swish":
            yield row._replace(nonlinearity="swish" if row.nonlinearity == HS else row.nonlinearity)
        elif first == "hswish" and row.operator == "bneck":
            yield row._replace(nonlinearity=HS if row.out >= int(at) else RE)
        else:
            yield row


def _plans(rows: Sequence[Row], printed_inputs: int) -> Iterator[Plan]:
    for row in rows:
        assert row.expand is not None
        yield Plan(row.kernel, row.expand / printed_inputs, row.out, row.stride, row.nonlinearity)
        printed_inputs = row.out
