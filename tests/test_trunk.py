"""MobileNetV1, V2 and MnasNet, the other nets on the common trunk, against torchvision, timm and the printed sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

from backbones.mnasnet import MnasNet
from backbones.mobilenetv1 import MobileNetV1
from backbones.mobilenetv2 import MobileNetV2
from backbones.naming import to_ours
from backbones.trunk import Trunk
from backbones.weights import timm_conventions

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
NETS = {
    "v1": MobileNetV1,
    "v2": MobileNetV2,
    "a1": lambda **arguments: MnasNet("a1", **arguments),
    "small": lambda **arguments: MnasNet("small", **arguments),
}


@torch.no_grad()
def randomise(net: nn.Module) -> None:
    """Weights and statistics that let errors show; variances so small that a wrong eps shows too."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.6)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.momentum = 1.0
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.1 / math.sqrt(module.weight[0].numel()))
    net.train()
    net(torch.rand(4, 3, 96, 96))
    net.eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """In float64: in float32 both nets are further from the exact result than from each other."""
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("width", [1.0, 0.35, 1.4])
@torch.no_grad()
def test_v2_equals_torchvision(width: float) -> None:
    theirs = mobilenet_v2(width_mult=width)
    randomise(theirs)
    ours = MobileNetV2(width=width).eval()
    state, head = to_ours(theirs.state_dict(), ours, lambda: timm_conventions(Path("none.pth")))
    ours.load_state_dict(state)
    ours.double()
    theirs.double()
    image = torch.rand(2, 3, 97, 64, dtype=torch.float64)
    x, outputs = (image - MEAN) / STD, []
    for layer in theirs.features:
        x = layer(x)
        outputs.append(x.clone())
    features = ours(image)
    for name, index in {"c1": 1, "c2": 3, "c3_first": 4, "c3": 6, "c4": 13, "c5": 18}.items():
        assert_close(features[name], outputs[index])
    assert_close(features["c3_depthwise"], theirs.features[6].conv[:2](outputs[5]))
    assert_close(features["c4_expand"], theirs.features[14].conv[0](outputs[13]))
    weight, bias = head["classifier.weight"].double(), head["classifier.bias"].double()
    logits = nn.functional.linear(features["c5"].mean((2, 3)), weight, bias)
    assert_close(logits, theirs((image - MEAN) / STD))


@pytest.mark.parametrize(
    ("name", "net"),
    [
        ("mobilenetv1_100", "v1"),
        ("mobilenetv2_100", "v2"),
        ("semnasnet_100", "a1"),
        ("mnasnet_small", "small"),
    ],
)
@torch.no_grad()
def test_equals_timm(name: str, net: str) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name)
    randomise(theirs)
    ours = NETS[net]().eval()
    state, head = to_ours(theirs.state_dict(), ours, lambda: timm_conventions(Path(f"{name}.pth")))
    ours.load_state_dict(state)
    assert head.keys() == {"classifier.weight", "classifier.bias"}
    ours.double()
    theirs.double()
    image = torch.rand(2, 3, 75, 96, dtype=torch.float64)
    features = ours(image)
    expected = theirs.forward_intermediates((image - MEAN) / STD)[1]
    for level, feature in zip(("c1", "c2", "c3", "c4"), expected[:4], strict=True):
        assert feature.std() > 0.01, level
        assert_close(features[level], feature)
    assert_close(features["c5"], theirs.forward_features((image - MEAN) / STD))


@pytest.mark.parametrize("tail", [None, "detection", "segmentation"])
@pytest.mark.parametrize("stride", [32, 16])
@pytest.mark.parametrize("width", [0.35, 1.0])
@pytest.mark.parametrize("net", list(NETS))
@torch.no_grad()
def test_specs_are_the_maps(net: str, width: float, stride: int, tail: str | None) -> None:
    for padding, size in (("symmetric", (65, 96)), ("same", (32, 47))):
        ours = NETS[net](width=width, output_stride=stride, reduced_tail=tail, padding=padding).eval()
        features = ours(torch.rand(1, 3, *size))
        assert features.keys() == ours.specs.keys()
        for name, (channels, step) in ours.specs.items():
            assert features[name].shape == (1, channels, math.ceil(size[0] / step), math.ceil(size[1] / step)), name


def test_named_features_are_the_ones_of_v3() -> None:
    for build in NETS.values():
        assert list(build().specs) == ["c1", "c2", "c3", "c4", "c3_first", "c3_depthwise", "c4_expand", "c5"]
    v1 = MobileNetV1()
    features = v1.eval()(torch.rand(1, 3, 32, 32))
    assert torch.equal(features["c4_expand"], features["c4"])
    assert MobileNetV2().specs["c4_expand"].channels == 576
    assert MnasNet("a1").specs["c4_expand"].channels == 672


