"""One side of one row of ``peer``, in its own process: builds its work, then does a turn for every line it reads."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tasks.deploy.peer_profile import profile
from tasks.deploy.timing import timed

Check = list[Any] | str
"""What the other side must give, too: numbers, detections (label, score, box), or a digest."""


class Work(NamedTuple):
    """What a side does."""

    call: Callable[[], object]
    items: float = 1.0
    """Images a call."""
    check: Check = ""
    detail: str = ""
    """For the notes."""
    turn: Callable[[], float] | None = None
    """Says its own milliseconds, where not all that ``call`` does counts."""
    floor: Callable[[], object] | None = None
    """The engine's call alone, see ``peer_profile``."""
    late: bool = False
    """What a timed call returns is what the other side must give, too: it takes too long to call it once more."""
    kept: object = None
    """What must live as long as the work."""


def main() -> None:
    """Answer on what was stdout; whatever libraries print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes our input
    asked: dict[str, Any] = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=out, flush=True)

    import torch

    torch.set_num_threads(asked["threads"])
    try:
        works = importlib.import_module(f"tasks.deploy.{asked['module']}").WORKS
        work: Work = works[asked["row"]](asked, asked["side"] == "ours")
    except (ValueError, OSError, ImportError) as error:
        answer(error=" ".join(str(error).split()))
        return
    turn = work.turn or timed(work.call, asked["prime"])
    answer(check=work.check, items=work.items, detail=work.detail)
    for line in sys.stdin:
        if line.startswith("profile"):
            answer(profile=profile(work.call, work.floor))
        elif work.late:
            start = time.perf_counter()
            check = work.call()
            answer(ms=(time.perf_counter() - start) * 1000, check=check)
        else:
            answer(ms=turn())


if __name__ == "__main__":
    main()
