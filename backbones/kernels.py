"""Faster training on a CPU: batch norm with its activation, and depthwise convolutions between two of those, in C++.

torch's operators pass over memory 14 times for a depthwise convolution with a batch norm and an activation on either
side, and 20 times for its gradients; these do it in 5 and 9, and convolve faster. What they compute is the same, up to
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


def fits_depthwise(x: Tensor, before: NormAct | None, conv: nn.Conv2d, norm: nn.BatchNorm2d, act: nn.Module) -> bool:
    """Whether ``depthwise`` can stand for ``act(norm(conv(before(x))))``; its threads share out the images."""
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size in ((3, 3), (5, 5))
        and conv.stride in ((1, 1), (2, 2))
        and conv.dilation == (1, 1)
        and conv.padding in ((0, 0), (conv.kernel_size[0] // 2,) * 2)
        and conv.bias is None
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


def depthwise(
    x: Tensor,
    before: NormAct | None,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    act: nn.Module,
    gate: Gate | None = None,
) -> Tensor:
    """``z * gates(means of z)`` of ``z = act(norm(conv(before(x))))``; only the result is written out, and conv's own.

    Args:
        x: [B, C, H, W], as ``fits_depthwise`` wants it.
        before: a batch norm and an activation in front of the convolution; None: it sees ``x``.
        conv: depthwise.
        norm, act: behind the convolution.
        gate: squeeze-excite; None: z is the result.
    Returns:
        [B, C, ceil(H / stride), ceil(W / stride)] at the padding of half the kernel.
    """
    parts: tuple[Any, ...] = (None, None, None)
    if before is not None:
        parts = (before[0].weight, before[0].bias, Statistics.of(*before))
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


class DepthwiseBatchNormAct(torch.autograd.Function):
    """``depthwise`` and its gradients; keeps the maps before both norms and computes again what came of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
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
        batch, channels, height, width = x.shape
        kernel, stride, pad = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        sides = [(side + 2 * pad - kernel) // stride + 1 for side in (height, width)]
        ctx.geometry = _Geometry(batch, height, width, channels, kernel, stride, pad, *sides)
        ctx.activations = before and before.activation, after.activation
        ctx.gate, ctx.threads = gate, torch.get_num_threads()
        first: tuple[Tensor, ...] = ()
        if gamma_before is not None and beta_before is not None and before is not None:
            first = gamma_before, beta_before, torch.empty(channels), torch.empty(channels)
            _call("moments", x, batch * height * width, channels, *before.moving(), *first[2:], ctx.threads)
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
        ctx.save_for_backward(x, weight, y, *second, *first, *gates, *gate_weights)
        ctx.norms = len(first)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, *rest = ctx.saved_tensors
        second, first, gated = rest[:4], rest[4 : 4 + ctx.norms], rest[4 + ctx.norms :]
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        to_x, to_weight, *to_second = (torch.empty_like(each) for each in (x, weight, *second[:2]))
        to_first = [torch.empty_like(each) for each in first[:2]] if first else [None, None]
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
            *(to_x, *to_first, to_weight, *to_second, ctx.geometry, ctx.threads),
        )
        return to_x, *to_first, None, None, to_weight, *to_second, None, None, *to_gate
