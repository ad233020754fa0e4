"""Whole runs on a tiny data set: what they leave behind, that they repeat, and that they go on where they stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures import ROOT, SHARED, Command
from omegaconf import OmegaConf
from PIL import Image

from tasks import build, load
from tasks.cli import compose
from tasks.data.images import decode
from tasks.training.build import plain
from tasks.training.callbacks import Keep
from tasks.training.run import reopen

TF_SMALL = SHARED / "weights" / "tf_mobilenetv3_small_100.safetensors"
TINY = ["data=voc", "image_size=[64,64]", "batch_size=4", "workers=0", "trainer.validations=2", "trainer.threads=1"]


def folder_of(output: str) -> Path:
    return Path(next(line for line in output.splitlines() if line.startswith("run folder")).split()[2])


def weights(folder: Path, name: str = "best.pt") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["model"]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_leaves_what_the_readme_says(command: Command, voc: Path, tmp_path: Path) -> None:
    done = command("detect", *TINY, f"data.root={voc}", "trainer.max_epochs=2")
    folder = tmp_path / folder_of(done.stdout)
    assert {"config.yaml", "best.pt", "last.pt", "metrics.csv", "predictions.png"} <= {p.name for p in folder.iterdir()}
    assert list(folder.glob("events.out.tfevents*"))
    assert not list(folder.glob(".*tmp"))
    (record,) = records(tmp_path)
    assert record["task"] == "detect"
    assert record["split"] == "test"
    assert record["budget"] == "2 epochs"
    assert record["params"] == sum(p.numel() for p in load(folder).parameters())
    assert set(record["per_class"]["detect"]) == {"square", "bar"}
    assert "map_50" in done.stdout
    assert "try next" in done.stdout


def test_a_trained_run_loads_and_predicts(command: Command, voc: Path, tmp_path: Path) -> None:
    done = command("detect", *TINY, f"data.root={voc}", "trainer.max_epochs=1")
    net = load(tmp_path / folder_of(done.stdout))
    assert not net.training
    assert net.classes == {"detect": ("bar", "square")}
    seen = net.predict(voc / "JPEGImages" / "000.jpg")["detect"]
    assert seen["boxes"].shape[1] == 4
    assert float(seen["boxes"].max()) <= 64


def test_build_needs_no_data() -> None:
    net = build("detect", ["backbone=large", "head.num_classes=90"])
    assert not net.training
    with torch.inference_mode():
        output = net(torch.rand(1, 3, 320, 320))["detect"]
    assert output["cls"].shape == (1, 3234, 91)


def test_one_seed_gives_one_result(command: Command, voc: Path, tmp_path: Path) -> None:
    words = [*TINY, f"data.root={voc}", "trainer.max_steps=6"]
    first, second, other = (command("detect", *words, f"seed={seed}") for seed in (1, 1, 2))
    one, two, three = (weights(tmp_path / folder_of(done.stdout)) for done in (first, second, other))
    assert equal(one, two)
    assert not equal(one, three)
    a, b, _ = records(tmp_path)
    assert a["metrics"] == b["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_ends_where_an_uninterrupted_one_does(
    command: Command, voc: Path, tmp_path: Path, how: signal.Signals
) -> None:
    words = [
        *TINY,
        f"data.root={voc}",
        "trainer.max_steps=60",
        "trainer.save_every=0",
        "trainer.accumulate=2",
        "workers=1",
    ]
    whole = tmp_path / folder_of(command("detect", *words).stdout)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    stopped = subprocess.Popen(
        [sys.executable, "-m", "tasks.detect", *words, "output=stopped"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (last := list(tmp_path.glob("stopped/detect/*/last.pt"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(stopped.pid, how)  # as a terminal does: the loader's processes get it, too
    out, _ = stopped.communicate(timeout=60)
    assert stopped.returncode != 0
    step = torch.load(last[0], weights_only=True)["step"]
    assert 0 < step < 60, "the test wants to stop in the middle"
    if how is signal.SIGINT:
        assert f"resume={last[0].parent.relative_to(tmp_path)}" in out
    command("detect", f"resume={last[0].parent}")
    assert equal(weights(whole), weights(last[0].parent))
    assert equal(weights(whole, "last.pt"), weights(last[0].parent, "last.pt"))
    first, second = records(tmp_path)
    assert first["metrics"] == second["metrics"]


def test_resume_refuses_to_become_another_run(command: Command, voc: Path, tmp_path: Path) -> None:
    folder = tmp_path / folder_of(command("detect", *TINY, f"data.root={voc}", "trainer.max_steps=1").stdout)
    done = command("detect", f"resume={folder}", "backbone=large", check=False)
    assert done.returncode == 1
    assert "backbone=large cannot change it" in done.stderr


def test_a_run_goes_on_where_its_data_lies_now(tmp_path: Path) -> None:
    own = ["data=combined", "data.parts.bccd.root=/old"]
    OmegaConf.save(OmegaConf.create({**plain(compose("multitask", own)), "overrides": own}), tmp_path / "config.yaml")
    for words in (["data=combined", "data.parts.bccd.root=/new"], ["+data.parts.bccd.root=/new"]):
        config, _, typed = reopen(tmp_path, plain(compose("multitask", words)), words)
        assert config["data"]["parts"]["bccd"]["root"] == "/new"
        assert typed == own
    for word in ("data.root=/new", "data=scenes", "+data.parts.bcd.root=/new"):
        with pytest.raises(ValueError, match=r"cannot change it; allowed .* results, .*data\.parts\.bccd\.root"):
            reopen(tmp_path, plain(compose("multitask", [word])), [word])


def test_a_finished_run_is_not_run_again(command: Command, voc: Path, tmp_path: Path) -> None:
    folder = tmp_path / folder_of(command("detect", *TINY, f"data.root={voc}", "trainer.max_steps=1").stdout)
    done = command("detect", f"resume={folder}", check=False)
    assert done.returncode == 1
    assert "is finished" in done.stderr
    assert len(records(tmp_path)) == 1


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(command: Command, voc: Path, tmp_path: Path) -> None:
    done = command(
        "detect", *TINY, f"data.root={voc}", "trainer.max_steps=40", "trainer.save_every=0", "optimizer=sgd",
        "optimizer.lr=1e12", "trainer.clip_norm=null", "schedule.warmup=0", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the last good checkpoint is kept" in done.stderr
    assert not (tmp_path / "results.jsonl").exists()
    for file in tmp_path.glob("outputs/detect/*/last.pt"):
        assert all(torch.isfinite(v).all() for v in weights(file.parent, "last.pt").values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    net = build("detect", ["head.num_classes=2"])
    module = SimpleNamespace(model=net, step=7)
    next(net.parameters()).data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite at step 7; the last good checkpoint is kept"):
        Keep(tmp_path, 0, {}, SimpleNamespace()).save(SimpleNamespace(), module)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_names_foreign_code_is_refused(command: Command, voc: Path, tmp_path: Path) -> None:
    folder = tmp_path / folder_of(command("detect", *TINY, f"data.root={voc}", "trainer.max_epochs=0").stdout)
    content = torch.load(folder / "best.pt", weights_only=True)
    for target in (
        "os.system",
        "heads.boxes.torch.hub.load",  # a name that begins as ours do
        "backbones.weights.load_file",
        "tasks.training.setup.os.system",
        "tasks.training.checkpoint.save_text",  # ours, but no part of a model
        "heads.absent.Head",
    ):
        content["config"]["backbone"]["_target_"] = target
        torch.save(content, folder / "best.pt")
        with pytest.raises(ValueError, match=f"would run {re.escape(target)}"):
            load(folder)


def test_without_training_the_score_is_about_zero(command: Command, voc: Path, tmp_path: Path) -> None:
    command("detect", *TINY, f"data.root={voc}", "trainer.max_epochs=0")
    (record,) = records(tmp_path)
    assert record["train_seconds"] == 0
    assert record["metrics"]["map_50"] < 0.05


def test_what_is_frozen_stays(command: Command, voc: Path, tmp_path: Path) -> None:
    """For ever, for half of the run, and by a backbone's rate of zero, which still follows the data's statistics."""
    words = [*TINY, f"data.root={voc}", "schedule.warmup=0", "ema.share=0"]
    runs = {
        "first": ["trainer.max_epochs=0"],
        "frozen": ["trainer.max_steps=4", "freeze={backbone: 1.0}"],
        "thawed": ["trainer.max_steps=4", "freeze={backbone: 0.5}"],
        "slow": ["trainer.max_steps=4", "backbone_lr=0"],
    }
    found = {}
    for name, more in runs.items():
        folder = tmp_path / folder_of(command("detect", *words, *more).stdout)
        found[name] = weights(folder, "best.pt" if name == "first" else "last.pt")
    first = found["first"]
    changed = {
        name: {key.partition(".")[0] for key, value in state.items() if not torch.equal(value, first[key])}
        for name, state in found.items()
    }
    assert changed["frozen"] == {"heads"}
    assert changed["thawed"] == {"backbone", "heads"}
    moved = {key for key, value in found["slow"].items() if not torch.equal(value, first[key])}
    in_backbone = {key for key in moved if key.startswith("backbone.")}
    assert in_backbone
    assert all(key.endswith(("running_mean", "running_var", "num_batches_tracked")) for key in in_backbone)


@pytest.mark.slow
def test_published_weights_are_scored_without_training(command: Command, tmp_path: Path) -> None:
    """ImageNet's layout, 1,000 classes, real photos: the command's top-1 and top-5 are those of timm's own logits.

    Every class has one grey picture; every other photo lies where timm sees it, the others one class further.
    """
    timm = pytest.importorskip("timm")
    if not TF_SMALL.is_file():
        pytest.skip("the shared weights are not here")
    theirs = timm.create_model("tf_mobilenetv3_small_100", checkpoint_path=str(TF_SMALL)).eval()
    view = build("classify", ["backbone=small", "data=imagenet", "head.num_classes=1000"]).view
    photos = sorted((SHARED / "data" / "clothing" / "test").rglob("*.jpg"))[::8]
    grey = tmp_path / "grey.jpg"
    Image.new("RGB", (300, 300), (128, 128, 128)).save(grey)
    images = [
        view({"image": torch.from_numpy(decode(str(path)).transpose(2, 0, 1).copy())}) for path in [*photos, grey]
    ]
    with torch.inference_mode():
        logits = theirs(torch.stack([one["image"].as_subclass(torch.Tensor) for one in images]).float() / 255 * 2 - 1)
    order = logits.argsort(1, descending=True)
    labels = [(int(row[0]) + i % 2) % 1000 for i, row in enumerate(order[:-1])]
    root = tmp_path / "imagenet"
    for split in ("train", "val"):
        for label in range(1000):
            (root / split / f"n{label:08d}").mkdir(parents=True)
            shutil.copy(grey, root / split / f"n{label:08d}")
    for path, label in zip(photos, labels, strict=True):
        shutil.copy(path, root / "val" / f"n{label:08d}")
    command("classify", "backbone=small", "data=imagenet", f"data.root={root}", f"weights={TF_SMALL}",
            "trainer.max_epochs=0", "workers=0")  # fmt: skip
    (record,) = records(tmp_path)
    for name, k in (("top1", 1), ("top5", 5)):
        right = sum(label in order[i, :k] for i, label in enumerate(labels)) + k  # the grey one is in k of its classes
        assert record["metrics"][name] == pytest.approx(right / (len(photos) + 1000), abs=1e-9)
