"""The suite's own speed against torchvision's: each side in a process of its own, the two stepping in turn.

Own processes keep one side's memory settings, threads and caches from the other; only one works at a time. This file is
free of torch; what the processes do is in ``peer_training``, ``peer_images`` and ``peer_scoring``.
"""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tasks.benchmark import Options
from tasks.deploy import available, facts, machine, peer_profile, timing
from tasks.deploy.cases import check_threads, cores, engines_of
from tasks.deploy.peer_profile import Profile
from tasks.deploy.peer_worker import Check
from tasks.deploy.progress import Progress, show
from tasks.words import suggest


class Row(NamedTuple):
    """One line of the table."""

    title: str
    module: str
    """Of ``tasks.deploy``, where both sides' work is."""
    peer: str
    target: float
    """How many times as fast as the peer it is to be."""
    rounds: int
    tolerance: float
    """Largest difference of what both sides give; relative where that is above 1."""
    window: int = 3
    """Rounds whose medians end the warm-up; 0: no warm-up, for what takes a minute."""
    prime: bool = True


STEP, IMAGE = "peer_training", "peer_images"
TOP = 50
"""Detections of the peer's that are looked for among ours."""
BF16_TOLERANCE = 0.1
"""As ``Row.tolerance``, for an engine that calculates in bfloat16, of three digits."""
ROWS = {
    "step_large": Row("training step, V3-Large 224, batch 32", STEP, "torchvision, contiguous, SGD", 2.2, 15, 1e-5, 2,
                      False),
    "step_small": Row("training step, V3-Small 224, batch 32", STEP, "torchvision, contiguous, SGD", 2.2, 20, 1e-5, 2,
                      False),
    "step_large_whole": Row("the same, Large, as tasks.classify trains by default: AdamW, clipping, moving average",
                            STEP, "torchvision, contiguous, SGD", 2.2, 10, 1e-5, 2, False),
    "step_ssdlite": Row("training step, SSDLite 320, batch 16, matching and loss", STEP,
                        "torchvision ssdlite320, channels last, SGD", 1.5, 15, 1e-5, 2, False),
    "step_ssdlite_real": Row("the same on photos and boxes of BCCD (bccd=; else drawn scenes)", STEP,
                             "torchvision ssdlite320, channels last, SGD", 1.5, 10, 1e-5, 2, False),
    "post_peaked": Row("post-processing, 91 classes x 3,234 boxes, batch 8, peaked scores", IMAGE,
                       "torchvision SSD.postprocess_detections", 10, 30, 0),
    "post_dense": Row("post-processing, the same, dense scores", IMAGE, "torchvision SSD.postprocess_detections", 10,
                      20, 0),
    "image_detect": Row("one image, detections out (320, decoded image in, peaked scores), ten in a row", IMAGE,
                        "torchvision ssdlite320, eager", 10, 30, 1e-3),
    "image_classify": Row("one image, class out (224 of 256), ten in a row", IMAGE, "torchvision V3-Large, eager", 4,
                          50, 1e-3),
    "image_mask": Row("one image, mask out (512), ten in a row", IMAGE, "torchvision LR-ASPP, eager", 5, 30, 1e-2),
    "predict": Row("predict's loop, V3-Small 224: batching, network, post-processing (decoding is other threads')",
                   IMAGE, "the bare engine call", 1 / 1.15, 50, float("inf")),
    "predict_files": Row("the same from JPEG files of 640 x 480, decoding and resizing ahead of the network included",
                         IMAGE, "the bare engine call", 1 / 1.15, 30, float("inf")),
    "coco": Row("COCO scoring, 100 detections an image, loading included", "peer_scoring", "pycocotools", 10, 3, 1e-9,
                0, False),
    "coco_faster": Row("COCO scoring, the same", "peer_scoring", "faster-coco-eval", 1, 3, 1e-9, 0, False),
    "input_bccd": Row("training step fed by our loader, BCCD (bccd=; else drawn scenes), augmented", STEP,
                      "our step on one batch in memory", 0.9, 8, float("inf"), 1, False),
    "input_camvid": Row("training step fed by our loader, CamVid (camvid=; else drawn scenes), augmented", STEP,
                        "our step on one batch in memory", 0.9, 8, float("inf"), 1, False),
}  # fmt: skip
USUAL = [name for name in ROWS if name not in ("coco_faster", "predict_files")]
"""The rows measured unless others are asked for."""


