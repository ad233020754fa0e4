"""Where the time of one prediction goes: decode, resize, network, post-process."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.data.drawing import draw_scene
from tasks.data.images import decode
from tasks.deploy.session import Runner
from tasks.deploy.timing import Summary, measure_whole, summarise

STAGES = ("decode", "resize", "network", "post-process")
PHOTO = (480, 640)
"""Height, width of the drawn photo, px."""


def photo(folder: Path, given: str | None) -> Path:
    """The picture that is decoded: the one that is given, or one drawn and saved as JPEG.

    Args:
        folder: where a drawn one goes.
        given: a path.
    Raises:
        ValueError, FileNotFoundError: it cannot be read.
    """
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"photo={given} is not a file")
        decode(given)
        return Path(given)
    file = folder / "scene.jpg"
    scene = Image.fromarray(draw_scene(0, 0, 0, max(PHOTO)).image)
    scene.crop((0, 0, PHOTO[1], PHOTO[0])).save(file, quality=90)
    return file


def split(runner: Runner, file: Path, batch: int, rounds: int) -> dict[str, Summary]:
    """Milliseconds a batch of each stage, all of one pass, and of all together.

    Args:
        runner: the model in its engine.
        file: is decoded ``batch`` times a pass, from the system's file cache.
        batch: images.
        rounds: passes.
    """
    rows: list[list[float]] = []
    run = pipeline(runner, file, batch)

    def turn() -> float:
        rows.append(run())
        return sum(rows[-1])

    timings = measure_whole({"whole": turn}, rounds, window=2, warmup=6)
    counted = np.array(rows[timings.warmup :][: len(timings.ms)])
    return {name: summarise(counted[:, i]) for i, name in enumerate(STAGES)} | {"whole": summarise(counted.sum(1))}


def pipeline(runner: Runner, file: Path, batch: int) -> Callable[[], list[float]]:
    """A pass from file to prediction that says what each of ``STAGES`` took, milliseconds."""

    def run() -> list[float]:
        clock = [time.perf_counter()]
        images = [decode(str(file)) for _ in range(batch)]
        clock.append(time.perf_counter())
        seen = np.stack([runner.fit(image) for image in images])
        clock.append(time.perf_counter())
        raw = runner.run(seen)
        clock.append(time.perf_counter())
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        runner.finish(raw, runner.image_size, sizes)
        clock.append(time.perf_counter())
        return [1000 * (end - start) for start, end in pairwise(clock)]

    return run
