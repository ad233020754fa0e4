"""What a run leaves on disk: ``last.pt`` to go on from, ``best.pt`` to use. Plain dicts, no pickled objects."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones.weights import UNREADABLE

LAST, BEST, CONFIG, RECORD = "last.pt", "best.pt", "config.yaml", "record.json"


def file_of(path: Path) -> Path:
    """Where the weights of a run folder are, the best ones if there are; a checkpoint is its own."""
    if not path.is_dir():
        return path
    return path / BEST if (path / BEST).is_file() else path / LAST


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write to a temporary name, then rename, so that a full disk or a kill leaves the old file whole.

    Raises:
        OSError: the disk is full or the folder is not writable; names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "; the one before it is whole" if path.exists() else ""
        raise OSError(f"could not write {path} ({error}){kept}: free some space, then resume={path.parent}") from error


def save_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running anything that is in it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no checkpoint of ours, or a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a run folder that holds {path.name}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from error
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{path} is no checkpoint of this suite; expected a dict with the entry 'model'")
    return content


def fill(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load a state dict of our own naming strictly.

    Raises:
        ValueError: it belongs to another architecture; lists the keys that differ.
    """
    own = model.state_dict()
    wrong = [
        f"{k} {tuple(own[k].shape)} here, {tuple(state[k].shape)} there"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    for label, keys in (("missing", own.keys() - state.keys()), ("left over", state.keys() - own.keys())):
        wrong += [f"{key} is {label}" for key in sorted(keys)]
    if wrong:
        raise ValueError(
            f"{source} belongs to another architecture: {'; '.join(wrong)}. Choose the backbone, head and classes it "
            "was trained with, or take its backbone alone: backbone.weights="
        )
    model.load_state_dict(dict(state))
