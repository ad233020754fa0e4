"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from tasks.deploy import artefact

if TYPE_CHECKING:
    from tasks.deploy.graph import Graph

SUFFIX = ".onnx"
PACKAGES = ("onnxruntime", "onnx", "onnxscript")
EXTRA = "export"
PRECISIONS = ("f32",)

ERRORS = tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
"""What ONNX Runtime raises; its kinds have no common base."""


class Session:
    """See ``tasks.deploy.Session``."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.metadata = artefact.unpack(session.get_modelmeta().custom_metadata_map)
        self.names = [output.name for output in session.get_outputs()]

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """See ``tasks.deploy.Session``."""
        try:
            return dict(zip(self.names, self.session.run(self.names, {artefact.INPUT: image}), strict=True))
        except ERRORS as error:
            raise RuntimeError(str(error)) from error


def export(graph: Graph, file: Path, metadata: Mapping[str, Any]) -> None:
    """See ``tasks.deploy.Engine``."""
    from tasks.deploy import onnx  # torch is needed to write a file, not to run it

    onnx.write(graph, file, metadata)


def load(file: Path, threads: int, precision: str) -> Session:
    """See ``tasks.deploy.Engine``."""
    try:
        return Session(open_session(str(file), threads))
    except ERRORS as error:
        raise ValueError(f"{file} cannot be read by ONNX Runtime ({error}); export it again") from error


def open_session(model: str | bytes, threads: int) -> onnxruntime.InferenceSession:
    """A session with exactly so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A session's threads spin for a while after it has run, in the way of whatever runs next: four sessions in turn,
    # with two threads on two cores, took 18 to 21 ms an image of V3-Large each, and 5.7 without; alone 4.8, and 5.2.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # errors are exceptions, too
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def layers(file: Path, image: np.ndarray, precision: str) -> dict[str, np.ndarray]:
    """See ``tasks.deploy.Engine``."""
    import onnx as format_

    proto = format_.load(file)
    inside = artefact.unpack({entry.key: entry.value for entry in proto.metadata_props})["layers"]
    present = {value for node in proto.graph.node for value in node.output}
    wanted = {name: value for name, value in inside.items() if value in present}
    already = {output.name for output in proto.graph.output}
    proto.graph.output.extend(format_.ValueInfoProto(name=value) for value in {*wanted.values()} - already)
    session = open_session(proto.SerializeToString(), 1)
    values = list(wanted.values())
    return dict(zip(wanted, session.run(values, {artefact.INPUT: image}), strict=True))
