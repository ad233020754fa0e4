"""What a run needs before it starts: the machine, the splits, the budget, Lightning's trainer, a folder of its own."""

from __future__ import annotations

import csv
import ctypes
import logging
import os
import random
import sys
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from omegaconf import OmegaConf
from rich.console import Console

from heads import check_count, check_range
from tasks.cli import CONF, describe
from tasks.data import DataSet
from tasks.data.arguments import expanded
from tasks.data.loader import Samples
from tasks.data.mix import Mix
from tasks.training import callbacks
from tasks.training.balance import Balance
from tasks.training.build import as_size, call, make, section_of, without
from tasks.training.metrics import METRICS
from tasks.training.schedule import Budget, Growth, Schedule, seconds_of
from tasks.words import suggest

SECTIONS = ("trainer", "mix", "schedule", "growth", "ema", "balance")
"""Of base.yaml, whose keys are all there are."""
PARTS = ("task", "tasks", "backbone", "heads", "data", "augment", "optimizer")
"""What the commands' own yamls add to base.yaml; those of a single task have ``head``, too."""
COUNTS = ("batch_size", "eval_batch_size", "trainer.accumulate", "trainer.threads")
WHOLE = ("seed", "data_seed", "workers", "trainer.max_steps")
RANGES = {
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("mix.p", "ema.share", "ema.cap", "bn_momentum"), (0, 1)),
    **dict.fromkeys(("cache_gb", "workers", "backbone_lr", "mix.mixup_alpha", "mix.cutmix_alpha"), (0, float("inf"))),
    **{
        f"trainer.{key}": (0, float("inf"))
        for key in ("max_epochs", "max_steps", "default_epochs", "clip_norm", "validations", "save_every")
    },
}
"""Key -> least and largest number."""
BESIDES: dict[str, tuple[str | None, ...]] = {
    "workers": ("auto",),
    "bn_momentum": ("auto", None),
    **{f"trainer.{key}": (None,) for key in ("threads", "max_epochs", "max_steps", "clip_norm")},
}
"""Key -> what may stand there for a number."""
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


def quiet() -> None:
    """Keep the libraries' advertisements off the screen; errors still come."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def keep_memory() -> None:
    """Make glibc keep freed memory rather than hand it back after every tensor: a CPU trains a quarter faster."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def check(config: dict[str, Any]) -> None:
    """Refuse what would fail later, before any data is read; a single number as a size becomes a square.

    Raises:
        ValueError: names the key, its value and what was expected.
    """
    check_keys(config)
    for task, head in config["heads"].items():
        if not isinstance(head, dict):
            left = ",".join(other for other in config["heads"] if other != task)
            raise ValueError(f"heads.{task} is {head}; to leave a task out: ~heads.{task} 'tasks=[{left}]'")
    for key in ("image_size", "train_size"):
        if config.get(key) is not None:
            config[key] = as_size(key, config[key])
    check_paths(config)
    check_numbers(config)
    check_momentum(config)
    make_balance(config)
    if config["evaluation"].get("resize") == "crop" and (others := sorted({*config["heads"]} - {"classify"})):
        raise ValueError(f"evaluation.resize=crop would cut off what {', '.join(others)} must find; leave it out")
    if config["trainer"]["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            "trainer.accelerator is gpu, but torch sees none here; leave it out, or install torch for CUDA"
        )
    if config["trainer"]["precision"] not in PRECISIONS:
        raise ValueError(
            f"trainer.precision is {config['trainer']['precision']}; expected one of {', '.join(PRECISIONS)}"
        )
    make_budget(config, 1)
    Schedule(**config["schedule"])
    Growth(**config["growth"])


