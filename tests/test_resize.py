"""Targets stay on what they mark when a batch changes its size."""

from __future__ import annotations

import torch

from tasks.data.loader import Batch
from tasks.data.resize import resized


def test_a_box_and_a_mask_follow_their_object() -> None:
    image, mask = torch.zeros(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.int64)
    image[:, :, 16:48, 24:72], mask[:, 16:48, 24:72], mask[:, :8] = 1.0, 3, 255
    targets = {
        "classify": torch.tensor([7]),
        "detect": {"boxes": torch.tensor([[[24.0, 16.0, 72.0, 48.0]]]), "labels": torch.tensor([[3]])},
        "segment": mask,
    }
    small = resized(Batch(image, targets, {}, {}, [], [], [0]), (32, 64))
    assert small.image.shape == (1, 3, 32, 64)
    x1, y1, x2, y2 = small.targets["detect"]["boxes"][0, 0].tolist()
    assert (x1, y1, x2, y2) == (16, 8, 48, 24)
    assert small.image[0, 0, 9:23, 17:47].min() > 0.99
    assert small.image[0, 0, :7].max() < 0.01
    inside = small.targets["segment"][0] == 3
    assert inside.nonzero().min(0).values.tolist() == [8, 16]
    assert inside.nonzero().max(0).values.tolist() == [23, 47]
    assert set(small.targets["segment"].unique().tolist()) == {0, 3, 255}
    assert small.targets["classify"].tolist() == [7]
    assert targets["detect"]["boxes"][0, 0].tolist() == [24, 16, 72, 48]  # the loader's batch is left alone


def test_a_batch_of_that_size_is_itself() -> None:
    batch = Batch(torch.zeros(2, 3, 32, 48), {}, {}, {}, [], [], [])
    assert resized(batch, (32, 48)) is batch
