"""torch.export: the graph of the model's operators, run by torch; needs no source of the model."""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from tasks.deploy.engine_torch import Session, as_array
from tasks.deploy.graph import Graph
from tasks.deploy.program import trace

SUFFIX = ".pt2"
PACKAGES = ("torch",)
EXTRA = None
PRECISIONS = ("f32", "bf16")
RUNS_CODE = True  # torch.export.load unpickles weights and evaluates the expressions of sizes

ENTRY = "mobilenetv3_bench.json"
"""Of the metadata, among the file's extra files."""


def export(graph: Graph, file: Path, metadata: Mapping[str, Any]) -> None:
    """See ``tasks.deploy.Engine``."""
    content = io.BytesIO()  # writing to a full disk itself, torch ends the process
    torch.export.save(trace(graph), content, extra_files={ENTRY: json.dumps(metadata)})
    file.write_bytes(content.getvalue())


def load(file: Path, threads: int, precision: str) -> Session:
    """See ``tasks.deploy.Engine``."""
    program, metadata = read(file)
    return Session(program.module(), metadata, threads, precision)


def read(file: Path) -> tuple[ExportedProgram, dict[str, Any]]:
    """A file's program and metadata.

    Raises:
        ValueError: it cannot be read.
    """
    extra: dict[str, Any] = {ENTRY: ""}
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it prints a traceback before it raises
    try:
        program = torch.export.load(file, extra_files=extra)
    except (RuntimeError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{file} cannot be read as a program of torch.export ({error}); export it again") from error
    return program, json.loads(extra[ENTRY] or "{}")


def layers(file: Path, image: np.ndarray, precision: str) -> dict[str, np.ndarray]:
    """See ``tasks.deploy.Engine``."""
    recorder = Recorder(read(file)[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        recorder.run(torch.from_numpy(image))
    return {name: as_array(value) for name, value in recorder.seen.items()}


class Recorder(Interpreter):
    """Runs a program, made free of operators that work in place, and keeps what each module's last operator gives."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.run_decompositions({}).module())
        self.seen: dict[str, Tensor] = {}
        """By the module's name."""

    def run_node(self, n: Node) -> Any:
        """One operator."""
        found = super().run_node(n)
        if isinstance(found, Tensor):
            for scope, _ in n.meta.get("nn_module_stack", {}).values():
                name = re.sub(r"@\d+", "", scope)  # how a module's second call is named
                if name.startswith("model."):
                    self.seen[name.removeprefix("model.")] = found
        return found
