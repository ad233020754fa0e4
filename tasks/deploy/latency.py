"""The latency sweep: what is compared with each other runs side by side; every case becomes a line and a record."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tasks import build, load
from tasks.benchmark import Options
from tasks.deploy import artefact, contract, facts, fresh, machine, stages, timing
from tasks.deploy.cases import Case, Network, Plan
from tasks.deploy.graph import Form, Graph
from tasks.deploy.latency_text import STAGE_ROUNDS, Opened, Result, conclude, keep, notes, table, weights_mb
from tasks.deploy.progress import Progress, show
from tasks.deploy.session import Runner, check_precision, leave_cores_to_the_engine, open_model
from tasks.reporting.costs import count
from tasks.training.model import Model

ROUNDS = 100
TOGETHER = 16
"""Cases timed side by side at most: so many models fit into memory. Of more, all are timed beside the first."""


@dataclass
class Store:
    """Models and artefacts that several cases share: an export takes seconds, whatever the threads."""

    folder: Path
    models: dict[Network, Model] = field(default_factory=dict)
    files: dict[tuple[Network, str, int], Path] = field(default_factory=dict)

    def model(self, network: Network) -> Model:
        """Built or loaded once."""
        if network not in self.models:
            self.models[network] = (
                load(network.run, network.trust) if network.run else build(network.task, network.overrides)
            )
        return self.models[network]

    def file(self, case: Case) -> Path:
        """The artefact of a case, alone in its folder; written once for all threads and precisions.

        Raises:
            ValueError, RuntimeError: the engine cannot export it.
        """
        key = (case.network, case.engine, case.batch)
        if key not in self.files:
            engine, model = contract(case.engine), self.model(case.network)
            file = Path(tempfile.mkdtemp(dir=self.folder)) / f"model{engine.SUFFIX}"
            graph = Graph(model, Form(model.image_size, case.batch))
            engine.export(graph, file, artefact.describe(graph, case.engine, None, None))
            self.files[key] = file
        return self.files[key]


def work(options: Options, planned: Plan) -> int:
    """Measure, print, record. Returns the exit code: 130 when Ctrl-C ended it; what was measured stays."""
    results: list[Result] = []
    left_out = list(planned.left_out)
    whole = machine.Watch()
    interrupted = sweep(options, planned.cases, results, left_out)
    if results:
        threads = sorted({result.opened.case.threads for result in results})
        packages = {name for result in results for name in facts(result.opened.case.engine)["PACKAGES"]}
        lines = [*machine.in_words(threads, sorted(packages)), *notes(results, whole.load(), left_out)]
        show([*table(results), "", *lines], options.out)
        code = conclude(options.results, left_out)
    else:
        print("\n".join(f"left out: {line}" for line in left_out), file=sys.stderr)
        code = 1
    return 130 if interrupted else code


def sweep(options: Options, cases: Sequence[Case], results: list[Result], left_out: list[str]) -> bool:
    """Time all cases, group by group; appends to ``results``. Returns whether Ctrl-C ended it."""
    progress = Progress(len(cases))
    with tempfile.TemporaryDirectory(prefix="mobilenetv3_bench_") as folder:
        store, photo = Store(Path(folder)), stages.photo(Path(folder), options.photo)
        for group in grouped(cases):
            first: list[Opened] = []
            while group:
                part, group = group[: TOGETHER - len(first)], group[TOGETHER - len(first) :]
                try:
                    opened = [*first, *open_group(part, store, progress, left_out)]
                    stop = time_group(opened, options, photo, progress, results, left_out)
                except KeyboardInterrupt:
                    stop = True
                progress.clear()
                if stop:
                    return True
                first = opened[:1]
                for one in opened if not group else opened[1:]:
                    one.runner = None  # results are kept to the end, sessions are not
                store.models.clear()  # files stay: another number of threads needs them again
                progress.step(len(part))
    return False


def grouped(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that are timed side by side: one task, size, number of threads and batch."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.threads, case.network.task, case.network.size, case.batch), []).append(case)
    return list(groups.values())


def open_group(group: Sequence[Case], store: Store, progress: Progress, left_out: list[str]) -> list[Opened]:
    """Load the cases; one that its engine cannot load is left out, with the reason."""
    opened = []
    for case in group:
        progress.say(f"opening {case.label}", force=True)
        try:
            opened.append(open_case(case, store))
        except (ValueError, RuntimeError) as error:  # an engine's own failures are RuntimeErrors
            left_out.append(f"{case.label}: {' '.join(str(error).split())[:200]}")
    return opened


def open_case(case: Case, store: Store) -> Opened:
    """A case in its engine.

    Raises:
        ValueError, RuntimeError: the engine cannot.
    """
    check_precision(case.engine, case.precision)
    model = store.model(case.network)
    costs = count(model, model.image_size)
    if facts(case.engine)["SUFFIX"] is None:
        runner = open_model(model, case.engine, case.threads, case.precision, case.batch)
        return Opened(case, runner, costs, weights_mb(model), None)
    file = store.file(case)
    session = contract(case.engine).load(file, case.threads, case.precision)
    heads = {task: model.head(task) for task in model.heads}
    runner = Runner(session, case.engine, case.threads, case.precision, heads, model.view)
    size = sum(path.stat().st_size for path in file.parent.rglob("*") if path.is_file())
    return Opened(case, runner, costs, size / 1e6, file)


def time_group(
    opened: Sequence[Opened],
    options: Options,
    photo: Path,
    progress: Progress,
    results: list[Result],
    left_out: list[str],
) -> bool:
    """Time a group side by side, then each one's stages and memory; appends to the lists and writes records.

    Returns:
        Whether Ctrl-C ended it; what was timed until then is in ``results``.
    """
    if not opened:
        return False
    turns = {str(i): timing.timed(call_of(one)) for i, one in enumerate(opened)}
    watch = machine.Watch()

    def on_round(done: int, rounds: int) -> None:
        progress.say(f"{len(turns)} side by side, round {done} of {rounds}", part=0.5 * len(turns) * done / rounds)

    times = timing.measure(turns, options.rounds or ROUNDS, options.seconds, on_round=on_round)
    load_beside = watch.load()
    stop = times.interrupted
    if stop and len(times.ms) < 6:  # too few to say anything
        return True
    known = {result.opened.case for result in results}  # the first of a large group is timed with each part of it
    for i, one in enumerate(opened):
        if one.case in known:
            continue
        ratio = timing.compare(times.ms[:, i], times.ms[:, 0]) if i else None
        noise = machine.noise(load_beside, times.ms[:, i])
        result = Result(one, timing.summarise(times.ms[:, i]), ratio, load_beside, noise, times.steady)
        if not stop:
            try:
                progress.say(f"stages and memory of {one.case.label}", part=0.5 * (len(turns) + i))
                complete(result, options, photo)
            except KeyboardInterrupt:
                stop = True
        results.append(result)
        keep(result, options.results, left_out)
    return stop


def call_of(one: Opened) -> Callable[[], object]:
    """One run of the engine on random pixels."""
    shape = (one.case.batch, 3, *one.case.network.size)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert one.runner
    return partial(one.runner.run, image)


def complete(result: Result, options: Options, photo: Path) -> None:
    """Add the stages and the peak memory."""
    one = result.opened
    assert one.runner
    rounds = min(STAGE_ROUNDS, options.rounds or ROUNDS)
    leave_cores_to_the_engine()
    result.stages = stages.split(one.runner, photo, one.case.batch, rounds)
    if options.memory:
        result.memory = fresh.peak_memory(one.case, one.artefact)
