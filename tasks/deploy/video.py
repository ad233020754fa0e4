"""The video that ``predict`` makes of a video: its frames, drawn on."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from tasks.reporting.drawing import PAGE

CODECS = ("libx264", "libopenh264", "mpeg4")
"""By preference; PyAV's own packages have all, those of a distribution may lack some."""


class Video:
    """An MP4 file that grows by a frame at a time, and gets its name when it is whole.

    Args:
        path: of the file.
        rate: frames a second.
        room: share of the first frame's longer side that is kept free below it, for legends that grow.
    """

    def __init__(self, path: Path, rate: Fraction, room: float = 0.0) -> None:
        self.path, self.rate, self.room, self.frames = path, rate, room, 0
        self.partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
        self._container: Any = None
        self._stream: Any = None
        self._size = (0, 0)

    def add(self, picture: Image.Image) -> None:
        """Append a frame; the first one and its room, at even sides as MP4 needs, are the video's size."""
        import av

        if self._container is None:
            height = picture.height + round(self.room * max(picture.size))
            self._size = (picture.width + picture.width % 2, height + height % 2)
            codec = next(name for name in CODECS if name in av.codecs_available)
            self._container = av.open(str(self.partial), "w")
            self._stream = self._container.add_stream(codec, rate=self.rate)
            self._stream.width, self._stream.height = self._size
            self._stream.pix_fmt = "yuv420p"
        if picture.width > self._size[0] or picture.height > self._size[1]:
            picture = ImageOps.contain(picture, self._size)
        whole = Image.new("RGB", self._size, PAGE)
        whole.paste(picture)
        frame = av.VideoFrame.from_image(whole)
        self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def close(self) -> None:
        """End the file; without a frame there is none."""
        if self._container is None:
            return
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self.partial.replace(self.path)
        finally:
            self.partial.unlink(missing_ok=True)
