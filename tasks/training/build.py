"""From a config to its parts: data set, model, optimizer. From a run folder back to its model."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from heads import check_count
from tasks.data import NOT_ARGUMENTS, DataSet
from tasks.data.arguments import expanded
from tasks.training import checkpoint
from tasks.training.model import Model, check_task
from tasks.training.weights import load_model

OURS = ("backbones.", "heads.")
"""Where the networks are that a checkpoint may name as its parts unless it is trusted."""
DATA = "tasks.data."
"""Where the readers are that it may name besides, and ``augment.evaluation``, which fits an image."""


def plain(config: DictConfig) -> dict[str, Any]:
    """The config with every reference resolved, as plain dicts and lists.

    Keys that start with ``_`` are for the command line or for other keys to refer to, and are left out.

    Raises:
        ValueError: a value that must be given is missing (``???``).
    """
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} must be given")
    whole = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    return {key: value for key, value in whole.items() if not key.startswith("_")}


def make(node: Mapping[str, Any]) -> Any:
    """Build what a yaml's ``_target_`` names; with ``_partial_`` a function that waits for its first arguments."""
    try:
        return instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError | AttributeError):
            raise ValueError(f"{node['_target_']} cannot be made: {error.__cause__}; correct its settings") from error
        raise


def call(section: str, node: Mapping[str, Any], *arguments: Any) -> Any:
    """Call the function that ``make`` gives for a ``_partial_`` node.

    Args:
        section: the node's place in the config, for messages.
        node: may have a ``name``.
        arguments: what the function waits for.
    Raises:
        ValueError: a setting that the part does not have, as a recipe or an experiment may leave when the part is
            exchanged, or one of the wrong kind; and whatever the part refuses.
    """
    function = make(without(node, "name"))
    known = inspect.signature(function.func).parameters
    any_key = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    strange = [key for key in function.keywords if key not in known and not any_key]
    if strange:
        raise ValueError(
            f"{section}={node.get('name', node['_target_'])} has no {', '.join(strange)}, which the recipe of the data "
            f"set, the experiment or an override sets; leave it out: {' '.join(f'~{section}.{key}' for key in strange)}"
        )
    try:
        return function(*arguments)
    except ValueError as error:
        if not section.startswith("heads."):
            raise
        raise ValueError(re.sub(r"\bhead\.", f"{section}.", str(error))) from error
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        settings = ", ".join(f"{key}={value}" for key, value in function.keywords.items())
        raise ValueError(f"{section} cannot be made of {settings} ({error}); correct {section}.<key>") from error


def without(node: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A yaml's node without the keys that are for people and other yamls, not for its target."""
    return {key: value for key, value in node.items() if key not in names}


def read_data(config: Mapping[str, Any]) -> DataSet:
    """Read the data set that the config names.

    Raises:
        ValueError, FileNotFoundError: see the reader.
    """
    data = cast(DataSet, make(without(config["data"], *NOT_ARGUMENTS)))
    data.name = str(config["data"]["name"])
    return data


def section_of(config: Mapping[str, Any], task: str) -> str:
    """Where a head's settings are typed."""
    return f"heads.{task}" if config.get("task") == "multitask" else "head"


def complete(
    config: Mapping[str, Any], data: DataSet | None = None
) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """The config with every head's ``num_classes``, and the class names; reads the data set only if it must.

    Raises:
        ValueError: the data set lacks a task's targets, or ``num_classes`` contradicts it.
    """
    whole = copy.deepcopy(dict(config))
    heads: dict[str, dict[str, Any]] = whole["heads"]
    if data is None and any(head["num_classes"] is None for head in heads.values()):
        data = read_data(config)
    classes = {}
    for task, head in heads.items():
        if data is None:
            check_count(f"{section_of(config, task)}.num_classes", head["num_classes"])
            classes[task] = tuple(f"class {i}" for i in range(head["num_classes"]))
            continue
        if task not in data.classes:
            raise ValueError(
                f"{data.name} has no targets for {task}; it has {', '.join(data.classes)}: choose another data="
            )
        classes[task] = data.classes[task]
        if head["num_classes"] not in (None, len(classes[task])):
            raise ValueError(
                f"{section_of(config, task)}.num_classes is {head['num_classes']}, but {data.name} has "
                f"{len(classes[task])} classes ({', '.join(classes[task][:5])} ...); leave it out"
            )
        head["num_classes"] = len(classes[task])
    return whole, classes


def as_size(key: str, size: Any) -> list[int]:
    """[height, width] in px; a single number is a square.

    Raises:
        ValueError: anything else, or less than 32 px a side.
    """
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"{key} is {size}; expected [height, width] in whole pixels")
    if min(sides) < 32:
        raise ValueError(f"{key} is {size}; expected at least 32 px a side")
    return sides


