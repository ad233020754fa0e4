"""One training run: read, build, fit, test, record. Every command that trains comes through here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from backbones import kernels
from tasks.cli import flatten
from tasks.data.images import decode
from tasks.data.loader import Collate, Samples, evaluation_loader, training_loader
from tasks.reporting import closing
from tasks.reporting.results import write_record
from tasks.training import callbacks, checkpoint, earlier, setup
from tasks.training.build import complete, make_model, plain, read_data, without_weights
from tasks.training.evaluate import Metrics, evaluate
from tasks.training.model import Model
from tasks.training.module import TaskModule
from tasks.training.record import make_record
from tasks.training.schedule import Growth, Schedule
from tasks.training.weights import load_model

ALLOWED_ON_RESUME = ("resume", "workers", "cache_gb", "results")
ROOTS = re.compile(r"data\.(parts\.[^.]+\.)?root")
"""Where the data lies, which may change, too."""


def run(composed: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Train what the config describes, test it once, append one record.

    Args:
        composed: as Hydra composed it.
        overrides: as typed, for the record.
    Returns:
        The record; with ``skip_done`` that of an equal run which is finished.
    Raises:
        ValueError, OSError: whatever the user can mend, see the README's troubleshooting.
    """
    setup.quiet()
    console = Console(highlight=False, markup=False)
    config = plain(composed)
    setup.check(config)
    folder = Path(config["resume"]) if config["resume"] else None
    if config["skip_done"] and folder is None:
        done = earlier.finished(config)
        if done is not None:
            console.print(f"done        {' '.join(overrides)}: {done.get('run') or config['results']}", soft_wrap=True)
            return cast(dict[str, Any], done)
        folder = earlier.stopped(config)
        overrides = [o for o in overrides if _key(o) in ALLOWED_ON_RESUME] if folder else overrides
    with ExitStack() as held:
        return _run(config, overrides, folder, held, console)


def _run(
    config: dict[str, Any], overrides: list[str], folder: Path | None, held: ExitStack, console: Console
) -> dict[str, Any]:
    """From the data to the record; ``folder`` is that of a run that goes on, and is held from here on."""
    saved: dict[str, Any] | None = None
    if folder is not None:
        if folder.is_dir():
            held.enter_context(earlier.claim(folder))
        config, saved, overrides = reopen(folder, config, overrides)
        setup.check(config)
    setup.prepare_machine(config)
    data = read_data(config)
    config, classes = complete(config, data)
    closing.introduce(console, data, config)
    if setup.device(config).type == "cpu" and (note := kernels.load()[1]):
        console.print(f"kernels     {note}", soft_wrap=True)
    model = make_model(without_weights(config) if saved else config, classes)
    if config["backbone"].get("weights") and not saved:
        closing.introduce_backbone(console, config["backbone"]["weights"], model.backbone)
    if config["weights"] and not saved:
        loaded = load_model(model, config["weights"])
        closing.introduce_weights(console, config["weights"], model.backbone, *loaded)
    module = make_module(model, config, len(data.splits["train"]))
    if not (saved or config["weights"] or config["backbone"].get("weights")) and "backbone" in (config["freeze"] or {}):
        console.print("note        the backbone is frozen at first, though it begins with random weights: freeze=null")
    collate = Collate(tuple(config["heads"]), setup.make_mix(config, classes))
    splits = setup.load_splits(data, config, console)
    if folder is None:  # nothing is left on disk by a run that cannot start
        folder = setup.new_folder(Path(config["output"]) / config["task"])
        held.enter_context(earlier.claim(folder))
        OmegaConf.save(OmegaConf.create({**config, "overrides": overrides}), folder / checkpoint.CONFIG)
    console.print(f"run folder  {folder}", soft_wrap=True)
    fit(module, splits, collate, config, classes, folder, saved, console)
    module.scored.to(setup.device(config))
    split = "test" if len(splits["test"]) else "val"
    metrics = test(module.scored, splits[split], config, console)
    record = make_record(module, metrics, split, data, config, overrides, folder)
    checkpoint.save_text(folder / checkpoint.RECORD, json.dumps(write_record(config["results"], record), indent=1))
    confusions = {task: metric.confusion for task, metric in metrics.items() if hasattr(metric, "confusion")}
    pictures = closing.draw(folder, classes, examples(module.scored, splits[split]), confusions)
    closing.conclude(console, record, folder, pictures, [line for part in splits.values() for line in part.skipped])
    return record


