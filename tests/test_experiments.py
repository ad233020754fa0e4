"""Published set-ups: they hold the printed numbers, describe the published networks, and run on each set's layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import ROOT, Command
from PIL import Image
from rich.console import Console
from torch import nn

from tasks import build
from tasks.cli import compose
from tasks.data.cityscapes import CLASSES
from tasks.training.balance import Balance
from tasks.training.build import complete, make_model, plain, read_data
from tasks.training.module import TaskModule
from tasks.training.schedule import Budget, Growth, Schedule
from tasks.training.setup import check, load_splits

FOLDER = ROOT / "conf" / "experiment"
NAMES = sorted(
    f"{folder}/{path.stem}" for folder in ("paper", "torchvision") for path in (FOLDER / folder).glob("*.yaml")
)
TINY = [
    "image_size=[64,64]",
    "batch_size=2",
    "eval_batch_size=2",
    "workers=0",
    "trainer.max_steps=2",
    "trainer.accumulate=1",
]
OFFLINE = {f"torchvision/coco_{head}": ["backbone.weights=null"] for head in ("lraspp", "deeplabv3")}

RMSPROP, SGD = "torch.optim.RMSprop", "torch.optim.SGD"
PUBLISHED: dict[str, dict[str, Any]] = {  # rates: at an epoch, or at a step where length is in steps
    "paper/imagenet_large": {
        "optimizer": RMSPROP, "weight_decay": 1e-5, "batch": 4096, "norm_decay": 0.99, "ema": 0.9999, "length": 600,
        "rates": {5: 0.099, 6: 0.1 * 0.99**2, 300: 0.1 * 0.99**100},
    },
    "paper/imagenet_small": {
        "optimizer": RMSPROP, "weight_decay": 1e-5, "batch": 4096, "norm_decay": 0.99, "ema": 0.9999, "length": 600,
        "rates": {5: 0.099, 6: 0.1 * 0.99**2, 300: 0.1 * 0.99**100},
    },
    "paper/slim_imagenet_large": {
        "optimizer": RMSPROP, "weight_decay": 1e-5, "batch": 8 * 192, "norm_decay": 0.997, "ema": 0.9999, "length": 600,
        "rates": {0: 0.0, 2.5: 0.08, 6: 0.16 * 0.99**2},
    },
    "paper/coco_ssdlite_large": {
        "optimizer": SGD, "weight_decay": 4e-5, "batch": 512, "norm_decay": 0.97, "ema": 0, "length": 400_000,
        "rates": {0: 0.13333, 2_000: 0.4, 201_000: 0.2, 400_000: 0.0},
    },
    "paper/coco_ssdlite_small": {
        "optimizer": SGD, "weight_decay": 4e-5, "batch": 512, "norm_decay": 0.97, "ema": 0, "length": 800_000,
        "rates": {0: 0.13333, 2_000: 0.4, 401_000: 0.2, 800_000: 0.0},
    },
    "paper/cityscapes_lraspp_large": {
        "optimizer": SGD, "weight_decay": 4e-5, "batch": 16, "norm_decay": 0.9997, "ema": 0, "length": 90_000,
        "rates": {0: 0.007, 45_000: 0.007 * 0.5**0.9, 90_000: 0.0},
    },
    "paper/cityscapes_lraspp_small": {
        "optimizer": SGD, "weight_decay": 4e-5, "batch": 16, "norm_decay": 0.9997, "ema": 0, "length": 90_000,
        "rates": {0: 0.007, 45_000: 0.007 * 0.5**0.9, 90_000: 0.0},
    },
    "torchvision/imagenet_large_v1": {
        "optimizer": RMSPROP, "weight_decay": 1e-5, "batch": 8 * 128, "norm_decay": 0.99, "ema": 0.9999, "length": 600,
        "rates": {0: 0.064, 2: 0.064 * 0.973, 599: 0.064 * 0.973**299},
    },
    "torchvision/imagenet_small": {
        "optimizer": RMSPROP, "weight_decay": 1e-5, "batch": 8 * 128, "norm_decay": 0.99, "ema": 0.9999, "length": 600,
        "rates": {0: 0.064, 2: 0.064 * 0.973, 599: 0.064 * 0.973**299},
    },
    "torchvision/imagenet_large_v2": {
        "optimizer": SGD, "weight_decay": 2e-5, "batch": 8 * 128, "norm_decay": 0.99, "ema": 0.99997, "length": 600,
        "rates": {0: 0.005, 5: 0.5, 302.5: 0.25, 600: 0.0},
    },
    "torchvision/coco_ssdlite": {
        "optimizer": SGD, "weight_decay": 4e-5, "batch": 8 * 24, "norm_decay": 0.97, "ema": 0, "length": 660,
        "rates": {0: 0.00015, 1: 0.15, 330.5: 0.075, 660: 0.0},
    },
    "torchvision/coco_lraspp": {
        "optimizer": SGD, "weight_decay": 1e-6, "batch": 8 * 4, "norm_decay": None, "ema": 0, "length": 30,
        "rates": {0: 0.01, 15: 0.01 * 0.5**0.9, 30: 0.0},
    },
    "torchvision/coco_deeplabv3": {
        "optimizer": SGD, "weight_decay": 1e-6, "batch": 8 * 4, "norm_decay": None, "ema": 0, "length": 30,
        "rates": {0: 0.01, 15: 0.01 * 0.5**0.9, 30: 0.0},
    },
}  # fmt: skip

PARAMETERS = {  # classes, published parameters, whether they count BatchNorm's, how exactly they are given
    "paper/imagenet_large": (1000, 5.4e6, True, 0.1e6),
    "paper/imagenet_small": (1000, 2.5e6, True, 0.05e6),
    "paper/slim_imagenet_large": (1001, 5_484_313, True, 0),  # torchvision's 5,483,032 and 1281 for slim's background
    "paper/coco_ssdlite_large": (91, 3.22e6, False, 0.006e6),  # TF predicts the background, too
    "paper/coco_ssdlite_small": (91, 1.77e6, False, 0.006e6),
    "paper/cityscapes_lraspp_large": (19, 1.51e6, True, 0.005e6),
    "paper/cityscapes_lraspp_small": (19, 0.47e6, True, 0.005e6),
    "torchvision/imagenet_large_v1": (1000, 5_483_032, True, 0),
    "torchvision/imagenet_large_v2": (1000, 5_483_032, True, 0),
    "torchvision/imagenet_small": (1000, 2_542_856, True, 0),
    "torchvision/coco_ssdlite": (90, 3_440_060, True, 0),
    "torchvision/coco_lraspp": (21, 3_221_538, True, 0),
    "torchvision/coco_deeplabv3": (21, 11_029_328 - 3_851, True, 0),  # theirs has an auxiliary classifier
}


def note(name: str) -> str:
    """A recipe's header, lines joined."""
    lines = (FOLDER / f"{name}.yaml").read_text().split("\ndefaults:")[0].splitlines()
    return re.sub(r"\s*\\?\s+", " ", " ".join(line.lstrip("#") for line in lines))


