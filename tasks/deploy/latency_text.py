"""What a latency sweep found, as a table with its conditions and as records."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

from tasks.cli import compose
from tasks.deploy import facts, fresh, machine, stages, timing
from tasks.deploy.cases import Case, record_of
from tasks.deploy.progress import typed
from tasks.deploy.session import Runner
from tasks.reporting.costs import Costs
from tasks.reporting.results import cpu_name, git_state, write_record
from tasks.training.build import plain

STAGE_ROUNDS = 20


@dataclass
class Opened:
    """A case, ready to run."""

    case: Case
    runner: Runner | None
    """None once it has been timed."""
    costs: Costs
    file_mb: float
    """What is shipped, decimal megabytes: the artefact's files; for an engine without them the weights."""
    artefact: Path | None


@dataclass
class Result:
    """What was measured of a case."""

    opened: Opened
    summary: timing.Summary
    ratio: timing.Ratio | None
    """To the first case of those it was timed with; None for that one itself."""
    load: machine.Load
    noise: list[str]
    steady: bool
    stages: dict[str, timing.Summary] = field(default_factory=dict)
    memory: fresh.Memory | str | None = None
    """A word on why it could not be measured; None: it was not asked for."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Of one kind of measurement, for the record's ``latency``."""


def weights_mb(model: nn.Module) -> float:
    """Decimal megabytes of parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values()) / 1e6


HEADER = (
    "task", "backbone", "head", "size", "engine", "threads", "batch", "params M", "MAdds M", "file MB", "peak MiB",
    "ms", "IQR", "p90", "p99", "outliers", "n", "x first", "decode", "resize", "network", "post", "whole ms", "",
)  # fmt: skip


def table(results: Sequence[Result]) -> list[str]:
    """Markdown: a row a case."""
    lines = [f"| {' | '.join(HEADER)} |", "|" + " --- |" * len(HEADER)]
    return lines + [f"| {' | '.join(cells(result))} |" for result in results]


def cells(result: Result) -> list[str]:
    """A row of the table."""
    one, summary = result.opened, result.summary
    case, network = one.case, one.case.network
    ratio = f"{result.ratio.median:.3f} {result.ratio.verdict}" if result.ratio else "1"
    parts = [f"{result.stages[name].median:.2f}" if result.stages else "-" for name in (*stages.STAGES, "whole")]
    named = network.backbone + (f" ({network.run})" if network.run else "")
    return [
        network.task, named, network.head, f"{network.size[0]}x{network.size[1]}", case.engine_text, str(case.threads),
        str(case.batch), f"{one.costs.params / 1e6:.2f}", f"{one.costs.madds / 1e6:.0f}", f"{one.file_mb:.1f}",
        f"{result.memory.peak:.0f} ({result.memory.before:.0f})" if isinstance(result.memory, fresh.Memory) else "-",
        f"{summary.median:.2f} [{summary.low:.2f}, {summary.high:.2f}]", f"{summary.iqr:.2f}", f"{summary.p90:.2f}",
        f"{summary.p99:.2f}", outliers_text(summary), str(summary.n), ratio, *parts, "noisy" if result.noise else "",
    ]  # fmt: skip


def outliers_text(summary: timing.Summary) -> str:
    """``2 (31.40)``: how many, and the one that lies farthest from the median."""
    farthest = max(summary.outliers, key=lambda ms: abs(ms - summary.median), default=None)
    return "0" if farthest is None else f"{len(summary.outliers)} ({farthest:.2f})"


def notes(results: Sequence[Result], load_beside: machine.Load, left_out: Sequence[str]) -> list[str]:
    """What must stand beside the table for it to mean something."""
    lines = [
        load_beside.in_words(),
        "ms        of a batch, network alone, median [95 % interval]; outliers: beyond 3 IQR from the quartiles, "
        "counted in, with the farthest; "
        "x first: median ratio to the first row of the same task, size, threads and batch, timed in the same rounds",
        f"stages    one pass from a JPEG to predictions, medians of {STAGE_ROUNDS}; "
        "an untrained detector finds far more than a trained one",
        "peak      of a fresh process that loads and runs it; in brackets before the model was loaded",
    ]  # fmt: skip
    for result in results:
        if result.noise:
            lines.append(f"noisy     {result.opened.case.label}: {'; '.join(result.noise)}")
        if isinstance(result.memory, str):
            lines.append(f"no peak   {result.opened.case.label}: {result.memory}")
        if not result.steady:
            lines.append(f"unsteady  {result.opened.case.label}: warm-up ended by its limit, not by its rule")
    return lines + [f"left out  {line}" for line in left_out]


LOST = "the record of "
"""In the note of what was measured and could not be written."""


def conclude(results: str | None, notes: Sequence[str]) -> int:
    """Say where the records are, unless the notes name one that was lost; the exit code."""
    if any(LOST in line for line in notes):
        return 1
    if results:
        print(f"records in {Path(results).resolve()}", file=sys.stderr)
    return 0


def keep(result: Result, results: str | None, left_out: list[str]) -> None:
    """Append the record of a measurement to ``results``; where that fails the table is shown all the same, with why."""
    if results is None:
        return
    try:
        write_record(results, record(result))
    except OSError as error:
        label = result.opened.case.label
        left_out.append(f"{LOST}{label}: {results} cannot be written ({error})")


def record(result: Result) -> dict[str, Any]:
    """A measurement as a record without metrics: ``tasks.compare`` gives it to the trained runs of the same network.

    A trained network's record keeps what its run says of itself.
    """
    one = result.opened
    case, network = one.case, one.case.network
    commit, dirty = git_state()
    run = {} if network.run is None else record_of(network.run)
    found = machine.describe(case.threads, facts(case.engine)["PACKAGES"])
    return {
        "task": network.task,
        "backbone": network.backbone,
        "head": network.head,
        "data": run.get("data", "none"),
        "split": run.get("split", "none"),
        "image_size": list(network.size),
        "seed": run.get("seed", 0),
        "budget": run.get("budget", "0"),
        "weights": run.get("weights"),
        "metrics": {},
        "params": one.costs.params,
        "madds": one.costs.madds,
        "latency": latency_of(result),
        "batch_size": case.batch,
        "train_seconds": 0.0,
        "commit": commit,
        "dirty": dirty,
        "config": run.get("config") or plain(compose(network.task, network.overrides)),
        "overrides": run.get("overrides", list(network.overrides)),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": typed(),
        "note": "latency",
        **({"run": network.run} if network.run else {}),
        **found,
    }


def latency_of(result: Result) -> Mapping[str, Any]:
    """A record's ``latency``."""
    one, summary = result.opened, result.summary
    return {
        "median_ms": round(summary.median, 4),
        "interval_ms": [round(summary.low, 4), round(summary.high, 4)],
        "iqr_ms": round(summary.iqr, 4),
        "p90_ms": round(summary.p90, 4),
        "p99_ms": round(summary.p99, 4),
        "outliers": len(summary.outliers),
        "outliers_ms": [round(ms, 4) for ms in summary.outliers],
        "n": summary.n,
        "engine": one.case.engine_text,
        "device": cpu_name(),
        "threads": one.case.threads,
        "batch_size": one.case.batch,
        "noisy": bool(result.noise),
        "noise": result.noise,
        "governor": machine.governor(),
        "load_average": result.load.average,
        "others_cores": result.load.others_cores,
        "file_mb": round(one.file_mb, 3),
        "peak_memory_mib": round(result.memory.peak, 1) if isinstance(result.memory, fresh.Memory) else None,
        "stages_ms": {name: round(stage.median, 4) for name, stage in result.stages.items()},
        **result.more,
    }
