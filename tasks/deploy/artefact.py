"""What an artefact says of itself: enough to prepare an image and to finish a prediction without the run it is from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata as packages
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.reporting.results import environment, git_state

if TYPE_CHECKING:
    from tasks.deploy.graph import Graph

FORMAT = 1
INPUT = "image"
"""The graph's one input."""

PREFIX = "mobilenetv3_bench."
"""Of the keys in formats that are open to others' entries."""


def describe(graph: Graph, engine: str, config: Mapping[str, Any] | None, checkpoint: Path | None) -> dict[str, Any]:
    """The metadata of an artefact.

    Args:
        graph: what is exported.
        engine: the name of the engine it is for.
        config: the run's, complete; None where the model is not from a run: such a file cannot be opened alone.
        checkpoint: the file that the weights are from.
    Returns:
        Plain data. ``heads`` and ``specs`` rebuild the heads, whose ``predict`` finishes raw outputs; ``evaluation``
        rebuilds what fits an image to ``image_size``.
    """
    model, form = graph.model, graph.form
    heads: dict[str, Any] = dict(model.heads.items())
    limits = {task: head.limits._asdict() for task, head in heads.items() if hasattr(head, "limits")}
    return {
        "format": FORMAT,
        "engine": engine,
        "tasks": list(model.heads),
        "classes": {task: list(names) for task, names in model.classes.items()},
        "image_size": list(form.size),
        "dynamic_size": form.dynamic_size,
        "batch": form.batch,
        "postprocess": form.postprocess,
        "outputs": list(graph.outputs),
        "input": "uint8 RGB [B, 3, H, W]; divided by 255 and normalised inside",
        "evaluation": config["evaluation"] if config else None,
        "heads": config["heads"] if config else None,
        "backbone": config["backbone"] if config else None,
        "specs": {name: list(spec) for name, spec in model.backbone.specs.items()},  # type: ignore[union-attr, operator]
        "thresholds": limits,
        "checkpoint": {"file": str(checkpoint), "sha256": sha256(checkpoint)} if checkpoint else None,
        "commit": git_state()[0],
        "versions": environment(1)["versions"] | {engine: version(engine)},
    }


def sha256(file: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def version(engine: str) -> str:
    """Of an engine's package."""
    from tasks.deploy import facts

    return packages.version(facts(engine)["PACKAGES"][0])


def pack(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as the texts that every format can hold."""
    return {f"{PREFIX}{key}": json.dumps(value) for key, value in metadata.items()}


def unpack(texts: Mapping[str, str]) -> dict[str, Any]:
    """Metadata from ``pack``'s texts; others' entries are left out."""
    return {key.removeprefix(PREFIX): json.loads(text) for key, text in texts.items() if key.startswith(PREFIX)}
