"""The commands (``python -m tasks.detect`` ...) and the suite's Python API.

Importing this imports nothing heavy: torch is loaded when ``build`` or ``load`` is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.deploy.predictor import Predictor
    from tasks.training.model import Model


def build(task: str, overrides: Sequence[str] = ()) -> Model:
    """The model that ``python -m tasks.<task> <overrides>`` would train, untrained, in eval mode.

    Args:
        task: ``classify``, ``detect``, ``segment`` or ``multitask``.
        overrides: as on the command line, e.g. ``["backbone=large", "head.num_classes=90"]``. With the number of
            classes given no data set is read.
    Raises:
        ValueError: a name or key that does not exist.
        FileNotFoundError: the data set is needed and not there.
    """
    from tasks.cli import compose
    from tasks.training.build import model_from_config

    config = compose(task, overrides)
    if "heads" not in config:
        raise ValueError(f"tasks.{task} trains no model; expected classify, detect, segment or multitask")
    return model_from_config(config).eval()


def load(run: str | Path, trust: bool = False) -> Model:
    """A trained run's model with its best weights, in eval mode.

    Args:
        run: a run folder, or a checkpoint file in one.
        trust: let the checkpoint name parts that are not of this suite (your own backbone or head); they are run.
    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        ValueError: a damaged checkpoint, or one with foreign parts that is not trusted.
    """
    from tasks.training.build import model_from_run

    return model_from_run(Path(run), trust).eval()


def predictor(
    run: str | Path, engine: str = "auto", threads: int | None = None, trust: bool = False, precision: str = "f32"
) -> Predictor:
    """A trained run in the fastest engine that is installed and gives torch's outputs; for services.

    Args:
        run: a run folder, a checkpoint in one, or a file that ``python -m tasks.export`` wrote.
        engine: ``auto``, which takes some seconds to export and to compare, or an engine's name.
        threads: of the engine; None: as many as there are cores.
        trust: as in ``load``; also for a file of torch_export, whose loading can run code.
        precision: ``f32``, or ``bf16`` where engine and CPU have it.
    Returns:
        An object whose ``predict(image)`` gives what ``load(run).predict(image)`` gives; ``notes`` say why this engine.
    Raises:
        FileNotFoundError: no such run.
        ValueError: a damaged file, or an engine that is unknown or not installed.
    """
    from tasks.deploy.predictor import open_predictor

    return open_predictor(run, engine, threads, precision, trust=trust)
