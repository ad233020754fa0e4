"""A trained model in the fastest engine that gives the same answers, and the stream of images through it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from heads import Size
from tasks.data.arguments import expanded
from tasks.data.drawing import draw_scene
from tasks.deploy import artefact, available, facts
from tasks.deploy.choice import choose
from tasks.deploy.frames import Frame
from tasks.deploy.session import Runner, leave_cores_to_the_engine, open_file, open_model, thread_count
from tasks.reporting.overlay import Picture, picture
from tasks.training import checkpoint
from tasks.training.build import model_from_run
from tasks.training.model import as_pixels

AUTO = "auto"
CHECKPOINTS = (".pt", ".pth", ".ckpt")
STAGES = ("decode", "resize", "network", "post-process", "write")
DECODED_PIXELS = 50_000_000
"""Of all images that are being decoded: photos of 12 megapixels four at a time, one of 40 alone."""
BATCH_PIXELS = 30_000_000
"""A batch is closed once its originals have so many pixels together: results are of the originals' size."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Predictor:
    """A model in an engine: an image in, predictions out.

    Resizing and post-processing are torch's whatever the engine: in this process torch has one thread from now on, see
    ``leave_cores_to_the_engine``.

    Args:
        runner: the engine with the model in it.
        notes: why it is this engine, one line each.
    """

    def __init__(self, runner: Runner, notes: Sequence[str] = ()) -> None:
        self.runner, self.notes = runner, list(notes)
        leave_cores_to_the_engine()
        self.fixed: int | None = runner.metadata["batch"]
        """Images that the engine takes at once; None: any number."""

    @property
    def classes(self) -> Mapping[str, tuple[str, ...]]:
        """Task -> class names."""
        return self.runner.classes

    def fit(self, image: np.ndarray) -> np.ndarray:
        """An image [H, W, 3] uint8 RGB as the network takes it: [3, *image_size] uint8."""
        return self.runner.fit(image)

    def predict(self, image: str | Path | Image.Image | np.ndarray | Tensor) -> dict[str, Any]:
        """What the network sees on one image, in that image's own pixels; the same as ``Model.predict`` gives.

        Args:
            image: a path, an image of Pillow's, or uint8 RGB: an array [H, W, 3] or a tensor [3, H, W].
        Returns:
            task -> prediction (see ``heads.Head``) without the batch dimension.
        """
        pixels = as_pixels(image)
        size = (pixels.shape[1], pixels.shape[2])
        found, _ = self.run([self.fit(pixels.movedim(0, -1).numpy())], [size])
        return {task: predictions[0] for task, predictions in found.items()}

    def run(self, fitted: Sequence[np.ndarray], sizes: list[Size]) -> tuple[dict[str, Any], float]:
        """A batch through the network.

        Args:
            fitted: see ``fit``; no more than ``fixed``.
            sizes: height and width of each original, px.
        Returns:
            task -> its head's predictions, in the originals' pixels; and the seconds that the engine took.
        """
        missing = (self.fixed or 0) - len(fitted)
        if missing > 0:  # the engine's number is made up with an image that is forgotten again
            fitted, sizes = [*fitted, *[fitted[-1]] * missing], [*sizes, *[(1, 1)] * missing]
        batch = np.stack(fitted) if len(fitted) > 1 else fitted[0][None]
        began = time.perf_counter()
        outputs = self.runner.run(batch)
        seconds = time.perf_counter() - began
        return self.runner.finish(outputs, (batch.shape[2], batch.shape[3]), sizes), seconds


