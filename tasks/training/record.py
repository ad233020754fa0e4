"""What a finished run writes into ``results.jsonl``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from tasks.cli import describe
from tasks.data import DataSet
from tasks.reporting import latency
from tasks.reporting.costs import count_parts
from tasks.reporting.results import environment, git_state
from tasks.training.evaluate import Metrics, scores
from tasks.training.model import Model
from tasks.training.module import TaskModule
from tasks.training.schedule import seconds_of


def make_record(
    module: TaskModule,
    metrics: Metrics,
    split: str,
    data: DataSet,
    config: Mapping[str, Any],
    overrides: list[str],
    folder: Path,
) -> dict[str, Any]:
    """What ran, on what, where, how long, what came out (``tasks.reporting.results.Record``)."""
    model = module.scored
    costs = count_parts(model, model.image_size)["total"]
    commit, dirty = git_state()
    command = shlex.join(["python", "-m", f"tasks.{config['task']}", *overrides])
    record = {
        "task": config["task"],
        "backbone": describe("backbone", config["backbone"]),
        "head": "+".join(describe("head", head) for head in config["heads"].values()),
        "data": data.name,
        "split": split,
        "image_size": list(model.image_size),
        "seed": config["seed"],
        "budget": describe_budget(config),
        "weights": config["weights"] or config["backbone"].get("weights"),
        "metrics": scores(metrics),
        "per_class": {task: metric.per_class() for task, metric in metrics.items()},
        "params": costs.params,
        "madds": costs.madds,
        "latency": latency.measure(model, model.image_size),
        "batch_size": module.batch_size,
        "train_seconds": round(module.elapsed, 1),
        "commit": commit,
        "dirty": dirty,
        "config": dict(config),
        "overrides": overrides,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "run": os.path.relpath(folder, Path(config["results"]).parent),  # as tasks.compare reads it
        "command": command,
        "note": data.note,
        **environment(torch.get_num_threads(), accelerator_name(model)),
    }
    if len(model.heads) > 1:
        record["sharing"] = latency.sharing(model, {task: model.single(task) for task in model.heads}, model.image_size)
    return record


def accelerator_name(model: Model) -> str | None:
    """The GPU that the model is on; None for the CPU."""
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def describe_budget(config: Mapping[str, Any]) -> str:
    """What limited the training, in the words of the config; runs of equal budgets may be compared."""
    trainer = config["trainer"]
    given = [f"{trainer['max_epochs']:g} epochs"] if trainer["max_epochs"] is not None else []
    given += [f"{trainer['max_steps']:.0f} steps"] if trainer["max_steps"] is not None else []
    if trainer["max_time"] is not None:
        given.append(f"{seconds_of(trainer['max_time']) / 60:g} min")
    return " or ".join(given) or f"{trainer['default_epochs']:g} epochs"