def params(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def without_norms(net: nn.Module) -> int:
    return params(net) - sum(params(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def madds(net: Trunk, size: int) -> float:
    """In millions; with a linear classifier of 1000 classes."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net.to("meta").eval()(torch.rand(1, 3, size, size))
    return counter.get_total_flops() / 2e6 + net.specs["c5"].channels / 1e3


@pytest.mark.parametrize(
    ("net", "width", "exact", "printed", "printed_madds"),
    [
        # V3 paper, Table 3 (V2: the figures are those without batch norm's parameters, cut to a decimal)
        ("v2", 1.0, 3_504_872, 3.4, 300),
        ("v2", 0.35, 1_677_128, 1.6, 59.2),
        ("a1", 1.0, 3_887_038, 3.9, 312),  # MAdds: MnasNet's own paper; V3's prints 315
        # MobileNetV1 paper, Table 8
        ("v1", 1.0, 4_231_976, 4.2, 569),
        ("v1", 0.5, 1_331_592, 1.3, 149),
    ],
)
def test_sizes_are_the_printed_ones(net: str, width: float, exact: int, printed: float, printed_madds: float) -> None:
    ours = NETS[net](width=width)
    classifier = (ours.specs["c5"].channels + 1) * 1000
    assert params(ours) + classifier == exact
    count = (without_norms(ours) + classifier) / 1e6
    assert printed in {math.floor(count * 10) / 10, round(count, 1), round(exact / 1e6, 1)}
    assert madds(ours, 224) == pytest.approx(printed_madds, rel=0.01)


def test_mnasnet_small_is_the_released_one() -> None:
    """The V3 paper prints 1.9 M and 65.1 M for Mnas-small; the released net (TensorFlow, timm) is 2.03 M."""
    ours = MnasNet("small")
    assert params(ours) + 1281 * 1000 == 2_030_264
    assert madds(ours, 224) == pytest.approx(65.1, rel=0.05)


def test_v2s_segmentation_sizes() -> None:
    """V3 paper, Table 7: V2 without the layer of 1280 under R-ASPP of 256, whole (2.11 M) and RF2 (1.15 M)."""
    for tail, printed in ((None, 2.11), ("segmentation", 1.15)):
        ours = MobileNetV2(output_stride=16, last_layer="none", reduced_tail=tail)
        channels = ours.specs["c5"].channels
        branches, project, classifier = 2 * (channels + 2) * 256, (512 + 2) * 256, 257 * 19
        assert math.floor((params(ours) + branches + project + classifier) / 1e4) / 100 == printed


def test_last_layer() -> None:
    assert MobileNetV2(width=0.35).specs["c5"].channels == 1280
    assert MobileNetV2(width=1.4).specs["c5"].channels == 1792
    assert MobileNetV2(width=0.35, last_layer="scaled").specs["c5"].channels == 448
    assert MobileNetV2(last_layer="none").specs["c5"].channels == 320
    assert MobileNetV2(reduced_tail="detection").specs["c5"].channels == 640
    assert MobileNetV1(reduced_tail="detection").specs["c5"].channels == 512


@pytest.mark.parametrize("net", list(NETS))
def test_trains(net: str) -> None:
    torch.manual_seed(0)
    ours = NETS[net](bn_momentum=0.03).train()
    features = ours(torch.rand(4, 3, 64, 64))
    features["c5"].square().mean().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert {m.momentum for m in ours.modules() if isinstance(m, nn.BatchNorm2d)} == {0.03}


def test_squeeze_excite_of_mnasnet_is_a_quarter_of_the_input() -> None:
    squeezes = [b.squeeze_excite.reduce.out_channels for b in MnasNet("a1").blocks if b.squeeze_excite]  # type: ignore[union-attr]
    assert squeezes == [6, 10, 10, 20, 28, 28, 40, 40]
    assert all(b.squeeze_excite is None for b in MnasNet("a1", se_ratio=0).blocks)


def test_published_weights() -> None:
    assert MobileNetV2().published == MobileNet_V2_Weights.IMAGENET1K_V1.url
    with pytest.raises(ValueError, match="nobody publishes"):
        MobileNetV1(weights="imagenet")


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (MobileNetV1, {"output_stride": 8}, "output_stride=8 is unknown; choose one of 32, 16"),
        (MobileNetV2, {"last_layer": "half"}, "'fixed', 'scaled', 'none'"),
        (MobileNetV2, {"width": -1}, "width=-1"),
        (MnasNet, {"variant": "b1"}, "variant='b1' is unknown; choose one of 'a1', 'small'"),
        (MnasNet, {"variant": "a1", "se_ratio": 4}, "se_ratio=4"),
        (MobileNetV1, {"reduced_tail": "yes"}, "None, 'detection', 'segmentation'"),
    ],
)
def test_refuses_unknown_values(build: type[Trunk], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)  # type: ignore[arg-type]


def test_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert params(MobileNetV2()) == params(MobileNetV2())


@pytest.mark.parametrize("last", [True, False])
def test_maps_of_training_lie_in_memory_as_the_weights(last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    net = MnasNet("a1").train().to(memory_format=layout)
    seen: list[torch.Tensor] = []
    net.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    seen += net(torch.rand(2, 3, 64, 64)).values()
    assert len(seen) > 3
    assert all(x.is_contiguous(memory_format=layout) for x in seen)
