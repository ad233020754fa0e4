"""Depthwise convolutions give torch's own outputs and gradients, and stand aside where they are not faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backbones import depthwise
from backbones.depthwise import DepthwiseConv2d


@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (9, 4), (14, 15)])
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_torchs(kernel: int, stride: int, size: tuple[int, int], padded: bool) -> None:
    torch.manual_seed(0)
    pad = kernel // 2 if padded else 0
    if not padded:
        size = (size[0] + kernel - 1, size[1] + kernel - 1)
    ours = DepthwiseConv2d(20, kernel, stride=stride, padding=pad)
    theirs = nn.Conv2d(20, 20, kernel, stride, pad, groups=20, bias=False)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for conv in (ours, theirs):
        x = torch.randn(3, 20, *size, generator=torch.Generator().manual_seed(1))
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = conv(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        assert x.grad is not None
        assert conv.weight.grad is not None
        found.append((y.detach(), x.grad, conv.weight.grad))
    for mine, peers in zip(*found, strict=True):
        torch.testing.assert_close(mine, peers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["evaluates", "frozen", "contiguous", "float64", "dilated", "autocast"])
def test_stands_aside(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise._Depthwise, "apply", lambda *_: pytest.fail("not nn.Conv2d's own way"))
    conv = DepthwiseConv2d(4, 5, padding=2, dilation=2 if why == "dilated" else 1)
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    if why == "evaluates":
        conv.eval()
    elif why == "frozen":
        conv.requires_grad_(False)
    elif why == "contiguous":
        x = x.detach().contiguous()
    elif why == "float64":
        conv, x = conv.double(), x.detach().double()
    with torch.autocast("cpu", enabled=why == "autocast"):
        conv(x).float().sum()


def test_wide_kernels_train_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    backward = depthwise._backward
    monkeypatch.setattr(depthwise, "_backward", lambda *a: (widths.append(a[2].shape[3]), backward(*a))[1])
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    for kernel in (3, 5, 7):
        DepthwiseConv2d(4, kernel, padding=kernel // 2)(x).sum().backward()
    assert widths == [3, 2, 3, 2, 2]


def test_frozen_input_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "input_gradient", lambda *_: pytest.fail("nobody asked for it"))
    conv = DepthwiseConv2d(4, 5, padding=2)
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    conv(x).sum().backward()
    assert conv.weight.grad is not None
