"""MobileNetV3 against torchvision, against the paper's printed sizes, and against its own specs."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import mobilenet_v3_large, mobilenet_v3_small
from torchvision.models.mobilenetv3 import MobileNetV3 as TheirMobileNetV3
from torchvision.models.mobilenetv3 import _mobilenet_v3_conf

from backbones.mobilenetv3 import LARGE, SMALL, MobileNetV3
from backbones.naming import torchvision_to_ours

THEIRS = {"large": mobilenet_v3_large, "small": mobilenet_v3_small}
HEAD = {"large": 1280, "small": 1024}
# Index in torchvision's `features` of each of our features' source: (module, part of it).
PLACES = {
    "large": {"c1": "1", "c2": "3", "c3_first": "4", "c3": "6", "c3_depthwise": "6.block.1", "c4": "12",
              "c4_expand": "13.block.0", "c5": "16"},
    "small": {"c1": "0", "c2": "1", "c3_first": "2", "c3": "3", "c3_depthwise": "3.block.1", "c4": "8",
              "c4_expand": "9.block.0", "c5": "12"},
}  # fmt: skip


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Weights and statistics that let errors show: no zeros, no ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.8, 1.6), (module.bias.data, -0.3, 0.3),
                (module.running_mean, -0.2, 0.2), (module.running_var, 0.3, 1.2),
            ):  # fmt: skip
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, math.sqrt(2 / fan_in), generator=generator)
            if module.bias is not None:
                module.bias.data.uniform_(-0.5, 0.5, generator=generator)


def normalise(image: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def their_features(net: TheirMobileNetV3, variant: str, image: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        net.features.get_submodule(place).register_forward_hook(
            # a copy: torchvision's residual adds in place
            lambda _module, _args, output, name=name: found.update({name: output.clone()})
        )
        for name, place in PLACES[variant].items()
    ]
    net.features(normalise(image))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("size", [(64, 64), (97, 131)])
@pytest.mark.parametrize(("variant", "dilated"), [("large", False), ("small", False), ("large", True), ("small", True)])
@torch.no_grad()
def test_equals_torchvision(variant: str, dilated: bool, size: tuple[int, int]) -> None:
    theirs = THEIRS[variant](dilated=dilated).eval()
    randomise(theirs)
    ours = MobileNetV3(variant, output_stride=16 if dilated else 32).eval()
    state, head = torchvision_to_ours(theirs.state_dict(), ours)
    ours.load_state_dict(state)
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    features, expected = ours(image), their_features(theirs, variant, image)
    assert features.keys() == expected.keys() == ours.specs.keys()
    for name, feature in features.items():
        assert feature.std() > 0.05, name  # a dead map would prove nothing
        assert_close(feature, expected[name])
    hidden = nn.functional.hardswish(
        nn.functional.linear(features["c5"].mean((2, 3)), head["hidden.weight"], head["hidden.bias"])
    )
    logits = nn.functional.linear(hidden, head["classifier.weight"], head["classifier.bias"])
    assert_close(logits, theirs(normalise(image)))


@torch.no_grad()
def test_detection_tail_equals_torchvision() -> None:
    theirs = TheirMobileNetV3(*_mobilenet_v3_conf("mobilenet_v3_large", reduced_tail=True)).eval()
    randomise(theirs)
    ours = MobileNetV3("large", reduced_tail="detection").eval()
    ours.load_state_dict(torchvision_to_ours(theirs.state_dict(), ours).backbone)
    image = torch.rand(1, 3, 75, 64)
    expected = their_features(theirs, "large", image)
    for name, feature in ours(image).items():
        assert_close(feature, expected[name])


def test_training_step_equals_torchvision() -> None:
    """Gradients and running statistics too: in-place operations have spoilt neither."""
    theirs = mobilenet_v3_large().train()
    randomise(theirs)
    ours = MobileNetV3("large").train()
    ours.load_state_dict(torchvision_to_ours(theirs.state_dict(), ours).backbone)
    image = torch.rand(4, 3, 96, 96)
    features = ours(image)
    sum(feature.square().mean() for feature in features.values()).backward()  # type: ignore[union-attr]
    sum(f.square().mean() for f in their_features(theirs, "large", image).values()).backward()  # type: ignore[union-attr]
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = torchvision_to_ours(theirs.state_dict() | their_gradients, ours).backbone
    statistics = torchvision_to_ours(theirs.state_dict(), ours).backbone
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=2e-3, atol=1e-4 * expected[name].abs().max().item()
        )
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, statistics[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "width", "stride", "tail", "size"),
    [
        *((v, w, s, t, (65, 96)) for v, w, s, t in product(
            ("large", "small"), (0.35, 0.75, 1.0, 1.25), (32, 16), (None, "detection", "segmentation"))),
        *((v, 1.0, s, None, hw) for v, s, hw in product(
            ("large", "small"), (32, 16), ((32, 32), (33, 47), (63, 34), (100, 225)))),
    ],
)  # fmt: skip
@torch.no_grad()
def test_specs_are_the_maps(variant: str, width: float, stride: int, tail: str | None, size: tuple[int, int]) -> None:
    net = MobileNetV3(variant, width=width, output_stride=stride, reduced_tail=tail).eval()
    features = net(torch.rand(1, 3, *size))
    assert features.keys() == net.specs.keys()
    for name, (channels, step) in net.specs.items():
        assert features[name].shape == (1, channels, math.ceil(size[0] / step), math.ceil(size[1] / step)), name
    assert net.specs["c5"].stride == stride
    assert [net.specs[name].stride for name in ("c1", "c2", "c3", "c4", "c4_expand", "c3_first", "c3_depthwise")] == [
        2, 4, 8, 16, 16, 8, 8,
    ]  # fmt: skip


def test_taps_are_the_ones_of_the_literature() -> None:
    large, small = MobileNetV3("large").specs, MobileNetV3("small").specs
    taps = ("c4_expand", "c3_first", "c3_depthwise", "c5")
    assert [large[name].channels for name in taps] == [672, 40, 120, 960]
    assert [small[name].channels for name in taps] == [288, 24, 88, 576]
    assert MobileNetV3("large", reduced_tail="detection").specs["c4_expand"].channels == 672
    assert MobileNetV3("small", reduced_tail="detection").specs["c4_expand"].channels == 288
    assert MobileNetV3("large", reduced_tail="segmentation").specs["c4_expand"].channels == 336
    assert MobileNetV3("small", reduced_tail="segmentation").specs["c4_expand"].channels == 144
    assert MobileNetV3("large", reduced_tail="detection").specs["c5"].channels == 480


def params(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def classifier_params(net: MobileNetV3, hidden: int, classes: int = 1000) -> int:
    return (net.specs["c5"].channels + 1) * hidden + (hidden + 1) * classes


def madds(net: MobileNetV3, size: int, hidden: int, classes: int = 1000) -> float:
    """In millions; with the classifier."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net.to("meta").eval()(torch.rand(1, 3, size, size))
    return (counter.get_total_flops() / 2 + net.specs["c5"].channels * hidden + hidden * classes) / 1e6


