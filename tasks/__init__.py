"""The commands (``python -m tasks.detect`` ...) and the Python face of the suite.

Importing this imports nothing heavy: torch is loaded when ``build`` or ``load`` is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

    return model_from_config(compose(task, overrides)).eval()


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