def check_paths(config: dict[str, Any]) -> None:
    """Refuse what cannot take a run's files; ``~`` becomes the home folder.

    Raises:
        ValueError: no path, or a folder where a file is to be.
    """
    for key, usual in (("output", "outputs"), ("results", "results.jsonl")):
        if not isinstance(config[key], str):
            raise ValueError(f"{key} is {config[key]}; expected a path, such as {usual}")
    for key in ("output", "results", "resume"):
        if config[key]:
            config[key] = str(expanded(config[key]))
    if Path(config["results"]).is_dir():
        raise ValueError(f"results={config['results']} is a folder; expected a file, such as results.jsonl")


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse keys that do not exist or were taken out, where they are no function's arguments.

    Raises:
        ValueError: names the key, and those there are.
    """
    base: Any = OmegaConf.load(CONF / "base.yaml")
    known = {"": [*(key for key in base if key not in ("hydra", "_variants")), *PARTS]}
    known |= {f"{section}.": list(base[section]) for section in SECTIONS}
    for prefix, needed in known.items():
        given = config[prefix[:-1]] if prefix else config
        if not isinstance(given, dict):
            raise ValueError(f"{prefix[:-1]} is {given}; set {prefix}<key>: {', '.join(needed)}")
        allowed = needed if prefix else [*needed, "head"]
        for key in given:
            if key not in allowed:
                there = ", ".join(allowed)
                raise ValueError(f"there is no setting {prefix}{key}{suggest(key, allowed)}; there are {there}")
        for key in needed:
            if key not in given:
                raise ValueError(f"{prefix}{key} was taken out; every run needs it: leave out ~{prefix}{key}")


def check_numbers(config: Mapping[str, Any]) -> None:
    """Refuse numbers that are none, or out of their range.

    Raises:
        ValueError: names the key, its value and what was expected.
    """
    for key in (*COUNTS, *RANGES):
        section, _, name = key.rpartition(".")
        value = (config[section] if section else config)[name]
        if value in BESIDES.get(key, ()):
            continue
        if key in COUNTS:
            check_count(key, value)
        else:
            check_range(key, value, *RANGES[key])
            if key in WHOLE and value != int(value):
                raise ValueError(f"{key} is {value}; expected a whole number")


def check_momentum(config: Mapping[str, Any]) -> None:
    """Refuse a part's own ``bn_momentum`` where the one for all overrules it.

    Raises:
        ValueError: names the part's key, and the one to unset.
    """
    parts = {"backbone": ("backbone", config["backbone"])}
    parts |= {section_of(config, task): ("head", head) for task, head in config["heads"].items()}
    everywhere = config["bn_momentum"]
    for section, (group, part) in parts.items():
        if everywhere is not None and "bn_momentum=" in describe(group, part):
            raise ValueError(
                f"{section}.bn_momentum is {part['bn_momentum']}, but bn_momentum={everywhere} overrules it; "
                "set bn_momentum=null"
            )


def device(config: Mapping[str, Any]) -> torch.device:
    """Where scoring runs: the GPU that training uses, else the CPU."""
    gpu = torch.cuda.is_available() and config["trainer"]["accelerator"] in ("auto", "gpu", "cuda")
    return torch.device("cuda" if gpu else "cpu")


def precision(config: Mapping[str, Any]) -> Any:
    """``trainer.precision``; auto takes bfloat16 on a GPU that has it, where it halves the time, else float32."""
    if config["trainer"]["precision"] != "auto":
        return config["trainer"]["precision"]
    return "bf16-mixed" if device(config).type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def make_balance(config: Mapping[str, Any]) -> Balance:
    """The weights of the losses; those of tasks that were taken out of a recipe do not count.

    Raises:
        ValueError: an unknown method, or a weight for something that is no task.
    """
    trained = tuple(config["heads"])
    weights = config["balance"]["weights"] or {}
    if not isinstance(weights, Mapping):
        raise ValueError(f"balance.weights is {weights}; expected task: factor, e.g. '{{classify: 0.5}}'")
    kept = {task: weight for task, weight in weights.items() if task in trained or task not in METRICS}
    return Balance(trained, config["balance"]["method"], kept)


def make_optimizer(config: Mapping[str, Any]) -> Any:
    """The optimizer, waiting for its parameters; float16's gradient scaler cannot clip under a fused one.

    Raises:
        ValueError: it cannot be made with these settings.
    """
    float16 = precision(config) == "16-mixed"
    optimizer = make(without(config["optimizer"], *(["fused"] if float16 else [])))
    try:
        optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    except (TypeError, ValueError, IndexError) as error:
        settings = without(config["optimizer"], "_target_", "_partial_")
        raise ValueError(f"the optimizer cannot be made ({error}) of {settings}; correct optimizer.<key>") from error
    return optimizer


def prepare_machine(config: Mapping[str, Any]) -> None:
    """Memory, threads and seeds."""
    keep_memory()
    if config["trainer"]["threads"]:
        torch.set_num_threads(int(config["trainer"]["threads"]))
    torch.manual_seed(config["seed"])
    np.random.seed(config["seed"])  # noqa: NPY002 - for libraries that draw from it
    random.seed(config["seed"])


def worker_count(config: Mapping[str, Any], samples: Samples) -> int:
    """Loader processes: as asked, or one a core beyond the first, at most 8.

    None for images in memory where torch's threads take both of two cores: a process that augments them would hold up
    one thread, and the other waits for it.
    """
    if config["workers"] != "auto":
        return int(config["workers"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if samples.in_memory and cores <= min(2, config["trainer"]["threads"] or cores):
        return 0
    return max(1, min(8, cores - 1))


def load_splits(data: DataSet, config: Mapping[str, Any], console: Console) -> dict[str, Samples]:
    """The three splits, decoded into memory as far as they fit the budget (train first).

    Raises:
        ValueError: an image that cannot be read, or nothing to train on.
    """
    tasks = tuple(config["heads"])
    sizes = [(size[0], size[1]) for size in (config.get("train_size") or config["image_size"], config["image_size"])]
    augment, plain_view = (
        call("augment", config["augment"], sizes[0]),
        call("evaluation", config["evaluation"], sizes[1]),
    )
    left = config["cache_gb"] * 2**30
    on_error = config["data"].get("on_error") or "fail"
    splits = {}
    for name in ("train", "val", "test"):
        training = name == "train"
        split = Samples(
            data.splits.get(name, []), tasks, augment if training else plain_view, config["seed"], training, on_error
        )
        if left > 0 and split.cache(left, callbacks.progress_line(console, f"decoding {name}")):
            left -= split.cached_bytes
        splits[name] = split
    if not len(splits["val"]) and not len(splits["test"]):
        raise ValueError(
            f"{data.name} has nothing to score on: set data.test or data.val to a split, or to a share of train"
        )
    if not len(splits["train"]):
        raise ValueError(
            f"{data.name}: no training image is left; the first problem: {data.skipped[0] if data.skipped else 'none'}"
        )
    return splits


def new_folder(parent: Path) -> Path:
    """A run folder that nobody else has: ``<date_time>``, numbered when two runs start in one second."""
    parent.mkdir(parents=True, exist_ok=True)
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ["", *(f"_{i}" for i in range(2, 1000))]:
        folder = parent / f"{name}{suffix}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise OSError(f"{parent} already holds a thousand runs of this second")


def make_budget(config: Mapping[str, Any], samples: int) -> Budget:
    """How long to train, from ``trainer.max_epochs``, ``max_steps`` and ``max_time``.

    Raises:
        ValueError: the time is unreadable or none.
    """
    trainer = config["trainer"]
    steps = []
    epochs = trainer["max_epochs"]
    if epochs is None and trainer["max_steps"] is None and trainer["max_time"] is None:
        epochs = trainer["default_epochs"]
    if epochs is not None:
        wanted = round(epochs * samples / (config["batch_size"] * trainer["accumulate"]))
        steps.append(max(1, wanted) if epochs > 0 else 0)
    if trainer["max_steps"] is not None:
        steps.append(int(trainer["max_steps"]))
    seconds = None
    if trainer["max_time"] is not None:
        seconds = seconds_of(trainer["max_time"])
    if seconds is not None and seconds <= 0:
        raise ValueError(f"trainer.max_time is {trainer['max_time']}; expected more than nothing")
    return Budget(min(steps) if steps else None, seconds)


def make_mix(config: Mapping[str, Any], classes: Mapping[str, tuple[str, ...]]) -> Mix | None:
    """Mixup and CutMix, where asked for and there are labels to mix."""
    if not (config["mix"]["mixup_alpha"] or config["mix"]["cutmix_alpha"]):
        return None
    if list(classes) != ["classify"]:
        raise ValueError(
            f"mix blends whole images, which {', '.join(classes)} cannot follow; "
            "set mix.mixup_alpha=0 mix.cutmix_alpha=0"
        )
    return Mix(len(classes["classify"]), **config["mix"])


def metrics_file(folder: Path, step: int) -> CSVLogger:
    """Lightning's ``metrics.csv``; on a resume with its earlier rows, which Lightning would delete."""
    path = folder / "metrics.csv"
    earlier: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]  # a cut line has none
            earlier = [row for row in rows if int(row["step"]) <= step]
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    for row in earlier:
        logger.log_metrics(
            {key: float(value) for key, value in row.items() if value and key != "step"}, int(row["step"])
        )
    return logger


