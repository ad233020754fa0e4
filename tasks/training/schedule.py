"""How far a run is, and what follows from it: learning rate, EMA decay, BatchNorm momentum.

Everything here is a function of the run's own length, so that a run of five minutes and one of five days are both
trained right: at a BatchNorm momentum of 0.01 the running statistics of a 300-step run are still those of its first
steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

from heads import check_count, check_range, check_share


def seconds_of(text: str) -> float:
    """Seconds of ``DD:HH:MM:SS``.

    Raises:
        ValueError: another form.
    """
    try:
        days, hours, minutes, seconds = (int(part) for part in str(text).split(":"))
    except ValueError as error:
        raise ValueError(
            f"trainer.max_time is {text!r}; expected DD:HH:MM:SS, e.g. 00:00:10:00 for ten minutes"
        ) from error
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()


@dataclass(frozen=True)
class Budget:
    """How long a run may train: optimizer steps, seconds, or both (what is reached first ends it).

    A budget of steps gives the same run every time; one of seconds depends on the machine.
    """

    steps: int | None
    seconds: float | None

    def progress(self, step: int, elapsed: float) -> float:
        """The share of the budget that is used up, in [0, 1]."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(step / self.steps if self.steps else 1.0)
        if self.seconds is not None:
            shares.append(elapsed / self.seconds)
        return min(1.0, max(shares))

    def expected_steps(self, step: int, elapsed: float) -> float:
        """The run's whole length in steps: exact for a budget of steps, else by the rate so far."""
        if self.seconds is None:
            return float(self.steps or 0)
        progress = self.progress(step, elapsed)
        return step / progress if progress > 0 and step > 0 else math.inf


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run, as a factor of ``optimizer.lr``.

    Args:
        shape: ``cosine``, ``poly``, ``exponential`` or ``constant``.
        warmup: share of the run that rises linearly from ``warmup_from``.
        warmup_from: factor at the first step.
        final: factor at the end (cosine, poly).
        power: of poly.
        decay, every: ``exponential`` multiplies by ``decay`` every ``every`` passes over the data, in stairs.
    Raises:
        ValueError: an unknown shape, or a number that is none or out of its range.
    """

    shape: str = "cosine"
    warmup: float = 0.05
    warmup_from: float = 0.0
    final: float = 0.0
    power: float = 0.9
    decay: float = 0.97
    every: float = 2.4

    def __post_init__(self) -> None:
        shapes = ("cosine", "poly", "exponential", "constant")
        if self.shape not in shapes:
            raise ValueError(f"schedule.shape is {self.shape!r}; expected one of {', '.join(shapes)}")
        check_share("schedule.warmup", self.warmup)
        for key in ("warmup_from", "final", "power", "decay"):
            check_range(f"schedule.{key}", getattr(self, key), 0)
        check_range("schedule.every", self.every, 1e-6)

    def factor(self, progress: float, passes: float) -> float:
        """What to multiply the base rate with.

        Args:
            progress: share of the run, in [0, 1].
            passes: over the training data so far.
        """
        if progress < self.warmup:
            return self.warmup_from + (1 - self.warmup_from) * progress / self.warmup
        if self.shape == "constant":
            return 1.0
        if self.shape == "exponential":
            return self.decay ** math.floor(passes / self.every)
        rest = (progress - self.warmup) / (1 - self.warmup)
        curve = (1 + math.cos(math.pi * rest)) / 2 if self.shape == "cosine" else (1 - rest) ** self.power
        return self.final + (1 - self.final) * curve


@dataclass(frozen=True)
class Growth:
    """The images' size over a run: small at first, because early steps need no detail and cost by the pixel.

    Args:
        start: factor on the input's size at the first step, in [0.001, 1]; 1 trains at full size throughout.
        until: share of the run at which the full size is reached, in [0.001, 1].
        multiple: sizes are rounded to this many pixels, and no side gets smaller than 32.
    Raises:
        ValueError: an argument is out of its range.
    Source: progressive resizing, as in EfficientNetV2, section 4, arXiv 2104.00298.
    """

    start: float = 1.0
    until: float = 0.7
    multiple: int = 16

    def __post_init__(self) -> None:
        for key in ("start", "until"):
            check_range(f"growth.{key}", getattr(self, key), 1e-3, 1)
        check_count("growth.multiple", self.multiple)

    def size(self, full: tuple[int, int], progress: float) -> tuple[int, int]:
        """Height, width of the images at ``progress``, a share of the run in [0, 1]; ``full`` from ``until`` on."""
        if self.start == 1 or progress >= self.until:
            return full
        factor = self.start + (1 - self.start) * progress / self.until
        height, width = (
            min(side, max(32, self.multiple * math.floor(side * factor / self.multiple + 0.5))) for side in full
        )
        return height, width


def ema_decay(step: int, expected_steps: float, share: float, cap: float) -> float:
    """Decay of the weights' moving average at a step: a window of ``share`` of the run, growing from nothing.

    Args:
        step: optimizer steps done.
        expected_steps: of the whole run.
        share: of the run that the window spans.
        cap: the largest decay, e.g. 0.9999.
    """
    window = 1 - 1 / max(1.0, share * expected_steps)
    return max(0.0, min(cap, window, (1 + step) / (10 + step)))


def batch_norm_momentum(expected_steps: float) -> float:
    """A window (1 / momentum steps) of a twentieth of the run, within [0.01, 0.1] (MobileNetV3's, PyTorch's)."""
    return min(0.1, max(0.01, 20 / max(1.0, expected_steps)))
