"""Depthwise convolutions whose backward pass is as fast on a CPU as their forward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WIDEST = 3
"""Columns of a kernel up to which oneDNN has a fast gradient of depthwise weights (jit, AVX2 and AVX-512)."""


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution without bias; trains faster than torch's where its kernel is wider than three pixels.

    oneDNN takes ten times as long for the gradient of a 5x5 kernel as for the forward pass (240 channels of 14x14 px,
    batch 32, two cores of an AMD EPYC: 6.7 against 0.7 ms), but 0.8 ms for those of its 5x2 and its 5x3 part: see
    ``weight_gradient``. Training on a CPU in float32 goes that way, all else is ``nn.Conv2d``'s.

    Args:
        channels: of input and output.
        kernel: odd size of the kernel, pixels.
        stride: 1 or 2.
        padding: zeros on each side, pixels.
        dilation: distance between the kernel's taps, pixels.
    """

    def __init__(self, channels: int, kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> None:
        super().__init__(channels, channels, kernel, stride, padding, dilation, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to the same with the size of ``nn.Conv2d``."""
        slow = (
            self.training
            and WIDEST < self.kernel_size[1] <= x.shape[3]
            and self.dilation == (1, 1)
            and self.weight.requires_grad
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and x.is_contiguous(memory_format=torch.channels_last)
            and torch.backends.mkldnn.is_available()
            and not torch.is_autocast_enabled("cpu")
        )
        if not slow:
            return super().forward(x)
        out: Tensor = _Depthwise.apply(x, self.weight, self.stride, self.padding)
        return out


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        stride, padding = ctx.geometry
        grad = grad.contiguous(memory_format=torch.channels_last)
        to_x = input_gradient(grad, x, weight, stride, padding) if ctx.needs_input_grad[0] else None
        to_weight = weight_gradient(grad, x, weight, stride, padding) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, None, None


def input_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Of a depthwise convolution; at stride 1 by its fast forward pass, with the kernel turned by half a circle.

    Args:
        grad: [B, C, h, w], of the output.
        x: [B, C, H, W], the input.
        weight: [C, 1, k, k].
        stride, padding: vertical, horizontal.
    Returns:
        [B, C, H, W].
    """
    if stride == (1, 1):
        around = [side - 1 - pad for side, pad in zip(weight.shape[2:], padding, strict=True)]
        return F.conv2d(grad, weight.flip(2, 3), None, 1, around, 1, len(weight))
    return _backward(grad, x, weight, stride, padding, (True, False, False))[0]


def weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Of a depthwise convolution, by at most three columns of the kernel at a time.

    Columns ``a`` to ``b`` of the kernel see the input from column ``a - padding`` on. Cut to what they see, and padded
    there with zeros where it lies outside, the input meets a kernel of ``b - a`` columns without any padding.

    Args:
        grad: [B, C, h, w], of the output.
        x: [B, C, H, W], the input.
        weight: [C, 1, k, k], for its shape.
        stride, padding: vertical, horizontal.
    Returns:
        [C, 1, k, k].
    """
    columns: list[Tensor] = []
    for part in weight.tensor_split(-(-weight.shape[3] // WIDEST), dim=3):
        left = padding[1] - sum(done.shape[3] for done in columns)
        seen = stride[1] * (grad.shape[3] - 1) + part.shape[3]
        window = cut(x, left, seen)
        columns.append(_backward(grad, window, part, stride, (padding[0], 0), (False, True, False))[1])
    return torch.cat(columns, dim=3)


def cut(x: Tensor, left: int, seen: int) -> Tensor:
    """The columns ``-left`` to ``seen - left`` of a map, zeros where it has none; half the passes of ``F.pad``."""
    window = torch.empty((*x.shape[:3], seen), memory_format=torch.channels_last)
    start, end = max(left, 0), min(left + x.shape[3], seen)
    window[..., :start] = 0
    window[..., end:] = 0
    window[..., start:end] = x[..., start - left : end - left]
    return window


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own, for any of input, weight and bias."""
    backward: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight), wanted
    )
    return backward
