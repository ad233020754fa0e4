"""Any network of timm that gives feature maps, as a backbone: ``pip install -e ".[timm]"``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones import FeatureSpec
from backbones.blocks import BN_MOMENTUM, check_choice
from backbones.weights import located, read


class TimmBackbone(nn.Module):
    """A timm network built with ``features_only``: MobileNetV4, EfficientNet-Lite, RepViT, FastViT ...

    Args:
        model: timm's name, such as "mobilenetv4_conv_small"; a tag may follow a dot.
        output_stride: 32, or 16 or 8 where the network allows it.
        bn_momentum: weight of the new batch in the running statistics.
        weights: None (random), "imagenet" (timm's published weights, by Hugging Face's cache), or a file with the whole
            network in timm's naming.
    Raises:
        ValueError: timm is not installed or does not know the name, the network gives no maps at strides 8, 16 and
            32, or weights that do not fit.
        FileNotFoundError: the weights are not there or not to be had.

    Features: c1 .. c5, the last of each stride (those that the network has). Taps inside of blocks are not to be had,
    so that c4_expand is c4, and c3_first and c3_depthwise are c3: every head runs, on the nearest map there is.
    Differs: networks that cut images into patches give floor(H / stride) for sides that are no multiple of the stride.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str,
        *,
        output_stride: int = 32,
        bn_momentum: float = BN_MOMENTUM,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("output_stride", output_stride, (32, 16, 8))
        self.net = _build(model, output_stride, weights)
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum
        described = self.net.pretrained_cfg
        assert isinstance(described, dict)
        self.register_buffer("mean", torch.tensor(described["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(described["std"]).view(1, 3, 1, 1))
        self.names, self.specs = _specs(self.net, model, output_stride)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Named maps of a batch [B, 3, H, W] float in [0, 1]."""
        maps = self.net((image - self.mean) / self.std)
        return {name: maps[index] for name, index in self.names.items()}


def _build(model: str, output_stride: int, weights: str | None) -> nn.Module:
    timm = _timm()
    if not timm.is_model(model.partition(".")[0]):
        near = timm.list_models(f"*{model.partition('.')[0].split('_')[0]}*")[:8]
        hint = (
            f"near it are {', '.join(near)}"
            if near
            else "python -c 'import timm; print(timm.list_models())' lists them"
        )
        raise ValueError(f"timm {timm.__version__} has no model {model!r}; {hint}")
    options: dict[str, Any] = {"features_only": True}
    if output_stride != 32:
        options["output_stride"] = output_stride
    if weights == "imagenet":
        options["pretrained"] = True
    elif weights is not None:
        path = located(weights)
        _check(timm, model, path)
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    try:
        net = timm.create_model(model, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"could not fetch timm's weights of {model} ({error}); give backbone.weights a local file, or null"
        ) from error
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"timm cannot build {model!r} with features_only and output_stride={output_stride}: {error}"
        ) from error
    assert isinstance(net, nn.Module)
    return net


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ValueError('backbone=timm needs timm; install it with pip install -e ".[timm]"') from error
    return timm


def _check(timm: Any, model: str, path: Path) -> None:
    """timm loads leniently where a classifier is cut off; here every key must have its counterpart."""
    with torch.device("meta"):
        wanted = timm.create_model(model).state_dict()
    state = read(path)
    wrong = [f"{key} is missing" for key in wanted if key not in state]
    wrong += [f"{key} is left over" for key in state if key not in wanted]
    wrong += [
        f"{key} is {list(state[key].shape)} and should be {list(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if wrong:
        raise ValueError(f"backbone.weights={path} does not fit timm's {model}: {'; '.join(wrong)}")


def _specs(net: nn.Module, model: str, output_stride: int) -> tuple[dict[str, int], dict[str, FeatureSpec]]:
    """Feature name -> index of timm's map, and the specs."""
    info: Any = net.feature_info
    channels, strides = info.channels(), info.reduction()
    names: dict[str, int] = {}
    if output_stride == 32:
        names = {f"c{int(math.log2(stride))}": index for index, stride in enumerate(strides)}
    else:  # dilation repeats the stride: the last maps are c5, c4 ...
        names = {f"c{5 - (len(strides) - 1 - index)}": index for index in range(len(strides))}
    if not {"c3", "c4", "c5"} <= names.keys():
        raise ValueError(f"timm's {model} gives maps at strides {strides}; heads need strides 8, 16 and 32")
    names |= {"c4_expand": names["c4"], "c3_first": names["c3"], "c3_depthwise": names["c3"]}
    return names, {name: FeatureSpec(channels[index], strides[index]) for name, index in names.items()}
