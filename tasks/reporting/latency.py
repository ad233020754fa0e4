"""How long a forward takes in eager torch, measured side by side so that ratios survive a noisy machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tasks.reporting.costs import count_parts
from tasks.reporting.results import cpu_name


def interleaved(calls: Sequence[Callable[[], object]], seconds: float, least: int = 5, warmup: int = 3) -> np.ndarray:
    """Time some calls in turn, round after round.

    Args:
        calls: what to time.
        seconds: about how long to go on.
        least: rounds at least, however slow.
        warmup: rounds that are not counted.
    Returns:
        [rounds, calls] milliseconds.
    """
    rounds: list[list[float]] = []
    began = time.perf_counter()
    while len(rounds) < least + warmup or time.perf_counter() - began < seconds:
        row = []
        for call in calls:
            start = time.perf_counter()
            call()
            row.append((time.perf_counter() - start) * 1000)
        rounds.append(row)
    return np.array(rounds[warmup:])


def forward_of(model: nn.Module, size: tuple[int, int]) -> Callable[[], object]:
    """One forward of one random image, in eval mode."""
    image = torch.rand(1, 3, *size, device=next(model.parameters()).device)
    image = image.contiguous(memory_format=torch.channels_last)
    model.eval()

    def call() -> object:
        with torch.inference_mode():
            output = model(image)
        if image.is_cuda:
            torch.cuda.synchronize()
        return output

    return call


def measure(model: nn.Module, size: tuple[int, int], seconds: float = 2.0) -> dict[str, Any]:
    """A record's ``latency``: one forward of one image, with torch's threads as they are."""
    times = interleaved([forward_of(model, size)], seconds)[:, 0]
    device = next(model.parameters()).device
    q1, median, q3, p90 = np.quantile(times, [0.25, 0.5, 0.75, 0.9])
    return {
        "median_ms": round(float(median), 3),
        "iqr_ms": round(float(q3 - q1), 3),
        "p90_ms": round(float(p90), 3),
        "n": len(times),
        "engine": "torch",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "batch_size": 1,
    }


def sharing(
    joint: nn.Module, singles: Mapping[str, nn.Module], size: tuple[int, int], seconds: float = 5.0
) -> dict[str, Any]:
    """What one backbone for several heads saves against a model a task.

    Args:
        joint: all heads on one backbone.
        singles: task -> a model with that head alone.
        size: height, width of the input, px.
        seconds: to spend on timing.
    Returns:
        ``params``, ``madds`` and ``latency_ms`` as [joint, sum of singles], and ``latency_ratio``: the median of the
        rounds' ratios, with its quartiles; ``n`` rounds.
    """
    times = interleaved([forward_of(model, size) for model in (joint, *singles.values())], seconds)
    ratios = times[:, 0] / times[:, 1:].sum(1)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    costs = [count_parts(model, size)["total"] for model in (joint, *singles.values())]
    median = np.median(times, 0)
    return {
        "params": [costs[0].params, sum(cost.params for cost in costs[1:])],
        "madds": [costs[0].madds, sum(cost.madds for cost in costs[1:])],
        "latency_ms": [round(float(median[0]), 3), round(float(median[1:].sum()), 3)],
        "latency_ratio": round(float(middle), 4),
        "latency_ratio_quartiles": [round(float(low), 4), round(float(high), 4)],
        "n": len(times),
    }