# Paper, Tables 3 and 9 (latest text): variant, size, width, printed MAdds in M, printed parameters in M, exact count.
PRINTED = [
    ("large", 224, 1.25, 356, 7.5, 7_551_976),
    ("large", 224, 1.0, 217, 5.4, 5_483_032),
    ("large", 224, 0.75, 155, 4.0, 3_993_528),
    ("large", 224, 0.5, 69, 2.6, 2_689_520),
    ("large", 224, 0.35, 40, 2.2, 2_131_832),
    ("large", 256, 1.0, 282, 5.4, 5_483_032),
    ("large", 192, 1.0, 160, 5.4, 5_483_032),
    ("large", 160, 1.0, 112, 5.4, 5_483_032),
    ("large", 128, 1.0, 73, 5.4, 5_483_032),
    ("large", 96, 1.0, 43, 5.4, 5_483_032),
    ("small", 224, 1.25, 91, 3.6, 3_645_960),
    ("small", 224, 1.0, 57, 2.5, 2_542_856),
    ("small", 224, 0.75, 44, 2.0, 2_041_872),
    ("small", 224, 0.5, 21, 1.6, 1_592_704),
    ("small", 224, 0.35, 12, 1.4, 1_358_288),
    ("small", 256, 1.0, 74, 2.5, 2_542_856),
    ("small", 160, 1.0, 30, 2.5, 2_542_856),
    ("small", 128, 1.0, 20, 2.5, 2_542_856),
    ("small", 96, 1.0, 12, 2.5, 2_542_856),
]

MISPRINTED = {("large", 224, 0.35): 39.47, ("small", 224, 0.75): 43.40, ("small", 256, 1.0): 73.18}
"""Counted, in M: over 1 % beside the print, and no rule of the paper or its code gives that (40, 44, 74)."""


