"""The proof that an engine runs the same model: outputs on real images, the task's metric, and where they part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tasks.data.loader import Batch
from tasks.deploy import contract
from tasks.deploy.graph import Graph
from tasks.deploy.session import Runner
from tasks.training.evaluate import Metrics, feed, scores
from tasks.training.metrics import METRICS

OUTPUT_TOLERANCE = {"f32": 1e-4, "bf16": 0.1}
"""Of an output's largest absolute value. Untrained networks with random batch norms differ by up to 1e-5 in f32."""

DECIDED = {"f32": 0.01, "bf16": 1.0}
"""Share of decided values (classes of pixels, ranked detections) that may differ, for two candidates may be nearly
equal; in bf16 many are, and the metric alone judges."""

LAYER_TOLERANCE = {"f32": 2e-3, "bf16": 0.2}
"""As ``OUTPUT_TOLERANCE``, inside the network: maps of one pixel have small values and large relative noise."""


@dataclass
class Difference:
    """Of one output, over all images that were compared."""

    decided: bool
    """The output is the result of choices: a nearly equal choice may turn out differently, so differences count."""
    largest: float = 0.0
    """Absolute difference."""
    scale: float = 0.0
    """Largest absolute value in torch."""
    differing: int = 0
    """Values that differ by more than a thousandth of the largest one."""
    values: int = 0

    @property
    def relative(self) -> float:
        """``largest`` over ``scale``, infinite where one is not finite; of choices the share that differs."""
        if not np.isfinite(self.largest):
            return float("inf")
        if self.decided:
            return self.differing / max(1, self.values)
        return self.largest / self.scale if self.scale else self.largest

    def allowed(self, limit: float, precision: str) -> float:
        """What ``relative`` may be where values may differ by ``limit``."""
        return max(limit, DECIDED[precision]) if self.decided else limit

    def __str__(self) -> str:
        share = f"{100 * self.relative:.2g} % of the values differ"
        return share if self.decided else f"{self.largest:.2g}, {self.relative:.1g} of its largest value"

    def take(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Add one batch: the engine's values and torch's."""
        gap = np.abs(ours.astype(np.float64) - theirs) if ours.shape == theirs.shape else np.array([np.inf])
        self.largest = max(self.largest, float(gap.max(initial=0)) if np.isfinite(gap).all() else float("inf"))
        self.scale = max(self.scale, float(np.abs(theirs).max(initial=0)))
        self.differing += int((gap > 1e-3 * self.scale).sum())
        self.values += gap.size


def fresh(reference: Runner) -> dict[str, Difference]:
    """For every output of a graph a ``Difference`` that has seen nothing yet."""
    inside = reference.metadata["postprocess"] == "inside"
    names = reference.metadata["outputs"]
    return {name: Difference(inside and not name.startswith("classify")) for name in names}


class Comparison(NamedTuple):
    """What ``compare`` found."""

    differences: dict[str, Difference]
    """By output."""
    metrics: dict[str, float]
    """Of the engine."""
    reference: dict[str, float]
    """Of torch."""
    mains: list[str]
    """The metrics that decide."""
    images: int
    worst: np.ndarray
    """[B, 3, H, W] uint8: the batch with the largest difference."""
    skipped: list[str]
    """What was wrong with images that were left out."""


def compare(
    runner: Runner,
    reference: Runner,
    judge: Runner,
    loader: DataLoader,
    on_batch: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Run a split through both and compare every output and every score.

    Args:
        runner: in the engine.
        reference: the same graph in torch, for the outputs.
        judge: the model in torch with the heads' own post-processing, for the scores; may be the reference.
        loader: see ``evaluation_loader``.
        on_batch: called with (batches done, batches in all).
    """
    differences = fresh(reference)
    ours, theirs = (
        {task: METRICS[task](names) for task, names in reference.classes.items()} for _ in ("engine", "torch")
    )
    worst, furthest, count = np.zeros(0), -1.0, 0
    skipped: list[str] = []
    batch: Batch
    for done, batch in enumerate(loader, 1):
        if len(batch.image):
            pixels = batch.image.contiguous().numpy()
            found, wanted = (each.run(padded(runner, pixels)) for each in (runner, reference))
            for name, difference in differences.items():
                difference.take(found[name], wanted[name])
            gaps = [difference.relative for difference in differences.values()]
            if max(gaps) > furthest:
                worst, furthest = padded(runner, pixels), max(gaps)
            score(ours, runner, found, batch)
            score(theirs, judge, wanted if judge is reference else judge.run(pixels), batch)
            count += len(pixels)
        skipped += batch.skipped
        if on_batch:
            on_batch(done, len(loader))
    several = len(ours) > 1
    mains = [f"{task}/{metric.main}" if several else metric.main for task, metric in ours.items()]
    return Comparison(differences, scores(ours), scores(theirs), mains, count, worst, skipped)


def blocks(graph: Graph, image: np.ndarray) -> dict[str, np.ndarray]:
    """What every module gives in torch, by name, in the order in which they end; of a repeated one the last.

    Args:
        graph: stays as it is.
        image: [B, 3, H, W] uint8.
    """
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen.pop(name, None)
                seen[name] = output.numpy().copy()  # the next may work in place

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in graph.model.named_modules() if name]
    try:
        with torch.inference_mode():
            graph(torch.from_numpy(image))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def padded(runner: Runner, pixels: np.ndarray) -> np.ndarray:
    """The images with the last one repeated up to the batch that the graph takes."""
    short = (runner.metadata["batch"] or 0) - len(pixels)
    return np.concatenate([pixels, np.repeat(pixels[-1:], short, axis=0)]) if short > 0 else pixels


