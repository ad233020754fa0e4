"""ExecuTorch with XNNPACK, for phones: one batch size, one image size, raw outputs."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tasks.deploy.engine_torch_export import Recorder
from tasks.deploy.graph import Graph
from tasks.deploy.program import trace

SUFFIX = ".pte"
PACKAGES = ("executorch",)
EXTRA = "executorch"
PRECISIONS = ("f32",)
FIXED = True

ENTRY = "metadata"
"""A second method of the program, which gives the metadata as the bytes of a JSON text."""


class Session:
    """See ``tasks.deploy.Session``.

    Raises:
        ValueError: another number of threads than the process's one pool has: replacing it ends in a hang or a crash.
    """

    def __init__(self, file: Path, threads: int) -> None:
        with quiet():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime, Verification

            if (count := portable_lib._threadpool_get_thread_count()) != threads:
                raise ValueError(f"executorch runs with {count} threads here and cannot change it; set threads={count}")
            self.program = Runtime.get().load_program(file, verification=Verification.InternalConsistency)
            text = self.program.load_method(ENTRY).execute([])[0]
            self.metadata: Mapping[str, Any] = json.loads(text.numpy().tobytes())
            self.method = self.program.load_method("forward")

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """See ``tasks.deploy.Session``."""
        outputs = self.method.execute([torch.from_numpy(image)])
        return {name: value.numpy() for name, value in zip(self.metadata["outputs"], outputs, strict=True)}


_lowered: dict[Path, ExportedProgram] = {}
"""The file that was written last, and what it was made from: nothing in the file itself lets one look inside."""


def export(graph: Graph, file: Path, metadata: Mapping[str, Any]) -> None:
    """See ``tasks.deploy.Engine``.

    Raises:
        ValueError: the form is more than ExecuTorch can.
    """
    if graph.form.batch is None or graph.form.dynamic_size:
        raise ValueError("executorch takes one size and one number of images; set size=fixed and batch=1")
    if any(name.endswith("/count") for name in graph.outputs):
        raise ValueError("executorch has no operator for non-maximum suppression; export with postprocess=outside")
    text = torch.frombuffer(bytearray(json.dumps(metadata).encode()), dtype=torch.uint8)
    program = trace(graph)
    file.write_bytes(lower(program, {ENTRY: text}))
    _lowered.clear()
    _lowered[file.resolve()] = program


def lower(program: ExportedProgram, constants: Mapping[str, Any] | None = None) -> bytes:
    """The program as a file, run by XNNPACK as far as it can; ``constants`` become methods without input."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=dict(constants or {})
        )
        return bytes(edge.to_executorch().buffer)


def load(file: Path, threads: int, precision: str) -> Session:
    """See ``tasks.deploy.Engine``."""
    return Session(file, threads)


def layers(file: Path, image: np.ndarray, precision: str) -> dict[str, np.ndarray]:
    """See ``tasks.deploy.Engine``; only of the file that this process wrote last, by lowering its program once more."""
    if file.resolve() not in _lowered:
        return {}
    inside, example = Inside(_lowered[file.resolve()]), torch.from_numpy(image)
    with torch.no_grad():
        names = list(inside(example))
        buffer = lower(torch.export.export(inside, (example,)))
    with quiet():
        from executorch.runtime import Runtime

        found = Runtime.get().load_program(buffer).load_method("forward").execute([example])
    return {name: value.numpy().copy() for name, value in zip(names, found, strict=True)}


class Inside(nn.Module):
    """A program that gives what each module gives, by its name."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.recorder = Recorder(program)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] uint8, as many and as large as the program takes."""
        self.recorder.run(image)
        return self.recorder.seen


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's notices, which its C++ part writes to stderr itself; errors are exceptions."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    logging.getLogger("executorch").setLevel(logging.ERROR)
    kept = os.dup(2)
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere:
        warnings.simplefilter("ignore")
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
