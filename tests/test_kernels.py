"""The compiled kernels give torch's own outputs, gradients and statistics, and stand aside where they cannot."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from backbones import kernels
from backbones.blocks import ConvNormAct, SqueezeExcite
from backbones.compiled import library
from tasks import build

needs_compiler = pytest.mark.skipif(kernels.load()[0] is None, reason=kernels.load()[1])
ACTS = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "hswish": nn.Hardswish}


@pytest.fixture
def anew() -> Iterator[None]:
    """The kernels are looked for again, and afterwards once more."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return int(request.param)


def last(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Values whose mean is far from zero by their own measure, and whose batch norm has both sides of every bend."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 5
    return x.contiguous(memory_format=torch.channels_last)


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    nn.init.normal_(norm.weight, 1.5, 0.5)
    nn.init.normal_(norm.bias, 0.5, 2.0)
    nn.init.normal_(norm.running_mean)
    return norm


def same(ours: Tensor, x: Tensor, parts: list[nn.Module], doubled: nn.Sequential) -> None:
    """Output, gradients and running statistics are those of the same layers in float64."""
    theirs_x = x.detach().double().requires_grad_()
    theirs = doubled(theirs_x)
    grad = last(tuple(theirs.shape), 9) - 5
    ours.backward(grad)
    theirs.backward(grad.double())
    pairs = [(ours, theirs), (x.grad, theirs_x.grad)]
    own = [value for part in parts for value in (*part.parameters(), *part.buffers())]
    for mine, peers in zip(
        own, (*(v for part in doubled for v in (*part.parameters(), *part.buffers())),), strict=True
    ):
        pairs.append((mine, peers))
        if mine.requires_grad:
            pairs.append((mine.grad, peers.grad))
    for mine, peers in pairs:
        assert mine is not None
        assert peers is not None
        scale = float(peers.detach().abs().max()) + 1e-6
        assert_close(mine.double() / scale, peers.double() / scale, rtol=0, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", [(4, 8, 1, 1), (1, 24, 5, 3), (3, 16, 17, 19), (2, 72, 9, 31), (2, 960, 2, 2)])
@pytest.mark.parametrize("momentum", [0.01, None])
def test_norm_and_activation_are_torchs(act: str, shape: tuple[int, ...], momentum: float | None, threads: int) -> None:
    torch.manual_seed(0)
    norm = trained(nn.BatchNorm2d(shape[1], 1e-3, momentum))
    layers = nn.Sequential(copy.deepcopy(norm), ACTS[act]()).double()
    for seed in (1, 2):  # the second batch meets the statistics of the first
        x = last(shape, seed).requires_grad_()
        assert kernels.fits(x * 1, norm, ACTS[act]())
        same(kernels.norm_act(x * 1, norm, ACTS[act]()), x, [norm], layers)


@pytest.fixture(params=["own", "-mno-avx512f", "-mno-avx"])
def registers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU's, and shorter ones of others."""
    if request.param != "own":
        found = library(kernels.SOURCE, request.param)
        if found[0] is None:
            pytest.skip(found[1])
        monkeypatch.setattr(kernels, "load", lambda: found)


@needs_compiler
@pytest.mark.parametrize("act", ["none", "hswish"])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(8, 8), (16, 64), (24, 72), (40, 240), (48, 24), (72, 40), (112, 56), (672, 112), (8, 32)]
)
@pytest.mark.parametrize("shape", [(5, 1, 2), (4, 23, 29)])
def test_1x1_convolutions_are_torchs(
    act: str, inputs: int, outputs: int, shape: tuple[int, int, int], threads: int, registers: None
) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(inputs, outputs, 1, bias=False), trained(nn.BatchNorm2d(outputs))
    doubled = nn.Sequential(*copy.deepcopy([conv, norm, ACTS[act]()])).double()
    x = (last((shape[0], inputs, *shape[1:])) - 4).requires_grad_()
    assert kernels.fits_pointwise(x * 1, conv, norm, ACTS[act]())
    same(kernels.pointwise(x * 1, conv, norm, ACTS[act]()), x, [conv, norm], doubled)