def score(metrics: Metrics, runner: Runner, outputs: Mapping[str, np.ndarray], batch: Batch) -> None:
    """Feed each task's metric with one batch's predictions."""
    extra = (runner.metadata["batch"] or 0) - len(batch.sizes)
    sizes = [*batch.sizes, *batch.sizes[-1:] * extra]
    predictions = runner.finish(outputs, (batch.image.shape[2], batch.image.shape[3]), sizes)
    for task, predicted in predictions.items():
        feed(metrics[task], predicted[: len(batch.sizes)], batch.truths[task])


def verdict(found: Comparison, precision: str, output: float | None, metric: float) -> list[str]:
    """What is too far apart; empty where it is the same model.

    Args:
        found: of ``compare``.
        precision: that the engine calculated in.
        output: allowed difference of outputs, of each one's largest value; None: ``OUTPUT_TOLERANCE``.
        metric: allowed difference of the tasks' main metrics.
    """
    limit = OUTPUT_TOLERANCE[precision] if output is None else output
    wrong = []
    for name, difference in found.differences.items():
        allowed = difference.allowed(limit, precision)
        if not difference.relative <= allowed:
            wrong.append(f"{name} differs: {difference} ({allowed:g} allowed)")
    for name in found.mains:
        ours, theirs = found.metrics[name], found.reference[name]
        if not (abs(ours - theirs) <= metric or (np.isnan(ours) and np.isnan(theirs))):
            wrong.append(f"{name} is {ours:.4f}, in torch {theirs:.4f} ({metric:g} allowed)")
    return wrong


def parting(graph: Graph, engine: str, file: Path, image: np.ndarray, precision: str) -> str:
    """Which module of the model is the first that gives something else in a file, as a sentence.

    Args:
        graph: the model in torch.
        engine: of the file.
        file: the artefact.
        image: [B, 3, H, W] uint8, one that shows the difference.
        precision: that the engine calculates in.
    """
    found = contract(engine).layers(file, image, precision)
    if not found:
        return f"Engine {engine} does not let one look inside, so the layer is not known"
    limit, agreed = LAYER_TOLERANCE[precision], "the input"
    largest, where = 0.0, ""
    for name, wanted in blocks(graph, image).items():
        if name not in found or found[name].shape != wanted.shape:
            continue
        gap = Difference(False)
        gap.take(found[name], wanted)
        if not gap.relative <= limit:
            kind = type(graph.model.get_submodule(name)).__name__
            apart = f"which differs by {gap.relative:.2g} of its largest value"
            return f"They part at {name} ({kind}), {apart}; {agreed} still agrees"
        agreed = name
        if gap.relative > largest:
            largest, where = gap.relative, name
    most = f" (the largest gap, {largest:.2g} of the layer's largest value, is at {where})" if where else ""
    return f"No layer up to {agreed} differs by more than {limit:g}{most}, so they part behind it or by rounding"


def follow_sizes(runner: Runner, reference: Runner, batch: int) -> None:
    """Refuse a graph of dynamic size in which something has stayed at the size that it was traced with.

    Args:
        runner: in the engine.
        reference: the same graph in torch.
        batch: images at once.
    Raises:
        ValueError: the engine refuses a size, or an output differs there.
    """
    height, width = runner.image_size
    for size in ((height, width), (height + 32, width + 64)):
        image = np.random.default_rng(0).integers(0, 256, (batch, 3, *size), dtype=np.uint8)
        where = f"images of {size[0]}x{size[1]}"
        fix = "export each size by itself: size=fixed image_size=[height,width]"
        try:
            found = runner.run(image)
        except (RuntimeError, AssertionError) as error:  # the latter from the guards of torch.export
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the graph does not take {where} ({reason}); {fix}") from error
        wanted = reference.run(image)
        for name, difference in fresh(reference).items():
            difference.take(found[name], wanted[name])
            if not difference.relative <= difference.allowed(OUTPUT_TOLERANCE[runner.precision], runner.precision):
                raise ValueError(f"{name} of {where} differs ({difference}), so it depends on the size; {fix}")
