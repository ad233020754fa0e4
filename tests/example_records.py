"""Run records for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def record(**changes: Any) -> dict[str, Any]:
    """A complete record with some fields changed."""
    fields = {
        "task": "detect", "backbone": "small", "head": "ssdlite", "data": "bccd", "split": "test", "seed": 0,
        "image_size": [320, 320], "budget": "10 min", "weights": None, "metrics": {"map": 0.4, "map_50": 0.7},
        "params": 1_786_000, "madds": 162_000_000, "latency": None,
        "device": "some CPU", "threads": 2, "batch_size": 16,
        "train_seconds": 600.5, "commit": None, "dirty": None, "versions": {"python": "3.11", "torch": None},
        "config": {"seed": 0}, "overrides": [], "time": "2024-05-01T12:00:00+00:00",
    }  # fmt: skip
    return fields | changes


def write(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """A ``results.jsonl`` of them."""
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path
