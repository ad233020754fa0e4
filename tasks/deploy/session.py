"""A model in an engine: one face for prediction, benchmark and proof, whatever runs behind it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from backbones import FeatureSpec
from heads import Head, Size, check_count
from tasks.deploy import Session, artefact, contract, engine_names, facts
from tasks.deploy import available as available
from tasks.deploy import engine as engine
from tasks.deploy.graph import Form, Graph, unflatten
from tasks.deploy.inside import ENDINGS
from tasks.training.build import OURS, foreign_targets, make, without
from tasks.training.model import Model

View = Callable[[dict[str, Any]], dict[str, Any]]
"""Fits an image to the network's input, see ``tasks.data.augment.evaluation``."""
BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""What Linux calls the instructions for bfloat16, on x86 and Arm."""


class Runner:
    """A model in an engine.

    Args:
        session: the loaded graph.
        name: of the engine.
        threads: that it runs with.
        precision: that it calculates in: ``f32`` or ``bf16``.
        heads: task -> what finishes its raw output.
        view: fits an image to the network's input.
        kept: what must live as long as the session.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        threads: int,
        precision: str,
        heads: Mapping[str, Head],
        view: View,
        kept: object = None,
    ) -> None:
        self.session, self.name, self.threads, self.precision = session, name, threads, precision
        self.version = artefact.version(name)
        self.metadata = dict(session.metadata)
        self.image_size: Size = (self.metadata["image_size"][0], self.metadata["image_size"][1])
        self.classes = {task: tuple(names) for task, names in self.metadata["classes"].items()}
        self._heads, self._view, self._kept = dict(heads), view, kept

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """The graph's outputs by name.

        Args:
            image: [B, 3, H, W] uint8 RGB at ``image_size``.
        Raises:
            ValueError: another type or number of dimensions.
        """
        if image.dtype != np.uint8 or image.ndim != 4:  # some engines would cast floats of [0, 1] to zeros
            raise ValueError(f"the engine got {image.dtype} {image.shape}; expected uint8 RGB [B, 3, H, W]")
        return self.session.run(image)

    @torch.inference_mode()
    def predict(self, image: np.ndarray, sizes: list[Size]) -> dict[str, Any]:
        """Predictions in the pixels of the original images.

        Args:
            image: [B, 3, H, W] uint8 RGB at ``image_size``, fitted as ``metadata["evaluation"]`` says.
            sizes: height and width of each original image, pixels.
        Returns:
            task -> what its head's ``predict`` gives.
        """
        return self.finish(self.run(image), (image.shape[2], image.shape[3]), sizes)

    @torch.inference_mode()
    def finish(self, outputs: Mapping[str, np.ndarray], size: Size, sizes: list[Size]) -> dict[str, Any]:
        """The part of ``predict`` behind ``run``: its outputs for images of ``size``, in the originals' pixels."""
        raw = unflatten(outputs, self.precision)
        if self.metadata["postprocess"] == "inside":
            return {task: ENDINGS[task].finish(output, size, sizes) for task, output in raw.items()}
        return {task: head.predict(raw[task], sizes) for task, head in self._heads.items()}

    def fit(self, image: np.ndarray) -> np.ndarray:
        """An image [H, W, 3] uint8 RGB as the network takes it: [3, *image_size] uint8, resized as in evaluation."""
        pixels = torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)
        return self._view({"image": tv_tensors.Image(pixels)})["image"].as_subclass(torch.Tensor).contiguous().numpy()


def open_model(
    model: Model,
    name: str,
    threads: int | None = None,
    precision: str = "f32",
    batch: int | None = None,
    postprocess: str = "outside",
) -> Runner:
    """A model in an engine, by way of a temporary file.

    Args:
        model: stays as it is.
        name: of the engine.
        threads: None: as many as this process has cores.
        precision: ``f32``, or ``bf16`` where engine and CPU have it.
        batch: images a run; None: any number, or one where the engine needs to know.
        postprocess: ``outside``: the graph gives the heads' raw outputs; ``inside``: finished predictions.
    Raises:
        ValueError: an engine that is unknown or not installed, or that cannot do what is asked.
    """
    contract(name)  # refused before the model is copied
    check_precision(name, precision)
    count = thread_count(threads)
    batch = batch or (1 if facts(name).get("FIXED") else None)
    graph = Graph(model, Form(model.image_size, batch, False, postprocess))
    metadata = artefact.describe(graph, name, None, None)
    return open_graph(graph, name, metadata, count, precision, model.view)


def open_graph(
    graph: Graph, name: str, metadata: Mapping[str, Any], threads: int, precision: str, view: View
) -> Runner:
    """A graph in an engine, by way of a temporary file where the engine needs one; see ``open_model``."""
    heads = {task: graph.model.head(task) for task in graph.model.heads}
    suffix = facts(name)["SUFFIX"]
    if suffix is None:
        return Runner(engine(name).wrap(graph, metadata, threads, precision), name, threads, precision, heads, view)
    folder = tempfile.TemporaryDirectory(prefix="mobilenetv3_bench_", ignore_cleanup_errors=True)
    file = Path(folder.name) / f"model{suffix}"
    with in_our_words(name):
        contract(name).export(graph, file, metadata)
        session = contract(name).load(file, threads, precision)
    return Runner(session, name, threads, precision, heads, view, folder)


