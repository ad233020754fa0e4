"""What a benchmark runs: every combination that was asked for, checked before anything heavy is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf

from tasks.benchmark import Options
from tasks.cli import compose, describe
from tasks.data.arguments import expanded
from tasks.deploy import available, engine_names, facts, lacking
from tasks.words import suggest

NUM_CLASSES = {"classify": 1000, "detect": 90, "segment": 19}
"""Of untrained networks: ImageNet's, COCO's as the papers count them, Cityscapes'."""
SIZES = {"classify": (224, 224), "detect": (320, 320), "segment": (512, 512), "multitask": (320, 320)}
DATA = {"classify": "imagenet", "detect": "coco", "segment": "cityscapes", "multitask": "scenes"}
"""Whose recipe an untrained network is built under; no image of it is read."""

COST_SIZES = [(side, side) for side in (96, 128, 160, 192, 224, 256)]
COST_WIDTHS = [0.35, 0.5, 0.75, 1.0, 1.25]
"""Of ``cost``: the paper's Figure 1 and Table 9."""
ONE_ENGINE = ("cost", "check", "roofline")
"""What takes the fastest engine unless it is told another."""


class Network(NamedTuple):
    """A network of some size, trained or not."""

    task: str
    backbone: str
    """As named in tables: ``large width=0.75``."""
    head: str
    size: tuple[int, int]
    """Height, width of the input, px."""
    width: float
    overrides: tuple[str, ...]
    """What builds it: ``tasks.build(task, overrides)``."""
    run: str | None
    """The run folder of a trained one."""
    trust: bool = False
    """Load it even if it names parts that are not of this suite."""


class Case(NamedTuple):
    """A network under some conditions."""

    network: Network
    engine: str
    threads: int
    precision: str
    batch: int

    @property
    def engine_text(self) -> str:
        """As records name it."""
        return self.engine if self.precision == "f32" else f"{self.engine} {self.precision}"

    @property
    def label(self) -> str:
        """Everything that sets it apart."""
        network = self.network
        size = f"{network.size[0]}x{network.size[1]}"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        run = f" of {network.run}" if network.run else ""
        return f"{network.backbone} + {network.head} {size}{run}, {self.engine_text}, {threads}, batch {self.batch}"


class Plan(NamedTuple):
    """All cases, and what was left out of them, with the reason."""

    cases: list[Case]
    left_out: list[str]


def plan(options: Options) -> Plan:
    """Every combination of what was asked for.

    Raises:
        ValueError: an unknown name, a setting that fits nothing, an engine that is not installed.
        FileNotFoundError: a run folder that is not there.
    """
    for task in options.task:
        if task not in SIZES:
            raise ValueError(f"there is no task {task!r}{suggest(task, SIZES)}; there are {', '.join(SIZES)}")
    left_out: list[str] = []
    engines = (
        available()[:1]
        if options.engine is None and options.what in ONE_ENGINE
        else engines_of(options.engine, left_out)
    )
    networks = [of_run(run)._replace(trust=options.trust) for run in options.run] or untrained(options)
    found = []
    for threads, batch, network, engine, precision in product(
        options.threads or [cores()], options.batch, networks, engines, options.precision
    ):
        case = Case(network, engine, threads, precision, batch)
        known = facts(engine)["PRECISIONS"]
        if precision in known:
            found.append(case)
        elif options.engine and "all" not in options.engine:
            raise ValueError(f"engine {engine} has no precision {precision}; it has {', '.join(known)}")
        else:
            left_out.append(f"{engine} has no precision {precision}")
    check_threads(options.threads or [])
    if not found:
        raise ValueError(f"nothing is left to measure: {'; '.join(dict.fromkeys(left_out))}")
    return Plan(list(dict.fromkeys(found)), list(dict.fromkeys(left_out)))