@pytest.mark.parametrize(("variant", "size", "width", "printed_madds", "printed_params", "exact"), PRINTED)
def test_sizes_are_the_printed_ones(
    variant: str, size: int, width: float, printed_madds: float, printed_params: float, exact: int
) -> None:
    # Small 1.25 is printed with the older text's head of 1280.
    hidden = 1280 if (variant, width) == ("small", 1.25) else HEAD[variant]
    net = MobileNetV3(variant, width=width)
    count = params(net) + classifier_params(net, hidden)
    assert count == exact
    as_printed = {math.floor(count / 1e5) / 10, round(count / 1e6, 1)}  # the table cuts some figures and rounds others
    if (variant, width) == ("large", 0.35):
        assert as_printed == {2.1}  # printed 2.2: no rule of the paper or its code gives it
    else:
        assert printed_params in as_printed
    ours = madds(net, size, hidden)
    # Printed in whole millions, some rounded and some cut: a small figure is off by more than 1 % for that alone.
    met = abs(ours - printed_madds) <= 0.01 * printed_madds or printed_madds in (math.floor(ours), round(ours))
    assert met != ((variant, size, width) in MISPRINTED), ours
    assert met or ours == pytest.approx(MISPRINTED[variant, size, width], abs=0.005)


@pytest.mark.parametrize(
    ("variant", "width", "exact"),
    [("large", 0.75, 3_993_528), ("small", 1.0, 2_542_856), ("small", 0.75, 2_041_872), ("small", 0.5, 1_592_704)],
)
def test_width_rule_is_timms(variant: str, width: float, exact: int) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(f"mobilenetv3_{variant}_{int(width * 100):03}")
    stem = 16 / width if width < 0.75 else 16  # timm leaves the first layer at 16 below 0.75
    net = MobileNetV3(variant, width=width, stem_width=round(stem))
    count = params(net) + classifier_params(net, HEAD[variant])
    assert count == params(theirs)
    assert width < 0.75 or count == exact


@pytest.mark.parametrize(
    ("variant", "tail", "head", "printed"),
    [
        # Table 7, rows 8, 7 and 11: LR-ASPP of so many filters, 19 classes
        ("large", "segmentation", 128, 1.51),
        ("large", "segmentation", 256, 1.63),
        ("small", "segmentation", 128, 0.47),
    ],
)
def test_segmentation_tail_gives_the_printed_sizes(variant: str, tail: str, head: int, printed: float) -> None:
    net = MobileNetV3(variant, output_stride=16, reduced_tail=tail)
    c5, low = net.specs["c5"].channels, net.specs["c3_depthwise"].channels
    projection, gate = c5 * head + 2 * head, c5 * head  # 1x1 with batch norm; 1x1 without
    count = params(net) + projection + gate + (head + 1) * 19 + (low + 1) * 19
    assert count / 1e6 == pytest.approx(printed, abs=0.006)


def test_minimalistic_sizes() -> None:
    """The counts of tensorflow/models' checkpoints as timm has them: 3.92 M and 2.04 M."""
    for variant, exact in (("large", 3.92), ("small", 2.04)):
        net = MobileNetV3(variant, minimalistic=True)
        assert (params(net) + classifier_params(net, HEAD[variant])) / 1e6 == pytest.approx(exact, abs=0.01)
        kinds = {type(module).__name__ for module in net.modules()}
        assert not kinds & {"Hardswish", "SqueezeExcite", "Hardsigmoid"}
        assert max(m.kernel_size[0] for m in net.modules() if isinstance(m, nn.Conv2d)) == 3


def kinds_of(net: MobileNetV3) -> list[str]:
    """The activations of the first layer, of every block and of the last layer."""
    return [type(part.act).__name__ for part in (net.stem, *(b.depthwise for b in net.blocks), net.last)]  # type: ignore[union-attr]


def test_tables_are_hswish_at_80_and_40() -> None:
    assert kinds_of(MobileNetV3("large")) == kinds_of(MobileNetV3("large", nonlinearity="hswish@80"))
    assert kinds_of(MobileNetV3("small")) == kinds_of(MobileNetV3("small", nonlinearity="hswish@40"))
    assert set(kinds_of(MobileNetV3("large", nonlinearity="hswish@16"))) == {"Hardswish"}
    assert kinds_of(MobileNetV3("large", nonlinearity="hswish@112")).count("Hardswish") == 5 + 2
    assert set(kinds_of(MobileNetV3("large", nonlinearity="relu"))) == {"ReLU"}
    assert kinds_of(MobileNetV3("large", nonlinearity="swish")) == [
        {"Hardswish": "SiLU"}.get(kind, kind) for kind in kinds_of(MobileNetV3("large"))
    ]
    assert kinds_of(MobileNetV3("large", stem_nonlinearity="relu"))[0] == "ReLU"