def reopen(
    folder: Path, config: Mapping[str, Any], overrides: list[str]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Config, last checkpoint and overrides of a run that is to go on.

    Raises:
        FileNotFoundError: no run there, or nothing saved yet.
        ValueError: overrides that would make it another run; or it is finished.
    """
    if not (folder / checkpoint.CONFIG).is_file():
        raise FileNotFoundError(f"resume={folder} is no run folder; expected one that holds {checkpoint.CONFIG}")
    own = plain(OmegaConf.load(folder / checkpoint.CONFIG))  # type: ignore[arg-type]
    typed = own.pop("overrides")
    allowed = [*ALLOWED_ON_RESUME, *(key for key in flatten(own) if ROOTS.fullmatch(key))]
    foreign = [o for o in overrides if _key(o) not in allowed and o not in typed]
    if foreign:
        raise ValueError(
            f"resume= goes on with the run's own config, so {foreign[0]} cannot change it; "
            f"allowed beside it are {', '.join(allowed[1:])}"
        )
    if (folder / checkpoint.RECORD).is_file():
        raise ValueError(
            f"{folder} is finished, its scores are in {folder / checkpoint.RECORD}; start a new run to train on"
        )
    for left in folder.glob(".*.tmp"):  # of a kill while saving
        left.unlink(missing_ok=True)
    if own["task"] != config["task"]:
        raise ValueError(
            f"{folder} is a run of {own['task']}; resume it with python -m tasks.{own['task']} resume={folder}"
        )
    for key in {o.lstrip("+").partition("=")[0] for o in overrides} & set(allowed):
        *above, last = key.split(".")
        trees: list[Any] = [config, own]
        new, old = (reduce(lambda node, part: node[part], above, tree) for tree in trees)
        old[last] = new[last]
    if not (folder / checkpoint.LAST).is_file():
        return own, {}, typed  # it was stopped before its first save: from the start, as it would have run
    return own, checkpoint.load(folder / checkpoint.LAST), typed


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def make_module(model: Model, config: Mapping[str, Any], samples: int) -> TaskModule:
    """What Lightning trains, as the config sets it.

    Args:
        model: with its first weights.
        config: complete.
        samples: in the training split.
    """
    return TaskModule(
        model=model.to(memory_format=torch.channels_last),  # doubles training speed on CPUs
        optimizer=setup.make_optimizer(config),
        schedule=Schedule(**config["schedule"]),
        growth=Growth(**config["growth"]),
        budget=setup.make_budget(config, samples),
        balance=setup.make_balance(config),
        samples=samples,
        batch_size=config["batch_size"] * config["trainer"]["accumulate"],
        seed=config["seed"],
        ema=config["ema"]["share"],
        ema_cap=config["ema"]["cap"],
        bn_momentum=config["bn_momentum"],
        backbone_lr=config["backbone_lr"],
        freeze=config["freeze"] or {},
    )


def fit(
    module: TaskModule,
    splits: Mapping[str, Samples],
    collate: Collate,
    config: Mapping[str, Any],
    classes: Mapping[str, tuple[str, ...]],
    folder: Path,
    saved: Mapping[str, Any] | None,
    console: Console,
) -> None:
    """Train; the module's scored weights are the best afterwards.

    Raises:
        KeyboardInterrupt: the user stopped it; everything is saved.
    """
    trainer_config = config["trainer"]
    names = {task: list(of_task) for task, of_task in classes.items()}
    description = {"format": 1, "config": dict(config), "classes": names}
    workers = setup.worker_count(config, splits["train"])
    loader = evaluation_loader(splits["val"], config["eval_batch_size"], workers) if len(splits["val"]) else None
    validation = callbacks.Validate(loader, trainer_config["validations"], folder, description)
    working: list[L.Callback] = [validation]
    keep = callbacks.Keep(folder, trainer_config["save_every"], description, validation)
    working.append(keep)
    if saved:
        module.restore(saved)
        validation.load_state_dict(saved["validation"])
        working.append(callbacks.Restore(saved["optimizer"]))
    if module.progress < 1:
        trainer = setup.make_trainer(config, folder, module.step, splits["train"], working, validation, console)
        start = module.step * trainer_config["accumulate"]
        batches = training_loader(
            splits["train"], config["batch_size"], config["seed"], workers, start, None, collate
        )  # fmt: skip
        trainer.fit(module, batches)
        if keep.interrupted and module.progress < 1:
            again = f"python -m tasks.{config['task']} resume={folder}"
            console.print(f"\nstopped at step {module.step}; go on with  {again}", soft_wrap=True)
            raise KeyboardInterrupt
    if not (folder / checkpoint.BEST).is_file():
        validation.keep(module, None, {})
    checkpoint.fill(module.scored, checkpoint.load(folder / checkpoint.BEST)["model"], str(folder / checkpoint.BEST))


def test(model: Model, split: Samples, config: Mapping[str, Any], console: Console) -> Metrics:
    """Score the test split: once, after training, with the weights that validation chose."""
    loader = evaluation_loader(split, config["eval_batch_size"], setup.worker_count(config, split))
    return evaluate(model, loader, callbacks.progress_line(console, "testing, batch"))


def examples(model: Model, split: Samples, count: int = 12) -> closing.Examples:
    """Evenly chosen test images with their truths and the model's predictions, for the picture."""
    rows = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).astype(int)).tolist()
    chosen = Samples([split.samples[row] for row in rows], split.tasks, split.transform, 0, False, "skip")
    found = []
    for i in range(len(chosen)):
        packed = chosen[0, i]
        if "item" in packed:
            image = decode(chosen.samples[i].image)
            found.append((image, packed["truths"], model.predict(image)))
    return found
