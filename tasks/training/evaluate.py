"""Scores a model on a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from tasks.data.loader import Batch, prepared
from tasks.training.metrics import METRICS
from tasks.training.model import Model

Metrics = dict[str, Any]
"""task -> its metric, fed with the split."""


@torch.inference_mode()
def evaluate(model: Model, loader: DataLoader, on_batch: Callable[[int, int], None] | None = None) -> Metrics:
    """Run a split through the model in eval mode and feed each task's metric.

    Args:
        model: on the device it is to run on; its mode is left as it was.
        loader: see ``evaluation_loader``.
        on_batch: called with (batches done, batches in all).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    metrics: Metrics = {task: METRICS[task](model.classes[task]) for task in model.heads}
    batch: Batch
    for done, batch in enumerate(loader, 1):
        loader.dataset.skipped |= dict.fromkeys(batch.skipped)  # type: ignore[attr-defined]
        if len(batch.image):
            outputs = model(prepared(batch._replace(image=batch.image.to(device, non_blocking=True))).image)
            for task, output in outputs.items():
                feed(metrics[task], model.head(task).predict(output, batch.sizes), batch.truths[task])
        if on_batch:
            on_batch(done, len(loader))
    model.train(was_training)
    return metrics


def feed(metric: Any, predictions: Any, truths: Sequence[Any]) -> None:
    """Update a metric with the samples that have a truth for its task."""
    having = [row for row, truth in enumerate(truths) if truth is not None]
    if len(having) < len(truths):
        predictions = [predictions[row] for row in having] if isinstance(predictions, list) else predictions[having]
    if having:
        metric.update(predictions, [truths[row] for row in having])


def scores(metrics: Metrics) -> dict[str, float]:
    """Flat scores: ``map`` for a single task, ``detect/map`` in a joint run."""
    several = len(metrics) > 1
    return {
        f"{task}/{name}" if several else name: value
        for task, metric in metrics.items()
        for name, value in metric.compute().items()
    }


def headline(metrics: Metrics, values: dict[str, float]) -> float:
    """The number that chooses the checkpoint: the mean of the tasks' main metrics, as far as they are numbers."""
    several = len(metrics) > 1
    mains = [values[f"{task}/{metric.main}" if several else metric.main] for task, metric in metrics.items()]
    numbers = [value for value in mains if value == value]
    return sum(numbers) / len(numbers) if numbers else 0.0
