"""OpenVINO on the CPU; a file is a pair, ``.xml`` with the graph and ``.bin`` with the weights."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino

if TYPE_CHECKING:
    from tasks.deploy.graph import Graph

SUFFIX = ".xml"
PACKAGES = ("openvino", "onnx", "onnxscript")
EXTRA = "openvino"
PRECISIONS = ("f32", "bf16")
BESIDE = (".bin",)

ENTRY = ("mobilenetv3_bench", "metadata")
"""Of the metadata, in the model's rt_info."""
WEIGHTS = "weights_sha256"
"""In the metadata: of the ``.bin``."""


class Session:
    """See ``tasks.deploy.Session``."""

    def __init__(self, compiled: openvino.CompiledModel, metadata: Mapping[str, Any]) -> None:
        self.compiled, self.metadata = compiled, metadata
        self.request, self.lock = compiled.create_infer_request(), Lock()
        self.names = [output.get_any_name() for output in compiled.outputs]

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """See ``tasks.deploy.Session``."""
        with self.lock:  # a request serves one caller at a time, and a service may have several
            # outputs are copied: the next run reuses their memory
            found = self.request.infer([image], share_inputs=True)
        return dict(zip(self.names, found.values(), strict=True))


def export(graph: Graph, file: Path, metadata: Mapping[str, Any]) -> None:
    """See ``tasks.deploy.Engine``."""
    from tasks.deploy import onnx  # torch is needed to write a file, not to run it

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        layers = onnx.write(graph, source, {})
        model = openvino.convert_model(source)
    known = {**metadata, "layers": layers}
    for _ in range(2):  # the second time with the digest of what the first wrote beside it
        model.set_rt_info(json.dumps(known), list(ENTRY))
        try:
            openvino.save_model(model, file, compress_to_fp16=False)
        except RuntimeError as error:
            if "iostream" not in str(error):
                raise
            raise OSError(f"{file} cannot be written whole ({error}); is the disk full?") from error
        known[WEIGHTS] = digest(file)


def load(file: Path, threads: int, precision: str) -> Session:
    """See ``tasks.deploy.Engine``."""
    model = read(file)
    return Session(compile_model(model, threads, precision), metadata_of(model))


def layers(file: Path, image: np.ndarray, precision: str) -> dict[str, np.ndarray]:
    """See ``tasks.deploy.Engine``."""
    model = read(file)
    present = {name for op in model.get_ops() for output in op.outputs() for name in output.get_names()}
    wanted = {name: value for name, value in metadata_of(model)["layers"].items() if value in present}
    already = {name for output in model.outputs for name in output.get_names()}
    model.add_outputs(sorted({*wanted.values()} - already))
    found = compile_model(model, 1, precision)([image])
    by_name = {name: found[output] for output in found for name in output.get_names()}
    return {name: by_name[value] for name, value in wanted.items()}


def read(file: Path) -> openvino.Model:
    """A file's model.

    Raises:
        ValueError: it cannot be read, or the weights are missing or another export's.
    """
    if not file.with_suffix(".bin").is_file():
        raise ValueError(
            f"{file.with_suffix('.bin')} is missing; it holds the weights of {file.name}: keep the two together"
        )
    try:
        model = openvino.Core().read_model(file)
    except RuntimeError as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given").strip()
        raise ValueError(f"{file} cannot be read by OpenVINO ({reason}); export it again") from error
    if metadata_of(model).get(WEIGHTS, digest(file)) != digest(file):
        raise ValueError(f"{file.with_suffix('.bin')} belongs to another export than {file.name}; export it again")
    return model


def digest(file: Path) -> str:
    """SHA-256 of the weights beside a file."""
    return hashlib.sha256(file.with_suffix(".bin").read_bytes()).hexdigest()


def metadata_of(model: openvino.Model) -> dict[str, Any]:
    """What ``export`` wrote beside the graph; empty where another program wrote the file."""
    path = list(ENTRY)
    return json.loads(model.get_rt_info(path).astype(str)) if model.has_rt_info(path) else {}


def compile_model(model: openvino.Model, threads: int, precision: str) -> openvino.CompiledModel:
    """The model made ready for one request at a time."""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # pinned to a core that another process uses, it would wait for it
        "INFERENCE_PRECISION_HINT": precision,
    }
    return openvino.Core().compile_model(model, "CPU", settings)
