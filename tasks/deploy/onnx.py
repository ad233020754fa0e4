"""A graph as ONNX, by torch's exporter; ONNX Runtime runs it and OpenVINO converts it."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tasks.deploy import artefact
from tasks.deploy.graph import Graph
from tasks.deploy.program import trace

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
"""Of ONNX 1.15 (2023): it has HardSwish and Gelu; older runtimes could not read a newer one."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter writes the modules that a node is from, outermost first, and the node itself."""


def write(graph: Graph, file: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Write one file, weights inside.

    Returns:
        Module of the model -> the value of the graph that it ends with; ``layers`` of the metadata in the file.
    """
    proto, layers = convert(graph)
    del proto.metadata_props[:]
    for key, text in artefact.pack({**metadata, "layers": layers}).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, text
    file.write_bytes(proto.SerializeToString())
    return layers


@lru_cache(maxsize=1)
def convert(graph: Graph) -> tuple[ModelProto, dict[str, str]]:
    """The graph as ONNX without metadata, and its layers; the last one is kept for the next engine."""
    for library in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            trace(graph),
            input_names=[artefact.INPUT],
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            custom_translation_table={torch.ops.mobilenetv3_bench.suppress.default: suppress},
        )
    assert program is not None
    proto = program.model_proto
    layers = layers_of(proto)
    for node in proto.graph.node:
        del node.metadata_props[:]  # the exporter's stack traces, with paths of this machine
    return proto, layers


def layers_of(proto: ModelProto) -> dict[str, str]:
    """Module of the model -> the value that it ends with: what the last node in its scope gives."""
    layers = {}
    for node in proto.graph.node:
        texts = [entry.value for entry in node.metadata_props if entry.key == SCOPES]
        for scope in ast.literal_eval(texts[0])[:-1] if texts else ():
            if scope.startswith("model."):
                layers[scope.removeprefix("model.")] = node.output[0]
    return layers


def suppress(boxes: Any, scores: Any, iou: float, threshold: float) -> Any:
    """``tasks.deploy.inside.suppress`` as ONNX: its NonMaxSuppression, and the scores of what that selects."""
    from onnxscript import opset20

    op: Any = opset20  # its annotations do not admit its own constants
    every = op.Constant(value_ints=[2**31 - 1])
    chosen = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        every,
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[threshold]),
    )  # [N, 3]: group, class 0, box
    index = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
    return op.ScatterND(op.Mul(scores, op.Constant(value_float=0.0)), index, op.GatherND(scores, index))