@needs_compiler
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 64), (24, 72), (40, 24)])
@pytest.mark.parametrize("stride", [1, 2])
def test_an_expansion_goes_with_the_depthwise_convolution(
    inputs: int, outputs: int, stride: int, threads: int, registers: None
) -> None:
    torch.manual_seed(0)
    expand, first = nn.Conv2d(inputs, outputs, 1, bias=False), trained(nn.BatchNorm2d(outputs))
    conv = nn.Conv2d(outputs, outputs, 3, stride, 1, groups=outputs, bias=False)
    second, gate = trained(nn.BatchNorm2d(outputs)), SqueezeExcite(outputs, 8)
    layers = copy.deepcopy([expand, first, nn.ReLU(), conv, second, nn.Hardswish(), gate])
    x = (last((3, inputs, 13, 10)) - 4).requires_grad_()
    ours = kernels.depthwise(x * 1, expand, (first, nn.ReLU()), conv, second, nn.Hardswish(), gate)
    same(ours, x, [expand, first, conv, second, gate], nn.Sequential(*layers).double())


@needs_compiler
def test_an_input_that_needs_no_gradient_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = last((2, 16, 9, 9))
    expand, first = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
    conv, second = nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32)
    outs = (
        kernels.pointwise(x, expand, first, nn.ReLU()),
        kernels.depthwise(x, expand, (first, nn.ReLU()), conv, second, nn.ReLU()),
    )
    for out in outs:
        expand.weight.grad = None
        torch.autograd.backward(out.square().sum())
        assert x.grad is None
        assert float(expand.weight.grad.abs().max()) > 0  # type: ignore[union-attr]


