"""Run records: one JSON line a run in ``results.jsonl``, what ran, on what, where, how long, and what came out.

Everything that compares runs works on these lines alone. Writing is safe for several processes at once; reading names
the lines that are no records and uses the rest. Nothing here needs torch.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

try:
    import fcntl
except ImportError:  # Windows: a single append is all the safety there is
    fcntl = None  # type: ignore[assignment]

PROJECT = "mobilenetv3-bench"
CODE_FOLDERS = ("backbones", "heads", "tasks", "conf", "pyproject.toml")


class _LatencyConditions(TypedDict):
    median_ms: float
    """Milliseconds a batch."""
    engine: str
    """``torch``, ``onnxruntime`` ...; with its precision where that is not float32 (``openvino bf16``)."""
    device: str
    """The machine: CPU or GPU model."""
    threads: int
    batch_size: int


class Latency(_LatencyConditions, total=False):
    """How long one forward took, and under which conditions.

    Compared only where ``device``, ``engine``, ``threads`` and ``batch_size`` are equal.
    """

    iqr_ms: float | None
    """Interquartile range."""
    p90_ms: float | None
    n: int
    """Timed repetitions."""
    noisy: bool
    """The machine was busy with something else."""
    p99_ms: float
    interval_ms: list[float]
    """The median's 95 % interval. This and what follows is ``tasks.benchmark``'s."""
    outliers: int
    outliers_ms: list[float]
    noise: list[str]
    """Why it is noisy."""
    file_mb: float
    """Of what is shipped, decimal megabytes."""
    peak_memory_mib: float | None
    """Of a fresh process."""
    stages_ms: dict[str, float]
    """``decode``, ``resize``, ``network``, ``post-process`` and ``whole``, from a JPEG to predictions, a batch."""
    share_of_peak: float
    """Share of the time that the machine's peaks make unavoidable; of ``tasks.benchmark roofline``."""


class _Required(TypedDict):
    task: str
    """``classify``, ``detect``, ``segment``, ``multitask``."""
    backbone: str
    """The config's ``backbone.name``, with what was overridden of it where that matters (``large width=0.75``)."""
    head: str
    """The head's name; joined by ``+`` for a joint run."""
    data: str
    """The data yaml's name (``combined``: several sets for a joint run)."""
    split: str
    """What the metrics were computed on: ``test``, ``val``."""
    image_size: int | list[int]
    """The network's input, px: one side of a square, or [height, width]."""
    seed: int
    budget: str
    """What limited the training: ``30 epochs``, ``10 min``, ``0`` (untrained). Only equal budgets are compared."""
    weights: str | None
    """What the backbone, or the whole model, started from; None = from scratch."""
    metrics: dict[str, float | None]
    """Fractions in [0, 1]: ``top1``, ``map``, ``miou`` ...; ``<task>/<metric>`` in a joint run. None = undefined."""
    params: int
    """Parameters of the whole network, BatchNorm's included."""
    madds: int
    """Multiply-adds of one image of ``image_size``: convolutions and matrix products."""
    latency: Latency | None
    device: str
    """The machine that trained: CPU or GPU model."""
    threads: int
    batch_size: int
    train_seconds: float
    commit: str | None
    """Of the repository the code lies in; None outside a checkout."""
    dirty: bool | None
    """The code differed from ``commit``."""
    versions: dict[str, str | None]
    """python, torch, torchvision, lightning, numpy, and this project."""
    config: dict[str, Any]
    """The whole composed config, as plain data."""
    overrides: list[str]
    """What was given on the command line."""
    time: str
    """When the run ended: ISO 8601 with its offset from UTC."""


class Record(_Required, total=False):
    """One line of ``results.jsonl``. The fields of ``_Required`` always stand there; those below may be absent."""

    run: str | None
    """The run's folder, as written."""
    command: str | None
    """The command that repeats it."""
    per_class: dict[str, dict[str, float | None]]
    """task -> {class name: fraction}."""
    sharing: dict[str, Any]
    """Of a joint run: what one backbone for all heads saves, see ``tasks.reporting.latency.sharing``."""
    cores: int
    note: str
    """For the titles of tables: ``synthetic``, ``10 % of train`` ..."""


