"""Image folders for classification: a folder a class, on disk or inside a zip archive."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tasks.data import DataSet, Problems, Sample, check_splits, images
from tasks.data.arguments import Names, arrange_splits, check_tasks, did_you_mean, open_root

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2")
AUTO = "auto"
USUAL = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev"), "test": ("test", "testing")}
"""The folders that ``auto`` looks for, also in capitals."""
HELD_OUT = 0.1
"""The share of train that ``auto`` holds out where there is no such folder."""
WHOLE = "."
"""The name of the root itself as a split: there are no split folders, or just this one."""


def read(
    root: str | None,
    train: Names,
    val: Names | float | None,
    test: Names | float | None,
    on_error: str,
    tasks: Sequence[str],
    seed: int,
) -> DataSet:
    """Read ``<split>/<class>/**/<image>``, or ``<class>/**/<image>`` where there are no split folders.

    Files are only listed here; they are decoded when asked for. Hidden files are passed over; others that are no images
    by their extension are counted in ``skipped``. A class is a folder, in the order of the names.

    Args:
        root: a folder, or a .zip that is read without unpacking.
        train: a folder in the root, several to join, ``.`` for the root itself, or ``auto``: ``train`` if there is
            one, else the root.
        val: likewise, or a share of train to hold out, in (0, 1), or None. ``auto``: ``val``, ``validation``,
            ``valid`` or ``dev`` if there is one, else a tenth of train.
        test: likewise; ``auto``: ``test`` or ``testing`` if there is one, else a tenth of train.
        on_error: ``fail`` at a class folder that is empty or in one split only, or ``skip`` it.
        tasks: ``classify``.
        seed: which samples are held out.
    Raises:
        FileNotFoundError: the root is not set or missing.
        ValueError: no such split, no class folders, an empty class, classes that differ between the splits.
    """
    path = open_root("folder", root)
    check_tasks("folder", tasks, ("classify",))
    tree = _Tree(path, Problems(path.name, on_error))
    chosen = tree.choose(train, val, test)
    found = {name: tree.find(name) for name in dict.fromkeys(name for choice in chosen for name in _names(choice))}
    classes = tree.check_classes(found, _names(chosen[0]))
    index = {name: label for label, name in enumerate(classes)}

    def load(name: str) -> list[Sample]:
        content = found[name].items()
        return [Sample(f, None, {"classify": index[c]}) for c, files in content if c in index for f in files]

    splits = arrange_splits(load, *chosen, seed)
    skipped = tree.problems.settle() + tree.ignored_lines()
    shares = zip(("val", "test"), (val, test), chosen[1:], strict=True)
    note = ", ".join(
        f"{split}: {got:.0%} of train" for split, asked, got in shares if asked == AUTO and got == HELD_OUT
    )
    return check_splits(DataSet(path.name, {"classify": classes}, splits, skipped, note))


@dataclass
class _Tree:
    """A folder or an archive, and what was found wrong with it."""

    root: Path
    problems: Problems
    members: list[str] | None = None
    """An archive's files and folders (which end in a slash)."""
    ignored: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.root.is_dir():
            return
        if self.root.suffix.lower() != ".zip":
            raise ValueError(
                f"data.root is {self.root}, which is neither a folder nor a .zip; if it is a zip archive, rename it to "
                f"{self.root.stem}.zip"
            )
        try:
            names = images.open_zip(str(self.root)).namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.root} cannot be read as an archive ({error}); pack it again") from error
        self.members = list(dict.fromkeys(names))

    def choose(
        self, train: Names, val: Names | float | None, test: Names | float | None
    ) -> tuple[Names, Names | float | None, Names | float | None]:
        """The splits' folders, with every ``auto`` replaced."""
        usual = self._usual()
        if train == AUTO and usual["train"] is None and (usual["val"] or usual["test"]):
            there = usual["val"] or usual["test"]
            raise ValueError(f"{self.root} has a folder {there}, but none to train on; name it: data.train=<folder>")
        return (
            (usual["train"] or WHOLE) if train == AUTO else train,
            (usual["val"] or HELD_OUT) if val == AUTO else val,
            (usual["test"] or HELD_OUT) if test == AUTO else test,
        )

    def find(self, split: str) -> dict[str, list[str]]:
        """class -> the sources of its images; both in the order of their names."""
        folders = self._folders(split)
        if folders is None:
            raise ValueError(f"{self.root} has no folder {split!r}{did_you_mean(split, self._folders() or [])}")
        base = "" if split == WHOLE else f"{split}/"
        start = f"{self.root}!/{base}" if self.members is not None else f"{self.root}{os.sep}{base}"
        found: dict[str, list[str]] = {name: [] for name in sorted(folders)}
        for name in sorted(self._files(split)):
            folder, _, rest = name.partition("/")
            if rest and name.lower().endswith(EXTENSIONS):
                found[folder].append(start + name)
            else:
                kind = PurePosixPath(name).suffix or PurePosixPath(name).name
                self.ignored[kind if rest else f"{kind} outside of class folders"] += 1
        if not any(found.values()):
            hint = (
                ""
                if split == WHOLE
                else "; a split without labels cannot be scored: set it to null or a share of train"
            )
            raise ValueError(f"{self.root} has no images in {split!r}; expected {base}<class>/<image>{hint}")
        for name, files in found.items():
            if not files:
                self.problems.add(f"the class folder {base}{name} has no images")
        return found

    def check_classes(self, found: dict[str, dict[str, list[str]]], train: Sequence[str]) -> tuple[str, ...]:
        """The classes of the training folders, which all others must have, too."""
        classes = sorted({name for split in train for name in found[split]})
        if not train:
            return ()  # not a name: `arrange_splits` says so
        if len(classes) < 2:
            hint, only = "is data.root one folder too high?", classes[0]
            if self.members is not None and train == [WHOLE]:  # a root cannot lie inside an archive
                inside = [f"data.{split}={only}/{name}" for split, name in self._usual(only).items() if name]
                hint = f"if {only} holds them, set {' '.join(inside) or f'data.train={only}'}"
            raise ValueError(
                f"{self.root} has only the class {only} in {', '.join(train)}; expected "
                f"<class>/<image> of two or more classes: {hint}"
            )
        for split, content in found.items():
            extra, missing = sorted(content.keys() - set(classes)), sorted(set(classes) - content.keys())
            for names, where, other in ((extra, split, train[0]), (missing, train[0], split)):
                if names:
                    more = f" (and {len(names) - 5} more)" if len(names) > 5 else ""
                    self.problems.add(f"class {', '.join(names[:5])}{more} is in {where!r}, but not in {other!r}")
        return tuple(classes)

    def ignored_lines(self) -> list[str]:
        """What is no image by its extension, in one line."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.ignored.most_common(5))
        return [f"{self.ignored.total()} files that are no images by their names ({kinds})"] if self.ignored else []

    def _usual(self, inside: str = WHOLE) -> dict[str, str | None]:
        """split -> the folder that is called so; None if there is none."""
        there = {name.casefold(): name for name in sorted(self._folders(inside) or [])}  # train, even beside Train
        return {split: next((there[name] for name in names if name in there), None) for split, names in USUAL.items()}

    def _folders(self, inside: str = WHOLE) -> list[str] | None:
        """The folders directly in one; None if it does not exist."""
        if self.members is None:
            folder = self.root / inside
            if not folder.is_dir():
                return None
            return [entry.name for entry in folder.iterdir() if entry.is_dir() and shown(entry.name)]
        base = "" if inside == WHOLE else f"{inside}/"
        below = [name[len(base) :] for name in self.members if name.startswith(base)]
        return list(dict.fromkeys(n.split("/")[0] for n in below if "/" in n and shown(n))) if below else None

    def _files(self, inside: str) -> Iterable[str]:
        """Paths relative to the folder, with forward slashes."""
        if self.members is not None:
            base = "" if inside == WHOLE else f"{inside}/"
            below = (name[len(base) :] for name in self.members if name.startswith(base) and not name.endswith("/"))
            yield from (name for name in below if all(map(shown, name.split("/"))))
            return
        yield from walk(self.root / inside)


def _names(choice: Names | float | None) -> list[str]:
    """The folders that a split's argument names."""
    if isinstance(choice, str):
        return [choice]
    return [] if choice is None or isinstance(choice, float | int) else list(choice)


def walk(root: Path) -> Iterator[str]:
    """Paths of a folder's files, with forward slashes; links to folders are followed, but never in a circle.

    Raises:
        OSError: a folder that cannot be listed; names it.
    """
    seen = set()
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if shown(name)]
        start = Path(folder).relative_to(root)
        yield from ((start / name).as_posix() for name in files if shown(name))


def _refuse(error: OSError) -> None:
    raise type(error)(f"{error.filename} cannot be listed ({error.strerror}); make it readable, or move it away")


def shown(name: str) -> bool:
    """Not hidden, nor what macOS adds to archives and Linux to disks."""
    return not name.startswith((".", "__MACOSX", "lost+found"))