@dataclass(slots=True)
class Seen:
    """An image on its way: first decoded, later predicted."""

    frame: Frame
    size: Size = (0, 0)
    image: np.ndarray | None = None
    """[3, H, W] uint8 at the network's size."""
    shown: Picture | None = None
    """To draw on."""
    drawing: Image.Image | None = None
    """A frame of the video that is written."""
    predictions: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Why there is nothing of it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> its share of the time."""


def open_predictor(
    run: str | Path,
    engine: str = AUTO,
    threads: int | None = None,
    precision: str = "f32",
    images: Sequence[np.ndarray] | None = None,
    count: int | None = None,
    trust: bool = False,
) -> Predictor:
    """A trained run, ready to predict.

    Args:
        run: a run folder, a checkpoint in one, or a file that ``python -m tasks.export`` wrote.
        engine: by name, or ``auto``: see ``choose``. A written file brings its own.
        threads: of the engine; None: as many as there are cores.
        precision: ``f32``, or ``bf16`` where engine and CPU have it.
        images: [H, W, 3] uint8 each, for ``auto``'s check; None: a drawn scene.
        count: how many images are to come; None: many.
        trust: load what may run code: a checkpoint that names foreign parts, a file of torch_export.
    Raises:
        FileNotFoundError: no such run.
        ValueError: an engine that is unknown or not installed, a damaged file, or one that is not trusted.
    """
    thread_count(threads)
    if not isinstance(engine, str):
        raise ValueError(f"engine is {engine!r}; expected {AUTO}, or an engine's name")
    path = expanded(run)
    if path.is_file() and path.suffix not in CHECKPOINTS:
        runner = open_file(path, threads, precision, trust)
        if engine not in (AUTO, runner.name):
            raise ValueError(f"{path} is for the engine {runner.name}, not {engine}; leave engine= out")
        return Predictor(runner, ["the file is for this engine"])
    model = model_from_run(path, trust).eval()
    if engine != AUTO:
        return Predictor(open_model(model, engine, threads, precision), [f"engine={engine} was asked for"])
    scene = [draw_scene(0, 0, 0, max(model.image_size)).image] if images is None else images
    batch = np.stack([model.fit(as_pixels(image)).numpy() for image in scene])
    exported = exported_from(checkpoint.file_of(path), threads, precision)
    return Predictor(*choose(model, batch, threads, precision, count, exported))


def exported_from(weights: Path, threads: int | None, precision: str) -> dict[str, Runner]:
    """What ``tasks.export`` has written of a checkpoint in its usual form, by engine; not what may run code."""
    found = {}
    for name in available():
        known = facts(name)
        file = weights.parent / "export" / f"{name}{known['SUFFIX']}"
        if known["SUFFIX"] and not known.get("RUNS_CODE") and file.is_file():
            with suppress(ValueError, OSError, RuntimeError):  # damaged, or not for this precision: as if it were none
                runner = open_file(file, threads, precision)
                if (runner.metadata["checkpoint"] or {}).get("sha256") == artefact.sha256(weights):
                    found[name] = runner
    return found


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, waiting: int
) -> Generator[Result, None, None]:
    """Work done by threads while the results before it are being used; in order, never more than ``waiting`` at once.

    Closing the generator (or leaving its loop by an error) drops what has not begun and waits for what has.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= waiting:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Room:
    """How many pixels may be decoded at once, by all threads together; one image alone may have more."""

    def __init__(self, pixels: int = DECODED_PIXELS) -> None:
        self.pixels, self.taken = pixels, 0
        self.changed = threading.Condition()

    @contextmanager
    def one(self) -> Iterator[Callable[[int], None]]:
        """For one image: what is yielded waits for its pixels' room, which is given back in the end."""
        own = 0

        def admit(pixels: int) -> None:
            nonlocal own
            with self.changed:
                self.changed.wait_for(lambda: not self.taken or self.taken + pixels <= self.pixels)
                own = pixels
                self.taken += pixels

        try:
            yield admit
        finally:
            with self.changed:
                self.taken -= own
                self.changed.notify_all()


def read(
    frame: Frame,
    fit: Callable[[np.ndarray], np.ndarray],
    draws: bool,
    forbidden: Collection[Path] = (),
    room: Room | None = None,
) -> Seen:
    """Decode and fit one image; a bad one comes back with its problem. The full image is not kept.

    Args:
        frame: what to read.
        fit: see ``Predictor.fit``.
        draws: keep a picture to draw on.
        forbidden: folders that results go to: nothing in them is input.
        room: shared with the other threads that read; None: there are none.
    """
    began = time.perf_counter()
    with (room or Room()).one() as admit:
        try:
            if frame.source is not None and lies_in(frame.source, forbidden):
                raise ValueError(f"{frame.source} lies in out=, it is a result; remove it from the list")
            pixels = frame.load(admit=admit)
        except (ValueError, OSError, MemoryError) as error:
            return Seen(frame, problem=str(error) or type(error).__name__)
        decoded = time.perf_counter()
        image = fit(pixels)
        fitted = time.perf_counter()
        shown = picture(pixels) if draws else None
        drawn = time.perf_counter() - fitted
    seconds = {"decode": decoded - began, "resize": fitted - decoded, "write": drawn}
    return Seen(frame, (pixels.shape[0], pixels.shape[1]), image, shown, seconds=seconds)


def lies_in(file: Path, folders: Collection[Path]) -> bool:
    """Whether a file is in one of them or below, whatever way its path takes; a link to a file is where it lies."""
    folder = file.parent.resolve()
    return not {folder, *folder.parents}.isdisjoint(folders)


def predicted(predictor: Predictor, items: Iterable[Seen], batch_size: int) -> Generator[Seen, None, None]:
    """Images through the network, some at a time; those with a problem pass by. In order."""
    waiting: list[Seen] = []
    good = pixels = 0
    most = min(batch_size, predictor.fixed or batch_size)
    for seen in items:
        waiting.append(seen)
        if seen.problem is None:
            good += 1
            pixels += seen.size[0] * seen.size[1]
        if good in (0, most) or pixels >= BATCH_PIXELS or len(waiting) >= 2 * most:
            yield from _through(predictor, waiting)
            waiting, good, pixels = [], 0, 0
    yield from _through(predictor, waiting)


def _through(predictor: Predictor, waiting: list[Seen]) -> list[Seen]:
    batch = [seen for seen in waiting if seen.problem is None]
    if not batch:
        return waiting
    began = time.perf_counter()
    images = [seen.image for seen in batch if seen.image is not None]
    found, network = predictor.run(images, [seen.size for seen in batch])
    rest = time.perf_counter() - began - network
    for i, seen in enumerate(batch):
        seen.predictions = {task: predictions[i] for task, predictions in found.items()}
        seen.image = None
        seen.seconds |= {"network": network / len(batch), "post-process": rest / len(batch)}
    return waiting