@needs_compiler
@pytest.mark.parametrize("act", ["relu", "relu6", "hswish"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("size", [(3, 3), (5, 8), (14, 7), (9, 22)])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_depthwise_convolutions_are_torchs(
    act: str, kernel: int, stride: int, size: tuple[int, int], before: bool, padded: bool, threads: int
) -> None:
    torch.manual_seed(0)
    pad, extra = (kernel // 2, 0) if padded else (0, kernel - 1)
    shape = (3, 40, size[0] + extra, size[1] + extra)
    first, second = trained(nn.BatchNorm2d(40)), trained(nn.BatchNorm2d(40))
    conv = nn.Conv2d(40, 40, kernel, stride, pad, groups=40, bias=False)
    parts: list[nn.Module] = [*([first] if before else []), conv, second]
    layers = copy.deepcopy([*([first, ACTS[act]()] if before else []), conv, second, ACTS[act]()])
    doubled = nn.Sequential(*layers).double()
    x = last(shape).requires_grad_()
    assert kernels.fits_depthwise(x * 1, (first, ACTS[act]()) if before else None, conv, second, ACTS[act]())
    ours = kernels.depthwise(x * 1, None, (first, ACTS[act]()) if before else None, conv, second, ACTS[act]())
    same(ours, x, parts, doubled)


@needs_compiler
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_gates_are_squeeze_excites(stride: int, frozen: bool, threads: int, registers: None) -> None:
    torch.manual_seed(0)
    first, second, gate = trained(nn.BatchNorm2d(24)), trained(nn.BatchNorm2d(24)), SqueezeExcite(24, 8)
    conv = nn.Conv2d(24, 24, 3, stride, 1, groups=24, bias=False)
    gate.reduce.weight.requires_grad_(not frozen)
    parts: list[nn.Module] = [first, conv, second, gate]
    layers = copy.deepcopy([first, nn.ReLU(), conv, second, nn.Hardswish(), gate])
    x = last((3, 24, 9, 7)).requires_grad_()
    ours = kernels.depthwise(x * 1, None, (first, nn.ReLU()), conv, second, nn.Hardswish(), gate)
    same(ours, x, parts, nn.Sequential(*layers).double())


@needs_compiler
@pytest.mark.parametrize("act", ACTS)
def test_what_is_not_a_number_stays_so(act: str) -> None:
    x = last((2, 8, 4, 4))
    x[0, 3, 1, 1] = float("nan")
    norm = nn.BatchNorm2d(8)
    out = kernels.norm_act(x, norm, ACTS[act]())
    assert out[:, 3].isnan().all()
    assert not out[:, :3].isnan().any()
    assert norm.running_mean is not None
    assert norm.running_mean.isnan().tolist() == [False] * 3 + [True] + [False] * 4


@needs_compiler
def test_a_batch_always_gives_the_same_bits(threads: int) -> None:
    norm, conv = trained(nn.BatchNorm2d(72)), nn.Conv2d(72, 72, 5, padding=2, groups=72, bias=False)
    expand = nn.Conv2d(24, 72, 1, bias=False)
    grads = []
    for _ in range(2):
        x = last((5, 24, 13, 11)).requires_grad_()
        kernels.depthwise(x * 1, expand, (norm, nn.ReLU()), conv, norm, nn.Hardswish()).square().sum().backward()
        grads.append((x.grad, conv.weight.grad, expand.weight.grad))
        conv.weight.grad = expand.weight.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@needs_compiler
@pytest.mark.parametrize(
    "why", ["evaluates", "frozen", "contiguous", "float64", "channels", "swish", "autocast", "one value", "compiles"]
)
def test_the_norm_stands_aside(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_call", lambda *_: pytest.fail("a kernel ran"))
    channels = 12 if why == "channels" else 16
    part = ConvNormAct(16, channels, activation="swish" if why == "swish" else "hswish")
    x = last((1, 16, 1, 1) if why == "one value" else (2, 16, 5, 5))
    if why == "evaluates":
        part.eval()
    elif why == "frozen":
        part.norm.eval()
    elif why == "contiguous":
        x = x.contiguous()
        part.conv.weight.data = part.conv.weight.data.contiguous()
    elif why == "float64":
        part, x = part.double(), x.double()
    elif why == "compiles":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.autocast("cpu", enabled=why == "autocast"):
        if why == "one value":
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                part(x)
        else:
            part(x)


@needs_compiler
@pytest.mark.parametrize("why", ["strided", "grouped", "many weights"])
def test_the_1x1_convolution_stands_aside(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.PointwiseBatchNormAct, "apply", lambda *_: pytest.fail("the kernel ran"))
    channels = 320 if why == "many weights" else 16
    part = ConvNormAct(channels, channels, stride=2 if why == "strided" else 1, groups=2 if why == "grouped" else 1)
    part(last((2, channels, 5, 5)))


@needs_compiler
@pytest.mark.parametrize("why", ["dilated", "seven wide", "fewer images than threads"])
def test_the_convolution_stands_aside(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.DepthwiseBatchNormAct, "apply", lambda *_: pytest.fail("the kernel ran"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4 if why == "fewer images than threads" else 2)
    part = ConvNormAct(
        16, 16, 7 if why == "seven wide" else 5, groups=16, dilation=2 if why == "dilated" else 1, activation="relu"
    )
    part(last((3, 16, 9, 9)))


@needs_compiler
@pytest.mark.parametrize(
    "backbone", ["small", "large", "large_minimalistic", "mobilenetv1", "mobilenetv2", "mnasnet_a1"]
)
@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_a_network_trains_as_with_torchs_operators(
    backbone: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to what rounding does to a deep net whose activations have bends."""
    torch.manual_seed(0)
    ours = build("detect", [f"backbone={backbone}", f"backbone.padding={padding}", "data=scenes"]).backbone
    ours = ours.to(memory_format=torch.channels_last).train()
    theirs, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    image = torch.rand(4, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    calls: set[str] = set()
    call = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *args: (calls.add(name), call(name, *args))[1])
    found = []
    for net in (ours, theirs, exact):
        if net is theirs:
            gated = {"sum_images"} if any(block.squeeze_excite for block in net.blocks) else set()
            convs = {"pointwise", "pointwise_backward", "depthwise", "depthwise_backward"}
            assert calls == gated | convs | {"moments", "apply", "apply_backward"}
            monkeypatch.setattr(kernels, "load", lambda: (None, ""))
        features = net(image.to(net.mean.dtype))
        sum(each.square().mean() for each in features.values()).backward()
        values = features | dict(net.named_buffers()) | {name: p.grad for name, p in net.named_parameters()}
        found.append({name: value.detach().double() for name, value in values.items() if value is not None})
    assert found[0].keys() == found[2].keys()
    for name, right in found[2].items():
        mine, peers = (float((side[name] - right).norm()) for side in found[:2])
        assert mine <= 3 * peers + 0.05 * float(right.norm()) + 1e-6, name


def test_without_a_compiler_torch_does_the_work(anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    library, note = kernels.load()
    assert library is None
    assert "C++ compiler" in note
    part = ConvNormAct(16, 16, 3, groups=16)
    assert part(last((2, 16, 5, 5))).shape == (2, 16, 5, 5)
