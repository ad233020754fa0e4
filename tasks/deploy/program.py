"""A graph as ``torch.export`` sees it: what every other format is made from."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from tasks.deploy.graph import Graph


@lru_cache(maxsize=1)
def trace(graph: Graph) -> ExportedProgram:
    """The program of a graph, with the dynamic dimensions of its form; the last one is kept for the next engine."""
    dynamic: dict[int, Any] = {}
    if graph.form.batch is None:
        dynamic[0] = Dim("batch", min=1, max=4096)
    if graph.form.dynamic_size:
        dynamic |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    # Out of place, for torch.onnx takes twice as long over operators that work in place.
    in_place = [module for module in graph.modules() if getattr(module, "inplace", False)]
    try:
        for module in in_place:
            module.inplace = False  # type: ignore[assignment]
        with torch.no_grad():
            return torch.export.export(graph, (graph.example(),), dynamic_shapes=(dynamic,) if dynamic else None)
    finally:
        for module in in_place:
            module.inplace = True  # type: ignore[assignment]
