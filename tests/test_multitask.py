"""The training commands as a whole, the joint one above all: defaults, balances, resuming, sharing, joined sets."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deploy_models import network, pictures
from fixtures import SHARED, write_voc
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from backbones.mobilenetv3 import MobileNetV3
from tasks import build, load
from tasks.cli import compose
from tasks.data import Boxes, Sample
from tasks.data.loader import Samples, evaluation_loader
from tasks.reporting import latency
from tasks.training import run as training
from tasks.training.balance import METHODS
from tasks.training.build import read_data
from tasks.training.callbacks import Keep
from tasks.training.evaluate import evaluate, scores
from tasks.training.metrics import METRICS
from tasks.training.run import run
from tasks.training.setup import load_splits

TF_SMALL = SHARED / "weights" / "tf_mobilenetv3_small_100.safetensors"
TASKS = ("classify", "detect", "segment")
HEADS = {"classify": "pooled", "detect": "ssdlite", "segment": "lraspp"}
WEIGHTS = {"classify": 0.1, "detect": 0.7, "segment": 6.0}  # of conf/recipe/multitask_scenes.yaml
TINY = ["image_size=[64,64]", "batch_size=4", "eval_batch_size=3", "workers=0", "trainer.progress=false"]


@pytest.fixture(scope="module", autouse=True)
def brief_timing() -> Iterator[None]:
    """Every record has latencies; here of the fewest rounds."""
    timed = latency.interleaved
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "interleaved", lambda calls, seconds: timed(calls, 0))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A few small scenes, drawn once."""
    words = ["data.image_size=64", "data.workers=1", "data.train=8", "data.val=4", "data.test=4"]
    return [f"data.root={tmp_path_factory.mktemp('scenes')}", *words]


def go(task: str, root: Path, *words: str) -> tuple[dict, Path]:
    """What a command does with these words, in this process; its record and its run folder."""
    overrides = [*TINY, f"output={root}", f"results={root}/results.jsonl", *words]
    record = run(compose(task, overrides), overrides)
    return record, root / record["run"]


def losses(folder: Path) -> list[dict[str, float]]:
    """What ``metrics.csv`` has of each training step."""
    rows = [row for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines()) if row["train/loss"]]
    return [{name: float(value) for name, value in row.items() if name.startswith("train/") and value} for row in rows]


def of_task(losses: dict[str, float], task: str) -> float:
    return sum(value for name, value in losses.items() if name.startswith(f"train/{task}/"))


