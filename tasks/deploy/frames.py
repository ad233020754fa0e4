"""What ``images=`` may name: a folder, a glob, a file, a list, an archive, a video.

Only names are held, never pixels: a frame is decoded when it is loaded. Free of torch.
"""

from __future__ import annotations

import glob
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tasks.data.arguments import expanded
from tasks.data.folder import EXTENSIONS, shown, walk
from tasks.data.images import decode, open_zip, split_source

VIDEOS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".flv",
          ".wmv")  # fmt: skip
BEGIN = 512
"""Bytes by which ``video_suffix`` decides."""
STILLS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
"""Brands of pictures in the container of MP4."""
USUAL_RATE = Fraction(25)
"""Frames a second of a video that does not say."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One image to look at."""

    name: str
    """As results call it: its path from what ``images=`` names."""
    stem: str
    """Of the files written for it: relative, without a suffix, its own among all frames."""
    load: Callable[..., np.ndarray]
    """Decodes it: [H, W, 3] uint8 RGB. Raises ValueError naming the file. ``admit=`` as in ``images.decode``."""
    source: Path | None = None
    """The file it lies in, if that is the image itself."""


@dataclass(slots=True)
class Frames:
    """All that ``images=`` names."""

    items: Iterable[Frame]
    total: int | None
    """How many; None where a video does not say."""
    root: Path | None = None
    """The folder that was searched."""
    rate: Fraction | None = None
    """Of a video: frames a second."""
    left_alone: Counter[str] = field(default_factory=Counter)
    """Suffix -> files there that are no images by their names."""


def open_frames(images: str | None, max_pixels: int) -> Frames:
    """Find the images; nothing is decoded yet.

    Args:
        images: a folder (searched with all below it), a glob, one image, a ``.txt`` with a path a line, a ``.zip``, an
            ``archive.zip!/member`` or a video.
        max_pixels: larger images are refused when they are loaded.
    Raises:
        FileNotFoundError: not set, not there, or no image in it.
        ValueError: a damaged archive or video, or a video and no library for it.
    """
    if not images:
        raise FileNotFoundError(
            "images is not set; set images=<a folder, a file, a glob, a list.txt, an archive.zip, a video, or ->"
        )
    path = expanded(images)
    text, suffix = str(path), path.suffix.lower()
    if path.is_dir():
        found = from_folder(path, max_pixels)
    elif not path.exists() and split_source(text)[1] is None:
        if not glob.has_magic(text):
            raise FileNotFoundError(f"images={images} does not exist (looked in {path.absolute()}); set images=")
        found = from_glob(text, max_pixels)
    elif suffix in VIDEOS:
        return from_video(path, max_pixels)
    else:
        reader = {".zip": from_zip, ".txt": from_list}.get(suffix, from_file)
        found = reader(path, max_pixels)
    if not found.total:
        raise FileNotFoundError(f"images={images} holds no image ({', '.join(EXTENSIONS)}); set images=")
    return found


def from_file(path: Path, max_pixels: int) -> Frames:
    """A single image."""
    return _frames([(path.name, str(path))], max_pixels)


def from_folder(root: Path, max_pixels: int) -> Frames:
    """All images of a folder and of the folders in it, in natural order (2 before 10)."""
    left_alone: Counter[str] = Counter()
    found = _frames([(name, str(root / name)) for name in _images(walk(root), left_alone)], max_pixels)
    found.root, found.left_alone = root, left_alone
    return found


def from_zip(path: Path, max_pixels: int) -> Frames:
    """All images of an archive, in natural order; nothing is unpacked to disk."""
    try:
        members = open_zip(str(path)).namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} cannot be read as an archive ({error}); pack it again") from error
    left_alone: Counter[str] = Counter()
    files = (name for name in members if not name.endswith("/"))
    visible = (name for name in files if all(part == ".." or shown(part) for part in name.split("/")))
    found = _frames([(name, f"{path}!/{name}") for name in _images(visible, left_alone)], max_pixels)
    found.left_alone = left_alone
    return found


def from_glob(pattern: str, max_pixels: int) -> Frames:
    """All files that a pattern names (``**`` spans folders), in natural order."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    files = (name for name in glob.iglob(pattern, recursive=True) if not Path(name).is_dir())  # noqa: PTH207 - as typed
    names = sorted((Path(name).relative_to(root).as_posix() for name in files), key=_natural)
    found = _frames([(name, str(root / name)) for name in names], max_pixels)
    found.root = root if "**" in parts else None  # others do not look deep enough to find what is written
    return found


def from_list(path: Path, max_pixels: int) -> Frames:
    """A path a line, in the list's order; relative ones start in the list's folder, else in the current one."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = [line.rstrip("\r\n") for line in file if line.strip()]
    beside = [(line, path.parent / line) for line in lines]
    return _frames([(line, str(near if near.exists() else Path(line))) for line, near in beside], max_pixels)


