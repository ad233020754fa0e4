"""A trained model on your images, drawn and as data. ``python -m tasks.predict run=<run folder> images=photos/``"""

from __future__ import annotations

from omegaconf import DictConfig

from tasks.cli import command
from tasks.words import end_as_by_ctrl_c


def work(config: DictConfig, _overrides: list[str]) -> None:
    """Predict what the config names."""
    from tasks.deploy.predict import predict

    predict(config)


def main() -> None:
    """Entry point."""
    end_as_by_ctrl_c()
    command("predict", work)


if __name__ == "__main__":
    main()