def task_of(name: str) -> str:
    """The command that the header names."""
    found = re.search(rf"python -m tasks\.(\w+) experiment={name} data\.root=", note(name))
    assert found, f"{name}.yaml does not say how it is run"
    return found[1]


def config_of(name: str, *overrides: str) -> dict[str, Any]:
    return plain(compose(task_of(name), [f"experiment={name}", *overrides]))


def write_image(path: Path, size: tuple[int, int], seed: int) -> None:
    """Noise of height, width ``size``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def write_imagenet(root: Path) -> Path:
    """train/<wnid>/<wnid>_<number>.JPEG and val/<wnid>/ILSVRC2012_val_<number>.JPEG."""
    for c, wnid in enumerate(("n01440764", "n02102040", "n03000684")):
        for i in range(4):
            write_image(root / "train" / wnid / f"{wnid}_{i}.JPEG", (60, 80), 10 * c + i)
        for i in range(2):
            write_image(root / "val" / wnid / f"ILSVRC2012_val_{2 * c + i:08}.JPEG", (60, 80), 10 * c + 5 + i)
    return root


def write_coco(root: Path) -> Path:
    """annotations/instances_<split>.json with category ids that have gaps, and the splits' images."""
    categories = [{"id": key, "name": name} for key, name in ((1, "person"), (3, "car"), (90, "toothbrush"))]
    for split, count in (("train2017", 6), ("val2017", 2)):
        images, annotations = [], []
        for i in range(count):
            file = f"{i:012}.jpg"
            write_image(root / split / file, (60, 80), i)
            images.append({"id": i + 7, "file_name": file, "height": 60, "width": 80})
            for k, (x, y, w, h) in enumerate(((4, 6, 40, 30), (30, 20, 24, 36))):
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(
                    {"id": 10 * i + k, "image_id": i + 7, "category_id": (1, 3, 90)[(i + k) % 3], "bbox": [x, y, w, h],
                     "area": w * h, "iscrowd": 0, "segmentation": [corners]}
                )  # fmt: skip
        file = root / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


