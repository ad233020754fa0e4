"""What a long measurement says: on stderr how far it is and how long it will take, and in the end its result."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class Progress:
    """Counts units of work; the time left is what the finished ones took, so it is honest only after the first.

    Args:
        total: units in all.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.began = time.perf_counter()
        self.shown = 0.0
        self.live = sys.stderr.isatty()

    def left(self, part: float = 0.0) -> str:
        """``3 min left``; nothing before the first unit is done.

        Args:
            part: of the unit that is being worked on, in [0, 1].
        """
        done = self.done + part
        if done < 0.5:
            return "time left not known yet"
        seconds = (time.perf_counter() - self.began) / done * (self.total - done)
        return f"{seconds:.0f} s left" if seconds < 90 else f"{seconds / 60:.0f} min left"

    def say(self, text: str, part: float = 0.0, force: bool = False) -> None:
        """Show what is being done: on a terminal in place and often, else a line, and seldom."""
        now = time.perf_counter()
        if not force and now - self.shown < (0.2 if self.live else 30.0):
            return
        self.shown = now
        line = f"{min(self.done + 1, self.total)} of {self.total}  {text}  {self.left(part)}"
        if self.live:
            print(f"\r\x1b[2K{line[:118]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def step(self, units: int = 1) -> None:
        """Units are done."""
        self.done += units

    def clear(self) -> None:
        """Leave an empty line for what comes next."""
        if self.live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def typed() -> str:
    """The command that runs."""
    return shlex.join(["python", "-m", "tasks.benchmark", *sys.argv[1:]])


def show(lines: Sequence[str], out: str | None) -> None:
    """Print a result; write it to a file as well, with the command that made it.

    Args:
        lines: of the result.
        out: the file; None: the screen alone.
    """
    text = "\n".join(lines)
    print(text, flush=True)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(f"{text}\n\ncommand   {typed()}\n", encoding="utf-8")
