"""Faster training on a CPU: batch norm with its activation, and the 1x1 and depthwise convolutions around it, in C++.

torch's operators pass over memory 14 times for a depthwise convolution with a batch norm and an activation on either
side, and 20 times for its gradients; these do it in 5 and 9, and convolve faster. A 1x1 convolution counts its norm's
moments as it goes, and takes its norm's gradient without that being written out. What they compute is the same, up to
rounding. ``compiled.py`` compiles ``kernels.cpp`` for this machine; where it cannot, or with ``KERNELS=0`` in the
environment, torch's operators do the work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from backbones.compiled import call, library

SOURCE = Path(__file__).with_name("kernels.cpp")
ACTIVATIONS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.ReLU: 1, nn.ReLU6: 2, nn.Hardswish: 3}
"""The numbers that ``kernels.cpp`` knows them by."""
LANES = 8
"""Channels are taken by this many."""
MOST_WEIGHTS = 100_000
"""Of a 1x1 convolution: these stay in a cache. With more torch is faster (on Zen 4 by 5 % with 512 x 512, by a quarter
with 1024 x 1024)."""
NormAct = tuple[nn.BatchNorm2d, nn.Module]


class Gate(Protocol):
    """Squeeze-excite."""

    def gates(self, means: Tensor) -> Tensor:
        """From the channels' means, [B, C, 1, 1], to what they are scaled by."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What ``gates`` learns."""


def load() -> tuple[ctypes.CDLL | None, str]:
    """As ``compiled.library``."""
    return library(SOURCE)


def fits(x: Tensor, norm: nn.BatchNorm2d, act: nn.Module) -> bool:
    """Whether ``norm_act`` can stand for ``act(norm(x))``: a norm in training, float32, channels last, on a CPU."""
    return (
        norm.training
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[1] % LANES == 0
        and x.numel() > x.shape[1]
        and x.is_contiguous(memory_format=torch.channels_last)
        and type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.track_running_stats
        and norm.weight.dtype == torch.float32
        and type(act) in ACTIVATIONS
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and load()[0] is not None
    )


def fits_pointwise(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, act: nn.Module) -> bool:
    """Whether ``pointwise`` can stand for ``act(norm(conv(x)))``."""
    return (
        conv.kernel_size == conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding == (0, 0)
        and conv.bias is None
        and conv.out_channels % LANES == 0
        and conv.weight.numel() <= MOST_WEIGHTS
        and fits(x, norm, act)
    )


def fits_depthwise(x: Tensor, before: NormAct | None, conv: nn.Conv2d, norm: nn.BatchNorm2d, act: nn.Module) -> bool:
    """Whether ``depthwise`` can stand for ``act(norm(conv(before(x))))``; its threads share out the images."""
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size in ((3, 3), (5, 5))
        and conv.stride in ((1, 1), (2, 2))
        and conv.dilation == (1, 1)
        and conv.padding in ((0, 0), (conv.kernel_size[0] // 2,) * 2)
        and conv.bias is None
        and conv.in_channels % LANES == 0
        and min(x.shape[2:]) + 2 * int(conv.padding[0]) >= conv.kernel_size[0]
        and x.shape[0] >= torch.get_num_threads()
        and fits(x, norm, act)
        and (before is None or fits(x, *before))
    )


def norm_act(x: Tensor, norm: nn.BatchNorm2d, act: nn.Module) -> Tensor:
    """``act(norm(x))`` of a batch norm in training, running statistics included.

    Args:
        x: [B, C, H, W], as ``fits`` wants it.
        norm: of C channels.
        act: one of ``ACTIVATIONS``.
    Returns:
        [B, C, H, W].
    """
    out: Tensor = BatchNormAct.apply(x, norm.weight, norm.bias, Statistics.of(norm, act))
    return out


def pointwise(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, act: nn.Module) -> Tensor:
    """``act(norm(conv(x)))``.

    Args:
        x: [B, C, H, W], as ``fits_pointwise`` wants it.
        conv: 1x1, to O channels.
        norm, act: behind it.
    Returns:
        [B, O, H, W].
    """
    out: Tensor = PointwiseBatchNormAct.apply(x, conv.weight, norm.weight, norm.bias, Statistics.of(norm, act))
    return out


def depthwise(
    x: Tensor,
    expand: nn.Conv2d | None,
    before: NormAct | None,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    act: nn.Module,
    gate: Gate | None = None,
) -> Tensor:
    """``z * gates(means of z)`` of ``z = act(norm(conv(before(expand(x)))))``; written out are only the result, and
    what the convolutions give.

    Args:
        x: [B, C, H, W], as ``fits_depthwise`` wants it, and ``fits_pointwise`` where there is ``expand``.
        expand: a 1x1 convolution, then C is what it takes; None: ``before`` sees ``x``.
        before: a batch norm and an activation in front of the convolution; None: it sees ``x``.
        conv: depthwise.
        norm, act: behind the convolution.
        gate: squeeze-excite; None: z is the result.
    Returns:
        [B, channels of conv, ceil(H / stride), ceil(W / stride)] at the padding of half the kernel.
    """
    parts: tuple[Any, ...] = (None if expand is None else expand.weight, None, None, None)
    if before is not None:
        parts = (parts[0], before[0].weight, before[0].bias, Statistics.of(*before))
    parts += (conv, conv.weight, norm.weight, norm.bias, Statistics.of(norm, act), gate)
    out: Tensor = DepthwiseBatchNormAct.apply(x, *parts, *(() if gate is None else gate.parameters()))
    return out


class Statistics(NamedTuple):
    """What a batch norm in training keeps beside its weights, and the activation behind it."""

    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float
    activation: int

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, act: nn.Module) -> Statistics:
        """Counts the batch, as ``nn.BatchNorm2d`` does."""
        assert norm.num_batches_tracked is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        return cls(norm.running_mean, norm.running_var, momentum, norm.eps, ACTIVATIONS[type(act)])

    def moving(self) -> tuple[float, float, Tensor, Tensor]:
        """As arguments of a kernel."""
        return self.eps, self.momentum, self.running_mean, self.running_var


