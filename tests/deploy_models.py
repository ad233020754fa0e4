"""What the tests of export and engines need: untrained networks, a run folder, a tiny data set."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tasks import build
from tasks.cli import compose
from tasks.training import checkpoint
from tasks.training.build import complete, make_model, plain
from tasks.training.model import Model

TINY_SCENES = ["data=scenes", "data.train=4", "data.val=5", "data.test=2"]


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every BatchNorm its own statistics and scale, so that each layer's values are of a trained net's kind."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.7, 1.3, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)


@cache
def network(task: str, backbone: str = "small", size: tuple[int, int] = (64, 96), *choices: str) -> Model:
    """An untrained network for three classes."""
    tasks = ("classify", "detect", "segment") if task == "multitask" else ()
    classes = [f"heads.{name}.num_classes=3" for name in tasks] or ["head.num_classes=3"]
    torch.manual_seed(0)
    model = build(task, [f"backbone={backbone}", f"image_size=[{size[0]},{size[1]}]", *classes, *choices])
    randomise(model)
    return model


def pictures(count: int, size: tuple[int, int]) -> np.ndarray:
    """[count, 3, H, W] uint8: noise under a gradient."""
    rng = np.random.default_rng(count)
    ramp = np.linspace(0, 200, size[1], dtype=np.float64)
    return (rng.integers(0, 56, (count, 3, *size)) + ramp).astype(np.uint8)


def write_run(folder: Path, task: str, overrides: list[str]) -> Path:
    """A run folder as a training command leaves it, of an untrained network."""
    folder.mkdir(parents=True, exist_ok=True)
    config, classes = complete(plain(compose(task, overrides)))
    torch.manual_seed(0)
    model = make_model(config, classes)
    randomise(model)
    names = {name: list(of_task) for name, of_task in classes.items()}
    content = {"format": 1, "config": config, "classes": names, "model": model.state_dict()}
    checkpoint.save(folder / checkpoint.BEST, content)
    return folder
