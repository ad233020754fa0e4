"""A trained model on your images, drawn and as data. ``python -m tasks.predict run=<run folder> images=photos/``"""

from __future__ import annotations

import re
import sys

from omegaconf import DictConfig

from tasks.cli import command

PATHS = ("run", "images", "out", "annotations")
"""Taken as they stand: a file may be called ``a(1), b=2.jpg``, which Hydra's grammar would refuse."""


def work(config: DictConfig, _overrides: list[str]) -> None:
    """Predict what the config names."""
    from tasks.deploy.predict import predict

    predict(config)


def quoted(word: str) -> str:
    """An override with its path in quotes."""
    key, _, value = word.partition("=")
    if key not in PATHS or value in ("", "null") or value[0] in "'\"":
        return word
    text = re.sub(r"(\\*)('|$)", lambda run: run[1] * 2 + run[2].replace("'", "\\'"), value)
    return f"{key}='{text}'"


def main() -> None:
    """Entry point."""
    if not {"-m", "--multirun"} & set(sys.argv):  # a sweep needs its commas
        sys.argv[1:] = [quoted(word) for word in sys.argv[1:]]
    command("predict", work)


if __name__ == "__main__":
    main()
