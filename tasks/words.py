"""Words typed on a command line, without Hydra: ``key=value`` pairs, near misses, and how such a command ends.

For compare, ledger and benchmark, which compose no config and start at once.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence


def command(help_text: str, work: Callable[[list[str]], int | None]) -> None:
    """Entry point of a command: what the user can mend ends in one line, and the process with an exit code.

    Args:
        help_text: what ``--help`` prints.
        work: gets the words; returns the exit code, None for 0.
    """
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(help_text, end="")
        return
    end_as_by_ctrl_c()
    try:
        code = work(words)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, head perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    else:
        if code:
            sys.exit(code)


def end_as_by_ctrl_c() -> None:
    """Let the signals by which systems and closed sessions end a process end it as Ctrl-C does: with its work kept."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores the second, and so do we then
            signal.signal(number, signal.default_int_handler)


def pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Key and value of each word.

    Raises:
        ValueError: a word that is no ``key=value``.
    """
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is no key=value; --help lists the keys")
        yield key, value


def suggest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """``, did you mean 'small'?`` or nothing.

    Args:
        word: that is not known.
        known: what it may have meant.
        cutoff: 0 to 1: how alike they must be.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f", did you mean {close[0]!r}?" if close else ""
