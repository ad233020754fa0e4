"""C++ of our own, compiled once for this machine by its own compiler into the user's cache, and called by ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import operator
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from backbones import cache_folder

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")


EXACT = "-ffp-contract=off"
"""A flag beside those, for what is to be rounded as torch's operators round it: no fused multiply-adds."""


@functools.cache
def library(source: Path, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """A compiled file, and what is to be said about it.

    Args:
        source: C++, all functions that are called by name ``extern "C"``.
        flags: for the compiler, beside ``FLAGS``.
    Returns:
        None where it cannot be had (no Linux, no compiler, ``KERNELS=0``), and why; else the library, and how long it
        took to compile if that was now.
    """
    if os.environ.get("KERNELS") == "0":
        return None, "torch's operators (KERNELS=0)"
    compiler = shutil.which("c++") or shutil.which("g++")
    if sys.platform != "linux" or compiler is None:
        return None, "torch's operators; with Linux and a C++ compiler (g++) a step takes a third less"
    try:
        start = time.perf_counter()
        command = (compiler, *FLAGS, *flags)
        file = _file(source, command)
        compiled = not file.exists()
        if compiled:
            _compile(source, command, file)
        if file.stat().st_uid not in (0, os.getuid()):
            raise OSError(f"{file} belongs to another user")
        return ctypes.CDLL(str(file)), f"compiled once, {time.perf_counter() - start:.0f} s: {file}" if compiled else ""
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:200])
        return None, f"torch's operators, for {compiler} could not compile ours: {first}"
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return None, f"torch's operators, for ours could not be kept: {error}; XDG_CACHE_HOME=<folder> moves them"


def _file(source: Path, command: tuple[str, ...]) -> Path:
    """Where it lies once compiled, by this compiler for this CPU."""
    version = subprocess.run([command[0], "--version"], check=True, capture_output=True, text=True).stdout
    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))), ""
    )
    key = hashlib.sha256("\0".join((source.read_text(), version, *command[1:], cpu)).encode()).hexdigest()
    return cache_folder() / f"{source.stem}-{key[:16]}.so"


def _compile(source: Path, command: tuple[str, ...], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / file.name
        subprocess.run([*command, "-o", made, source], check=True, capture_output=True, text=True)
        made.replace(file)


def call(found: ctypes.CDLL, function: str, *args: Tensor | ctypes.Structure | float | None) -> None:
    """A function with its arguments in C's terms.

    Args:
        found: of ``library``.
        function: gives nothing back.
        args: tensors and structures go by address, None as a null pointer, floats as double, whole numbers as long.
    """
    converted: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            converted.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, ctypes.Structure):
            converted.append(ctypes.byref(arg))
        elif isinstance(arg, float):
            converted.append(ctypes.c_double(arg))
        else:
            converted.append(arg if arg is None else ctypes.c_long(operator.index(arg)))
    getattr(found, function)(*converted)
