"""Joining data sets: order, shared images, classes that clash; the yaml on the real sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from tasks.data import NOT_ARGUMENTS, DataSet, Sample
from tasks.data.combine import combine, read

ROOT = Path(__file__).parents[1]
SHARED = (ROOT / "../shared/data").resolve()


def part(name: str, task: str, counts: tuple[int, int, int], classes: tuple[str, ...] = ("a", "b")) -> DataSet:
    splits = {
        split: [Sample(f"{name}/{split}{i}.jpg", (4, 4), {task: i}) for i in range(count)]
        for split, count in zip(("train", "val", "test"), counts, strict=True)
    }
    return DataSet(name, {task: classes}, splits, [f"{name}: one"], "tiny")


def lengths(data: DataSet) -> dict[str, int]:
    return {split: len(each) for split, each in data.splits.items()}


def test_splits_are_concatenated_and_tasks_merged() -> None:
    data = combine([part("x", "classify", (3, 1, 0)), part("y", "detect", (2, 0, 2), ("c",))])
    assert data.classes == {"classify": ("a", "b"), "detect": ("c",)}
    assert lengths(data) == {"train": 5, "val": 1, "test": 2}
    assert [s.image[0] for s in data.splits["train"]] == list("xxxyy")
    assert data.skipped == ["x: x: one", "y: y: one"]
    assert (data.name, data.note) == ("x+y", "x: tiny; y: tiny")
    same = combine([part("x", "classify", (3, 1, 0)), part("y", "classify", (2, 1, 1))])
    assert lengths(same) == {"train": 5, "val": 2, "test": 1}


def test_an_image_of_two_parts_becomes_one_sample() -> None:
    boxes, masks = part("x", "detect", (3, 0, 0)), part("x", "segment", (5, 0, 0), ("c", "d"))
    masks.name = "z"
    data = combine([boxes, masks])
    assert lengths(data)["train"] == 5
    assert [set(s.targets) for s in data.splits["train"]] == [{"detect", "segment"}] * 3 + [{"segment"}] * 2
    assert [s.image for s in data.splits["train"]] == [s.image for s in masks.splits["train"]]
    masks.splits = {"train": masks.splits["train"][2:], "val": [], "test": masks.splits["train"][:1]}
    with pytest.raises(ValueError, match=r"x/train0\.jpg is in both train and test"):
        combine([boxes, masks])


@pytest.mark.parametrize(
    ("classes", "message"),
    [(("a", "c"), "class 1 is 'b' and 'c'"), (("b", "a"), "class 0 is 'a' and 'b'"), (("a",), "2 against 1")],
)
def test_classes_that_differ_are_named(classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"x and y have different classes for detect: {message}"):
        combine([part("x", "detect", (1, 1, 1)), part("y", "detect", (1, 1, 1), classes)])


def test_one_target_twice_is_refused() -> None:
    other = part("x", "detect", (1, 1, 1))
    other.name = "z"
    with pytest.raises(ValueError, match=r"x/train0\.jpg has targets for detect in x and z"):
        combine([part("x", "detect", (1, 1, 1)), other])


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


def folder(root: Path, classes: str = "ab", count: int = 3) -> dict[str, Any]:
    for split in ("train", "val", "test"):
        for name in classes:
            for i in range(count):
                write(root / split / name / f"{i}.jpg")
    config = OmegaConf.to_container(OmegaConf.create((ROOT / "conf/data/folder.yaml").read_text()), resolve=False)
    assert isinstance(config, dict)
    return {**config, "root": str(root), "tasks": ["classify"], "seed": 0}


def test_parts_are_read_by_their_own_readers_and_repeated(tmp_path: Path) -> None:
    parts = {"one": folder(tmp_path / "1"), "two": folder(tmp_path / "2", count=1)}
    data = read(parts, {})
    assert lengths(data) == {"train": 8, "val": 8, "test": 8}
    assert lengths(read(parts, {"two": 3})) == {"train": 12, "val": 8, "test": 8}
    with pytest.raises(ValueError, match=r"data.repeats has three: 2; expected 1 or more for one of one, two"):
        read(parts, {"three": 2})
    with pytest.raises(ValueError, match=r"data.repeats has two: 0"):
        read(parts, {"two": 0})
    with pytest.raises(ValueError, match=r"one and two have different classes for classify: 2 against 3"):
        read({"one": folder(tmp_path / "1"), "two": folder(tmp_path / "3", "abc")}, {})
    with pytest.raises(ValueError, match=r"data.parts is empty"):
        read({}, {})


def test_a_parts_error_names_the_parts_key(tmp_path: Path) -> None:
    part = folder(tmp_path / "1")
    with pytest.raises(
        FileNotFoundError, match=r"folder: data\.parts\.one\.root is not set; set data\.parts\.one\.root="
    ):
        read({"one": {**part, "root": None}})
    (tmp_path / "1" / "train" / "c").mkdir()
    with pytest.raises(ValueError, match=r"'?c'?.*"):
        read({"one": part})
    assert read({"one": part}, on_error="skip").skipped
    with pytest.raises(ValueError, match="Expecting property name"):  # an error that is made of more than a text
        read({"one": {"_target_": "json.loads", "s": "{"}})


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose(overrides=["+data=combined", "+tasks=[classify,detect,segment]", "+data_seed=0", *overrides])
    return OmegaConf.to_container(config, resolve=True)["data"]  # type: ignore[call-overload,index]


def test_the_yaml_takes_the_parts_yamls_and_gives_each_its_task() -> None:
    config = composed("data.parts.camvid.val=0.2")
    assert {name: part["tasks"] for name, part in config["parts"].items()} == {
        "clothing": ["classify"],
        "bccd": ["detect"],
        "camvid": ["segment"],
    }
    assert config["parts"]["camvid"]["val"] == 0.2
    assert config["parts"]["bccd"]["_target_"] == "tasks.data.voc.read"
    assert config["smallest_object"] == config["parts"]["bccd"]["smallest_object"] == 0.08
    assert composed("~data.parts.bccd")["smallest_object"] == 0.2


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_the_three_real_sets() -> None:
    config = composed(*(f"data.parts.{name}.root={SHARED / name}" for name in ("clothing", "bccd", "camvid")))
    data = instantiate({key: value for key, value in config.items() if key not in NOT_ARGUMENTS}, _convert_="all")
    assert {task: len(names) for task, names in data.classes.items()} == {"classify": 10, "detect": 3, "segment": 11}
    assert lengths(data) == {"train": 3068 + 263 + 367, "val": 341 + 29 + 101, "test": 372 + 72 + 233}
    assert any("BloodImage_00338" in line for line in data.skipped)
