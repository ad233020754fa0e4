"""A tiny batch for the detection heads' tests, and whether a head learns it by heart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from backbones import FeatureSpec

SIZE = (64, 64)
TARGET = {
    "boxes": torch.tensor([[[4.0, 4, 30, 40], [30, 20, 60, 60]], [[10, 30, 50, 62], [0, 0, 0, 0]]]),
    "labels": torch.tensor([[0, 2], [1, -1]]),
}
NO_BOXES = [
    {"boxes": torch.zeros(2, 0, 4), "labels": torch.zeros(2, 0, dtype=torch.int64)},
    {"boxes": torch.zeros(2, 3, 4), "labels": torch.full((2, 3), -1)},
]


def features(specs: dict[str, FeatureSpec], batch: int = 2, size: tuple[int, int] = SIZE) -> dict[str, Tensor]:
    """Random maps, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(batch, channels, -(-size[0] // stride), -(-size[1] // stride), generator=generator)
        for name, (channels, stride) in specs.items()
    }


def check_overfits(
    head: nn.Module, specs: dict[str, FeatureSpec], learning_rate: float = 0.02, steps: int = 60
) -> None:
    """After some tens of steps the objects of the batch are the best detections, and well placed."""
    optimizer = torch.optim.AdamW(head.parameters(), learning_rate)
    batch = features(specs)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(head.loss(head(batch, SIZE), TARGET).values()).backward()
        optimizer.step()
    output = head(batch, SIZE)  # by the batch's own statistics: the running ones lag behind in so few steps
    output = {name: value.detach() for name, value in output.items()}
    for found, boxes, labels in zip(head.predict(output, [SIZE] * 2), TARGET["boxes"], TARGET["labels"], strict=True):
        real = labels >= 0
        best = slice(0, int(real.sum()))
        assert sorted(found["labels"][best].tolist()) == labels[real].tolist()
        assert (found["scores"][best] > 0.4).all()
        assert (box_iou(boxes[real], found["boxes"][best]).max(dim=1).values > 0.7).all()
