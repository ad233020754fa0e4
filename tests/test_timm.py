"""timm's networks as backbones."""

from __future__ import annotations

import builtins
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from backbones.timm import TimmBackbone

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("model", ["mobilenetv4_conv_small_035", "tf_efficientnet_lite0", "repvit_m0_9", "fastvit_t8"])
@torch.no_grad()
def test_features_are_timms(model: str) -> None:
    ours = TimmBackbone(model).eval()
    image = torch.rand(1, 3, 96, 64)
    features = ours(image)
    assert features.keys() == ours.specs.keys()
    for name, (channels, stride) in ours.specs.items():
        assert features[name].shape == (1, channels, math.ceil(96 / stride), math.ceil(64 / stride)), name
    assert {"c3", "c4", "c5", "c4_expand", "c3_first", "c3_depthwise"} <= features.keys()
    assert [ours.specs[name].stride for name in ("c3", "c4", "c5")] == [8, 16, 32]
    config = timm.get_pretrained_cfg(model)
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    torch.testing.assert_close(features["c5"], ours.net((image - mean) / std)[-1])


@torch.no_grad()
def test_output_stride() -> None:
    ours = TimmBackbone("mobilenetv3_small_050", output_stride=16).eval()
    features = ours(torch.rand(1, 3, 65, 96))
    for name, (channels, stride) in ours.specs.items():
        assert features[name].shape == (1, channels, math.ceil(65 / stride), math.ceil(96 / stride)), name
    assert ours.specs["c5"].stride == ours.specs["c4"].stride == 16


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_local_weights(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    theirs = timm.create_model("mobilenetv3_small_050", num_classes=1000).eval()
    file = tmp_path / f"net{suffix}"
    save_file(theirs.state_dict(), file) if suffix == ".safetensors" else torch.save(theirs.state_dict(), file)
    ours = TimmBackbone("mobilenetv3_small_050", weights=str(file)).eval()
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(ours(image)["c5"], theirs.forward_features((image - ours.mean) / ours.std))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = timm.create_model("mobilenetv3_small_050").state_dict()
    state["stray"] = state.pop("conv_stem.weight")
    state["bn1.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"conv_stem\.weight is missing; stray is left over; bn1\.weight is \[3\]"):
        TimmBackbone("mobilenetv3_small_050", weights=str(tmp_path / "net.pth"))
    with pytest.raises(FileNotFoundError, match=r"backbone\.weights"):
        TimmBackbone("mobilenetv3_small_050", weights=str(tmp_path / "absent.pth"))


def test_refuses_what_it_cannot_build() -> None:
    with pytest.raises(ValueError, match=r"has no model 'mobilenetv9'; "):
        TimmBackbone("mobilenetv9")
    with pytest.raises(ValueError, match="strides"):
        TimmBackbone("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="choose one of 32, 16, 8"):
        TimmBackbone("mobilenetv3_small_050", output_stride=4)


def test_bn_momentum_and_gradients() -> None:
    ours = TimmBackbone("mobilenetv3_small_050", bn_momentum=0.03).train()
    assert {m.momentum for m in ours.modules() if isinstance(m, nn.BatchNorm2d)} == {0.03}
    ours(torch.rand(2, 3, 64, 64))["c5"].sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_without_timm_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *arguments: object, **options: object) -> object:
        if name == "timm":
            raise ImportError(name)
        return original(name, *arguments, **options)  # type: ignore[arg-type]

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[timm\]"'):
        TimmBackbone("mobilenetv3_small_050")
