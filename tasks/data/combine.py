"""Several data sets as one, for the joint model: each brings the targets of a task or more."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from tasks.data import NOT_ARGUMENTS, SPLITS, DataSet, Sample, check_splits


def read(
    parts: Mapping[str, Mapping[str, Any]], repeats: Mapping[str, int] | None = None, on_error: str | None = None
) -> DataSet:
    """Read every part by its own reader and join them.

    Args:
        parts: name -> what that data set's yaml says.
        repeats: name -> how often the part's training samples count in a pass, so that a small one is not drowned;
            None: once.
        on_error: ``fail`` or ``skip`` in place of the parts' own; None: theirs.
    Raises:
        ValueError: no parts, a part that is not there in ``repeats``; or see ``combine`` and the parts' readers.
    """
    repeats = repeats or {}
    for name, times in repeats.items():
        if name not in parts or times < 1:
            raise ValueError(f"data.repeats has {name}: {times}; expected 1 or more for one of {', '.join(parts)}")
    read_parts = []
    for name, part in parts.items():
        data = read_part(name, {**part, "on_error": on_error} if on_error else part)
        data.name = name
        train = data.splits["train"] * repeats.get(name, 1)
        read_parts.append(replace(data, splits={**data.splits, "train": train}))
    return combine(read_parts)


def read_part(name: str, part: Mapping[str, Any]) -> DataSet:
    """One part by its own reader.

    Raises:
        ValueError, FileNotFoundError: the reader's, which name the part's keys by where they stand here.
    """
    try:
        data: DataSet = instantiate({k: v for k, v in part.items() if k not in NOT_ARGUMENTS}, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, ValueError | OSError):
            raise
        own = "|".join(re.escape(key) for key in part if key != "on_error")
        kind = FileNotFoundError if isinstance(cause, FileNotFoundError) else ValueError  # not all take just a text
        raise kind(re.sub(rf"\bdata\.({own})\b", rf"data.parts.{name}.\1", str(cause))) from None
    return data


def combine(parts: Sequence[DataSet]) -> DataSet:
    """One data set of several: the splits one after the other, the classes of all tasks.

    An image that two parts share (boxes from one, a mask from the other) becomes one sample with both targets.

    Args:
        parts: at least one; those of the same task have the same classes.
    Raises:
        ValueError: no parts, classes that differ, one image with one task's target twice or in two splits.
    """
    if not parts:
        raise ValueError("data.parts is empty; name at least one data set")
    classes: dict[str, tuple[str, ...]] = {}
    origin: dict[str, str] = {}
    for part in parts:
        for task, names in part.classes.items():
            if classes.setdefault(task, names) != names:
                raise ValueError(
                    f"{origin[task]} and {part.name} have different classes for {task}: "
                    f"{_differ(classes[task], names)}; parts of one task must name the same classes in the same order"
                )
            origin.setdefault(task, part.name)
    splits = {split: _join(parts, split) for split in SPLITS}
    return check_splits(
        DataSet(
            "+".join(part.name for part in parts),
            classes,
            splits,
            [f"{part.name}: {line}" for part in parts for line in part.skipped],
            "; ".join(f"{part.name}: {part.note}" for part in parts if part.note),
        )
    )


def _join(parts: Sequence[DataSet], split: str) -> list[Sample]:
    """The parts' samples; those of one image merged."""
    owners: dict[str, dict[str, Sample]] = {}
    for part in parts:
        for sample in part.splits.get(split, []):
            owners.setdefault(sample.image, {})[part.name] = sample
    merged = {image: _merge(samples) for image, samples in owners.items() if len(samples) > 1}
    joined = []
    for part in parts:
        for sample in part.splits.get(split, []):
            if sample.image not in merged:
                joined.append(sample)
            elif next(iter(owners[sample.image])) == part.name:  # once, where the first part has it
                joined.append(merged[sample.image])
    return joined


def _merge(samples: dict[str, Sample]) -> Sample:
    """One sample with the targets of all."""
    (first, sample), *others = samples.items()
    for name, other in others:
        if both := sample.targets.keys() & other.targets.keys():
            raise ValueError(f"{other.image} has targets for {', '.join(sorted(both))} in {first} and {name}; keep one")
        sample = replace(sample, size=sample.size or other.size, targets={**sample.targets, **other.targets})
    return sample


def _differ(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    """Where two class lists part, in short."""
    if len(ours) != len(theirs):
        return f"{len(ours)} against {len(theirs)}"
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return f"class {place} is {ours[place]!r} and {theirs[place]!r}"