def test_design_choices_cost_what_the_paper_says() -> None:
    """Section 5.1 and 5.2: the last stage's redesign saves 30 M multiply-adds, 16 filters instead of 32 save 10 M."""
    now = madds(MobileNetV3("large"), 224, 1280)
    original = MobileNetV3("large", last_stage="original")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        original.to("meta").eval()(torch.rand(1, 3, 224, 224))
    before = (counter.get_total_flops() / 2 + 1280 * 1000) / 1e6
    assert original.specs["c5"].channels == 1280
    assert before - now == pytest.approx(34.3, abs=0.05)  # printed as 30
    assert madds(MobileNetV3("large", stem_width=32), 224, 1280) - now == pytest.approx(10.4, abs=0.05)  # printed as 10


def test_squeeze_excite_switches() -> None:
    squeezes = [b.squeeze_excite.reduce.out_channels for b in MobileNetV3("large").blocks if b.squeeze_excite]  # type: ignore[union-attr]
    assert squeezes == [24, 32, 32, 120, 168, 168, 240, 240]
    small = [b.squeeze_excite.reduce.out_channels for b in MobileNetV3("small").blocks if b.squeeze_excite]  # type: ignore[union-attr]
    assert small == [8, 24, 64, 64, 32, 40, 72, 144, 144]
    sixteenth = MobileNetV3("large", se_ratio=1 / 16)
    assert [b.squeeze_excite.reduce.out_channels for b in sixteenth.blocks if b.squeeze_excite][-1] == 64  # type: ignore[union-attr]
    assert all(b.squeeze_excite is None for b in MobileNetV3("large", se_ratio=0).blocks)
    gates = {type(m) for m in MobileNetV3("small", se_gate="sigmoid").modules()}
    assert nn.Sigmoid in gates
    assert nn.Hardsigmoid not in gates


def test_tables_are_as_long_as_the_papers() -> None:
    assert (len(LARGE), len(SMALL)) == (17, 13)
    assert [row.stride for row in LARGE].count(2) == [row.stride for row in SMALL].count(2) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "medium"}, "variant='medium' is unknown; choose one of 'large', 'small'"),
        ({"output_stride": 8}, "output_stride=8 is unknown; choose one of 32, 16"),
        ({"reduced_tail": "true"}, "choose one of None, 'detection', 'segmentation'"),
        ({"padding": "valid"}, "choose one of 'auto', 'symmetric', 'same'"),
        ({"nonlinearity": "hswish"}, "'hswish@N'"),
        ({"nonlinearity": "relu@3"}, "'hswish@N'"),
        ({"stem_nonlinearity": "gelu"}, "stem_nonlinearity='gelu'"),
        ({"se_gate": "tanh"}, "se_gate='tanh'"),
        ({"se_ratio": 4}, r"se_ratio=4 is outside \[0, 1\]"),
        ({"width": 0}, "width=0"),
        ({"variant": "small", "last_stage": "original"}, "last_stage='original' is unknown; choose one of 'efficient'"),
    ],
)  # fmt: skip
def test_refuses_unknown_values(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MobileNetV3(**{"variant": "large", **arguments})  # type: ignore[arg-type]


def test_refuses_misspelt_arguments() -> None:
    with pytest.raises(TypeError, match="widht"):
        MobileNetV3("large", widht=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "image", [torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64)]
)
def test_refuses_what_is_no_image_batch(image: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected floats \[B, 3, H, W\] in \[0, 1\]"):
        MobileNetV3("small")(image)


def test_bn_momentum_reaches_every_norm() -> None:
    norms = [m for m in MobileNetV3("small", bn_momentum=0.03).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.03, 1e-3)}
    assert len(norms) == 34


@pytest.mark.parametrize("variant", ["large", "small"])
def test_an_untrained_net_keeps_the_scale(variant: str) -> None:
    """He initialisation by group: in training mode no map is dead or blown up, and every parameter gets a gradient."""
    torch.manual_seed(0)
    net = MobileNetV3(variant).train()
    features = net(torch.rand(8, 3, 64, 64))
    for name, feature in features.items():
        assert 0.02 < feature.std() < 30, name
    features["c5"].square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_channels_last_stays_and_gives_the_same() -> None:
    net = MobileNetV3("small").eval()
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = net(image)
        after = net.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last))
    for name, feature in after.items():
        assert feature.is_contiguous(memory_format=torch.channels_last), name
        assert_close(feature, before[name])
