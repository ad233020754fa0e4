"""Which engine ``engine=auto`` takes: the fastest, on the first images, of those that are the same model there."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from tasks.deploy import available
from tasks.deploy.session import Runner, open_model
from tasks.training.model import Model

TOLERANCE = {"f32": 1e-3, "bf16": 0.1}
"""Precision -> largest difference of a raw output from torch's, relative to its largest value, 1 at least."""
WORTH = 30.0
"""Seconds of work in torch below which the exports, some ten seconds together, cost more than they save."""
FAILURES = (ValueError, OSError, RuntimeError, ImportError)
"""What comes of an engine that cannot run a model."""


def choose(
    model: Model,
    images: np.ndarray,
    threads: int | None,
    precision: str = "f32",
    count: int | None = None,
    exported: Mapping[str, Runner] | None = None,
) -> tuple[Runner, list[str]]:
    """Of torch and the engines that are known or may be hoped to be faster, the fastest that gives torch's outputs.

    Args:
        model: in eval mode.
        images: [B, 3, H, W] uint8 at the network's size: the first of those to come.
        threads: of the engine; None: as many as there are cores.
        precision: ``f32`` or ``bf16``; torch, which the others are compared with, has both.
        count: how many images are to come; few are left to torch and to what has been exported. None: many.
        exported: engine -> this model from a file; in other engines it is exported for the time being.
    Returns:
        The runner, and why it is this engine: one line each.
    """
    torch_runner = open_model(model, "torch", threads, precision)
    expected, slow = torch_runner.run(images), quickest(torch_runner, images)
    installed = available()
    exported = exported or {}
    candidates = installed[: installed.index("torch")]
    best, best_seconds = torch_runner, slow
    notes: list[str] = []
    if count is not None and count * slow / len(images) < WORTH:
        candidates = [name for name in candidates if name in exported]
        if not candidates:
            why = "one image is too little" if count == 1 else f"{count} images are too few"
            ask = f"; engine={installed[0]} exports all the same" if installed[0] != "torch" else ""
            return torch_runner, [f"{why} to repay an export{ask}"]
    for name in candidates:
        try:
            runner = exported.get(name) or open_model(model, name, threads, precision)
            problem = difference(expected, runner.run(images), TOLERANCE[precision])
            seconds = quickest(runner, images)
        except FAILURES as error:
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if problem is None and seconds > best_seconds:
            problem = f"slower than {best.name} here ({1000 * seconds:.1f} against {1000 * best_seconds:.1f} ms)"
        if problem is None:
            best, best_seconds = runner, seconds
        else:
            notes.append(f"{name} left out: {problem}")
    return best, notes if best is torch_runner else [*notes, "same outputs as torch on the first images"]


def quickest(runner: Runner, images: np.ndarray, times: int = 3) -> float:
    """Seconds of the quickest of some runs, after a first one that does not count."""
    runner.run(images)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        runner.run(images)
        taken.append(time.perf_counter() - began)
    return min(taken)


def difference(expected: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray], tolerance: float) -> str | None:
    """Where an engine's raw outputs part from torch's; None where they do not."""
    for name, value in expected.items():
        if name not in got or got[name].shape != value.shape:
            return f"its output {name} is {got[name].shape if name in got else 'missing'}, torch's {value.shape}"
        largest = float(np.abs(value.astype(np.float64) - got[name]).max(initial=0.0))
        limit = tolerance * max(1.0, float(np.abs(value).max(initial=0.0)))
        if not largest <= limit:
            return f"its output {name} differs from torch's by {largest:.2g}, over {limit:.2g}"
    return None