class Problem(NamedTuple):
    """A line that is no record."""

    path: str
    line: int
    """Counted from 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


_NUMBER = (int, float)
_TEXT = (str,)
_RANGED = ((int,), _NUMBER, (int, list))
_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int,), "params": (int,), "madds": (int,), "threads": (int,), "batch_size": (int,), "cores": (int,),
    "train_seconds": _NUMBER, "dirty": (bool,), "image_size": (int, list),
    "metrics": (dict,), "latency": (dict,), "versions": (dict,), "config": (dict,), "per_class": (dict,),
    "sharing": (dict,), "overrides": (list,),
}  # fmt: skip
REQUIRED = tuple(_Required.__annotations__)
OPTIONAL = tuple(name for name in Record.__annotations__ if name not in REQUIRED)
_MAY_BE_NULL = {"weights", "latency", "commit", "dirty", "run", "command"}
_LATENCY = {"median_ms": _NUMBER, "engine": _TEXT, "device": _TEXT, "threads": (int,), "batch_size": (int,)}
DEEPEST = 300
"""Levels of a record at most: what walks through it calls itself."""
# some writers put NaN where JSON has no number
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)
_CHECKS = [(name, _KINDS.get(name, _TEXT), name in _MAY_BE_NULL) for name in REQUIRED + OPTIONAL]


def check_record(record: object) -> str | None:
    """What is wrong with a record read from JSON; None if nothing is."""
    if not isinstance(record, dict):
        return f"is a JSON {type(record).__name__}, expected an object with the fields of a run record"
    missing = [name for name in REQUIRED if name not in record]
    if missing:
        return f"lacks {', '.join(missing)}"
    for name, kinds, may_be_null in _CHECKS:
        value = record.get(name)
        if value is None and (may_be_null or name not in record):
            continue
        if type(value) not in kinds or (kinds in _RANGED and not _within(value)):
            return f"{name} is {_short(value)}, expected {_expected(kinds)}"
    return _check_inside(record)


def _check_inside(record: dict[str, Any]) -> str | None:
    size = record["image_size"]
    if type(size) is list and not (len(size) == 2 and all(type(side) is int for side in size)):
        return f"image_size is {_short(size)}, expected one side or [height, width]"
    for name in ("trainer", "backbone", "head", "heads", "data"):
        part = record["config"].get(name)
        if part is not None and type(part) is not dict:
            return f"config {name} is {_short(part)}, expected dict"
    for table, values in (("metrics", record["metrics"]), *record.get("per_class", {}).items()):
        if type(values) is not dict:
            return f"per_class {table} is {_short(values)}, expected dict"
        for name, value in values.items():
            # written out: a call for each of a hundred thousand values is felt
            if value is not None and not (type(value) in _NUMBER and -1e300 < value < 1e300):
                return f"{table} {name} is {_short(value)}, expected a finite number or null"
    for name, kinds in _LATENCY.items() if record["latency"] is not None else ():
        value = record["latency"].get(name)
        if type(value) not in kinds or not _within(value):
            return f"latency {name} is {_short(value)}, expected {_expected(kinds)}"
    return None


def _within(value: Any) -> bool:
    """Not infinite, nor so large that arithmetic on it fails; true of all that is no number."""
    return type(value) not in _NUMBER or -1e300 < value < 1e300


def _expected(kinds: tuple[type, ...]) -> str:
    return "a finite number" if kinds is _NUMBER else " or ".join(kind.__name__ for kind in kinds)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_record(path: str | Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Append a record as one line; safe beside other processes that do the same.

    Numbers that are not finite become null; numpy and torch scalars become numbers, paths strings. A last line that a
    crash left without its end stays as it is and the record starts a new line. On a full disk nothing is left behind.

    Args:
        path: the ``results.jsonl``; its folder is made.
        record: the fields of ``Record``.
    Returns:
        The record as it was written.
    Raises:
        ValueError: a field is missing, unknown or of the wrong kind; nothing is written.
    """
    plain = cast("dict[str, Any]", _plain(record, "record"))
    unknown = [name for name in plain if name not in REQUIRED and name not in OPTIONAL]
    wrong = f"has the unknown field {', '.join(unknown)}" if unknown else check_record(plain)
    if wrong:
        raise ValueError(f"a run record {wrong}; the fields are listed in tasks/reporting/results.py")
    line = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    append_line(path, line)
    return plain


