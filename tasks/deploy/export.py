"""From a run folder to an artefact: read, write, open it as a stranger would, compare, say what came out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from heads import Size
from tasks.data.arguments import expanded
from tasks.data.loader import Samples, evaluation_loader
from tasks.deploy import artefact, contract, engine_names, facts, parity
from tasks.deploy.graph import Form, Graph
from tasks.deploy.session import (
    Runner,
    check_precision,
    cores,
    foreign_parts,
    in_our_words,
    open_file,
    open_graph,
    open_model,
    thread_count,
)
from tasks.reporting.closing import SHOWN
from tasks.training import checkpoint, setup
from tasks.training.build import as_size, foreign_targets, make, model_from_run, plain, read_data
from tasks.training.callbacks import progress_line
from tasks.training.model import Model

SIZES = ("fixed", "dynamic")


class Source(NamedTuple):
    """What is exported."""

    checkpoint: Path
    config: dict[str, Any]
    """Of the run, complete."""
    model: Model
    image_size: Size


def run(composed: DictConfig) -> Path:
    """Export what the config names, and prove it.

    Returns:
        The artefact.
    Raises:
        ValueError: a setting that does not fit; or the artefact is not the same model, which is said with the layer
            where they part.
        FileNotFoundError: no such run, or its data set is elsewhere now.
    """
    setup.quiet()
    console = Console(highlight=False, markup=False)
    config = plain(composed)
    check(config)
    source = read(config)
    fixed = facts(config["engine"]).get("FIXED", False)
    batch = config["batch"] or (1 if fixed else None)
    form = Form(source.image_size, batch, config["size"] == "dynamic", config["postprocess"])
    graph = Graph(source.model, form)
    metadata = artefact.describe(graph, config["engine"], source.config, source.checkpoint)
    loader, split = images(config, source, batch)
    console.print(f"exporting   {source.checkpoint} with {config['engine']}", soft_wrap=True)
    file = target(config, source)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export_", dir=file.parent) as folder:  # nobody finds an unproved file
        draft = Path(folder) / file.name
        with in_our_words(config["engine"]):
            contract(config["engine"]).export(graph, draft, metadata)
            runner = open_file(draft, config["threads"] or cores(), config["precision"], trust=True)
        reference = open_graph(graph, "torch", metadata, runner.threads, "f32", source.model.view)
        judge = reference if form.postprocess == "outside" else open_model(source.model, "torch", runner.threads)
        if form.dynamic_size:
            parity.follow_sizes(runner, reference, batch or 2)
        found = parity.compare(runner, reference, judge, loader, progress_line(console, "comparing, batch"))
        if not found.images:
            raise ValueError(f"not one image of {split} can be read, so nothing is proved; {found.skipped[0]}")
        show(console, found, runner, split)
        gate(found, graph, draft, file, config)
        move(draft, file)
    conclude(console, file, runner)
    return file


def gate(found: parity.Comparison, graph: Graph, draft: Path, file: Path, config: Mapping[str, Any]) -> None:
    """Let only the same model pass.

    Raises:
        ValueError: it is another one: says how far off, and in which layer they part; the draft is kept, named so.
    """
    engine, precision, tolerance = config["engine"], config["precision"], config["tol"]
    wrong = parity.verdict(found, precision, tolerance["output"], tolerance["metric"])
    if not wrong:
        return
    if config["postprocess"] == "inside" and not parity.verdict(found, precision, tolerance["output"], float("inf")):
        place = (
            "The outputs agree: post-processing inside is coarser; set postprocess=outside, or allow it: tol.metric="
        )
    else:
        place = parity.parting(graph, engine, draft, found.worst, precision)
    failed = move(draft, file.with_name(f"{file.stem}.failed{file.suffix}"))
    raise ValueError(f"{engine} is not the same model: {'; '.join(wrong)}. {place}. It is kept as {failed}")


def check(config: Mapping[str, Any]) -> None:
    """Refuse what cannot work, before anything is read.

    Raises:
        ValueError, FileNotFoundError: names the key, its value and what was expected.
    """
    if config["run"] is None:
        raise ValueError("run is not set; run=<run folder>, the one that a training command printed")
    if not isinstance(config["tol"], dict):
        raise ValueError(f"tol is {config['tol']!r}; expected tol.metric=<number> or tol.output=<number>")
    if type(config["trust"]) is not bool:
        raise ValueError(f"trust is {config['trust']!r}; expected true or false")
    writing = [name for name in engine_names() if facts(name)["SUFFIX"]]
    contract(config["engine"])
    if config["engine"] not in writing:
        raise ValueError(f"engine {config['engine']} writes no file; choose one of {', '.join(writing)}")
    check_precision(config["engine"], config["precision"])
    if config["size"] not in SIZES:
        raise ValueError(f"size is {config['size']!r}; expected {' or '.join(SIZES)}")
    for key, value in config["tol"].items():
        if not (value is None and key == "output") and (type(value) not in (int, float) or not value >= 0):
            raise ValueError(f"tol.{key} is {value!r}; expected a number, 0 or more")
    thread_count(config["threads"])
    for key in ("batch", "limit"):
        if config[key] is not None and (type(config[key]) is not int or config[key] < 1):
            raise ValueError(f"{key} is {config[key]!r}; expected a whole number above 0, or null")
    if config["size"] == "dynamic" and facts(config["engine"]).get("FIXED"):
        raise ValueError(f"engine {config['engine']} takes one size only; size=fixed")


def read(config: Mapping[str, Any]) -> Source:
    """The run's model, at the size that is asked for."""
    path = expanded(str(config["run"]))
    model = model_from_run(path, config["trust"]).eval()
    file = checkpoint.file_of(path)
    run_config = checkpoint.load(file)["config"]
    size = as_size("image_size", run_config["image_size"] if config["image_size"] is None else config["image_size"])
    model.image_size = (size[0], size[1])
    model.view = make(run_config["evaluation"])(model.image_size)
    return Source(file, run_config, model, model.image_size)


