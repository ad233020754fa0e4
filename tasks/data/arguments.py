"""What the readers' arguments have in common: root, tasks and splits, each checked with a message that has the fix."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from tasks.data import Sample, hold_out

Names = str | Sequence[str]
"""One split of the data set's own, or several to join."""


def expanded(path: str | Path) -> Path:
    """A path with ``~`` for the user's home; a name that begins with ~ and is nobody's home stays as it is."""
    with suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def open_root(name: str, root: str | None) -> Path:
    """The data set's folder (or archive), absolute.

    Raises:
        FileNotFoundError: not set, or not there; names ``data.root``.
    """
    if root is None:
        raise FileNotFoundError(f"{name}: data.root is not set; set data.root=<where the data set lies>")
    path = expanded(root).absolute()
    if not path.exists():
        raise FileNotFoundError(f"{name}: data.root is {root}, which does not exist (looked in {path}); set data.root")
    return path


def check_tasks(name: str, tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """The tasks asked for.

    Raises:
        ValueError: the data set has no targets for one of them.
    """
    for task in tasks:
        if task not in known:
            raise ValueError(f"{name} has no targets for {task}; it has {', '.join(known)}: choose another data=")
    return list(tasks)


def check_names(classes: Sequence[str]) -> tuple[str, ...]:
    """The classes' names.

    Raises:
        ValueError: a text, whose letters would be the classes.
    """
    if isinstance(classes, str):
        raise ValueError(f"data.classes is {classes!r}; expected a list: data.classes=[{classes}]")
    return tuple(classes)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'train'? There are train, val`` - the tail of a message about an unknown name."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    guess = f"; did you mean {close[0]!r}?" if close else ";"
    shown = ", ".join(names[:20]) + (f" ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"{guess} There are: {shown}" if names else f"{guess} there are none"


def arrange_splits(
    load: Callable[[str], list[Sample]],
    train: Names,
    val: Names | float | None,
    test: Names | float | None,
    seed: int,
) -> dict[str, list[Sample]]:
    """The three splits from the data set's own ones.

    Args:
        load: the samples of one of the data set's own splits.
        train: its name, or several.
        val: likewise; or the share of ``train`` to hold out, in (0, 1); or None for none.
        test: likewise.
        seed: which samples are held out.
    Raises:
        ValueError: an argument of another kind.
    """
    rest = _join(load, "train", train)
    splits: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    total = len(rest)
    shares = [choice for choice in (val, test) if isinstance(choice, int | float)]
    if all(0 < share < 1 for share in shares) and sum(shares) >= 1:
        raise ValueError(f"data.val={val} and data.test={test} leave nothing to train on; expected a sum below 1")
    for split, choice in (("test", test), ("val", val)):
        if isinstance(choice, (int, float)):
            if not 0 < choice < 1:
                raise ValueError(f"data.{split} is {choice}; expected a split's name, or a share of train in (0, 1)")
            if rest:  # the share is of the whole, also after another one has been held out
                share = min(choice * total / len(rest), 0.99)
                rest, splits[split] = hold_out(rest, share, seed)
        elif choice is not None:
            splits[split] = _join(load, split, choice)
    splits["train"] = rest
    return splits


def _join(load: Callable[[str], list[Sample]], split: str, names: Names) -> list[Sample]:
    chosen = [names] if isinstance(names, str) else names
    if not isinstance(chosen, Sequence) or not chosen or not all(isinstance(name, str) for name in chosen):
        raise ValueError(f"data.{split} is {names!r}; expected a split's name or a list of names")
    samples = {sample.image: sample for name in chosen for sample in load(name)}  # a sample in two of them counts once
    return list(samples.values())
