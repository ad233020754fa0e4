"""The net that V1, V2, MnasNet and V3 are all instances of: a first convolution, blocks, a last 1x1 convolution.

Each network's own file holds its printed table; ``settle`` works out width, tail and dilation for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbones import FeatureSpec
from backbones.blocks import BlockSpec, ConvNormAct, InvertedResidual, check_choice, round_channels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PADDINGS = ("auto", "symmetric", "same")
TAILS = (None, "detection", "segmentation")


class Plan(NamedTuple):
    """A block as its table prints it, before width, tail and dilation."""

    kernel: int
    factor: float
    """Expansion over input channels."""
    out: int
    stride: int
    activation: str
    output_activation: str = "none"
    skip: bool = True


def settle(
    plans: Sequence[Plan],
    inputs: int,
    width: float,
    output_stride: int,
    reduced_tail: str | None,
    *,
    halves_expansion: bool = False,
) -> list[BlockSpec]:
    """The blocks with every number worked out; without squeeze-excite, which differs between the networks.

    Args:
        plans: the printed table.
        inputs: channels of the first convolution, width applied.
        width: multiplies all outputs; an expansion is a multiple of its rounded input.
        output_stride: 32, or 16: the blocks after stride 16 are dilated by 2 instead.
        reduced_tail: "detection" or "segmentation" halves the outputs after stride 16; None does not.
        halves_expansion: whether the expansion of the block that leaves stride 16 is halved as well.
    Raises:
        ValueError: a value outside of those.
    """
    check_choice("output_stride", output_stride, (32, 16))
    check_choice("reduced_tail", reduced_tail, TAILS)
    if not width > 0:
        raise ValueError(f"width={width} is not a multiplier; give a number above 0, such as 0.75")
    stride, blocks = 2, []
    for plan in plans:
        stride *= plan.stride
        in_tail = stride == 32
        leaves_16 = in_tail and plan.stride == 2
        expand = round_channels(inputs * plan.factor / (2 if leaves_16 and halves_expansion else 1))
        outputs = round_channels((plan.out // 2 if in_tail and reduced_tail else plan.out) * width)
        blocks.append(
            BlockSpec(
                kernel=plan.kernel,
                inputs=inputs,
                expand=expand,
                outputs=outputs,
                squeeze=0,
                activation=plan.activation,
                output_activation=plan.output_activation,
                stride=plan.stride,
                dilation=2 if in_tail and output_stride == 16 else 1,
                residual=plan.skip and plan.stride == 1 and inputs == outputs,
            )
        )
        inputs = outputs
    return blocks


class Trunk(nn.Module):
    """Images to named feature maps; the networks' own files turn their printed tables into ``blocks``.

    Args:
        stem: channels and activation of the first convolution, 3x3 at stride 2.
        blocks: the blocks in order, stride 4 to 32 among them.
        last: channels and activation of the 1x1 convolution before the pooling; None: the net has none.
        gate: squeeze-excite's gate, "hard_sigmoid" or "sigmoid".
        padding: "symmetric", TensorFlow's "same", or "auto": symmetric unless loaded weights need the other.
        bn_momentum: weight of the new batch in the running statistics.
        layout: "v3", or "v2": how torchvision and timm name the net's parts.
        published: URL of torchvision's ImageNet weights; None: there are none.
        weights: what ``weights.load_weights`` takes; None: random (He, fan out, per group).
    Raises:
        ValueError: unknown padding or gate, weights that do not fit.

    Features (all after batch norm and activation, [B, channels, ceil(H / stride), ceil(W / stride)]):
        c1 .. c4: the last output at stride 2, 4, 8, 16; c5: what the pooling sees.
        c3_first: the first output at stride 8 (torchvision's LR-ASPP reads it).
        c3_depthwise: the last depthwise output at stride 8, before squeeze-excite (the paper's LR-ASPP).
        c4_expand: the expansion of the block that leaves stride 16 (SSDLite's C4); without an expansion, c4.
    """

    mean: Tensor
    std: Tensor
    same_padding: Tensor

    def __init__(
        self,
        stem: tuple[int, str],
        blocks: Sequence[BlockSpec],
        last: tuple[int, str] | None,
        *,
        gate: str,
        padding: str,
        bn_momentum: float,
        layout: str,
        published: str | None,
        weights: str | None,
    ) -> None:
        super().__init__()
        check_choice("padding", padding, PADDINGS)
        taps, self.specs = place_taps(stem[0], blocks, last)
        self.padding, self.layout, self.published = padding, layout, published
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        # Kept with the weights, so that whoever loads them pads as they were trained.
        self.register_buffer("same_padding", torch.tensor(padding == "same"))
        self.stem = ConvNormAct(3, stem[0], 3, stride=2, activation=stem[1], momentum=bn_momentum)
        self.blocks = nn.ModuleList(
            InvertedResidual(block, gate, bn_momentum, tap) for block, tap in zip(blocks, taps[1:], strict=True)
        )
        self.last = None
        if last is not None:
            self.last = ConvNormAct(blocks[-1].outputs, last[0], activation=last[1], momentum=bn_momentum)
        self._stem_taps = taps[0]["output"]
        self.apply(initialise)
        self.register_load_state_dict_post_hook(lambda module, _: module.pad_same(bool(module.same_padding)))
        self.pad_same(padding == "same")
        if weights is not None:
            from backbones.weights import load_weights

            load_weights(self, weights)

    def pad_same(self, same: bool) -> None:
        """Makes every convolution pad as TensorFlow does, or symmetrically."""
        for module in self.modules():
            if isinstance(module, ConvNormAct):
                module.pad_same(same)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Named feature maps.

        Args:
            image: [B, 3, H, W] float in [0, 1], H and W >= 32.
        Returns:
            One map for every entry of ``specs``.
        Raises:
            ValueError: not a float batch of three channels.
        """
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(
                f"image is {image.dtype} {list(image.shape)}; expected floats [B, 3, H, W] in [0, 1] (bytes / 255)"
            )
        features: dict[str, Tensor] = {}
        x = (image - self.mean) / self.std
        if self.training and self.stem.conv.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)  # once; the convolution would do it in both passes
        x = self.stem(x)
        for name in self._stem_taps:
            features[name] = x
        for block in self.blocks:
            x = block(x, features)
        if self.last is not None:
            features["c5"] = self.last(x)
        return features


def place_taps(
    stem: int, blocks: Sequence[BlockSpec], last: tuple[int, str] | None
) -> tuple[list[dict[str, list[str]]], dict[str, FeatureSpec]]:
    """Which block leaves which feature, and the specs of the features.

    Returns:
        A dict ``place -> names`` for the stem and for every block, in order; the specs, in order of depth.
    """
    levels = [1]  # log2 of the printed stride after the stem and after each block
    strides = [2]  # the real one: dilation keeps it
    for block in blocks:
        levels.append(levels[-1] + int(math.log2(block.stride)))
        strides.append(strides[-1] * (1 if block.dilation > 1 else block.stride))
    channels = [stem, *(block.outputs for block in blocks)]
    ends = {level: len(levels) - 1 - levels[::-1].index(level) for level in (1, 2, 3, 4, 5)}
    leaves_16 = ends[4] + 1
    places = [
        *((ends[level], "output", f"c{level}", channels[ends[level]], strides[ends[level]]) for level in (1, 2, 3, 4)),
        (levels.index(3), "output", "c3_first", channels[levels.index(3)], 8),
        (ends[3], "depthwise", "c3_depthwise", blocks[ends[3] - 1].expand, 8),
        (leaves_16, "expand", "c4_expand", blocks[leaves_16 - 1].expand, 16),
    ]
    if last is None:
        places.append((ends[5], "output", "c5", channels[-1], strides[-1]))
    taps: list[dict[str, list[str]]] = [{"output": [], "depthwise": [], "expand": []} for _ in levels]
    specs = {}
    for index, place, name, width, stride in places:
        taps[index][place].append(name)
        specs[name] = FeatureSpec(width, stride)
    if last is not None:
        specs["c5"] = FeatureSpec(last[0], strides[-1])
    return taps, specs


def initialise(module: nn.Module) -> None:
    """He initialisation by fan out, zero biases.

    Differs: torchvision counts a depthwise convolution's fan out over all groups, which makes its weights smaller by
        the square root of the channels; here the fan out is that of one group, as in TensorFlow's layers.
    """
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) / module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
