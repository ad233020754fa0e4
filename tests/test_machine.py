"""What is said of the machine, from a made-up ``/proc`` and from numbers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tasks.deploy import machine

TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def write_proc(root: Path, busy: float, processes: dict[int, tuple[int, float]]) -> Path:
    """Processors that have worked ``busy`` seconds, and pid -> (parent, seconds)."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    share = round(busy * TICK / len(cores))
    lines = [f"cpu{core} {share} 0 0 12345 0 0 0 0 0 0" for core in cores]
    root.mkdir(exist_ok=True)
    (root / "stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *lines, "cpu9999 77777 0 0 0 0 0 0 0", "intr 1"]))
    for pid, (parent, seconds) in processes.items():
        (root / str(pid)).mkdir(exist_ok=True)
        words = ["S", str(parent), *["0"] * 9, str(round(seconds * TICK)), "0", "0", "0", "0"]
        (root / str(pid) / "stat").write_text(f"{pid} (a name) with) {' '.join(words)}")
    return root


def test_own_time_is_that_of_the_family(tmp_path: Path) -> None:
    me = os.getpid()
    family = {me: (1, 3.0), me + 1: (me, 2.0), me + 2: (me + 1, 1.0), 1: (0, 50.0), me + 7: (1, 9.0)}
    proc = write_proc(tmp_path, 60, family)
    assert machine.own_seconds((), proc) == pytest.approx(6.0)
    assert machine.own_seconds((me + 1,), proc) == pytest.approx(3.0)  # with all that it started
    assert machine.busy_seconds(proc) == pytest.approx(60, abs=0.1)


def test_others_share_is_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    watch = machine.Watch(proc=write_proc(tmp_path, 60, {os.getpid(): (1, 5.0)}))
    write_proc(tmp_path, 75, {os.getpid(): (1, 12.0)})
    load = watch.load()
    assert load.seconds == 10
    assert load.others_cores == pytest.approx(0.8, abs=0.02)
    assert machine.noise(load) == ["others took 0.80 cores"]


def test_without_proc_nothing_is_claimed(tmp_path: Path) -> None:
    assert machine.busy_seconds(tmp_path / "none") is None
    assert machine.own_seconds((), tmp_path / "none") is None
    load = machine.Watch(proc=tmp_path / "none").load()
    assert load.others_cores is None
    assert "unknown" in load.in_words()


def test_load_average_stands_in_where_shares_are_not_known() -> None:
    busy = machine.Load(1.0, None, 3.5, None)
    assert machine.noise(busy, cores=4) == ["the load average was 3.5 before the run"]
    assert machine.noise(busy, cores=16) == []
    assert machine.noise(machine.Load(1.0, None, None, None), cores=4) == []
    assert machine.noise(machine.Load(1.0, 0.01, 3.5, None), cores=4) == []  # known to be quiet


def test_the_load_average_is_from_before_our_own_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averages = iter([0.25, 3.5, 3.5])
    monkeypatch.setattr(os, "getloadavg", lambda: (next(averages), 0.0, 0.0), raising=False)
    machine.load_average.cache_clear()
    try:
        machine.Watch()
        later = machine.Watch(proc=tmp_path / "none").load()
        assert later.average == 0.25
        assert machine.noise(later, cores=2) == []
        assert "load average before 0.25" in machine.in_words([2])[1]
    finally:
        machine.load_average.cache_clear()


def test_restless_timings_are_noise() -> None:
    quiet = machine.Load(1.0, 0.0, 0.0, 0)
    draw = np.random.default_rng(0)
    assert machine.noise(quiet, draw.normal(10, 0.1, 100)) == []
    assert "interquartile" in machine.noise(quiet, draw.normal(10, 3, 100))[0]
    assert (
        machine.noise(quiet, np.where(np.arange(100) % 5, 10 + draw.normal(0, 0.1, 100), 30))[0] == "20 % are outliers"
    )


def test_description_names_the_conditions() -> None:
    found = machine.describe(2, ["pytest", "a-package-that-is-not-there"])
    assert found["threads"] == 2
    assert found["versions"]["pytest"]
    assert "a-package-that-is-not-there" not in found["versions"]
    assert "2 threads" in machine.in_words([2])[0]