class _Norm(ctypes.Structure):
    """``Norm`` of kernels.cpp; whoever makes one keeps its tensors alive."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gamma", "beta", "mean", "invstd")),
        ("activation", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("gates", "spread")),
    )

    @classmethod
    def of(cls, tensors: Sequence[Tensor], activation: int, *gates: Tensor) -> _Norm:
        return cls(*(each.data_ptr() for each in tensors), activation, *(each.data_ptr() for each in gates))


class _Pointwise(ctypes.Structure):
    """``Pointwise`` of kernels.cpp; whoever makes one keeps its tensors alive."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "weight", "to_x", "to_weight")), ("C", ctypes.c_long))

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, to_x: Tensor | None, to_weight: Tensor) -> _Pointwise:
        return cls(
            x.data_ptr(), weight.data_ptr(), None if to_x is None else to_x.data_ptr(), to_weight.data_ptr(), x.shape[1]
        )


class _Geometry(ctypes.Structure):
    """``Geometry`` of kernels.cpp."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("N", "H", "W", "C", "K", "stride", "pad", "OH", "OW"))


def _call(kernel: str, *args: Tensor | ctypes.Structure | float | None) -> None:
    found = load()[0]
    assert found is not None
    call(found, kernel, *args)


class BatchNormAct(torch.autograd.Function):
    """``norm_act`` and its gradients; keeps ``x`` alone, not the norm's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, statistics: Statistics) -> Tensor:
        channels = x.shape[1]
        ctx.shape = x.numel() // channels, channels
        ctx.activation, ctx.threads = statistics.activation, torch.get_num_threads()
        norm, y = (gamma, beta, torch.empty(channels), torch.empty(channels)), torch.empty_like(x)
        _call("moments", x, *ctx.shape, *statistics.moving(), *norm[2:], ctx.threads)
        _call("apply", x, y, 1, *ctx.shape, _Norm.of(norm, ctx.activation), ctx.threads)
        ctx.save_for_backward(x, *norm)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *norm = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        to = [torch.empty_like(each) for each in (x, *norm[:2])]
        _call("apply_backward", grad, x, *to, *ctx.shape, _Norm.of(norm, ctx.activation), ctx.threads)
        return *to, None