def make_trainer(
    config: Mapping[str, Any],
    folder: Path,
    step: int,
    samples: Samples,
    working: list[L.Callback],
    validation: callbacks.Validate,
    console: Console,
) -> L.Trainer:
    """Lightning's trainer as the config sets it; our callbacks decide when to validate, save and stop."""
    settings = config["trainer"]
    loggers: list[Logger] = [metrics_file(folder, step), TensorBoardLogger(folder, name="", version="")]
    mains = [name for task in config["heads"] for name in headline_names(task, len(config["heads"]) > 1)]
    bar = [callbacks.Bar(console, validation, mains)] if settings["progress"] else []
    try:
        return L.Trainer(
            accelerator=settings["accelerator"],
            devices=1,
            precision=precision(config),
            max_epochs=1,
            accumulate_grad_batches=settings["accumulate"],
            gradient_clip_val=settings["clip_norm"],
            logger=loggers,
            callbacks=[callbacks.Log(samples), *working, *bar],
            limit_val_batches=0,
            log_every_n_steps=10**9,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, RuntimeError) as error:
        raise ValueError(
            f"trainer.accelerator={settings['accelerator']} trainer.precision={settings['precision']}: {error}"
        ) from error


def headline_names(task: str, several: bool) -> list[str]:
    """What the progress bar shows of a task."""
    main = METRICS[task].main
    return [f"{task}/{main}"] if several else [main]
