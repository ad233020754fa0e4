"""What a training command says: what it is about to do, what was reached, where everything lies, what to try next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import nn

from tasks.data import DataSet
from tasks.reporting.confusion import confusion_picture
from tasks.reporting.pictures import GRIDS, save

Examples = list[tuple[np.ndarray, dict[str, Any], dict[str, Any]]]
"""Image [H, W, 3] uint8, task -> truth, task -> prediction."""

SHOWN = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "miou", "pixel_accuracy", "top1", "top5")


def introduce(console: Console, data: DataSet, config: Mapping[str, Any]) -> None:
    """Name the data set, its splits and what was skipped."""
    counts = ", ".join(f"{len(samples)} {split}" for split, samples in data.splits.items())
    note = f" ({data.note})" if data.note else ""
    console.print(f"{config['task']}  {config['backbone']['name']} on {data.name}{note}: {counts} images")
    name_skipped(console, data.skipped)


def name_skipped(console: Console, messages: list[str]) -> None:
    """Count and name what ``on_error=skip`` left out."""
    if messages:
        shown = "; ".join(messages[:3]) + (f"; and {len(messages) - 3} more" if len(messages) > 3 else "")
        console.print(f"skipped {len(messages)}: {shown}", soft_wrap=True)


def introduce_backbone(console: Console, source: str, backbone: nn.Module) -> None:
    """Say what the backbone alone starts from."""
    console.print(f"backbone    {source}{conventions(backbone)}", soft_wrap=True)


def conventions(backbone: nn.Module) -> str:
    """What loaded weights brought with them, and what a renamed file would get wrong: padding and the images' mean."""
    same, mean = getattr(backbone, "same_padding", None), getattr(backbone, "mean", None)
    if same is None or mean is None:
        return ""
    return (
        f" (padding={'same' if same else 'symmetric'}, mean {', '.join(f'{v:.3g}' for v in mean.flatten().tolist())})"
    )


def introduce_weights(
    console: Console, source: str, backbone: nn.Module, filled: Mapping[str, list[str]], left_out: Sequence[str]
) -> None:
    """Say what a run starts from.

    Args:
        console: to print on.
        source: of the weights.
        backbone: filled with them.
        filled: the tasks whose heads have them, each with its parameters that stay fresh.
        left_out: parts of the checkpoint that the model has no use for.
    """
    whole = f"{source} for the backbone{conventions(backbone)} and {', '.join(filled)}"
    console.print(f"weights     {whole}", soft_wrap=True)
    for task, fresh in filled.items():
        if fresh:
            shown = ", ".join(fresh[:4]) + (f" ... ({len(fresh)} in all)" if len(fresh) > 4 else "")
            console.print(f"            trained on other classes, so {task} begins afresh with {shown}", soft_wrap=True)
    if left_out:
        console.print(f"            this model has no {', '.join(left_out)}: left out", soft_wrap=True)


def draw(
    folder: Path, classes: Mapping[str, tuple[str, ...]], examples: Examples, confusions: Mapping[str, np.ndarray]
) -> list[Path]:
    """Write ``predictions.png`` and, where there is a matrix, ``confusion.png``; one a task in a joint run.

    Args:
        folder: the run folder.
        classes: task -> class names.
        examples: what to show.
        confusions: task -> [truth, predicted] counts.
    Returns:
        The files written.
    """
    paths = []
    ending = {task: ".png" if len(classes) == 1 else f"_{task}.png" for task in classes}
    for task, matrix in confusions.items():
        paths.append(folder / f"confusion{ending[task]}")
        save(confusion_picture(matrix, classes[task]), paths[-1])
    for task, names in classes.items():
        having = [(image, truth[task], shown[task]) for image, truth, shown in examples if truth.get(task) is not None]
        if not having:
            continue
        path = folder / f"predictions{ending[task]}"
        images, truths, predictions = (list(column) for column in zip(*having, strict=True))
        save(GRIDS[task](images, truths, predictions, names), path)
        paths.append(path)
    return paths


def conclude(
    console: Console, record: Mapping[str, Any], folder: Path, pictures: list[Path], skipped: list[str]
) -> None:
    """The closing screen; ``skipped`` names the images that could not be read."""
    console.print(f"{record['backbone']} + {record['head']} on {record['data']} {record['split']}", soft_wrap=True)
    table = Table()
    table.add_column("score")
    table.add_column("%", justify="right")
    for name, value in record["metrics"].items():
        if name.rpartition("/")[2] in SHOWN and value == value:
            table.add_row(name, f"{100 * value:.1f}")
    for task, values in record["per_class"].items():
        for name, value in list(values.items())[:20]:
            if value == value:
                table.add_row(
                    f"  {name}" if len(record["per_class"]) == 1 else f"  {task}: {name}", f"{100 * value:.1f}"
                )
    console.print(table)
    name_skipped(console, skipped)
    latency = record["latency"]
    threads = f"{latency['threads']} thread{'s' if latency['threads'] > 1 else ''}"
    console.print(
        f"{record['params'] / 1e6:.2f} M parameters, {record['madds'] / 1e9:.3f} G multiply-adds at "
        f"{record['image_size'][0]}x{record['image_size'][1]}, {latency['median_ms']:.1f} ms an image "
        f"(eager torch, {threads}), trained {record['train_seconds']:.0f} s, seed {record['seed']}"
    )
    if "sharing" in record:
        saved = record["sharing"]
        console.print(
            f"one backbone for all heads takes {saved['latency_ratio']:.2f} of the time, "
            f"{saved['madds'][0] / saved['madds'][1]:.2f} of the multiply-adds and "
            f"{saved['params'][0] / saved['params'][1]:.2f} of the parameters of a model a task"
        )
    shown = [picture.name for picture in pictures]
    console.print(
        f"run folder   {folder}  ({', '.join(['best.pt', 'last.pt', 'metrics.csv', 'TensorBoard', *shown])})",
        soft_wrap=True,
    )
    console.print(f"record       {Path(record['config']['results']).resolve()}", soft_wrap=True)
    console.print("try next")
    for words, why in next_commands(record):
        console.print(f"  python -m tasks.{record['task']} {shlex.join(words)}    # {why}", soft_wrap=True)


def next_commands(record: Mapping[str, Any]) -> list[tuple[list[str], str]]:
    """The overrides of runs that are worth a look after this one, and what each would tell."""
    again = [word for word in record["overrides"] if not word.startswith(("seed=", "backbone="))]
    this = record["config"]["backbone"]["name"]
    other = "large" if this == "small" else "small"
    rest = [word for word in again if not word.startswith("backbone.")]  # another backbone may lack those settings
    return [
        (["-m", f"backbone={this}", *again, "seed=0,1,2"], "how far do seeds differ?"),
        ([f"backbone={other}", *rest], "another backbone"),
    ]
