"""SSDLite: SSD with depthwise separable convolutions, the paper's detector."""

from __future__ import annotations

from torch import Tensor, nn

from backbones.blocks import ConvNormAct
from heads.ssd import SSD


class SSDLite(SSD):
    """SSD whose extra layers and predictors are depthwise separable; arguments and output are those of ``SSD``.

    Source: MobileNetV2, section 6.2; MobileNetV3, section 6.3: the first map is the expansion of the block that leaves
        stride 16 (``c4_expand``), the second the last one before the pooling (``c5``).
    """

    def extra_layer(self, inputs: int, outputs: int, bn_momentum: float) -> nn.Sequential:
        """Halves the resolution."""
        half = outputs // 2
        return nn.Sequential(
            ConvNormAct(inputs, half, activation="relu6", momentum=bn_momentum),
            ConvNormAct(half, half, 3, stride=2, groups=half, activation="relu6", momentum=bn_momentum),
            ConvNormAct(half, outputs, activation="relu6", momentum=bn_momentum),
        )

    def predictor(self, inputs: int, outputs: int, bn_momentum: float) -> nn.Sequential:
        """Reads classes or offsets off a feature map."""
        return nn.Sequential(
            ConvNormAct(inputs, inputs, 3, groups=inputs, activation="relu6", momentum=bn_momentum),
            nn.Conv2d(inputs, outputs, 1),
        )

    def initialise_conv(self, conv: nn.Conv2d) -> None:
        """First weights of a convolution; biases are zero.

        Source: torchvision's and TensorFlow's configuration of SSDLite.
        """
        nn.init.normal_(conv.weight, std=0.03)


def torchvision_to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head's part of a state dict of torchvision's ``ssdlite320_mobilenet_v3_large``, under our names.

    Args:
        state: torchvision's names (``backbone.extra.*``, ``head.*``); the backbone's other entries are left out.
    Returns:
        What ``SSDLite.load_state_dict`` takes.
    Raises:
        ValueError: an entry has no counterpart; lists all of them.
    """
    parts = {
        "backbone.extra.": "extra.",
        "head.classification_head.module_list.": "cls.",
        "head.regression_head.module_list.": "box.",
    }
    unknown = [name for name in state if not name.startswith((*parts, "backbone."))]
    if unknown:
        raise ValueError(
            f"the checkpoint is of another head: {', '.join(unknown)} has no counterpart; choose the head it was "
            "trained with"
        )
    ours = {}
    for name, value in state.items():
        for theirs, prefix in parts.items():
            if name.startswith(theirs):
                ours[prefix + _rename(name.removeprefix(theirs))] = value
    return ours


def _rename(name: str) -> str:
    """``2.0.1.weight``, map, layer, 0 for the convolution and 1 for its norm, to ``2.0.norm.weight``."""
    parts = name.split(".")
    if len(parts) == 4:
        parts[2] = {"0": "conv", "1": "norm"}.get(parts[2], parts[2])
    return ".".join(parts)