def _multiply(x: Tensor, weight: Tensor, statistics: Statistics, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """A 1x1 convolution's result, its channels' means and 1 / sqrt(variance + eps)."""
    outputs, inputs = weight.shape[:2]
    y = torch.empty((x.shape[0], outputs, *x.shape[2:]), memory_format=torch.channels_last)
    moments = torch.empty(outputs), torch.empty(outputs)
    _call("pointwise", x, weight, y, x.numel() // inputs, inputs, outputs, *statistics.moving(), *moments, threads)
    return y, *moments


class PointwiseBatchNormAct(torch.autograd.Function):
    """``pointwise`` and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, statistics: Statistics) -> Tensor:
        ctx.activation, ctx.threads = statistics.activation, torch.get_num_threads()
        y, *moments = _multiply(x, weight, statistics, ctx.threads)
        norm, z = (gamma, beta, *moments), torch.empty_like(y)
        ctx.shape = y.numel() // y.shape[1], y.shape[1]
        _call("apply", y, z, 1, *ctx.shape, _Norm.of(norm, ctx.activation), ctx.threads)
        ctx.save_for_backward(x, weight, y, *norm)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, *norm = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_weight, *to_norm = (torch.empty_like(each) for each in (weight, *norm[:2]))
        conv = _Pointwise.of(x, weight, to_x, to_weight)
        _call("pointwise_backward", grad, y, *to_norm, *ctx.shape, _Norm.of(norm, ctx.activation), conv, ctx.threads)
        return to_x, to_weight, *to_norm, None


class DepthwiseBatchNormAct(torch.autograd.Function):
    """``depthwise`` and its gradients; keeps the maps before both norms and computes again what came of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expand: Tensor | None,
        gamma_before: Tensor | None,
        beta_before: Tensor | None,
        before: Statistics | None,
        conv: nn.Conv2d,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        after: Statistics,
        gate: Gate | None,
        *gate_weights: Tensor,
    ) -> Tensor:
        batch, channels, height, width = x.shape[0], conv.in_channels, *x.shape[2:]
        kernel, stride, pad = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        sides = [(side + 2 * pad - kernel) // stride + 1 for side in (height, width)]
        ctx.geometry = _Geometry(batch, height, width, channels, kernel, stride, pad, *sides)
        ctx.activations = before and before.activation, after.activation
        ctx.gate, ctx.threads = gate, torch.get_num_threads()
        first: tuple[Tensor, ...] = ()
        expanded: tuple[Tensor, ...] = () if expand is None else (x, expand)
        if gamma_before is not None and beta_before is not None and before is not None:
            if expand is None:
                moments: list[Tensor] = [torch.empty(channels), torch.empty(channels)]
                _call("moments", x, batch * height * width, channels, *before.moving(), *moments, ctx.threads)
            else:
                x, *moments = _multiply(x, expand, before, ctx.threads)
            first = gamma_before, beta_before, *moments
        norm_before = _Norm.of(first, ctx.activations[0]) if first else None
        y = torch.empty((batch, channels, *sides), memory_format=torch.channels_last)
        second, z = (gamma, beta, torch.empty(channels), torch.empty(channels)), torch.empty_like(y)
        _call("depthwise", x, norm_before, weight, y, ctx.geometry, *after.moving(), *second[2:], ctx.threads)
        ctx.shape = batch, sides[0] * sides[1], channels
        norm_after = _Norm.of(second, after.activation)
        gates: tuple[Tensor, ...] = ()
        if gate is not None:
            means = torch.empty((batch, channels, 1, 1))
            _call("sum_images", None, y, means, *ctx.shape, norm_after, ctx.threads)
            gates = means.div_(ctx.shape[1]), gate.gates(means)
            norm_after = _Norm.of(second, after.activation, gates[1])
        _call("apply", y, z, *ctx.shape, norm_after, ctx.threads)
        ctx.save_for_backward(x, weight, y, *second, *first, *expanded, *gates, *gate_weights)
        ctx.parts = len(first), len(expanded)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, *rest = ctx.saved_tensors
        second, rest = rest[:4], rest[4:]
        first, rest = rest[: ctx.parts[0]], rest[ctx.parts[0] :]
        expanded, gated = rest[: ctx.parts[1]], rest[ctx.parts[1] :]
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        to_x, to_weight, *to_second = (torch.empty_like(each) for each in (x, weight, *second[:2]))
        to_first = [torch.empty_like(each) for each in first[:2]] if first else [None, None]
        to_expand: Tensor | None = None
        to_input: Tensor | None = to_x
        expand = None
        if expanded:
            to_input = torch.empty_like(expanded[0]) if ctx.needs_input_grad[0] else None
            to_expand = torch.empty_like(expanded[1])
            expand = _Pointwise.of(expanded[0], expanded[1], to_input, to_expand)
        norm_before = _Norm.of(first, ctx.activations[0]) if first else None
        norm_after, to_gate = _Norm.of(second, ctx.activations[1]), []
        if gated:
            means, gates, *gate_weights = gated
            to_gates = torch.empty_like(gates)
            _call("sum_images", grad, y, to_gates, *ctx.shape, norm_after, ctx.threads)
            with torch.enable_grad():
                means = means.detach().requires_grad_()
                learnt = [each for each in gate_weights if each.requires_grad]
                spread, *found = torch.autograd.grad(ctx.gate.gates(means), (means, *learnt), to_gates)
            to_gate = [found.pop(0) if each.requires_grad else None for each in gate_weights]
            norm_after = _Norm.of(second, ctx.activations[1], gates, spread.div_(ctx.shape[1]))
        _call(
            "depthwise_backward",
            *(grad, x, norm_before, weight, y, norm_after),
            *(to_x, *to_first, to_weight, *to_second, ctx.geometry, expand, ctx.threads),
        )
        return to_input, to_expand, *to_first, None, None, to_weight, *to_second, None, None, *to_gate
