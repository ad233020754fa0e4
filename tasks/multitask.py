"""Several tasks on one backbone: trains, scores and shows. ``python -m tasks.multitask backbone=small``"""

from __future__ import annotations

from omegaconf import DictConfig

from tasks.cli import command


def work(config: DictConfig, overrides: list[str]) -> None:
    """Train and test what the config describes."""
    from tasks.training.run import run

    run(config, overrides)


def main() -> None:
    """Entry point."""
    command("multitask", work)


if __name__ == "__main__":
    main()
