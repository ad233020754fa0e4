"""C++ is compiled once, for this machine; where it cannot be, torch does the work and a line says why."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from backbones import compiled, kernels
from backbones.compiled import library
from heads import detections, segmentation
from tasks.data import colour

SOURCES = {
    "kernels": (kernels.SOURCE,),
    "detections": (detections.SOURCE, compiled.EXACT),
    "segmentation": (segmentation.SOURCE, compiled.EXACT),
    "colour": (colour.SOURCE,),
}
SMALL = SOURCES["detections"]
needs_compiler = pytest.mark.skipif(library(*SMALL)[0] is None, reason=library(*SMALL)[1])


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """What is compiled is looked for again, and afterwards once more."""
    library.cache_clear()
    yield
    library.cache_clear()


def test_kernels_0_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS", "0")
    assert library(*SMALL) == (None, "torch's operators (KERNELS=0)")


@needs_compiler
def test_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found, note = library(*SMALL)
    assert found is not None
    assert "compiled once" in note
    assert [path.suffix for path in (tmp_path / "mobilenetv3-bench").iterdir()] == [".so"]
    library.cache_clear()
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    found, note = library(*SMALL)
    assert found is not None
    assert note == ""


@needs_compiler
def test_other_flags_are_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "compiled once" in library(*SMALL)[1]
    assert "compiled once" in library(*SMALL, "-DOTHER")[1]


@needs_compiler
def test_a_strangers_library_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library(*SMALL)[0] is not None
    library.cache_clear()
    (file,) = (tmp_path / "mobilenetv3-bench").iterdir()
    os.chown(file, 12345, -1) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: 12345)
    found, note = library(*SMALL)
    assert found is None
    assert "belongs to another user" in note


@needs_compiler
@pytest.mark.parametrize(("what", "said"), [("source", "could not compile"), ("cache", "could not be kept")])
def test_what_cannot_be_compiled_or_kept_is_said(
    what: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("this is not C++")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("file" if what == "cache" else "")))
    found, note = library(source if what == "source" else SMALL[0])
    assert found is None
    assert said in note


@pytest.mark.parametrize("source", SOURCES)
def test_the_source_compiles_without_a_warning(source: str, tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    file, *flags = SOURCES[source]
    command = [compiler, *compiled.FLAGS, *flags, "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "made.so", file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
