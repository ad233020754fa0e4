"""Records: what is written is read back, whatever happens to the file in between."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_records import record

from tasks.reporting import results
from tasks.reporting.results import read_records, write_record


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    latency = {"median_ms": 6.5, "engine": "torch", "device": "some CPU", "threads": 1, "batch_size": 1}
    wanted = record(
        latency=latency, per_class={"detect": {"жук\u2028": 0.25}}, run="outputs/x", command="python -m ..."
    )
    write_record(path, wanted)
    write_record(path, record(seed=1))
    records, problems = read_records(path)
    assert not problems
    assert records == [wanted, record(seed=1)]
    assert len(path.read_bytes().splitlines()) == 2


def test_numbers_of_other_libraries_become_plain_and_what_is_not_finite_null(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    metrics = {"map": np.float32(0.5), "map_50": float("nan"), "ar": torch.tensor(0.25), "map_75": np.float64("inf")}
    write_record(path, record(metrics=metrics, params=np.int64(7), run=Path("outputs"), image_size=(320, 256)))
    [read], _ = read_records(path)
    assert read["metrics"] == {"map": 0.5, "map_50": None, "ar": 0.25, "map_75": None}
    assert (read["params"], read["run"], read["image_size"]) == (7, "outputs", [320, 256])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, "unknown field sead"),
        ({"seed": "1"}, "seed is '1', expected int"),
        ({"seed": True}, "seed is True"),
        ({"task": None}, "task is None, expected str"),
        ({"image_size": [320]}, "image_size"),
        ({"metrics": {"map": "high"}}, "metrics map is 'high'"),
        ({"per_class": {"detect": 3}}, "per_class detect"),
        ({"latency": {"median_ms": 3}}, "latency engine is None"),
        ({"config": {"x": object()}}, "record.config.x is a object"),
    ],
)
def test_a_wrong_record_is_refused_and_nothing_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        write_record(path, record(**changes))
    assert not path.exists()


@pytest.mark.parametrize("name", results.REQUIRED)
def test_every_required_field_is_missed(tmp_path: Path, name: str) -> None:
    fields = record()
    del fields[name]
    with pytest.raises(ValueError, match=f"lacks {name}"):
        write_record(tmp_path / "results.jsonl", fields)


def test_bad_lines_are_named_and_the_rest_is_used(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    good = json.dumps(record())
    lines = [
        good, '{"task": "detect"', "", "[1, 2]", '{"epoch": 1, "loss": 3}', json.dumps(record(seed="x")), good,
        json.dumps(record(metrics={"map": float("nan")})), good.replace("0.4", "1e999"), "[" * 100_000,
        good.replace("0.4", "1" + "0" * 400), "9" * 5000,
    ]  # fmt: skip
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + good[:40].encode())
    records, problems = read_records([path])
    assert [r["metrics"]["map"] for r in records] == [0.4, 0.4, None]
    assert [p.line for p in problems] == [2, 4, 5, 6, 9, 10, 11, 12, 13, 14]
    reasons = [p.reason for p in problems]
    assert "cut short" in reasons[0]
    assert "JSON list" in reasons[1]
    assert "lacks task" in reasons[2]
    assert reasons[3] == "seed is 'x', expected int"
    assert "finite" in reasons[4]
    assert "finite" in reasons[6]
    assert "UTF-8" in reasons[8]
    assert str(problems[0]).startswith(f"{path}:2: ")


def test_a_record_too_deep_to_walk_through_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = []
    for levels in (700, 5):
        config: dict[str, Any] = {}
        for _ in range(levels):
            config = {"x": config}
        lines.append(json.dumps(record(config=config)))
    lines.append(json.dumps(record(config={"x": [{}] * 1000})))  # wide, not deep
    path.write_text("\n".join(lines))
    records, (problem,) = read_records(path)
    assert len(records) == 2
    assert str(problem).endswith("results.jsonl:1: is nested 702 deep, expected at most 300")


def test_a_record_after_a_crash_starts_a_new_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(record()) + '\n{"task": "det')
    write_record(path, record(seed=5))
    records, problems = read_records(path)
    assert [r["seed"] for r in records] == [0, 5]
    assert [p.line for p in problems] == [2]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    write_record(path, record())
    before = path.read_bytes()
    real = os.write

    def half(handle: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return real(handle, data[: len(data) - 50])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        write_record(path, record(seed=1))
    assert path.read_bytes() == before


def _write_many(path: Path, seed: int) -> None:
    for i in range(40):
        write_record(path, record(seed=seed * 100 + i, overrides=["x" * 20_000]))


def test_processes_may_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, seed)) for seed in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    records, problems = read_records(path)
    assert not problems
    assert sorted(r["seed"] for r in records) == sorted(seed * 100 + i for seed in range(4) for i in range(40))


def test_a_record_waits_for_the_lock(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no file locks here")
    path = tmp_path / "results.jsonl"
    write_record(path, record())
    before = path.read_bytes()
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = threading.Thread(target=write_record, args=(path, record(seed=1)))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        assert path.read_bytes() == before
    writer.join()
    assert len(read_records(path)[0]) == 2


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="results="):
        read_records(tmp_path / "none.jsonl")


def test_environment_fits_the_record(tmp_path: Path) -> None:
    here = results.environment(threads=3)
    assert here["threads"] == 3
    assert here["device"]
    assert (
        here["versions"]["torch"] == torch.__version__.split("+")[0] or here["versions"]["torch"] == torch.__version__
    )
    assert results.environment(1, "some GPU")["device"] == "some GPU"
    write_record(tmp_path / "results.jsonl", record(**here))


def _git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(
        ["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "tasks" / "reporting" / "results.py"
    code.parent.mkdir(parents=True)
    code.write_text("1")
    monkeypatch.setattr(results, "__file__", str(code))
    assert results.git_state() == (None, None)
    _git(tmp_path, "init")
    assert results.git_state() == (None, None)  # a checkout around code that is not tracked is not the code's
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "x")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "results.jsonl").write_text("{}")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert results.git_state() == (commit, False)
    code.write_text("2")
    assert results.git_state() == (commit, True)
    monkeypatch.setenv("PATH", "")
    assert results.git_state() == (None, None)


def test_records_need_no_torch() -> None:
    code = "import sys, tasks.reporting.results as r; r.environment(1); r.git_state(); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
