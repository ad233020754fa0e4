"""The building blocks that the networks of the MobileNet lineage share; heads use them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels

BN_EPS = 1e-3
"""TensorFlow's and torchvision's value for MobileNetV3 (PyTorch's own default is 1e-5)."""

BN_MOMENTUM = 0.01
"""The paper's average decay of 0.99, in PyTorch's terms."""

ACTIVATIONS = {
    # In-place only where autograd keeps the result: hard-swish and swish keep their input and would have to copy it.
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "hswish": nn.Hardswish,
    "swish": nn.SiLU,
    "none": nn.Identity,
}
GATES = {"hard_sigmoid": nn.Hardsigmoid, "sigmoid": nn.Sigmoid}


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuses a value that is not in the list, and says what is.

    Raises:
        ValueError: names the argument, the value and all that is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(repr(item) for item in allowed)}")


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor`` that is not more than 10 % below ``channels``.

    Args:
        channels: wanted number of channels, any positive number.
        divisor: what the result is a multiple of, and its smallest value.
    Returns:
        Number of channels, >= ``divisor``.
    Source: ``_make_divisible`` of the authors' code, tensorflow/models research/slim/nets/mobilenet/mobilenet.py.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, activation; the map's size becomes ceil(size / stride).

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: odd size of the kernel, pixels.
        stride: 1 or 2.
        dilation: distance between the kernel's taps, pixels.
        groups: 1, or ``inputs`` for a depthwise convolution.
        activation: a key of ``ACTIVATIONS``.
        eps: of the batch norm.
        momentum: of the batch norm (PyTorch's sense: the weight of the new batch).
    Raises:
        ValueError: unknown activation.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: str = "relu",
        eps: float = BN_EPS,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, list(ACTIVATIONS))
        pad = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=pad, dilation=dilation, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outputs, eps, momentum)
        self.act: nn.Module = ACTIVATIONS[activation]()
        self.pads_same = False

    def pad_same(self, same: bool) -> None:
        """TensorFlow's 'SAME' padding instead of the symmetric one; at stride 1 the two are equal.

        Args:
            same: an even side at stride 2 gets one row less before it (none for 3x3) than after it.
        """
        self.pads_same = same and self.conv.stride[0] > 1
        half = self.conv.kernel_size[0] // 2 * self.conv.dilation[0]
        self.conv.padding = (0, 0) if self.pads_same else (half, half)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        if self.pads_same:
            half = self.conv.kernel_size[0] // 2
            height, width = x.shape[-2:]
            x = F.pad(x, (half - 1 + width % 2, half, half - 1 + height % 2, half))
        if kernels.fits_pointwise(x, *self.parts()):
            return kernels.pointwise(x, *self.parts())
        if kernels.fits_depthwise(x, None, *self.parts()):
            return kernels.depthwise(x, None, None, *self.parts())
        x = self.conv(x)
        if kernels.fits(x, self.norm, self.act):
            return kernels.norm_act(x, self.norm, self.act)
        return self.act(self.norm(x))

    def parts(self) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Module]:
        """Convolution, batch norm and activation, as the kernels take them."""
        return self.conv, self.norm, self.act


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the channel means.

    Args:
        channels: of the map.
        squeeze: channels of the bottleneck.
        gate: a key of ``GATES``.
    Raises:
        ValueError: unknown gate.
    Source: the paper, section 5.3 (ReLU inside, hard sigmoid outside; biases, no batch norm in the authors' code).
    """

    def __init__(self, channels: int, squeeze: int, gate: str = "hard_sigmoid") -> None:
        super().__init__()
        check_choice("gate", gate, list(GATES))
        self.reduce = nn.Conv2d(channels, squeeze, 1)
        self.expand = nn.Conv2d(squeeze, channels, 1)
        self.gate = GATES[gate]()

    def gates(self, means: Tensor) -> Tensor:
        """[B, channels, 1, 1] to the same shape, in [0, 1]."""
        out: Tensor = self.gate(self.expand(F.relu(self.reduce(means), inplace=True)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to the same shape; the input stays as it is, for it may be a feature of its own."""
        if self.training and x.dtype == torch.float32:
            means = x.sum((2, 3), keepdim=True) / x[0, 0].numel()  # its gradient is spread without being written out
        else:
            means = x.mean((2, 3), keepdim=True)
        return x * self.gates(means)


class BlockSpec(NamedTuple):
    """One block with every number settled: widths rounded, tails reduced, strides turned into dilation."""

    kernel: int
    inputs: int
    expand: int
    """Channels of the depthwise convolution; equal to ``inputs``: no expansion."""
    outputs: int
    squeeze: int
    """Channels of the squeeze-excite bottleneck; 0: none."""
    activation: str
    output_activation: str
    """"none" for a linear bottleneck (V2 and later)."""
    stride: int
    """Of the network as printed; it sets the level (c2, c3 ...) of the output."""
    dilation: int
    """Above 1: the stride is replaced by this dilation."""
    residual: bool


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise, squeeze-excite, project 1x1, and the shortcut where shapes allow it.

    Args:
        spec: the block's numbers.
        gate: squeeze-excite's gate.
        momentum: of the batch norms.
        taps: names under which the block leaves features, by place: "expand", "depthwise" (after batch norm and
            activation, before squeeze-excite) and "output".
    Source: MobileNetV2, section 3.3, and the paper, section 3. Squeeze-excite follows the depthwise activation.
    """

    def __init__(self, spec: BlockSpec, gate: str, momentum: float, taps: dict[str, list[str]]) -> None:
        super().__init__()
        act = spec.activation
        self.expand = (
            ConvNormAct(spec.inputs, spec.expand, activation=act, momentum=momentum)
            if spec.expand != spec.inputs
            else None
        )
        self.depthwise = ConvNormAct(
            spec.expand,
            spec.expand,
            spec.kernel,
            stride=1 if spec.dilation > 1 else spec.stride,
            dilation=spec.dilation,
            groups=spec.expand,
            activation=act,
            momentum=momentum,
        )
        self.squeeze_excite = SqueezeExcite(spec.expand, spec.squeeze, gate) if spec.squeeze else None
        self.project = ConvNormAct(spec.expand, spec.outputs, activation=spec.output_activation, momentum=momentum)
        self.residual = spec.residual
        self.taps = taps

    def forward(self, x: Tensor, features: dict[str, Tensor]) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, ceil(H / stride), ceil(W / stride)]; adds its taps to ``features``."""
        y = self._middle(x, features)
        y = self.project(y)
        if self.residual:
            y += x  # in place: no backward needs the batch norm's output
        self._leave("output", y, features)
        return y

    def _middle(self, x: Tensor, features: dict[str, Tensor]) -> Tensor:
        """What comes before the projection; in training, kernels.py writes out no map of it that no feature needs."""
        expand, depthwise = self.expand, self.depthwise
        parts = depthwise.parts()
        gate = None if self.taps.get("depthwise") else self.squeeze_excite
        before = None if expand is None or self.taps.get("expand") else (expand.norm, expand.act)
        fits = not depthwise.pads_same and kernels.fits_depthwise(x, before, *parts)
        if expand is not None and not (before and fits):
            x, expand, before = expand(x), None, None
            fits = not depthwise.pads_same and kernels.fits_depthwise(x, None, *parts)
        elif expand is not None and not kernels.fits_pointwise(x, *expand.parts()):
            x, expand = expand.conv(x), None
        self._leave("expand", x, features)  # where it is asked for, x is the expansion's result, or the block's input
        if fits:
            y = kernels.depthwise(x, None if expand is None else expand.conv, before, *parts, gate)
        else:
            y, gate = depthwise(x), None
        self._leave("depthwise", y, features)
        return y if self.squeeze_excite is None or gate is not None else self.squeeze_excite(y)

    def _leave(self, place: str, map_: Tensor, features: dict[str, Tensor]) -> None:
        for name in self.taps.get(place, ()):
            features[name] = map_