def write_cityscapes(root: Path) -> Path:
    """leftImg8bit/<split>/<city> and gtFine/<split>/<city> with label ids, scored ones and void."""
    ids = np.array([*CLASSES.values(), 0, 9], np.uint8)
    for split, city, count in (("train", "aachen", 3), ("train", "ulm", 2), ("val", "lindau", 2)):
        for i in range(count):
            stem = f"{city}_{i:06}_000019"
            write_image(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", (64, 128), i)
            mask = np.kron(np.random.default_rng(i).choice(ids, (4, 8)), np.ones((16, 16), np.uint8))
            target = root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(target)
    return root


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data set -> a tiny one in its own layout."""
    writers = {"imagenet": write_imagenet, "coco": write_coco, "cityscapes": write_cityscapes}
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in writers.items()}


def test_every_recipe_is_in_the_tables() -> None:
    assert set(NAMES) == set(PUBLISHED) == set(PARAMETERS)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_lab_note(name: str) -> None:
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# @package _global_\n")
    for part in ("python -m tasks.", "Printed (", "Inferred: ", "Differs: "):
        assert part in note(name) or (part == "Inferred: " and name.startswith("torchvision/")), part
    assert re.search(r"Answers to: |cannot be compared with: ", note(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_numbers_stand_in_the_config(name: str) -> None:
    config, published = config_of(name), PUBLISHED[name]
    optimizer, trainer = config["optimizer"], config["trainer"]
    assert optimizer["_target_"] == published["optimizer"]
    assert optimizer["weight_decay"] == published["weight_decay"]
    assert optimizer["momentum"] == 0.9
    assert config["batch_size"] * trainer["accumulate"] == published["batch"]
    assert trainer["clip_norm"] is None
    assert published["length"] in (trainer["max_epochs"], trainer["max_steps"])
    assert None in (trainer["max_epochs"], trainer["max_steps"])
    assert config["bn_momentum"] == (published["norm_decay"] and pytest.approx(1 - published["norm_decay"]))
    assert (config["ema"]["share"] and config["ema"]["cap"]) == published["ema"]
    schedule = Schedule(**config["schedule"])
    for at, rate in published["rates"].items():
        factor = schedule.factor(at / published["length"] + 1e-12, at + 1e-9)
        assert factor * optimizer["lr"] == pytest.approx(rate, rel=2e-3, abs=1e-6), at


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_the_published_one(name: str) -> None:
    classes, published, counts_norms, margin = PARAMETERS[name]
    net = build(task_of(name), [f"experiment={name}", f"head.num_classes={classes}", *OFFLINE.get(name, [])])
    norms = sum(p.numel() for part in net.modules() if isinstance(part, nn.BatchNorm2d) for p in part.parameters())
    assert abs(sum(p.numel() for p in net.parameters()) - (0 if counts_norms else norms) - published) <= margin


def test_a_choice_on_the_command_line_beats_the_recipe() -> None:
    config = config_of("paper/imagenet_large", "backbone=small", "optimizer.lr=0.01", "data=folder")
    assert config["backbone"]["name"] == "small"
    assert config["optimizer"]["lr"] == 0.01
    assert config["data"]["name"] == "folder"


def test_a_misspelt_recipe_is_refused_with_the_right_name() -> None:
    for wrong in ("paper/imagenet_larg", "imagenet_large", "papers/imagenet_large"):
        with pytest.raises(ValueError, match=rf"no experiment '{wrong}', did you mean '[a-z]+/imagenet_large.*; there"):
            compose("classify", [f"experiment={wrong}"])


def test_the_default_data_sets_recipe_does_not_leak_in() -> None:
    augment = config_of("paper/coco_ssdlite_large")["augment"]
    assert augment["vertical_flip"] == 0.0  # scenes: 0.5
    assert augment["iou_crop"] > 0  # scenes: 0


def test_without_a_number_each_part_keeps_its_batch_norm_momentum() -> None:
    name = "torchvision/coco_lraspp"
    net = build("segment", [f"experiment={name}", "head.num_classes=21", *OFFLINE[name]])
    seen = {}
    for momentum in (None, 0.3):
        module = TaskModule(
            net, torch.optim.SGD, Schedule(), Growth(), Budget(100, None), Balance(("segment",), "fixed", {}), 8, 2, 0,
            ema=0.0, ema_cap=0.0, bn_momentum=momentum, backbone_lr=1.0, freeze={},
        )  # fmt: skip
        module._prepare(progress=0.0, expected_steps=100.0)
        seen[momentum] = {part.momentum for part in net.modules() if isinstance(part, nn.BatchNorm2d)}
    assert seen == {None: {0.01, 0.1}, 0.3: {0.3}}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_on_its_data_sets_layout(
    name: str, command: Command, roots: dict[str, Path], tmp_path: Path
) -> None:
    overrides = [*TINY, *OFFLINE.get(name, [])]
    if config_of(name)["train_size"]:
        overrides += ["train_size=[64,64]", "image_size=[64,128]"]
    recipe = config_of(name, *overrides)
    words = [task_of(name), f"experiment={name}", f"data.root={roots[recipe['data']['name']]}"]
    command(*words, *overrides)
    (record,) = records(tmp_path)
    ran = record["config"]
    for part in ("optimizer", "schedule", "ema", "augment", "mix", "evaluation", "backbone", "bn_momentum", "trainer"):
        assert ran[part] == recipe[part], part
    assert ran["heads"][task_of(name)] | {"num_classes": None} == recipe["head"]
    assert record["data"] == recipe["data"]["name"]
    assert record["split"] == "test"
    assert record["train_seconds"] > 0
    assert record["metrics"]
    assert all(0 <= value <= 1 for value in record["metrics"].values() if value is not None)
    assert record["image_size"] == recipe["image_size"]
    assert ran["train_size"] == recipe["train_size"]


def test_ten_minutes_name_their_data_and_budget() -> None:
    names = sorted(path.stem for path in (FOLDER / "ten_minutes").glob("*.yaml"))
    assert names == ["camvid", "cifar10"]
    for name in names:
        config = plain(compose(task_of(f"ten_minutes/{name}"), [f"experiment=ten_minutes/{name}"]))
        assert config["data"]["name"] == name
        assert config["trainer"]["max_time"] == "00:00:10:00"
    lighter = np.array(compose("segment", ["experiment=ten_minutes/camvid"]).head.class_weights)
    usual = np.array(compose("segment", ["data=camvid"]).head.class_weights)  # of the root of the share; here its root
    np.testing.assert_allclose(lighter**2 / usual, np.mean(lighter**2 / usual), rtol=0.03)


def test_training_may_see_another_size_than_scoring(roots: dict[str, Path]) -> None:
    words = [f"data.root={roots['cityscapes']}", "train_size=[48,64]", "image_size=[64,96]", "data.val=null"]
    config = plain(compose("segment", ["data=cityscapes", *words]))
    splits = load_splits(read_data(config), config, Console(quiet=True))
    batch, whole = splits["train"][0, 0]["item"], splits["test"][0, 0]["item"]
    assert batch["image"].shape[-2:] == (48, 64)
    assert batch["mask"].shape[-2:] == (48, 64)
    assert whole["image"].shape[-2:] == (64, 96)
    assert make_model(complete(config)[0], complete(config)[1]).image_size == (64, 96)


@pytest.mark.parametrize(("value", "problem"), [("16", "at least 32 px"), ("[64,64,64]", "whole pixels")])
def test_a_training_size_is_checked(value: str, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"train_size is .*{problem}"):
        check(plain(compose("segment", [f"train_size={value}"])))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