class Side:
    """A process that does one side's work, a turn whenever it is told to.

    Args:
        row: a key of ``ROWS``.
        side: ``ours`` or ``theirs``.
        asked: what the work needs to know, plain data.
        threads: torch's, OpenMP's and the engine's.
    Raises:
        ValueError: the process says what is missing, or ends.
    """

    def __init__(self, row: str, side: str, asked: dict[str, Any], threads: int) -> None:
        words = {"row": row, "side": side, "module": ROWS[row].module, "threads": threads, **asked}
        words["prime"] = ROWS[row].prime
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment |= {"KINETO_LOG_LEVEL": "6"}  # the profiler looks for GPUs, and says so at length
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        self.name = f"{side} of {row}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tasks.deploy.peer_worker", json.dumps(words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.check: Check = ""
        self.items = 1.0
        self.detail = ""

    def start(self) -> None:
        """Wait until it is ready; two that start at once would only disturb each other."""
        ready = self.answer()
        self.check, self.items, self.detail = ready["check"], ready["items"], ready["detail"]

    def turn(self) -> float:
        """Milliseconds of one turn."""
        answer = self.ask("go")
        self.check = answer.get("check", self.check)
        return float(answer["ms"])

    def profile(self) -> Profile:
        """Where a turn's time goes."""
        found: Profile = self.ask("profile")["profile"]
        return found

    def ask(self, word: str) -> dict[str, Any]:
        """What it says to a word."""
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended: its answer says so
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"the process for {self.name} ended ({self.process.wait()}); its message stands above")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ValueError(found["error"])
        return found

    def stop(self) -> None:
        """End it; it is told by its closed input, and by a signal if it does not listen."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Outcome(NamedTuple):
    """A row with what was measured."""

    name: str
    times: timing.Timings
    """Columns: ours, theirs; milliseconds a turn."""
    items: tuple[float, float]
    """Images a turn of each side."""
    apart: float | None
    """Largest difference between the sides' results; None where they have nothing to compare."""
    noise: list[str]
    detail: str
    profiles: list[Profile]
    """Of ours and theirs; empty where none was asked for."""
    precision: str = "f32"
    """Of ours, in an engine."""


def work(options: Options) -> int:
    """Measure the rows asked for, print the table as it grows complete. Returns the exit code."""
    if options.rows == ["?"]:
        print(listing())
        return 0
    rows = chosen(options.rows)
    engine = (engines_of(options.engine, []) if options.engine else available())[0]
    check_threads(options.threads or [])
    count = (options.threads or [cores()])[0]
    if options.precision != ["f32"]:
        from tasks.deploy.session import check_precision  # with torch

        check_precision(engine, options.precision[0])
    asked = {
        "engine": engine,
        "precision": options.precision[0],
        "batch": options.batch[0] if "batch" in options.given else None,
        "roots": {"bccd": options.bccd, "camvid": options.camvid},
        "images": options.images,
        "profile": options.profile,
    }
    progress, watch = Progress(len(rows)), machine.Watch()
    outcomes: list[Outcome] = []
    left_out: list[str] = []
    interrupted = False
    for name in rows:
        try:
            outcomes.append(measure_row(name, asked, count, options.rounds, progress))
        except ValueError as error:
            left_out.append(f"{name}: {error}")
        except KeyboardInterrupt:
            interrupted = True
            break
        finally:
            progress.clear()
        if outcomes and outcomes[-1].name == name:
            print(f"{name}: {speed_text(outcomes[-1])}", file=sys.stderr, flush=True)
            if outcomes[-1].times.interrupted:
                interrupted = True
                break
        progress.step()
    shown = [*table(outcomes), *(line for one in outcomes for line in profile_lines(one))]
    show([*shown, "", *notes(outcomes, left_out, count, engine, watch.load(), asked)], options.out)
    return 130 if interrupted else 1 if left_out or any(not agrees(one) for one in outcomes) else 0