def make_model(config: Mapping[str, Any], classes: Mapping[str, tuple[str, ...]]) -> Model:
    """Build backbone and heads of a complete config."""
    backbone = make(without(config["backbone"], "name", "head_width", "head_activation"))
    heads = {}
    for task, head in config["heads"].items():
        part = make(without(head, "name")).func
        if isinstance(part, type):
            check_task(part, task)
        heads[task] = call(section_of(config, task), head, backbone.specs)
    size = (config["image_size"][0], config["image_size"][1])
    return Model(backbone, heads, classes, size, call("evaluation", config["evaluation"], size))


def without_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose weights come from its own checkpoint."""
    backbone = config["backbone"]
    return {**config, "backbone": backbone | ({"weights": None} if "weights" in backbone else {}), "weights": None}


def model_from_config(config: DictConfig) -> Model:
    """The model of a config; the data set is read only where the number of classes is not given."""
    complete_config, classes = complete(plain(config))
    complete_config["image_size"] = as_size("image_size", complete_config["image_size"])
    model = make_model(complete_config, classes)
    if complete_config["weights"]:
        load_model(model, complete_config["weights"])
    return model


def foreign_targets(node: Any) -> set[str]:
    """What a config would call beyond this suite's own parts."""
    if isinstance(node, list):
        return {name for part in node for name in foreign_targets(part)}
    if not isinstance(node, dict):
        return set()
    own = {str(node["_target_"])} if "_target_" in node else set()
    return foreign_targets(list(node.values())) | {target for target in own if not is_part(target)}


def is_part(target: str) -> bool:
    """Whether a name is that of a backbone, a head, a data set's reader or ``evaluation``, where it is defined.

    The start of the name alone says little: ``heads.boxes.torch.hub.load`` begins as ours do.
    """
    module, _, name = target.rpartition(".")
    function = target == f"{DATA}augment.evaluation" or (module.startswith(DATA) and name == "read")
    if not function and not target.startswith(OURS):
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    if getattr(found, "__module__", None) != module:
        return False
    return function or (isinstance(found, type) and issubclass(found, nn.Module))


def model_from_run(path: Path, trust: bool = False) -> Model:
    """The model of a run folder or of a checkpoint file, with its weights; see ``tasks.load``."""
    path = expanded(str(path))
    if not path.exists():
        raise FileNotFoundError(f"there is no run folder {path}; give the folder that a training command printed")
    file = checkpoint.file_of(path)
    content = checkpoint.load(file)
    if "config" not in content or "classes" not in content:
        raise ValueError(f"{file} holds weights only; expected a checkpoint that a training command wrote")
    config = content["config"]
    strange = foreign_targets([config[key] for key in ("backbone", "heads", "evaluation")])
    if strange and not trust:
        raise ValueError(
            f"{file} would run {', '.join(sorted(strange))}, which is not part of this suite; if you know it, give "
            "trust=True"
        )
    model = make_model(without_weights(config), {task: tuple(names) for task, names in content["classes"].items()})
    checkpoint.fill(model, content["model"], str(file))
    return model
