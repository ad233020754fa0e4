"""Image files in, arrays out: every odd file is decoded right or refused by name.

A source is a path, or ``archive.zip!/member``; nothing is ever unpacked to disk. Free of torch: readers stay light.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.data import IGNORE

MAX_PIXELS = 89_478_485
"""Pillow's own bound for a decompression bomb: 256 MiB of RGB. A 50-megapixel photo passes."""
MAX_BYTES = 512 * 2**20
"""Of one compressed file in an archive."""

# What a photo or a mask comes in. Not all that Pillow reads: EPS, for one, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")
# What Pillow raises on broken files, beside its own classes.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, AttributeError,
           struct.error, zlib.error)  # fmt: skip
_PNG_EXIF = (b"tiff:Orientation", b"Raw profile type exif")
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# Pillow only warns up to twice its bound; as an error it ends in our message rather than on the user's screen.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

_archives: dict[str, tuple[tuple[int, int, int], zipfile.ZipFile]] = {}
_archives_lock = threading.Lock()


def decode(
    source: str, max_pixels: int = MAX_PIXELS, admit: Callable[[int], None] = lambda _pixels: None
) -> np.ndarray:
    """The picture as a viewer shows it: EXIF orientation applied, in RGB.

    Grey, palette, CMYK and the like are converted; 16-bit grey is scaled by 1/257 (its full range);
    what is transparent lies on white, as the colour under full transparency is arbitrary.

    Args:
        source: a path, or ``archive.zip!/member``.
        max_pixels: larger images are refused by their header, before anything is decoded.
        admit: called with the number of pixels before they take memory; may wait until there is room.
    Returns:
        [H, W, 3] uint8 RGB, writable.
    Raises:
        ValueError: not an image, truncated, animated, too large, or of a depth that has no defined RGB; names the file.
    """
    with _opened(source, max_pixels) as upright:
        admit(upright.width * upright.height)
        upright.load()
        return as_rgb(upright, source)


def as_rgb(image: Image.Image, name: str) -> np.ndarray:
    """The pixels of an image of Pillow's, as ``decode`` gives them; the image itself is turned upright.

    Raises:
        ValueError: a depth that has no defined RGB; calls the image ``name``.
    """
    ImageOps.exif_transpose(image, in_place=True)  # a copy of a 40-megapixel photo is 160 MB
    if image.mode.startswith("I"):
        grey = _sixteen_bit(image, name)
        grey = grey.astype(np.uint32)
        grey += 128  # in place: a 40-megapixel photo is 160 MB
        grey //= 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError(f"{name} has floating-point pixels, whose range is not known; save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return np.array(white)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def decode_mask(source: str) -> np.ndarray:
    """The class indices of a mask: palette entries are not turned into colours, nor low bit depths stretched.

    Args:
        source: a path, or ``archive.zip!/member``; a grey or palette file of 1 to 16 bits.
    Returns:
        [H, W] uint8.
    Raises:
        ValueError: as ``decode``; also a colour image, a lossy format, or an index above 255.
    """
    with _opened(source) as image:
        if image.format in ("JPEG", "MPO", "JPEG2000"):
            raise ValueError(
                f"{source} is a mask in {image.format}, which alters class indices; save it as PNG from the original"
            )
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise ValueError(
                f"{source} is a mask in {image.mode} colours; expected one class index a pixel (grey or palette PNG)"
            )
        stretch = {"L;2": 85, "L;4": 17}.get(_raw_mode(image), 1)  # Pillow spreads 2 and 4 bits over 0..255
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            indices = _sixteen_bit(upright, source)
            if indices.max() > IGNORE:
                raise ValueError(
                    f"{source} has the mask value {indices.max()}; expected class indices of 0 to {IGNORE}"
                )
            return indices.astype(np.uint8)
        return np.array(upright, dtype=np.uint8) // stretch


