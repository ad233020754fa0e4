"""A run's model as a file, proved to be the same. ``python -m tasks.export run=<run folder> engine=openvino``"""

from __future__ import annotations

from omegaconf import DictConfig

from tasks.cli import command
from tasks.words import end_as_by_ctrl_c


def work(config: DictConfig, overrides: list[str]) -> None:
    """Export, compare with torch, say what came out."""
    from tasks.deploy.export import run

    run(config)


def main() -> None:
    """Entry point."""
    end_as_by_ctrl_c()
    command("export", work)


if __name__ == "__main__":
    main()