def listing() -> str:
    """All rows, a line each."""
    return "\n".join(f"  {key:18s}{row.title} | {row.peer}" for key, row in ROWS.items())


def chosen(names: Sequence[str] | None) -> list[str]:
    """The rows asked for, ``*`` allowed.

    Raises:
        ValueError: one that does not exist.
    """
    if names is None:
        return USUAL
    found = []
    for name in names:
        fitting = fnmatch.filter(ROWS, name)
        if not fitting:
            raise ValueError(f"rows={name}: there is no such row{suggest(name, ROWS)}; there are\n{listing()}")
        found += fitting
    return list(dict.fromkeys(found))


def measure_row(name: str, asked: dict[str, Any], threads: int, rounds: int | None, progress: Progress) -> Outcome:
    """Start both sides, let them step in turn.

    Raises:
        ValueError: a side cannot run here.
    """
    row = ROWS[name]
    sides: list[Side] = []
    progress.say(f"{name}: starting both sides", force=True)
    try:
        for side in ("ours", "theirs"):
            sides.append(Side(name, side, asked, threads))
            sides[-1].start()
        watch = machine.Watch()
        count = rounds or row.rounds

        def on_round(done: int, total: int) -> None:
            progress.say(f"{name}: round {done} of {total}", part=done / total)

        times = timing.measure(
            {"ours": sides[0].turn, "theirs": sides[1].turn},
            count,
            least=min(count, 10),
            window=row.window,
            warmup=10 if row.window else 0,
            on_round=on_round,
        )
        if not len(times.ms):
            raise KeyboardInterrupt
        noise = machine.noise(watch.load(), times.ms[:, 0] / times.ms[:, 1])
        detail = "; ".join(dict.fromkeys(side.detail for side in sides if side.detail))
        same = difference(*(side.check for side in sides))
        profiled = asked["profile"] and row.window and not times.interrupted  # what takes a minute has no operators
        profiles = [side.profile() for side in sides] if profiled else []
        precision = asked["precision"] if row.module == IMAGE else "f32"
        return Outcome(name, times, (sides[0].items, sides[1].items), same, noise, detail, profiles, precision)
    finally:
        for one in sides:
            one.stop()


def difference(ours: Check, theirs: Check) -> float | None:
    """Between two results: numbers by their largest difference, digests by being equal or not, detections as below."""
    if not ours and not theirs:
        return None
    if not ours or not theirs:
        return float("inf")
    if isinstance(ours, str) or isinstance(theirs, str):
        return 0.0 if ours == theirs else float("inf")
    if isinstance(ours[0], list):
        return apart(ours, theirs)
    if len(ours) != len(theirs):
        return float("inf")
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))


