"""Behind ``python -m tasks.predict``: images in, pictures and data out, and a word on what happened."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from tasks.data.arguments import expanded
from tasks.data.images import MAX_BYTES, decode
from tasks.deploy import engine
from tasks.deploy.frames import BEGIN, Frame, Frames, open_frames, video_library, video_suffix
from tasks.deploy.predictor import AUTO, STAGES, Predictor, Room, Seen, ahead, open_predictor, predicted, read
from tasks.deploy.session import cores
from tasks.deploy.writers import ENTRIES, SKIPPED, VIDEO, Output
from tasks.reporting.overlay import draw

SAMPLE = 4
"""Images at most by which an engine is chosen: they are held whole."""
OUT = "predictions"
NAMED = 20
"""Bad images that the closing screen names; the others are in the list beside the results."""
OF_THE_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ)
"""Errors in writing that are one image's own; others (a full disk) end the run."""
LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


def predict(composed: DictConfig) -> None:
    """Do what the config says.

    Raises:
        ValueError, OSError: whatever the user can mend; also where no image at all went well.
    """
    config: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    check(config)
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of files that decode all the same
    if config["images"] != "-":
        predict_all(config)
        return
    with tempfile.TemporaryDirectory(prefix="mobilenetv3_bench_") as folder:
        file = spool(Path(folder))
        if not file.suffix:
            predict_one(config, file)
            return
        try:
            predict_all({**config, "images": str(file)})
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), file.name)) from error


