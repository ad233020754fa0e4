"""What is exported: bytes in, named outputs out; normalisation is inside, post-processing inside or outside."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heads import Size
from tasks.deploy.inside import ENDINGS
from tasks.training.model import Model

POSTPROCESS = ("outside", "inside")
LARGE = (1152, 1280)
"""A size at which every map has several cells, down to a stride of 512."""


@dataclass(frozen=True)
class Form:
    """How a model is exported."""

    size: Size
    """Height, width of the input, pixels."""
    batch: int | None = None
    """Images a run; None: any number."""
    dynamic_size: bool = False
    """Other sizes than ``size`` are taken, too."""
    postprocess: str = "outside"
    """``outside``: the heads' raw outputs; ``inside``: scores, detections, class maps."""


class Graph(nn.Module):
    """A model as a function of bytes: [B, 3, H, W] uint8 RGB to a tuple of tensors, one for every name in ``outputs``.

    Args:
        model: is copied; the graph is in eval mode on the CPU.
        form: see ``Form``.
    Raises:
        ValueError: unknown ``postprocess``.
    """

    def __init__(self, model: Model, form: Form) -> None:
        super().__init__()
        if form.postprocess not in POSTPROCESS:
            raise ValueError(f"postprocess is {form.postprocess!r}; expected {' or '.join(POSTPROCESS)}")
        self.form = form
        self.model = copy.deepcopy(model).cpu()
        inside = form.postprocess == "inside"
        self.endings = nn.ModuleDict({task: ENDINGS[task](model.head(task)) for task in model.heads if inside})
        self.eval().requires_grad_(False)
        with torch.inference_mode():
            self.outputs = tuple(self.named(self.example(1)))

    def example(self, batch: int | None = None) -> Tensor:
        """Images to trace with: a number that may vary must not be 1 here, not on a map either, or it stays 1."""
        size = LARGE if self.form.dynamic_size and batch is None else self.form.size
        return torch.zeros(batch or self.form.batch or 2, 3, *size, dtype=torch.uint8)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """One tensor for every name in ``outputs``."""
        return tuple(self.named(image).values())

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """The outputs by name: ``<task>``, or ``<task>/<part>`` where a head gives several."""
        outputs = self.model(image.float() / 255)
        size = (image.shape[-2], image.shape[-1])
        return flatten(outputs | {task: ending(outputs[task], size) for task, ending in self.endings.items()})


def flatten(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Heads' raw outputs with one name each."""
    flat: dict[str, Tensor] = {}
    for task, output in outputs.items():
        flat |= (
            {f"{task}/{part}": value for part, value in output.items()} if isinstance(output, dict) else {task: output}
        )
    return flat


def unflatten(flat: Mapping[str, np.ndarray], precision: str) -> dict[str, Any]:
    """The heads' raw outputs again, as tensors that share the arrays' memory.

    Offsets of a detector that was calculated in bfloat16 are of that type again, which engines give as float32: it
    tells the head what the order of equal scores is worth. Logits are not, for they are many.
    """
    outputs: dict[str, Any] = {}
    for name, value in flat.items():
        task, slash, part = name.partition("/")
        tensor = torch.from_numpy(value)
        if part == "deltas" and precision == "bf16":
            tensor = tensor.bfloat16()
        if slash:
            outputs.setdefault(task, {})[part] = tensor
        else:
            outputs[task] = tensor
    return outputs