@contextmanager
def in_our_words(name: str) -> Iterator[None]:
    """Turn what an engine and its exporter raise about a model into a line.

    Raises:
        ValueError: instead of RuntimeError, and of AssertionError, as which the guards of torch.export come.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        reason = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:300]
        raise ValueError(f"engine {name} cannot take this model ({reason}); choose another engine=") from error


def open_file(path: Path, threads: int | None = None, precision: str = "f32", trust: bool = False) -> Runner:
    """An artefact, without the run it is from.

    Args:
        path: a file that ``python -m tasks.export`` wrote.
        threads: None: as many as this process has cores.
        precision: ``f32``, or ``bf16`` where engine and CPU have it.
        trust: load it even if it may run code (torch_export's files, a head that is not of this suite).
    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no artefact of this suite, its engine is not installed, or it is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no artefact {path}; python -m tasks.export run=<run folder> writes one")
    name = engine_of(path)
    check_precision(name, precision)
    count = thread_count(threads)
    if facts(name).get("RUNS_CODE") and not trust:
        raise ValueError(f"{path}: loading a file of {name} can run code that is in it; if you know it, trust=true")
    session = contract(name).load(path, count, precision)
    heads = finishers(session.metadata, path, trust)
    size = session.metadata["image_size"]
    return Runner(session, name, count, precision, heads, make(session.metadata["evaluation"])((size[0], size[1])))


def engine_of(path: Path) -> str:
    """The engine that a file is for, by its ending.

    Raises:
        ValueError: no engine writes such files.
    """
    suffixes = {facts(name)["SUFFIX"]: name for name in engine_names() if facts(name)["SUFFIX"]}
    if path.suffix not in suffixes:
        raise ValueError(f"{path} is no artefact; expected a file that ends in {', '.join(suffixes)}")
    return suffixes[path.suffix]


def finishers(metadata: Mapping[str, Any], path: Path, trust: bool) -> dict[str, Head]:
    """The heads of an artefact, without weights: their ``predict`` needs none.

    Raises:
        ValueError: the file was not written by ``tasks.export``, or names parts that are not of this suite and is not
            trusted.
    """
    if not metadata.get("heads"):
        raise ValueError(f"{path} says nothing of its heads; expected a file that python -m tasks.export wrote")
    strange = foreign_parts(metadata)
    if strange and not trust:
        raise ValueError(
            f"{path} would run {', '.join(sorted(strange))}; expected parts of {', '.join(OURS)}; if you know it, "
            "trust=true"
        )
    specs = {name: FeatureSpec(*spec) for name, spec in metadata["specs"].items()}
    with torch.device("meta"):
        return {task: make(without(head, "name"))(specs) for task, head in metadata["heads"].items()}


def foreign_parts(metadata: Mapping[str, Any]) -> set[str]:
    """What an artefact calls beyond this suite's own parts when it is opened."""
    return foreign_targets([*metadata["heads"].values(), metadata["evaluation"]])


def check_precision(name: str, precision: str) -> None:
    """Refuse what the engine cannot calculate in.

    Raises:
        ValueError: says what it can.
    """
    known = facts(name)["PRECISIONS"]
    if precision == "bf16" and not has_bf16():
        raise ValueError(
            "precision=bf16 needs a CPU that calculates in bfloat16 (AVX-512 BF16, AMX, Arm BF16); set precision=f32"
        )
    if precision not in known:
        raise ValueError(f"engine {name} has no precision={precision} here; expected {' or '.join(known)}")


def has_bf16(listed: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU calculates in bfloat16.

    Args:
        listed: where Linux lists the CPU's instructions; elsewhere torch is asked, which says yes to some CPUs that
            only emulate it.
    """
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    words = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    if words:
        return not words.isdisjoint(BF16)
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())


def thread_count(threads: int | None) -> int:
    """Of an engine; None: as many as this process has cores.

    Raises:
        ValueError: no whole number above 0, or more than the machine has.
    """
    count = cores() if threads is None else threads
    check_count("threads", count)
    if count > (most := max(cores(), os.cpu_count() or 1)):
        raise ValueError(f"threads is {count}, more than the {most} cores of this machine")
    return count


def leave_cores_to_the_engine() -> None:
    """Let torch, which resizes images and finishes predictions, work with one thread; the engine torch sets its own.

    More would be in the way of the engine's, and these in theirs: they wait by spinning. Detection at 320 px takes 15
    instead of 24 ms an image with OpenVINO, 14 instead of 22 with ONNX Runtime, on two cores. Of the whole process.
    """
    torch.set_num_threads(1)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