def predict_all(config: Mapping[str, Any]) -> None:
    """Everything that ``images`` names, into the folder ``out``.

    Raises:
        ValueError, OSError: see ``predict``.
    """
    out = expanded(config["out"] or OUT)
    frames = open_frames(config["images"], limit_of(config))
    check_out(out, frames, config["images"])
    items = iter(frames.items)
    first = list(itertools.islice(items, config["batch_size"]))
    predictor = open_predictor(
        config["run"],
        config["engine"],
        config["threads"],
        config["precision"],
        sample(first, config),
        frames.total,
        config["trust"],
    )
    if config["annotations"] and "detect" not in predictor.classes:
        raise ValueError(
            f"annotations={config['annotations']} is for detections; the run has no such head: leave it out"
        )
    console = Console(highlight=False, markup=False)
    introduce(console, predictor, frames, config)
    output = Output(out, predictor.classes, config["annotations"], frames.rate)
    if earlier := output.earlier():
        console.print(f"beside      {', '.join(earlier)} of an earlier run in {printable(str(out))}", soft_wrap=True)
    with output:
        tally = Tally(console, frames.total)
        try:
            work(predictor, itertools.chain(first, items), output, tally, config)
        except KeyboardInterrupt:
            tally.stop()
            console.print(f"stopped after {output.count} images; what was done is whole, in {out}", soft_wrap=True)
            raise
        finally:
            tally.stop()
    conclude(console, predictor, frames, output, tally)
    done = output.count + tally.bad
    if frames.rate is not None and frames.total is not None and done < frames.total - max(1, frames.total // 50):
        name = printable(Path(config["images"]).name)
        console.print(f"{name} ends after {done} of about {frames.total} frames: is it cut off?", soft_wrap=True)
    if not output.count and not tally.bad:
        raise ValueError(f"images={config['images']} has no picture in it; is the video cut off?")
    if not output.count:
        raise ValueError(f"none of the {tally.bad} images could be read; the first: {tally.problems[0]}")


def check(config: Mapping[str, Any]) -> None:
    """Refuse what would fail later.

    Raises:
        FileNotFoundError: ``run`` is not set.
        ValueError: names the key, its value and what was expected.
    """
    if not config["run"]:
        raise FileNotFoundError("run is not set; set run=<the run folder that a training command printed>")
    if config["engine"] != AUTO:
        engine(config["engine"])
    for key in ("batch_size", "limit", "threads", "workers"):
        value = config[key]
        if (value is not None or key in ("batch_size", "limit")) and not (type(value) is int and value > 0):
            raise ValueError(f"{key} is {value}; expected a whole number above 0")
    for key, least, most in (("score", 0.0, 1.0), ("max_megapixels", 1e-6, 1e5)):
        if type(config[key]) not in (int, float) or not least <= config[key] <= most:
            raise ValueError(f"{key} is {config[key]}; expected a number from {least:g} to {most:g}")
    if config["on_error"] not in ("skip", "fail"):
        raise ValueError(f"on_error is {config['on_error']!r}; expected skip or fail")
    for key in ("draw", "trust"):
        if type(config[key]) is not bool:
            raise ValueError(f"{key} is {config[key]!r}; expected true or false")


def check_out(out: Path, frames: Frames, images: str) -> None:
    """Refuse a folder whose pictures the next run would take for input.

    Raises:
        ValueError: see above; or there is a file of that name.
    """
    whole = out.resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; expected a folder, or a name for a new one")
    if whole / VIDEO == expanded(images).resolve():
        raise ValueError(f"images={images} is what would be written; choose another folder: out=")
    if frames.root is not None and whole.is_relative_to(frames.root.resolve()):
        raise ValueError(
            f"out={out} lies in images={images}, where it would be read as input; choose a folder elsewhere: out="
        )


def limit_of(config: Mapping[str, Any]) -> int:
    """The largest image that is decoded, in pixels."""
    return round(config["max_megapixels"] * 1e6)


def sample(frames: list[Frame], config: Mapping[str, Any]) -> list[np.ndarray] | None:
    """The first images that can be read, few, for the choice of the engine; None: not needed, or none."""
    found: list[np.ndarray] = []
    for frame in frames if config["engine"] == AUTO else []:
        if len(found) == SAMPLE:
            break
        with suppress(ValueError, OSError, MemoryError):
            found.append(frame.load())
    return found or None


def work(
    predictor: Predictor, frames: Iterable[Frame], output: Output, tally: Tally, config: Mapping[str, Any]
) -> None:
    """Decode ahead of the network, draw and write behind it, note each image in order."""
    workers = config["workers"] or max(1, min(4, cores() - 1))
    load = partial(read, fit=predictor.fit, draws=config["draw"], forbidden=output.pictures(), room=Room())
    keep = partial(save, output=output, threshold=float(config["score"]), limit=config["limit"])
    waiting = workers + config["batch_size"]
    with (
        closing(ahead(load, frames, workers, waiting)) as images,
        closing(predicted(predictor, images, config["batch_size"])) as results,
        closing(ahead(keep, results, workers, workers + 1)) as written,
    ):
        for seen in written:
            if seen.problem is None:
                output.add(seen.frame, seen.size, seen.predictions, seen.drawing)
            else:
                output.skip(printable(seen.problem))
            tally.add(seen)
            if seen.problem is not None and config["on_error"] == "fail":
                raise ValueError(f"{printable(seen.problem)} (or set on_error=skip)")


def save(seen: Seen, output: Output, threshold: float, limit: int) -> Seen:
    """Draw an image and write its own files."""
    if seen.problem is not None:
        return seen
    began = time.perf_counter()
    seen.predictions = {task: shortened(prediction, limit) for task, prediction in seen.predictions.items()}
    drawing = None if seen.shown is None else draw(seen.shown, seen.predictions, output.classes, threshold)
    seen.drawing = None if output.video is None else drawing  # a video's frames are encoded in order, later
    try:
        output.save(seen.frame, seen.predictions, drawing)
    except OSError as error:
        if error.errno not in OF_THE_NAME:
            raise
        seen.problem = f"{seen.frame.name}: its results cannot be written ({error.strerror}); rename it"
    seen.shown = None
    seen.seconds["write"] += time.perf_counter() - began
    return seen


def shortened(prediction: Any, limit: int) -> Any:
    """Of detections the best; they come by falling score."""
    return {key: value[:limit] for key, value in prediction.items()} if isinstance(prediction, dict) else prediction


def spool(folder: Path) -> Path:
    """What comes on stdin, in a file: ``stdin``, or ``stdin.mp4`` and the like where it begins as a video does.

    Raises:
        ValueError: an image of more than ``MAX_BYTES``, or a video and no library for it.
    """
    begin = sys.stdin.buffer.read(BEGIN)
    suffix = video_suffix(begin)
    if suffix:
        video_library("stdin")  # before an hour of it has come
    file = folder / f"stdin{suffix or ''}"
    with file.open("wb") as target:
        target.write(begin)
        if suffix:
            shutil.copyfileobj(sys.stdin.buffer, target)
        else:
            target.write(sys.stdin.buffer.read(MAX_BYTES + 1 - len(begin)))
    if suffix is None and file.stat().st_size > MAX_BYTES:
        raise ValueError(f"stdin gives over {MAX_BYTES >> 20} MiB; is it an image?")
    return file


def predict_one(config: Mapping[str, Any], file: Path) -> None:
    """One image that came on stdin; its predictions as JSON on stdout. Files are written only where ``out`` is set.

    Raises:
        ValueError: it is no image.
    """
    frame = Frame("stdin", "stdin", partial(decode, str(file), limit_of(config)))
    predictor = open_predictor(
        config["run"], config["engine"], config["threads"], config["precision"], None, 1, config["trust"]
    )
    seen = read(frame, predictor.fit, config["out"] is not None and config["draw"])
    if seen.problem is not None:
        raise ValueError(seen.problem.replace(str(file), "stdin"))
    (seen,) = predicted(predictor, [seen], 1)
    seen.predictions = {task: shortened(found, config["limit"]) for task, found in seen.predictions.items()}
    if config["out"] is not None:
        with Output(expanded(config["out"]), predictor.classes, config["annotations"]) as output:
            save(seen, output, float(config["score"]), config["limit"])
            output.add(seen.frame, seen.size, seen.predictions)
    entries = {task: ENTRIES[task](found, predictor.classes[task]) for task, found in seen.predictions.items()}
    print(json.dumps({"height": seen.size[0], "width": seen.size[1], **entries}))


def introduce(console: Console, predictor: Predictor, frames: Frames, config: Mapping[str, Any]) -> None:
    """Say what is about to be done."""
    runner = predictor.runner
    how_many = "images" if frames.total is None else f"{frames.total} image{'s' if frames.total > 1 else ''}"
    console.print(f"{', '.join(runner.classes)}  {printable(str(config['run']))} on {how_many}", soft_wrap=True)
    console.print(f"engine      {engine_line(predictor)}", soft_wrap=True)
    for note in predictor.notes:
        console.print(f"            {printable(note)}", soft_wrap=True)


def engine_line(predictor: Predictor) -> str:
    """``onnxruntime 1.32.0, 2 threads, f32``."""
    runner = predictor.runner
    threads = f"{runner.threads} thread{'s' if runner.threads > 1 else ''}"
    return f"{runner.name} {runner.version}, {threads}, {runner.precision}"


def conclude(console: Console, predictor: Predictor, frames: Frames, output: Output, tally: Tally) -> None:
    """The closing screen."""
    seconds = time.perf_counter() - tally.began
    console.print(
        f"{output.count} of {output.count + tally.bad} images in {timedelta(seconds=round(seconds))}, "
        f"{output.count / seconds:.1f} images/s, {engine_line(predictor)}",
        soft_wrap=True,
    )
    if output.count:
        table = Table("ms an image", *STAGES)
        table.add_row("", *(f"{1000 * tally.seconds[stage] / output.count:.1f}" for stage in STAGES))
        console.print(table)
        console.print("decode, resize and write run beside network and post-process", soft_wrap=True)
        console.print(f"results     {printable(str(output.out))}  ({output.contents()})", soft_wrap=True)
    if tally.bad:
        more = f"; all of them in {output.out / SKIPPED}" if tally.bad > len(tally.problems) else ""
        console.print(f"skipped {tally.bad}{more}")
        for problem in tally.problems:
            console.print(f"  {problem}", soft_wrap=True)
    if frames.left_alone:
        kinds = ", ".join(f"{count} {printable(kind)}" for kind, count in frames.left_alone.most_common(5))
        console.print(f"left alone {frames.left_alone.total()} files that are no images by their names ({kinds})")


class Tally:
    """Counts what comes out, and shows how far it is.

    Args:
        console: where to.
        total: images to come, or None.
    """

    def __init__(self, console: Console, total: int | None) -> None:
        self.console, self.total = console, total
        self.good = self.bad = 0
        self.problems: list[str] = []
        self.seconds: Counter[str] = Counter()
        self.began = self.said = time.perf_counter()
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                BarColumn(bar_width=24), TextColumn("{task.description}"), console=console, transient=True
            )
            self.task = self.bar.add_task("", total=total)
            self.bar.start()

    def add(self, seen: Seen) -> None:
        """One image is done."""
        if seen.problem is None:
            self.good += 1
            self.seconds.update(seen.seconds)
        else:
            self.bad += 1
            self.problems += [printable(seen.problem)] if len(self.problems) < NAMED else []
        if self.bar is not None:
            self.bar.update(self.task, completed=self.good + self.bad, description=self.text())
        elif time.perf_counter() - self.said > LINE_SECONDS:
            self.said = time.perf_counter()
            self.console.print(self.text())

    def text(self) -> str:
        """``120/1000  35.2 images/s  3 skipped  0:00:25 left``."""
        done, seconds = self.good + self.bad, time.perf_counter() - self.began
        parts = [f"{done}/{self.total}" if self.total else f"{done}", f"{done / seconds:.1f} images/s"]
        parts += [f"{self.bad} skipped"] if self.bad else []
        if self.total:
            left = seconds / done * max(0, self.total - done)
            parts.append(f"{timedelta(seconds=round(left))} left")
        return "  ".join(parts)

    def stop(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()


def printable(text: str) -> str:
    """Names as they can be shown: without line ends, terminal codes or bytes that are no text."""
    return "".join(c if c.isprintable() else "?" for c in text)
