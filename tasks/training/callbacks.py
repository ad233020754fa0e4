"""What happens beside the training steps: validation, checkpoints, Ctrl-C, the end of the budget, the progress bar."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.utils.data import DataLoader

from tasks.data.loader import Batch, Samples
from tasks.training import checkpoint
from tasks.training.evaluate import evaluate, headline, scores
from tasks.training.module import TaskModule


class Validate(L.Callback):
    """Scores the averaged weights at even shares of the run and keeps the best in ``best.pt``.

    Args:
        loader: of the validation split; None keeps the final weights as the best.
        times: how often in a run, the end included.
        folder: the run folder.
        description: goes into the checkpoint (config, classes).
    """

    def __init__(self, loader: DataLoader | None, times: int, folder: Path, description: Mapping[str, Any]) -> None:
        self.loader, self.times, self.folder, self.description = loader, times, folder, dict(description)
        self.done = 0
        self.best: float | None = None
        self.latest: dict[str, float] = {}
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: TaskModule, *_: Any) -> None:
        progress = module.progress
        if not at_step_end(trainer) or math.floor(progress * self.times + 1e-9) <= self.done:
            return
        self.done = math.floor(progress * self.times + 1e-9)
        if self.loader is not None:
            self.validate(trainer, module)
        elif progress >= 1:
            self.keep(module, None, {})

    def validate(self, trainer: L.Trainer, module: TaskModule) -> None:
        """Score the split now; log it; keep the weights if they are the best so far."""
        began = time.perf_counter()
        metrics = evaluate(module.scored, self.loader)  # type: ignore[arg-type]
        self.latest = scores(metrics)
        self.seconds += time.perf_counter() - began
        finite = {f"val/{name}": value for name, value in self.latest.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step=module.step)
        score = headline(metrics, self.latest)
        if self.best is None or score >= self.best:  # of equals the one that was trained longest
            self.keep(module, score, self.latest)

    def keep(self, module: TaskModule, score: float | None, values: Mapping[str, float]) -> None:
        """Write ``best.pt``."""
        self.best = score
        content = self.description | {"model": module.scored.state_dict(), "step": module.step, "metrics": dict(values)}
        checkpoint.save(self.folder / checkpoint.BEST, content)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "best": self.best, "latest": dict(self.latest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.best, self.latest = state["done"], state["best"], state["latest"]


class Keep(L.Callback):
    """Saves ``last.pt`` now and then, at the end and on Ctrl-C, and ends the run when its budget is used up.

    Every save is at the end of an optimizer step, and what follows depends on nothing but what is saved, so that when
    it happens changes nothing about the run.

    Args:
        folder: the run folder.
        every: seconds between saves.
        description: goes into the checkpoint (config, classes).
        validation: its state is saved along.
    """

    def __init__(self, folder: Path, every: float, description: Mapping[str, Any], validation: Validate) -> None:
        self.folder, self.every, self.description = folder, every, dict(description)
        self.validation = validation
        self.interrupted = False
        self.saved_at = time.perf_counter()
        self._before: Any = None

    def on_fit_start(self, trainer: L.Trainer, module: TaskModule) -> None:
        self.saved_at = time.perf_counter()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self.interrupted:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_batch_end(self, trainer: L.Trainer, module: TaskModule, *_: Any) -> None:
        if not at_step_end(trainer):
            return
        over = module.progress >= 1
        if over or self.interrupted or time.perf_counter() - self.saved_at >= self.every:
            self.save(trainer, module)
        if over or self.interrupted:
            trainer.should_stop = True

    def save(self, trainer: L.Trainer, module: TaskModule) -> None:
        """Write ``last.pt``.

        Raises:
            ValueError: a weight is no longer a number; the file before is kept.
        """
        if not all(bool(torch.isfinite(p).all()) for p in module.model.parameters()):
            raise ValueError(
                f"the weights are not finite at step {module.step}; the last good checkpoint is kept: try a lower "
                "optimizer.lr or trainer.clip_norm=1"
            )
        content = (
            self.description | module.snapshot(trainer.optimizers[0]) | {"validation": self.validation.state_dict()}
        )
        checkpoint.save(self.folder / checkpoint.LAST, content)
        self.saved_at = time.perf_counter()

    def teardown(self, trainer: L.Trainer, module: TaskModule, stage: str) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def on_exception(self, trainer: L.Trainer, module: TaskModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")


class Restore(L.Callback):
    """Hands the optimizer its saved state once Lightning has made it."""

    def __init__(self, optimizer: Mapping[str, Any]) -> None:
        self.optimizer = dict(optimizer)

    def on_train_start(self, trainer: L.Trainer, module: TaskModule) -> None:
        trainer.optimizers[0].load_state_dict(self.optimizer)


class Log(L.Callback):
    """Writes loss and learning rate to the loggers, by our own step, so that a resumed log goes on where it was.

    Args:
        samples: of the training split, told which of them a batch had to skip.
        times: how often in a run.
    """

    def __init__(self, samples: Samples, times: int = 200) -> None:
        self.samples, self.times = samples, times
        self.done = -1

    def on_train_batch_end(
        self, trainer: L.Trainer, module: TaskModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.samples.skipped |= dict.fromkeys(batch.skipped)
        share = math.floor(module.progress * self.times)
        if not at_step_end(trainer) or share <= self.done:
            return
        self.done = share
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        values["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        for logger in trainer.loggers:
            logger.log_metrics(values, step=module.step)


class Bar(L.Callback):
    """Loss, speed, main score and an honest time left: on a terminal a bar, elsewhere a line now and then.

    Args:
        console: where to draw.
        validation: whose scores to show.
        names: the scores worth showing.
        lines: how many lines a run prints where there is no terminal.
    """

    def __init__(self, console: Console, validation: Validate, names: list[str], lines: int = 20) -> None:
        self.console, self.validation, self.names, self.lines = console, validation, names, lines
        self.printed = -1
        self.bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, module: TaskModule) -> None:
        self.began = (time.perf_counter(), module.progress, module.step, self.validation.seconds)
        if self.console.is_terminal:
            self.bar = Progress(
                BarColumn(bar_width=16),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=1.0)

    def on_train_batch_end(self, trainer: L.Trainer, module: TaskModule, *_: Any) -> None:
        progress = module.progress
        line = math.floor(progress * self.lines)
        if self.bar is not None:
            self.bar.update(self.task, completed=progress, description=self.text(trainer, module, progress))
        elif line > self.printed:
            self.printed = line
            self.console.print(
                f"{progress:4.0%}  {self.text(trainer, module, progress)}", highlight=False, soft_wrap=True
            )

    def text(self, trainer: L.Trainer, module: TaskModule, progress: float) -> str:
        """``step 120  loss 2.31  26 img/s  map 0.31  2:10 left``."""
        began, progress_then, step_then, validating_then = self.began
        seconds = time.perf_counter() - began
        training = max(1e-9, seconds - (self.validation.seconds - validating_then))
        rate = (module.step - step_then) * module.batch_size / training
        gained = progress - progress_then
        parts = [f"step {module.step}"]
        if "train/loss" in trainer.callback_metrics:
            parts.append(f"loss {trainer.callback_metrics['train/loss'].item():.3f}")
        parts.append(f"{rate:.0f} img/s" if rate >= 10 else f"{rate:.1f} img/s")
        parts += [f"{name} {self.validation.latest[name]:.3f}" for name in self.names if name in self.validation.latest]
        if gained > 0:
            parts.append(f"{clock(seconds * (1 - progress) / gained)} left")
        return "  ".join(parts)

    def teardown(self, trainer: L.Trainer, module: TaskModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_exception(self, trainer: L.Trainer, module: TaskModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")


def at_step_end(trainer: L.Trainer) -> bool:
    """Whether the batch that just ended was the last of an optimizer step."""
    return (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0


def clock(seconds: float) -> str:
    """``2:05`` or ``1:02:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress_line(console: Console, what: str) -> Callable[[int, int], None]:
    """A one-line progress report for loops that are not training: draws on a terminal, keeps silent elsewhere."""
    state = {"at": 0.0}

    def report(done: int, total: int) -> None:
        now = time.perf_counter()
        if console.is_terminal and (done == total or now - state["at"] > 0.2):
            state["at"] = now
            console.print(f"{what} {done}/{total}", end="\n" if done == total else "\r", highlight=False)

    return report