def check_appendable(path: str | Path) -> None:
    """Refuse a file that no record could be appended to, before the work that it would be of.

    Raises:
        ValueError: it, or the folder where it would be made, is not to be written to.
    """
    whole = Path(path).absolute()
    place = next(place for place in (whole, *whole.parents) if place.exists())
    if not os.access(place, os.W_OK) or not (place == whole or place.is_dir()):
        raise ValueError(
            f"results={path}: {place} cannot be written to; set results=<a file elsewhere>, or null for no records"
        )


def append_line(path: str | Path, line: str) -> None:
    """Append one line of text under a lock, after the end of a line that a crash cut short."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # surrogates (file names that are no UTF-8) must not lose the record of a long run
    data = line.encode("utf-8", "backslashreplace") + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with _locked(handle):
            size = os.fstat(handle).st_size
            if size and _last_byte(handle, size) != b"\n":
                data = b"\n" + data
            try:
                written = 0
                while written < len(data):
                    written += os.write(handle, data[written:])
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
    finally:
        os.close(handle)


def _last_byte(handle: int, size: int) -> bytes:
    os.lseek(handle, size - 1, os.SEEK_SET)
    return os.read(handle, 1)


@contextmanager
def _locked(handle: int) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)


def _plain(value: object, where: str) -> object:
    """The value as JSON knows it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a numpy or torch scalar
        return _plain(value.item(), where)
    raise ValueError(f"{where} is a {type(value).__name__}, which a run record cannot hold; turn it into plain data")


def read_records(paths: str | Path | Iterable[str | Path]) -> tuple[list[Record], list[Problem]]:
    """The records of one or several files, in order.

    Fields that this version does not know are kept: a newer one may have written them.

    Args:
        paths: a ``results.jsonl``, or several.
    Returns:
        The records, and the lines that are none, each with its reason; empty lines are passed over.
    Raises:
        FileNotFoundError: a file is not there.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"results={path} is not a file; train something first, or set results=<a results.jsonl>"
            )
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                record = _DECODER.decode(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                problems.append(Problem(str(path), number, f"is not UTF-8 text ({error.reason})"))
                continue
            except (ValueError, RecursionError) as error:
                problems.append(Problem(str(path), number, f"is not JSON, or was cut short ({error})"))
                continue
            wrong = check_record(record)
            brackets = line.count(b"{") + line.count(b"[")  # few lines have so many that they could be so deep
            if brackets > DEEPEST and _depth(record) > DEEPEST:
                wrong = f"is nested {_depth(record)} deep, expected at most {DEEPEST}"
            if wrong:
                problems.append(Problem(str(path), number, wrong))
            else:
                records.append(record)
    return records, problems


def _depth(value: object) -> int:
    """How many objects and lists lie within each other."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def environment(threads: int, device: str | None = None) -> dict[str, Any]:
    """The machine and the versions, as fields of a record.

    Args:
        threads: torch's (``torch.get_num_threads()``).
        device: an accelerator's name, if one was used; None = the CPU's.
    Returns:
        ``device``, ``cores`` (those this process may use), ``threads``, ``versions``.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    packages = ("torch", "torchvision", "lightning", "numpy", PROJECT)
    versions = {"python": platform.python_version()} | {name: _version(name) for name in packages}
    return {"device": device or cpu_name(), "cores": cores, "threads": threads, "versions": versions}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The CPU's model as the system names it."""
    with suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return " ".join(value.split())
    if platform.system() == "Darwin":
        with suppress(OSError, subprocess.SubprocessError):
            name = subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5
            )
            if name.stdout.strip():
                return name.stdout.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def git_state() -> tuple[str | None, bool | None]:
    """The commit of the repository that holds this code, and whether the code differs from it.

    Only the project's own folders count as changes: a ``results.jsonl`` or a run's outputs beside them do not.

    Returns:
        (hash, changed); (None, None) without git, outside a checkout, or when the code is not tracked there.
    """
    root = Path(__file__).resolve().parents[2]
    # a venv inside somebody's repository must not lend us its commit
    if _git(root, "ls-files", "--error-unmatch", "--", str(Path(__file__).resolve())) is None:
        return None, None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *CODE_FOLDERS)
    if not commit or changes is None:
        return None, None
    return commit, bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    """Git's answer; None if there is none."""
    # variables of a surrounding git (a hook's GIT_DIR) would answer for another repository
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, env=surroundings
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