def size(source: str) -> tuple[int, int]:
    """Height and width of the decoded image, from the header alone.

    Raises:
        ValueError: as ``decode``, as far as the header tells.
    """
    with _opened(source) as image:
        orientation = _orientation(image, source)
        if orientation >= 5 and image.format == "TIFF":
            image.load()  # whether the header's size is turned already depends on Pillow's version
            orientation = 1
        width, height = image.size
        return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A semantic mask in a file of class indices."""

    source: str
    classes: int
    """How many; every value must be below, or ``IGNORE``."""

    def load(self) -> np.ndarray:
        """[H, W] uint8: class index, ``IGNORE`` for void.

        Raises:
            ValueError: unreadable, or a value outside the class list; names the file, the value and its count.
        """
        mask = decode_mask(self.source)
        counts = np.bincount(mask.reshape(-1), minlength=IGNORE + 1)
        unknown = np.flatnonzero(counts[self.classes : IGNORE]) + self.classes
        if len(unknown):
            value = int(unknown[0])
            more = f" (and {len(unknown) - 1} other values)" if len(unknown) > 1 else ""
            raise ValueError(
                f"{self.source} has the mask value {value} in {counts[value]} pixels{more}; expected 0 to "
                f"{self.classes - 1}, or {IGNORE} for void: complete the class list, or mend the mask"
            )
        return mask


def read_bytes(source: str) -> bytes:
    """The raw content of a file or of a zip's member.

    Raises:
        ValueError: missing, unreadable, encrypted, too large, or a member that points outside its archive.
    """
    archive, member = split_source(source)
    try:
        if member is None:
            return Path(archive).read_bytes()
        if PurePosixPath(member).is_absolute() or ".." in member.split("/"):
            raise ValueError(f"{source} points outside its archive; rename that member")
        opened = open_zip(archive)
        if opened.getinfo(member).file_size > MAX_BYTES:
            raise ValueError(f"{source} unpacks to over {MAX_BYTES >> 20} MiB; is it an image?")
        return opened.read(member)
    except KeyError:
        raise ValueError(f"{source} is not in the archive; check the name") from None
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{source} cannot be read ({error}); restore or remove it") from error


def split_source(source: str) -> tuple[str, str | None]:
    """``(path, None)``, or ``(archive, member)`` for ``archive.zip!/member``."""
    match = re.match(r"(.+\.zip)!/(.+)", source, re.IGNORECASE | re.DOTALL)
    return (match[1], match[2]) if match else (source, None)


def open_zip(path: str) -> zipfile.ZipFile:
    """An archive, opened once a process: reading its index takes 0.5 s for 60,000 members.

    Safe in threads (``ZipFile`` locks its reads) and after a fork (a child opens its own: a shared file position would
    mix up two processes' reads). Opened anew when the file has changed.
    """
    status = Path(path).stat()
    key = (os.getpid(), status.st_mtime_ns, status.st_size)
    with _archives_lock:
        known, archive = _archives.get(path, (None, None))
        if archive is None or known != key:
            archive = zipfile.ZipFile(path)
            _archives[path] = key, archive
        return archive


def _renew_lock() -> None:
    """A fork while another thread holds the lock would leave it locked in the child for ever."""
    global _archives_lock
    _archives_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def _opened(source: str, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image with its header checked; whatever Pillow raises inside the block becomes a ValueError with the name."""
    if max_pixels > (Image.MAX_IMAGE_PIXELS or max_pixels):
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's bound steps back, ours stays for every other caller
    with _named(source, max_pixels):
        packed = split_source(source)[1] is not None
        if not packed and not stat.S_ISREG(Path(source).stat().st_mode):  # reading from a pipe would wait for ever
            raise ValueError(f"{source} is a folder, a pipe or a device; expected an image file: remove it")
        with Image.open(io.BytesIO(read_bytes(source)) if packed else Path(source), formats=_FORMATS) as image:
            _check_header(image, source, max_pixels)
            yield image


@contextmanager
def _named(source: str, max_pixels: int) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{source} is missing; restore it, or remove it from the list") from None
    except _BOMB as error:
        raise ValueError(f"{source} is over the limit of {max_pixels:,} pixels; scale it down") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{source} is not an image ({_content(source)}); expected {', '.join(_FORMATS)}") from error
    except _BROKEN as error:
        if str(error).startswith(source):  # our own message, from inside the block
            raise
        reason = str(error) or type(error).__name__
        raise ValueError(f"{source} cannot be decoded: {reason}; restore or remove it") from error


def _check_header(image: Image.Image, source: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{source} has {width} x {height} pixels, over the limit of {max_pixels:,}; scale it down")
    # An MPO is a phone's JPEG with previews or a depth map behind it: its first frame is the photo.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError(
            f"{source} is an animated or multi-page {image.format} of {getattr(image, 'n_frames', 2)} frames; "
            "expected a single image: save the frame that is meant"
        )


def _content(source: str) -> str:
    """What the file is instead, as far as its first bytes tell."""
    if split_source(source)[1] is None:
        with Path(source).open("rb") as file:  # it may be of any size
            head = file.read(16)
    else:
        head = read_bytes(source)[:16]
    if not head:
        return "it is empty"
    return "it is text" if head.isascii() and head.decode("ascii").isprintable() else f"it starts with {head[:4].hex()}"


def _sixteen_bit(image: Image.Image, source: str) -> np.ndarray:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{source} has the pixel value {values.max()}; expected 8 or 16 bits: save it so")
    return values.astype(np.uint16, copy=False)


def _orientation(image: Image.Image, source: str) -> int:
    # Pillow decodes a whole PNG to find out that it has no EXIF: ask it only where there is some.
    if image.format == "PNG" and not _png_has_exif(source):
        return 1
    return int(image.getexif().get(0x0112, 1))


def _png_has_exif(source: str) -> bool:
    """Whether a PNG has a chunk that may say how it was held; the pixels' chunks are passed over unread."""
    packed = split_source(source)[1] is not None
    with io.BytesIO(read_bytes(source)) if packed else Path(source).open("rb") as file:
        file.seek(len(b"\x89PNG\r\n\x1a\n"))
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"eXIf":
                return True
            if kind in _PNG_TEXT:
                text = file.read(length)
                if any(mark in text for mark in _PNG_EXIF):
                    return True
                length = 0
            file.seek(length + 4, os.SEEK_CUR)  # 4: the checksum
    return False


def _raw_mode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", ())
    arguments = tiles[0][3] if tiles and image.format == "PNG" else ""
    return arguments if isinstance(arguments, str) else str(arguments[0])
