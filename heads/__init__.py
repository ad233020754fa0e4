"""Heads turn feature maps into a task's raw output, its loss and its prediction.

A head is a plain ``nn.Module``; its yaml is a ``_partial_`` that receives the backbone's ``specs``. ``forward`` gives
the same raw output in training and evaluation; ``loss`` and ``predict`` are separate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from backbones import FeatureSpec

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]
"""Height, width in pixels."""


class Head(Protocol):
    """The contract; nothing inherits from it. What output, target and prediction are depends on the task:

    ========  ========================================  ============================  ============================
    task      output                                    target                        prediction
    ========  ========================================  ============================  ============================
    classify  logits [B, K]                             label [B] int64, or           scores [B, K], sum 1
                                                        [B, K] float
    detect    dict of raw tensors (see the head)        {"boxes" [B, N, 4] xyxy px,   list of {"boxes" [n, 4] xyxy,
                                                        "labels" [B, N], -1 padding}  "scores" [n], "labels" [n]}
    segment   logits [B, K, h, w], the head's stride    mask [B, H, W], 255 ignored   list of class maps [H, W]
    ========  ========================================  ============================  ============================
    """

    task: ClassVar[str]

    def forward(self, features: dict[str, Tensor], size: Size) -> Any:
        """Raw output for images of ``size`` (the network's input, before any resize back)."""
        ...

    def loss(self, output: Any, target: Any) -> dict[str, Tensor]:
        """Named scalar terms; their sum is trained, each is logged."""
        ...

    def predict(self, output: Any, sizes: list[Size]) -> Any:
        """Predictions in the pixels of the original images, whose sizes are given, one an image."""
        ...


def select(specs: dict[str, FeatureSpec], names: tuple[str, ...], head: str) -> list[FeatureSpec]:
    """The specs of the features a head reads.

    Args:
        specs: what the backbone gives.
        names: the features wanted, in order.
        head: the head's name, for the message.
    Raises:
        ValueError: no feature, or one is missing; names what there is and the key to change.
    """
    if not names:
        raise ValueError(f"head.features is empty; {head} needs at least one of {', '.join(specs)}")
    missing = [name for name in names if name not in specs]
    if missing:
        raise ValueError(
            f"{head} needs the feature {', '.join(missing)}, but the backbone gives {', '.join(specs)}; "
            "choose another backbone, or name other features in the head's yaml"
        )
    return [specs[name] for name in names]


def check_share(name: str, value: float) -> float:
    """The value itself.

    Raises:
        ValueError: it is no number in [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; expected a share from 0 to below 1")
    return float(value)


def check_count(name: str, *values: int) -> None:
    """Refuse what is no number of things.

    Raises:
        ValueError: a value is no whole number above 0.
    """
    if not all(type(value) is int and value > 0 for value in values):
        raise ValueError(f"{name} is {', '.join(map(str, values))}; expected a whole number above 0")


def check_range(name: str, value: float, least: float, most: float = float("inf")) -> None:
    """Refuse what lies beyond; ``most`` itself is allowed where it is finite.

    Raises:
        ValueError: the value is no number from ``least`` to ``most``.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most or value == float("inf"):
        expected = f"a finite number of at least {least:g}" if most == float("inf") else f"{least:g} to {most:g}"
        raise ValueError(f"{name} is {value}; expected {expected}")