def check_threads(counts: Sequence[int]) -> None:
    """Refuse more threads than cores.

    Raises:
        ValueError: says how many there are.
    """
    if counts and max(counts) > cores():
        raise ValueError(f"threads={max(counts)}, but this process may use {cores()} cores; ask for no more than that")


def engines_of(names: Sequence[str] | None, left_out: list[str]) -> list[str]:
    """The engines asked for; None or ``all``: all that are installed, and what is missing of the others.

    Raises:
        ValueError: one that does not exist or is not installed.
    """
    if names is None or "all" in names:
        for name in engine_names():
            if missing := lacking(name):
                extra = f"pip install -e '.[{facts(name)['EXTRA']}]'"
                left_out.append(f"engine {name}: {', '.join(missing)} is not installed ({extra})")
        return available()
    for name in names:
        extra = facts(name)["EXTRA"]  # raises for an unknown one
        if missing := lacking(name):
            raise ValueError(f'engine {name} needs {", ".join(missing)}: pip install -e ".[{extra}]"')
    return list(names)


def untrained(options: Options) -> list[Network]:
    """Networks from names, each composed as its command would compose it."""
    found = []
    sizes: Sequence[tuple[int, int] | None] = options.image_size or (COST_SIZES if options.what == "cost" else [None])
    heads: Sequence[str | None] = options.head or [None]
    for task, backbone, head, size in product(options.task, options.backbone, heads, sizes):
        for width in options.width or usual_widths(options.what, task, backbone):
            overrides = [f"backbone={backbone}"]
            overrides += [f"head={head}"] if head else []
            overrides += [f"backbone.width={width:g}"] if width is not None else []
            if task in SIZES:  # else compose says what there is
                side = size or SIZES[task]
                overrides += [f"data={DATA[task]}", f"image_size=[{side[0]},{side[1]}]"]
            found.append(network_of(task, [*overrides, *options.overrides]))
    return list(dict.fromkeys(found))


def usual_widths(what: str, task: str, backbone: str) -> Sequence[float | None]:
    """Those that ``cost`` goes through, where the backbone has any but its own."""
    return COST_WIDTHS if what == "cost" and "width" in compose(task, [f"backbone={backbone}"]).backbone else [None]


def network_of(task: str, overrides: Sequence[str]) -> Network:
    """An untrained network; the number of classes is the usual one of its task where nobody gives it.

    Raises:
        ValueError: an unknown task or a setting that fits nothing.
    """
    config = compose(task, overrides)
    missing = [
        f"heads.{name}.num_classes={NUM_CLASSES[name]}" for name in config.heads if counted(config, name) is None
    ]
    if task != "multitask":
        missing = [word.replace(f"heads.{task}.", "head.") for word in missing]
    words = (*overrides, *missing)
    return named(task, compose(task, words), words, None)


def counted(config: DictConfig, task: str) -> int | None:
    """The number of classes that a head is given."""
    return cast("int | None", config.heads[task].num_classes)


def named(task: str, config: DictConfig, overrides: Sequence[str], run: str | None) -> Network:
    """A network with its names and size as its config has them."""
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    size = plain["image_size"]
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    backbone = describe("backbone", plain["backbone"])
    head = "+".join(describe("head", one) for one in plain["heads"].values())
    scale = plain["backbone"].get("width")
    return Network(task, backbone, head, (height, width), 1.0 if scale is None else scale, tuple(overrides), run)


def of_run(folder: str) -> Network:
    """A trained network.

    Raises:
        FileNotFoundError: no such run, or one that is not finished.
    """
    record = record_of(folder)
    size = record["image_size"]
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    scale = record["config"]["backbone"].get("width")
    return Network(
        record["task"], record["backbone"], record["head"], (height, width), 1.0 if scale is None else scale, (), folder
    )


def record_of(folder: str) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        FileNotFoundError: it is not there.
    """
    file = expanded(folder) / "record.json"
    if not file.is_file():
        raise FileNotFoundError(f"run={folder} holds no record.json; give the folder of a finished training")
    return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
