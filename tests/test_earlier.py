"""``skip_done``: a sweep that is started again does only what is left, and goes on with what was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from example_records import record, write
from fixtures import ROOT, Command
from omegaconf import OmegaConf

from tasks.cli import compose
from tasks.training import checkpoint
from tasks.training.build import complete, plain
from tasks.training.earlier import claim, finished, identity, stopped

SWEEP = [
    "-m", "backbone=small,mobilenetv1", "data=voc", "image_size=[64,64]", "batch_size=4", "workers=0",
    "trainer.validations=1", "trainer.threads=1", "trainer.progress=false", "skip_done=true",
]  # fmt: skip


def config_of(*overrides: str, full: bool = False) -> dict[str, Any]:
    config = plain(compose("detect", overrides))
    return complete(config | {"heads": {"detect": config["head"] | {"num_classes": 3}}})[0] if full else config


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ([], True),
        (["workers=0", "cache_gb=0", "results=a.jsonl", "output=b", "trainer.save_every=1", "skip_done=true"], True),
        (["trainer.progress=false"], True),
        (["seed=1"], False),
        (["optimizer.lr=0.1"], False),
        (["backbone.width=0.5"], False),
        (["trainer.max_steps=3"], False),
        (["data=bccd"], False),
        (["head.negatives=2.0"], False),
    ],
)
def test_what_makes_two_runs_the_same(change: list[str], same: bool) -> None:
    assert (identity(config_of(*change)) == identity(config_of())) == same
    assert (identity(config_of(*change)) == identity(config_of(full=True))) == same, "the classes are the data's"


def test_a_record_is_found_whatever_its_commit(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    config = config_of(f"results={results}")
    assert finished(config) is None
    whole = json.loads(json.dumps(config_of(f"results={results}", full=True)))
    write(results, [record(config=whole, commit="old"), record(config=whole, seed=1), record(), record(config={})])
    with results.open("a") as lines:
        lines.write('{"task": "det\n')
    found = finished(config)
    assert found is not None
    assert found["commit"] == "old"
    assert finished(config_of(f"results={results}", "seed=1")) is None, "its config has another seed"
    assert finished(config_of(f"results={results}", "optimizer.lr=0.5")) is None


def test_an_unfinished_folder_is_found(tmp_path: Path) -> None:
    config = config_of(f"output={tmp_path}", "optimizer.lr=1e-5", "trainer.max_time=00:00:10:00")
    assert stopped(config) is None
    for name in ("a_cut", "b_finished", "c_other", "d_stopped"):
        folder = tmp_path / "detect" / name
        folder.mkdir(parents=True)
        own = config_of(*(["seed=9"] if name == "c_other" else []), "optimizer.lr=1e-5", full=True)
        own["trainer"]["max_time"] = "00:00:10:00"
        OmegaConf.save(OmegaConf.create({**own, "overrides": []}), folder / checkpoint.CONFIG)
    (tmp_path / "detect/a_cut" / checkpoint.CONFIG).write_text("task: [detect")
    (tmp_path / "detect/b_finished" / checkpoint.RECORD).write_text("{}")
    assert stopped(config) == tmp_path / "detect/d_stopped"
    (tmp_path / "detect/d_stopped" / checkpoint.RECORD).write_text("{}")
    assert stopped(config) is None


def test_a_running_run_is_nobody_else_s(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="there are no such locks here")
    code = "import sys, time\nfrom pathlib import Path\nfrom tasks.training.earlier import claim\n"
    code += "with claim(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is being trained by another process"), claim(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with claim(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_sweep_goes_on_where_it_was(command: Command, voc: Path, tmp_path: Path, how: signal.Signals) -> None:
    words = [*SWEEP, f"data.root={voc}", "trainer.max_steps=80", "trainer.save_every=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    sweep = subprocess.Popen(
        [sys.executable, "-m", "tasks.detect", *words],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    results = tmp_path / "results.jsonl"

    def second() -> list[Path]:
        return [p for p in tmp_path.glob("outputs/detect/*/last.pt") if not (p.parent / checkpoint.RECORD).is_file()]

    while not (results.is_file() and second()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert second(), "the machine is too busy: the second run has not begun"
    os.killpg(sweep.pid, how)
    sweep.communicate(timeout=60)
    assert sweep.returncode != 0
    (folder,) = [path.parent for path in second()]
    step = torch.load(folder / "last.pt", weights_only=True)["step"]
    assert 0 < step < 80, "the test wants to stop in the middle"
    done = command("detect", *words)
    assert done.stdout.count("done        ") == 1
    assert done.stdout.count("run folder  ") == 2, "one line at the start, one at the end"
    assert str(folder.relative_to(tmp_path)) in done.stdout
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [one["backbone"] for one in records] == ["small", "mobilenetv1"]
    assert "backbone=mobilenetv1" in records[1]["overrides"], "the sweep's own words"
    again = command("detect", *words)
    assert again.stdout.count("done        ") == 2
    assert len(results.read_text().splitlines()) == 2
