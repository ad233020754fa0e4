"""Backbones turn an image into named feature maps.

A backbone is a plain ``nn.Module`` with a ``specs`` table and a ``forward`` that returns one map for every entry of it.
Features are named by level (``c2`` .. ``c5``: the last map of each resolution; ``c4_expand`` and the like: taps inside
a block), not by stride: under ``output_stride=16`` ``c5`` has stride 16, and ``specs["c5"].stride`` says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class FeatureSpec(NamedTuple):
    """What a head must know of a feature map before the net has run."""

    channels: int
    stride: int
    """Input pixels per feature pixel."""


class Backbone(Protocol):
    """The contract; nothing inherits from it.

    ``forward`` takes images ``[B, 3, H, W]`` float32 in [0, 1], normalises them with its own mean and std, and returns
    ``{name: [B, channels, ceil(H / stride), ceil(W / stride)]}`` with exactly the keys of ``specs``.
    """

    specs: dict[str, FeatureSpec]

    def forward(self, image: Tensor) -> dict[str, Tensor]: ...


def cache_folder() -> Path:
    """Where this suite keeps what can be made again.

    Raises:
        RuntimeError: there is no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mobilenetv3-bench"