def apart(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Between detections: by their number, and by each of their best beside ours of its class that overlaps it most.

    Returns:
        The largest of the numbers' relative difference, the largest difference of scores, and 1 - the mean overlap. The
        order of equal scores does not count, and little which of two overlapping boxes suppresses the other.
    """
    overlaps, scores = [], []
    for label, score, *box in theirs[:TOP]:
        found = max(((overlap(box, other), own) for kind, own, *other in ours if kind == label), default=(0.0, 0.0))
        overlaps.append(found[0])
        scores.append(abs(found[1] - score))
    return max(abs(len(ours) / len(theirs) - 1), *scores, 1 - sum(overlaps) / len(overlaps))


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes, xyxy."""
    sides = [min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    shared = max(0.0, sides[0]) * max(0.0, sides[1])
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / union if union else float(list(one) == list(other))


def agrees(one: Outcome) -> bool:
    """Whether both sides gave the same."""
    row = ROWS[one.name]
    tolerance = max(row.tolerance, BF16_TOLERANCE) if one.precision == "bf16" else row.tolerance
    return one.apart is None or one.apart <= tolerance


HEADER = ("row", "work", "ours", "peer", "theirs", "times as fast [95 %]", "quartiles", "to reach", "reached", "n",
          "same result", "")  # fmt: skip


def speed_of(one: Outcome) -> timing.Ratio:
    """How many times as fast ours is, by the rounds' ratios of time for an image."""
    ours, theirs = one.times.ms[:, 0] / one.items[0], one.times.ms[:, 1] / one.items[1]
    return timing.compare(theirs, ours)


def speed_text(one: Outcome) -> str:
    """``2.31x [2.25, 2.36]``."""
    speed = speed_of(one)
    spread = f" [{speed.low:.2f}, {speed.high:.2f}]" if speed.n >= 6 else " (no interval)"
    return f"{speed.median:.2f}x{spread}"


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Markdown."""
    lines = [f"| {' | '.join(HEADER)} |", "|" + " --- |" * len(HEADER)]
    for one in outcomes:
        row, speed = ROWS[one.name], speed_of(one)
        cells = [one.name, row.title, work_text(one, 0), row.peer, work_text(one, 1), speed_text(one)]
        cells += [f"{speed.q1:.2f} to {speed.q3:.2f}", f"{row.target:.2f}x", reached(speed, row), str(speed.n)]
        same = "-" if one.apart is None else f"{'yes' if agrees(one) else 'NO'} ({one.apart:.1e})"
        lines.append(f"| {' | '.join([*cells, same, 'noisy' if one.noise else ''])} |")
    return lines


def profile_lines(one: Outcome) -> list[str]:
    """What ``profile=true`` adds for a row."""
    turns = [timing.summarise(one.times.ms[:, side]).median for side in (0, 1)]
    return peer_profile.lines(one.name, one.profiles, turns, one.items[0]) if one.profiles else []


def work_text(one: Outcome, side: int) -> str:
    """Median of a turn, and the rate where a turn is more than one image."""
    ms = timing.summarise(one.times.ms[:, side]).median
    text = f"{ms / 1000:.2f} s" if ms >= 10_000 else f"{ms:.2f} ms"
    return f"{text} ({1000 * one.items[side] / ms:.1f} img/s)" if one.items[side] > 1 else text


def reached(speed: timing.Ratio, row: Row) -> str:
    """Whether the target lies below the interval, in it, or above."""
    if speed.n < 6:
        return "yes" if speed.median >= row.target else "no"
    if speed.low >= row.target:
        return "yes"
    return "within the spread" if speed.high >= row.target else "no"


def notes(
    outcomes: Sequence[Outcome],
    left_out: Sequence[str],
    threads: int,
    engine: str,
    load: machine.Load,
    asked: dict[str, Any],
) -> list[str]:
    """The conditions."""
    packages = ["pycocotools", "faster-coco-eval", *facts(engine)["PACKAGES"]]
    lines = [
        *machine.in_words([threads], packages),
        load.in_words(),
        "how       each side in its own process, in turn, order drawn each round; ours keeps freed memory (mallopt), "
        "theirs has the system's default; times as fast: median of the rounds' ratios",
        f"engine    {engine}, {asked['precision']} (rows image_* and predict)",
    ]
    if asked["batch"]:
        lines.append(f"trial     batch={asked['batch']} instead of the rows' own: not the table's numbers")
    for one in outcomes:
        lines += [f"{one.name}: {one.detail}"] if one.detail else []
        lines += [f"{one.name}: noisy, {'; '.join(one.noise)}"] if one.noise else []
        lines += [f"{one.name}: warm-up ended by its limit, not by its rule"] if not one.times.steady else []
    return lines + [f"left out  {line}" for line in left_out]
