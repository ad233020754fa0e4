"""Peak memory of a process that does nothing but load a model and run it. ``python -m tasks.deploy.fresh <JSON>``"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.deploy import contract, facts
from tasks.deploy.cases import Case

MIB = 2**20
RUNS = 3


class Memory(NamedTuple):
    """Of a fresh process, MiB."""

    peak: float
    """Most that was resident at once: interpreter, libraries, engine, model and its work."""
    before: float
    """Of it before the model was loaded: interpreter and libraries."""


def peak_memory(case: Case, file: Path | None) -> Memory | str:
    """Load and run the case in a process of its own.

    Args:
        case: what is run.
        file: the artefact; None for an engine that runs the model itself.
    Returns:
        The memory; or why there is nothing, in a line: the process failed, or the system does not say.
    """
    network = case.network
    asked = {
        "engine": case.engine,
        "threads": case.threads,
        "precision": case.precision,
        "shape": [case.batch, 3, *network.size],
        "file": file and str(file),
        "task": network.task,
        "overrides": network.overrides,
        "run": network.run,
        "trust": network.trust,
    }
    words = [sys.executable, "-m", "tasks.deploy.fresh", json.dumps(asked)]
    root = str(Path(__file__).resolve().parents[2])  # it works in this folder, where a run's own parts may lie
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return f"its process ended with {done.returncode}: {lines[-1][:200] if lines else 'without a word'}"
    peak, before = json.loads(done.stdout.splitlines()[-1])
    return Memory(peak, before) if peak else "this system does not say what a process holds"


def load_and_run(asked: dict[str, Any]) -> Memory:
    """In the fresh process."""
    engine = contract(asked["engine"])
    image = np.zeros(asked["shape"], np.uint8)
    if facts(asked["engine"])["SUFFIX"] is None:
        from tasks import build, load
        from tasks.deploy.session import open_model

        before = resident_peak()
        model = load(asked["run"], asked["trust"]) if asked["run"] else build(asked["task"], asked["overrides"])
        session: Any = open_model(model, asked["engine"], asked["threads"], asked["precision"], asked["shape"][0])
    else:
        before = resident_peak()
        session = engine.load(Path(asked["file"]), asked["threads"], asked["precision"])
    for _ in range(RUNS):
        session.run(image)
    return Memory(resident_peak(), before)


def resident_peak() -> float:
    """MiB; 0 where the system does not say.

    Linux hands ``ru_maxrss`` on from parent to child, so the child of a large process would seem as large;
    ``VmHWM`` is the process's own.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / MIB
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak * 1024 / MIB


if __name__ == "__main__":
    print(json.dumps(load_and_run(json.loads(sys.argv[1]))))
