"""What became of a run that was started before: finished, stopped on the way, or still running somewhere.

Two runs are the same if their configs are, but for what changes no result; the commit may differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tasks.reporting.results import Record, read_records
from tasks.training import checkpoint

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from resuming one run
    fcntl = None  # type: ignore[assignment]

FREE = {"resume", "workers", "cache_gb", "eval_batch_size", "results", "output", "skip_done", "overrides"}
"""Keys of a config that change no result."""
FREE_OF_TRAINER = {"progress", "save_every"}
LOCK = ".lock"


def identity(config: Mapping[str, Any]) -> str:
    """Equal for configs of which one run is enough.

    Args:
        config: complete or as composed: the number of classes is the data set's, and left out.
    """
    kept = {key: value for key, value in config.items() if key not in FREE}
    kept["trainer"] = {key: value for key, value in config["trainer"].items() if key not in FREE_OF_TRAINER}
    heads = {"head": config.get("head") or {}} | {f"heads.{task}": head for task, head in config["heads"].items()}
    kept |= {name: {**head, "num_classes": None} for name, head in heads.items()}
    del kept["heads"]
    return json.dumps(kept, sort_keys=True)


def finished(config: Mapping[str, Any]) -> Record | None:
    """The newest record of this run in ``results``; None: there is none."""
    if not Path(config["results"]).is_file():
        return None
    wanted = identity(config)
    records, _ = read_records(config["results"])
    alike = (one for one in reversed(records) if one["task"] == config["task"] and one["seed"] == config["seed"])
    return next((one for one in alike if _identity(one["config"]) == wanted), None)


def stopped(config: Mapping[str, Any]) -> Path | None:
    """The newest folder of this run that was begun and not finished; None: there is none."""
    wanted = identity(config)
    for file in sorted(Path(config["output"], config["task"]).glob(f"*/{checkpoint.CONFIG}"), reverse=True):
        folder = file.parent
        if (folder / checkpoint.RECORD).is_file():
            continue
        with suppress(yaml.YAMLError, OSError):  # a config that was cut short is not this run's
            if _identity(yaml.load(file.read_text(encoding="utf-8"), Loader=LOADER)) == wanted:
                return folder
    return None


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _identity(config: Any) -> str | None:
    if not isinstance(config, dict) or not isinstance(config.get("trainer"), dict) or "heads" not in config:
        return None  # a record of something else than a training
    return identity(config)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a run folder; the system lets go of it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by the loader's processes
        except OSError as error:
            raise ValueError(f"{folder} is being trained by another process; wait for it or stop it") from error
        yield  # the file stays: whoever waits for a lock on a deleted one would hold nothing