def saved(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize("command", [*TASKS, "multitask"])
def test_a_command_s_defaults_leave_weights_scores_and_pictures(
    command: str, scenes: list[str], tmp_path: Path
) -> None:
    record, folder = go(command, tmp_path, *scenes, "trainer.max_steps=2")
    tasks = TASKS if command == "multitask" else (command,)
    before, ending = ({task: mark.format(task) if tasks == TASKS else "" for task in tasks} for mark in ("{}/", "_{}"))
    assert record["head"].split("+") == [HEADS[task] for task in tasks]
    assert all(0 <= record["metrics"][before[task] + METRICS[task].main] <= 1 for task in tasks)
    assert json.loads((tmp_path / "results.jsonl").read_text())["metrics"].keys() == record["metrics"].keys()
    assert set(load(folder).heads) == set(record["per_class"]) == set(tasks)
    expected = {f"predictions{ending[task]}.png" for task in tasks}
    expected |= {f"confusion{ending[task]}.png" for task in tasks if task != "detect"}
    assert {path.name for path in folder.glob("*.png")} == expected
    assert all(len(np.unique(np.asarray(Image.open(folder / name)))) > 9 for name in expected), "one is empty"
    assert saved(folder)["step"] == 2


@pytest.fixture(scope="module")
def balanced(scenes: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """method -> the folder of a joint run of two steps."""
    words = [*scenes, "trainer.max_steps=2"]
    return {
        name: go("multitask", tmp_path_factory.mktemp(name), *words, f"balance.method={name}")[1] for name in METHODS
    }


def test_every_balance_trains_all_tasks_and_weighs_them_its_own_way(balanced: dict[str, Path]) -> None:
    steps = {name: losses(folder) for name, folder in balanced.items()}
    for of_method in steps.values():
        assert len(of_method) == 2
        assert all(math.isfinite(value) for step in of_method for value in step.values())
        assert all(of_task(step, task) > 0 for step in of_method for task in TASKS)
    for step in steps["fixed"]:
        assert step["train/loss"] == pytest.approx(sum(WEIGHTS[task] * of_task(step, task) for task in TASKS))
    fixed, uncertainty, mgda = (steps[name][0] for name in ("fixed", "uncertainty", "mgda"))
    totals = [first.pop("train/loss") for first in (fixed, uncertainty, mgda)]
    assert uncertainty == pytest.approx(fixed)  # one seed: before the first step they differ in the sum alone
    assert mgda == pytest.approx(fixed)
    assert totals[1] == pytest.approx(totals[0])  # all log variances are still 0
    assert totals[2] != pytest.approx(totals[0])


def test_uncertainty_s_log_variances_are_trained_and_not_decayed(balanced: dict[str, Path]) -> None:
    content, first = saved(balanced["uncertainty"]), losses(balanced["uncertainty"])[0]
    assert set(content["balance"]) == {f"log_variance.{task}" for task in TASKS}
    group = content["optimizer"]["param_groups"][-1]
    assert (len(group["params"]), group["weight_decay"]) == (3, 0)
    grows = [WEIGHTS[task] * of_task(first, task) > 0.5 for task in TASKS]  # where the loss is above a half
    assert set(grows) == {True, False}
    assert [bool(content["balance"][f"log_variance.{task}"] > 0) for task in TASKS] == grows
    moments = [content["optimizer"]["state"][place]["exp_avg"] for place in group["params"]]
    assert [bool(moment < 0) for moment in moments] == grows
    assert not saved(balanced["fixed"])["balance"]


class ScoredError(Exception):
    """Stops a run when it has come to its record."""


@pytest.mark.parametrize("method", METHODS)
def test_one_backbone_pass_a_batch_in_training_and_in_scoring(
    method: str, scenes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, int] = {True: 0, False: 0}
    forward = MobileNetV3.forward

    def counted(self: MobileNetV3, image: torch.Tensor) -> dict[str, torch.Tensor]:
        seen[self.training] += len(image)
        return forward(self, image)

    def stop(*_: object) -> None:
        raise ScoredError

    monkeypatch.setattr(MobileNetV3, "forward", counted)
    monkeypatch.setattr(training, "make_record", stop)  # it times further passes
    words = [*scenes, "trainer.max_steps=3", "trainer.validations=1", f"balance.method={method}"]
    with pytest.raises(ScoredError):
        go("multitask", tmp_path, *words)
    assert seen == {True: 3 * 4, False: 4 + 4}  # steps x batch; validation and test images


def test_a_frozen_head_of_a_joint_run_stays_and_the_others_move(scenes: list[str], tmp_path: Path) -> None:
    _, start = go("detect", tmp_path, *scenes, "trainer.max_steps=1", "head=ssdlite")
    words = [f"weights={start}", "freeze={heads.detect: 1.0}", "trainer.max_steps=2", "ema.share=0"]
    _, folder = go("multitask", tmp_path, *scenes, *words)
    before, after = saved(start, "best.pt")["model"], saved(folder)["model"]
    learned = [key for key in before if key.startswith("heads.detect.") and before[key].is_floating_point()]
    assert len(learned) > 20
    assert all(torch.equal(before[key], after[key]) for key in learned)
    assert not torch.equal(before["backbone.stem.conv.weight"], after["backbone.stem.conv.weight"])


def test_a_stopped_joint_run_ends_where_an_uninterrupted_one_does(
    scenes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*scenes, "balance.method=uncertainty", "trainer.max_steps=3", "trainer.validations=3"]
    at_step_end = Keep.on_train_batch_end

    def stop(self: Keep, trainer: object, module: object, *rest: object) -> None:
        self.interrupted = module.step == 2  # as Ctrl-C sets it
        at_step_end(self, trainer, module, *rest)

    record, whole = go("multitask", tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        patch.setattr(Keep, "on_train_batch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            go("multitask", tmp_path / "stopped", *words)
    (stopped,) = (tmp_path / "stopped" / "multitask").iterdir()
    assert saved(stopped)["step"] == 2
    words = [f"resume={stopped}"]
    resumed = run(compose("multitask", words), words)
    for name, part in (("best.pt", "model"), ("last.pt", "model"), ("last.pt", "average"), ("last.pt", "balance")):
        ours, theirs = saved(stopped, name)[part], saved(whole, name)[part]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), (name, part)
    assert json.dumps(resumed["metrics"]) == json.dumps(record["metrics"])  # nan is nan


def by_hand(net: nn.Module, size: tuple[int, int]) -> np.ndarray:
    """Parameters and multiply-adds: a layer's output values, each as many as one of its filters has weights."""
    madds: list[int] = []
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [
        layer.register_forward_hook(lambda layer, _, out: madds.append(out.numel() * layer.weight[0].numel()))
        for layer in layers
    ]
    with torch.inference_mode():
        net.eval()(torch.rand(1, 3, *size))
    for hook in hooks:
        hook.remove()
    return np.array([sum(p.numel() for p in net.parameters()), sum(madds)])


def test_sharing_counts_what_one_backbone_for_three_heads_saves() -> None:
    size = (64, 96)
    joint = network("multitask", "small", size)
    found = latency.sharing(joint, {task: joint.single(task) for task in TASKS}, size)
    ours, singles = by_hand(joint, size), sum(by_hand(network(task, "small", size), size) for task in TASKS)
    assert np.array_equal([found["params"], found["madds"]], np.stack([ours, singles], 1))
    assert np.array_equal(singles - ours, 2 * by_hand(joint.backbone, size))
    assert (singles > ours).all()


def write_parts(root: Path) -> list[str]:
    """Three sets in the layouts of those in ``conf/data/combined.yaml``, and the words that name them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 2), ("test", 5)):
        for i in range(count):
            path = root / "clothing" / split / ("dress", "hat")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (70, 50, 3), np.uint8)).save(path)
    write_voc(root / "bccd", train=4, val=2, test=3)
    for split, count in (("train", 4), ("val", 2), ("test", 4)):
        for kind, shape, values in (("images", (48, 64, 3), 256), ("masks", (48, 64), 2)):
            (root / "camvid" / kind / split).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, values, shape, np.uint8)
                pixels[0] = 11  # void in a mask
                Image.fromarray(pixels).save(root / "camvid" / kind / split / f"{i}.png")
    roots = [f"data.parts.{name}.root={root / name}" for name in ("clothing", "bccd", "camvid")]
    lists = [f"data.parts.bccd.{split}={split}" for split in ("train", "val", "test")]
    return ["data=combined", *roots, *lists, "data.parts.bccd.classes=null", "data.parts.camvid.classes=[road,sky]"]


def test_three_joined_sets_train_together_and_each_is_scored_for_its_task(tmp_path: Path) -> None:
    words = write_parts(tmp_path)
    record, folder = go("multitask", tmp_path, *words, "batch_size=12", "trainer.max_steps=2")
    assert all(of_task(step, task) > 0 for step in losses(folder) for task in TASKS)  # every batch has all 12 samples
    assert saved(folder)["step"] == len(losses(folder)) == 2
    split = load_splits(read_data(record["config"]), record["config"], Console(quiet=True))["test"]
    metrics = evaluate(load(folder), evaluation_loader(split, 4, 0))
    assert metrics["classify"].confusion.sum(1).tolist() == [3, 2]
    assert metrics["detect"].images == 3
    assert metrics["segment"].confusion.sum() == 4 * 47 * 64
    assert scores(metrics) == pytest.approx(record["metrics"], abs=1e-3, nan_ok=True)


def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """The truth is what the net sees, but for an error in each task and a target that is missing."""
    net, samples = network("multitask", "small", (64, 96)), []
    for i, size in enumerate([(64, 96), (80, 60), (50, 120), (64, 64), (96, 90)]):
        path = tmp_path / f"{i}.png"
        Image.fromarray(pictures(i + 1, size)[-1].transpose(1, 2, 0)).save(path)
        seen = net.predict(path)
        boxes, labels = (seen["detect"][key][:3].numpy() for key in ("boxes", "labels"))
        mask = (seen["segment"].numpy() + (i == 0)) % 3
        targets = {
            "classify": (int(seen["classify"].argmax()) + (i == 1)) % 3,
            "detect": Boxes(boxes, (labels + (i == 2)) % 3, np.zeros(3, bool), (boxes[:, 2:] - boxes[:, :2]).prod(1)),
            "segment": SimpleNamespace(load=mask.copy),
        }
        targets.pop({2: "segment", 3: "classify", 4: "detect"}.get(i), None)
        samples.append(Sample(str(path), size, targets))
    split = Samples(samples, TASKS, net.view, 0, training=False)
    one, three, whole = (scores(evaluate(net, evaluation_loader(split, count, 0))) for count in (1, 3, 5))
    assert one["classify/top1"] == 3 / 4
    assert 0 < one["detect/map"] < 1
    assert 0 < one["segment/miou"] < 1
    assert three == pytest.approx(one, abs=1e-6, nan_ok=True)
    assert whole == pytest.approx(one, abs=1e-6, nan_ok=True)


@pytest.mark.skipif(not TF_SMALL.is_file(), reason="the shared weights are not here")
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_weights_of_tensorflow_bring_their_padding_and_train(task: str, scenes: list[str], tmp_path: Path) -> None:
    first = load_file(TF_SMALL)["conv_stem.weight"]
    net = build(task, ["head.num_classes=3", f"backbone.weights={TF_SMALL}"])
    assert torch.equal(net.backbone.stem.conv.weight, first)
    record, folder = go(task, tmp_path, *scenes, f"backbone.weights={TF_SMALL}", "trainer.max_steps=1")
    for backbone in (net.backbone, load(folder).backbone):
        assert bool(backbone.same_padding)
        assert backbone.stem.conv.padding == (0, 0)
    assert record["weights"] == str(TF_SMALL)
    moved = saved(folder)["model"]["backbone.stem.conv.weight"] - first
    assert 0 < moved.abs().max() < 0.01