def from_video(path: Path, max_pixels: int) -> Frames:
    """The frames of a video's first picture stream.

    Raises:
        ValueError: no library for videos, or a damaged file.
    """
    av = video_library(str(path))
    try:
        with av.open(str(path)) as video:
            if not video.streams.video:
                raise ValueError(f"{path} has no pictures in it; expected a video")
            stream = video.streams.video[0]
            width, height, rate = stream.width, stream.height, stream.average_rate
            seconds = (
                float(stream.duration * stream.time_base) if stream.duration else (video.duration or 0) / av.time_base
            )
            total = stream.frames or (round(seconds * rate) if rate else 0)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}); restore it") from error
    if width * height > max_pixels:
        raise ValueError(f"{path} has {width} x {height} pixels, over the limit of {max_pixels:,}; scale it down")
    return Frames(_video(av, path, max_pixels), total or None, rate=rate or USUAL_RATE)


def video_library(name: str) -> Any:
    """PyAV, for the video called ``name``.

    Raises:
        ValueError: it is not installed; says what to install.
    """
    try:
        import av
    except ImportError:
        raise ValueError(f'{name} is a video, which PyAV reads; pip install -e ".[video]"') from None
    return av


def video_suffix(begin: bytes) -> str | None:
    """The usual ending of the container that a file's first ``BEGIN`` bytes are of; None: they are of no video."""
    if begin[4:8] in (b"ftyp", b"moov", b"mdat", b"wide") and begin[8:12] not in STILLS:
        return ".mp4"
    if begin[:4] == b"RIFF" and begin[8:12] == b"AVI ":
        return ".avi"
    if begin[:4] == b"\x1aE\xdf\xa3":
        return ".mkv"
    if begin[:4] in (b"\0\0\1\xba", b"\0\0\1\xb3"):
        return ".mpg"
    return ".ts" if begin[:1] == begin[188:189] == begin[376:377] == b"G" else None  # a packet's first byte


def _video(av: Any, path: Path, max_pixels: int) -> Iterator[Frame]:
    number = 0
    try:
        with av.open(str(path)) as video:
            video.streams.video[0].thread_type = "AUTO"
            for number, picture in enumerate(video.decode(video=0), 1):
                load = partial(_upright, picture)
                if picture.width * picture.height > max_pixels:  # a stream may change its size on the way
                    size = f"{picture.width} x {picture.height}"
                    load = partial(
                        _refuse, f"{path.name}, frame {number}, has {size} pixels, over the limit {max_pixels:,}"
                    )
                yield Frame(f"{path.name}#{number}", f"{path.stem}_{number:06}", load)
    except (av.error.FFmpegError, OSError) as error:
        message = f"{path.name} is broken after frame {number} ({error}); restore it"
        yield Frame(f"{path.name}#{number + 1}", f"{path.stem}_{number + 1:06}", partial(_refuse, message))


def _upright(picture: Any, admit: object = None) -> np.ndarray:
    """A video's frame as a player shows it: phones note which way they were held. It is in memory already."""
    turns = round(getattr(picture, "rotation", 0) / 90)  # counterclockwise
    return np.ascontiguousarray(np.rot90(picture.to_ndarray(format="rgb24"), turns))


def _refuse(message: str, admit: object = None) -> np.ndarray:
    raise ValueError(message)


def _frames(named: list[tuple[str, str]], max_pixels: int) -> Frames:
    """Frames of images that ``decode`` reads, from (name, source)."""

    def items() -> Iterator[Frame]:
        stems = Stems()
        for name, source in named:
            own = Path(source) if split_source(source)[1] is None else None
            yield Frame(name, stems.add(name), partial(decode, source, max_pixels), own)

    return Frames(items(), len(named))


class Stems:
    """Gives every image a relative name of its own for the files written for it.

    ``cats/a.jpg`` becomes ``cats/a``; a later ``cats/a.png`` becomes ``cats/a.png``. Nothing leads out of the folder.
    Names that differ in case only count as one, as on some disks they are.
    """

    def __init__(self) -> None:
        self.taken: set[int] = set()  # hashes: a million names would weigh a hundred megabytes

    def add(self, name: str) -> str:
        """A stem that no name before got."""
        parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
        whole = "/".join(re.sub(r"[\x00-\x1f:*?\"<>|]", "_", part) for part in parts) or "image"
        path = PurePosixPath(whole)
        stem = str(path.with_suffix("")) if path.suffix.lower() in EXTENSIONS else whole
        chosen, number = stem, 1
        while hash(chosen.casefold()) in self.taken:
            chosen = whole if number == 1 else f"{whole}_{number}"
            number += 1
        self.taken.add(hash(chosen.casefold()))
        return chosen


def _images(names: Iterable[str], left_alone: Counter[str]) -> list[str]:
    """Those that are images by their names, in natural order; the others are counted."""
    found = []
    for name in names:
        if name.lower().endswith(EXTENSIONS):
            found.append(name)
        else:
            left_alone[PurePosixPath(name).suffix or PurePosixPath(name).name] += 1
    return sorted(found, key=_natural)


def _natural(name: str) -> tuple[list[Any], str]:
    """A key that sorts ``2.jpg`` before ``10.jpg``, folder by folder."""
    parts = re.split("([0-9]+)", name.replace("/", "\x00").casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