def target(config: Mapping[str, Any], source: Source) -> Path:
    """Where the artefact goes.

    Raises:
        ValueError: ``out`` has another ending than the engine's, or is a folder.
    """
    suffix = facts(config["engine"])["SUFFIX"]
    if config["out"] is not None:
        out = expanded(str(config["out"]))
        if out.suffix != suffix:
            raise ValueError(f"out is {out}; files of engine {config['engine']} end in {suffix}")
        if out.is_dir():
            raise ValueError(f"out={out} is a folder; expected a file's name")
        return out
    words = [config["engine"]]
    if list(source.image_size) != source.config["image_size"]:
        words.append(f"{source.image_size[0]}x{source.image_size[1]}")
    words += ["dynamic"] * (config["size"] == "dynamic")
    words += [f"batch{config['batch']}"] if config["batch"] else []
    words += ["inside"] * (config["postprocess"] == "inside")
    return source.checkpoint.parent / "export" / f"{'_'.join(words)}{suffix}"


def images(config: Mapping[str, Any], source: Source, batch: int | None) -> tuple[DataLoader, str]:
    """The run's validation images (its test images where it had none), and what to call them.

    Raises:
        ValueError: the data set's reader is not of this suite and the run is not trusted.
        FileNotFoundError: the data set is not where it was.
    """
    data_config = relocated(source.config["data"], config["data"]["root"], config["data"]["parts"])
    strange = foreign_targets(data_config)
    if strange and not config["trust"]:
        raise ValueError(f"the run would read its data by {', '.join(sorted(strange))}; if you know it, trust=true")
    try:
        data = read_data({"data": data_config})
    except FileNotFoundError as error:  # names the key as the training command has it
        raise FileNotFoundError(str(error).replace("; set data.parts.", "; set +data.parts.")) from None
    split = "val" if data.splits.get("val") else "test"
    samples = data.splits.get(split, [])[: config["limit"]]
    if not samples:
        raise ValueError(f"{data.name} has neither validation nor test images to compare on; correct data.root")
    view = Samples(
        samples, tuple(source.config["heads"]), source.model.view, 0, False, data_config.get("on_error") or "fail"
    )
    return evaluation_loader(view, batch or min(8, source.config["eval_batch_size"]), 0), f"{data.name} {split}"


