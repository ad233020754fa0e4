"""From a trained model to what is shipped: export, engines, and the proof that it is the same model.

An engine is one file, ``tasks/deploy/engine_<name>.py``, that keeps the ``Engine`` contract; there is no list to edit.
Importing this imports neither torch nor an engine: what an engine says of itself in capitals is read off its file.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata as packages
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from tasks.words import suggest

if TYPE_CHECKING:
    import numpy as np

    from tasks.deploy.graph import Graph

FOLDER = Path(__file__).parent

FASTEST_FIRST = ("openvino", "onnxruntime", "torch", "torch_export", "executorch")
"""The order in which engines are preferred; others, by name, before torch.

V3-Large at 224 px, one image, one thread of an AMD EPYC (Zen 4), interleaved, 161 rounds beside other
processes, ms: openvino 6.9 to 11, onnxruntime 6.6 to 14, torch 15 to 31, torch_export 19 to 32 (25 %, 50 %).
"""


class Session(Protocol):
    """A graph in an engine, ready to run."""

    metadata: Mapping[str, Any]
    """What the artefact says of itself, see ``tasks.deploy.artefact``."""

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """The graph's outputs by name, float32 whatever the precision inside.

        Args:
            image: [B, 3, H, W] uint8 RGB at the network's input size; normalisation is inside the graph.
        """
        ...


class Engine(Protocol):
    """The contract of an engine's module, which keeps it by its own functions and constants."""

    SUFFIX: str | None
    """Of an artefact's file, with the dot. None: the engine writes no file, it runs the model itself by ``wrap``."""
    PACKAGES: tuple[str, ...]
    """Distributions that it needs; the first one's version is the engine's."""
    EXTRA: str | None
    """What to install: ``pip install -e ".[export]"``; None: what every installation has is enough."""
    PRECISIONS: tuple[str, ...]
    """What it can calculate in, as far as the CPU has it: ``f32``, ``bf16``."""
    # All these may be left out: FIXED = True where the number of images has to be fixed; RUNS_CODE = True where loading
    # a file may run code that is in it, so that only trusted ones are loaded; BESIDE = endings of what lies beside it.

    def export(self, graph: Graph, file: Path, metadata: Mapping[str, Any]) -> None:
        """Write the graph and its metadata as one file, with those of ``BESIDE``."""
        ...

    def load(self, file: Path, threads: int, precision: str) -> Session:
        """Load a file that ``export`` wrote, without running any code that is in it; but see ``RUNS_CODE``."""
        ...

    def layers(self, file: Path, image: np.ndarray, precision: str) -> dict[str, np.ndarray]:
        """What a file's graph gives where a module of the torch model ended, by the module's name, as far as known."""
        ...


def engine_names() -> list[str]:
    """All engines there are, installed or not, by their files."""
    return sorted(path.stem.removeprefix("engine_") for path in FOLDER.glob("engine_*.py"))


def facts(name: str) -> dict[str, Any]:
    """The constants of an engine's file (``SUFFIX``, ``PACKAGES`` ...), read without importing it.

    Raises:
        ValueError: there is no such engine.
    """
    known = engine_names()
    if name not in known:
        raise ValueError(f"there is no engine {name!r}{suggest(str(name), known)}; there are {', '.join(known)}")
    found = {}
    for node in ast.parse((FOLDER / f"engine_{name}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            with suppress(ValueError):  # a constant made of names is the module's own affair
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def lacking(name: str) -> list[str]:
    """The distributions that an engine needs and that are not installed."""
    discover = packages.Distribution.discover
    return [package for package in facts(name)["PACKAGES"] if next(iter(discover(name=package)), None) is None]


def available() -> list[str]:
    """The engines whose packages are installed, fastest first, as far as known."""
    installed = [name for name in engine_names() if not lacking(name)]
    order: dict[str, float] = {name: place for place, name in enumerate(FASTEST_FIRST)}
    return sorted(installed, key=lambda name: (order.get(name, order["torch"] - 0.5), name))


def engine(name: str) -> ModuleType:
    """An engine's module.

    Raises:
        ValueError: there is no such engine, or it is not installed; says what to install.
    """
    missing = lacking(name)
    if missing:
        raise ValueError(
            f'engine {name} needs {", ".join(missing)}: pip install -e ".[{facts(name)["EXTRA"]}]", or choose one of '
            f"{', '.join(available())}"
        )
    return importlib.import_module(f"tasks.deploy.engine_{name}")


def contract(name: str) -> Engine:
    """``engine``, typed by the contract."""
    return cast(Engine, engine(name))
