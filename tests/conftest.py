"""Fixtures: a tiny data set on disk, and a way to run commands as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import ROOT, Command, write_voc

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: threads of two workers wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run ``python -m tasks.<words>`` in an empty folder; returns the finished process."""

    def run(*words: str, cwd: Path = tmp_path, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, "-m", f"tasks.{words[0]}", *words[1:]],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``write_voc``."""
    return write_voc(tmp_path_factory.mktemp("voc"))
