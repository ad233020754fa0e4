"""Eager torch: the model itself, channels last; what the other engines are compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from tasks.deploy.graph import Graph

SUFFIX = None
PACKAGES = ("torch",)
EXTRA = None
PRECISIONS = ("f32", "bf16")


class Session:
    """See ``tasks.deploy.Session``; of any module that takes an image and gives the outputs that the metadata names."""

    def __init__(self, module: nn.Module, metadata: Mapping[str, Any], threads: int, precision: str) -> None:
        self.module = module.to(memory_format=torch.channels_last)
        self.metadata = metadata
        self.threads, self.half = threads, precision == "bf16"

    @torch.inference_mode()
    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """See ``tasks.deploy.Session``."""
        if torch.get_num_threads() != self.threads:  # one number for the whole process
            torch.set_num_threads(self.threads)
        pixels = torch.from_numpy(image).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            outputs = self.module(pixels)
        return {name: as_array(value) for name, value in zip(self.metadata["outputs"], outputs, strict=True)}


def as_array(value: torch.Tensor) -> np.ndarray:
    """An output; numpy has no bfloat16."""
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def wrap(graph: Graph, metadata: Mapping[str, Any], threads: int, precision: str) -> Session:
    """The model as it is, instead of ``export`` and ``load``: a copy, for other engines write files of the graph."""
    return Session(copy.deepcopy(graph), metadata, threads, precision)