def relocated(data: Mapping[str, Any], root: str | None, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run's data set, where it lies now.

    Args:
        data: as trained with.
        root: of the whole; None: as it was.
        parts: name -> ``{root: folder}``, of a set that is made of parts.
    Raises:
        ValueError: a root where the set has none.
    """
    of_parts = data.get("parts") or {}
    known = ", ".join(f"+data.parts.{name}.root=" for name in of_parts) or "data.root="
    if root is not None and of_parts:
        raise ValueError(f"data.root is {root}, but the run's data set is made of parts; set {known}")
    if not isinstance(parts, Mapping):
        raise ValueError(f"data.parts is {parts!r}; expected {known}")
    for name, part in parts.items():
        if name not in of_parts or not isinstance(part, Mapping) or list(part) != ["root"]:
            raise ValueError(f"data.parts.{name} is {part!r}, which the run's data set does not have; set {known}")
    whole = {**data, **({} if root is None else {"root": root})}
    if parts:
        whole["parts"] = {name: {**part, **parts.get(name, {})} for name, part in of_parts.items()}
    return whole


def move(file: Path, to: Path) -> Path:
    """Rename an artefact with what belongs to it (OpenVINO's ``.bin``), the file itself last; where it lies now."""
    for part in sorted(parts(file), key=lambda path: path == file):
        part.replace(to.with_suffix(part.suffix))
    return to


def parts(file: Path) -> list[Path]:
    """The files of an artefact."""
    of_engine = [facts(name) for name in engine_names() if facts(name)["SUFFIX"] == file.suffix]
    suffixes = {file.suffix, *(suffix for known in of_engine for suffix in known.get("BESIDE", ()))}
    return [path for path in file.parent.iterdir() if path.stem == file.stem and path.suffix in suffixes]


def show(console: Console, found: parity.Comparison, runner: Runner, split: str) -> None:
    """Outputs and scores, side by side."""
    console.print(f"compared    {runner.name} with torch on {found.images} images of {split}", soft_wrap=True)
    outputs, metrics = Table(), Table()
    outputs.add_column("output")
    outputs.add_column("largest difference")
    for name, difference in found.differences.items():
        outputs.add_row(name, str(difference))
    for column in ("score", "torch %", f"{runner.name} %"):
        metrics.add_column(column, justify="left" if column == "score" else "right")
    for name, value in found.metrics.items():
        if name.rpartition("/")[2] in SHOWN and not np.isnan(value):
            metrics.add_row(name, f"{100 * found.reference[name]:.2f}", f"{100 * value:.2f}")
    console.print(outputs)
    console.print(metrics)


def conclude(console: Console, file: Path, runner: Runner) -> None:
    """Where it lies, what it is, how to run it."""
    size = sum(part.stat().st_size for part in parts(file))
    height, width = runner.image_size
    trust = ", trust=True" if facts(runner.name).get("RUNS_CODE") or foreign_parts(runner.metadata) else ""
    sides = "any, any" if runner.metadata["dynamic_size"] else f"{height}, {width}"
    console.print(
        f"artefact    {file}  {size / 1e6:.1f} MB\n"
        f"            {runner.name} {runner.version}, {runner.precision}, {runner.threads} threads; uint8 "
        f"[{runner.metadata['batch'] or 'any'}, 3, {sides}] in, post-processing {runner.metadata['postprocess']}\n"
        "run it\n"
        "  from tasks import predictor\n"
        f'  print(predictor("{file}"{trust}).predict("photo.jpg"))',
        soft_wrap=True,
    )
