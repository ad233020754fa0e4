"""Image and mask folders: pairing, class values, seeded faults, CamVid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tasks.data import IGNORE, DataSet
from tasks.data.masks import read, value_table

ROOT = Path(__file__).parents[1]
SHARED = ROOT / "../shared/data"
CLASSES = ["road", "car", "sky"]


def load(root: Path | None, name: str = "masks", **changes: Any) -> DataSet:
    """Read as conf/data/<name>.yaml says."""
    arguments = yaml.safe_load((ROOT / f"conf/data/{name}.yaml").read_text())
    assert arguments.pop("name") == name
    assert arguments.pop("_target_") == "tasks.data.masks.read"
    return read(**(arguments | {"root": root and str(root), "tasks": ["segment"], "seed": 0} | changes))


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make(root: Path, counts: tuple[int, int, int] = (6, 2, 3), suffix: str = "") -> Path:
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for i in range(count):
            write(root / f"images/{split}/{split}{i}.jpg", rng.integers(0, 255, (8, 10, 3), dtype=np.uint8))
            write(root / f"masks/{split}/{split}{i}{suffix}.png", rng.integers(0, 3, (8, 10), dtype=np.uint8))
    return root


def test_pairs_by_name(tmp_path: Path) -> None:
    data = load(make(tmp_path), classes=CLASSES)
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 6, "val": 2, "test": 3}
    assert data.classes == {"segment": ("road", "car", "sky")}
    for each in data.splits.values():
        for sample in each:
            mask = sample.image.replace("images", "masks").replace(".jpg", ".png")
            assert np.array_equal(sample.targets["segment"].load(), np.array(Image.open(mask)))
            assert sample.size == (8, 10)


def test_folders_within_a_split_belong_to_the_name(tmp_path: Path) -> None:
    for city, frame in (("bern", "0"), ("bern", "1"), ("basel", "0")):
        write(tmp_path / f"photos/{city}/{frame}.jpg", np.zeros((8, 10, 3), np.uint8))
        write(tmp_path / f"photos/labels/{city}/{frame}.png", np.full((8, 10), len(city) - 4, np.uint8))
    write(tmp_path / "photos/.thumbs/0.jpg", np.zeros((2, 2, 3), np.uint8))
    data = load(tmp_path, classes=["a", "b"], images="photos", masks="photos/labels", val=0.4, test=None)
    samples = [sample for each in data.splits.values() for sample in each]
    assert sorted(Path(sample.image).relative_to(tmp_path / "photos").as_posix() for sample in samples) == [
        "basel/0.jpg", "bern/0.jpg", "bern/1.jpg",
    ]  # fmt: skip
    for sample in samples:
        assert (sample.targets["segment"].load() == len(Path(sample.image).parent.name) - 4).all()
    (tmp_path / "photos/labels/bern/1.png").unlink()
    with pytest.raises(ValueError, match=r"image photos/bern/1\.jpg has no mask"):
        load(tmp_path, classes=["a", "b"], images="photos", masks="photos/labels", val=0.4, test=None)


def test_suffix_joined_and_held_out_splits(tmp_path: Path) -> None:
    data = load(make(tmp_path, suffix="_L"), classes=CLASSES, mask_suffix="_L", train=["train", "val"], val=0.25)
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 6, "val": 2, "test": 3}
    flat = load(
        tmp_path, classes=CLASSES, mask_suffix="_L", images="images/train", masks="masks/train", val=0.5, test=None
    )
    assert {split: len(each) for split, each in flat.splits.items()} == {"train": 3, "val": 3, "test": 0}


def test_images_and_masks_in_one_folder(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / f"{i}.png", np.zeros((8, 10, 3), np.uint8))
        write(tmp_path / f"{i}_mask.png", np.full((8, 10), i % 3, np.uint8))
    data = load(tmp_path, classes=CLASSES, images=".", masks="./", mask_suffix="_mask", val=0.25, test=None)
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 3, "val": 1, "test": 0}
    for sample in [*data.splits["train"], *data.splits["val"]]:
        assert (sample.targets["segment"].load() == int(Path(sample.image).stem) % 3).all()


def test_values_and_void_are_mapped(tmp_path: Path) -> None:
    root = make(tmp_path)
    raw = np.array([[7, 30, 99], [255, 0, 7]], np.uint8)
    write(root / "images/train/train0.jpg", np.zeros((2, 3, 3), np.uint8))
    write(root / "masks/train/train0.png", raw)
    data = load(root, classes=["a", "b"], values=[30, 7], ignore=[99, 0])
    first = next(s for s in data.splits["train"] if s.image.endswith("train0.jpg"))
    assert first.targets["segment"].load().tolist() == [[1, 0, IGNORE], [IGNORE, IGNORE, 1]]
    binary = value_table(["back", "object"], [0, 255], [])
    assert (binary[0], binary[255]) == (0, 1)


def test_a_class_must_not_have_the_value_of_void(tmp_path: Path) -> None:
    root = make(tmp_path)
    names = [f"class {i}" for i in range(256)]
    assert len(load(root, classes=names[:255]).classes["segment"]) == 255
    with pytest.raises(ValueError, match=r"has 256 classes for masks.*expected at most 255, as 255 means ignored"):
        load(root, classes=names)


def test_a_value_outside_the_classes_is_named_with_its_count_when_loaded(tmp_path: Path) -> None:
    root = make(tmp_path)
    mask = np.zeros((8, 10), np.uint8)
    mask[2, :7] = 9
    write(root / "masks/train/train0.png", mask)
    data = load(root, classes=CLASSES)  # nothing is decoded yet
    first = next(s for s in data.splits["train"] if s.image.endswith("train0.jpg"))
    with pytest.raises(ValueError, match=r"train0\.png has the mask value 9 in 7 pixels, but the classes are 0 to 2"):
        first.targets["segment"].load()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing mask", r"image images/train/train3\.jpg has no mask"),
        ("orphan", r"mask masks/train/extra\.png has no image"),
        ("size", r"mask masks/train/train3\.png is of 7 x 8 pixels, but its image has 10 x 8"),
        ("broken", r"train3\.jpg is not an image"),
        ("empty", r"train3\.png is not an image \(it is empty\)"),
    ],
)
def test_faults_are_named_and_can_be_skipped(tmp_path: Path, fault: str, message: str) -> None:
    root = make(tmp_path)
    mask, image = root / "masks/train/train3.png", root / "images/train/train3.jpg"
    match fault:
        case "missing mask":
            mask.unlink()
        case "orphan":
            write(root / "masks/train/extra.png", np.zeros((8, 10), np.uint8))
        case "size":
            write(mask, np.zeros((8, 7), np.uint8))
        case "broken":
            image.write_text("hello")
        case "empty":
            mask.write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        load(root, classes=CLASSES)
    data = load(root, classes=CLASSES, on_error="skip")
    assert len(data.skipped) == 1
    assert len(data.splits["train"]) == (6 if fault == "orphan" else 5)


def test_a_colour_mask_is_refused(tmp_path: Path) -> None:
    root = make(tmp_path)
    write(root / "masks/test/test0.png", np.zeros((8, 10, 3), np.uint8))
    first = load(root, classes=CLASSES).splits["test"][0]
    with pytest.raises(ValueError, match=r"test0\.png is a mask in RGB colours"):
        first.targets["segment"].load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": None}, "data.classes is not set"),
        ({"classes": "car"}, r"data\.classes is 'car'; expected a list: data\.classes=\[car\]"),
        ({"ignore": 11}, r"data\.ignore is 11; expected a list: data\.ignore=\[11\]"),
        ({"classes": ["a", "b", "a"]}, "has the class 'a' twice for segment; remove or rename one, in data.classes"),
        ({"ignore": [2]}, "have 2 twice or out of range"),
        ({"values": [0, 1]}, "2 numbers for 3 classes"),
        ({"values": [0, 1, 300]}, "have 300 twice or out of range"),
        ({"val": "vall"}, r"no folder images/vall \(data.images is images/\{split\}\); did you mean 'val'"),
        ({"masks": "maks/{split}"}, r"no folder maks/train \(data.masks is"),
        ({"mask_suffix": "_x"}, "has no mask"),
        (
            {"images": "images/train", "masks": "masks/train", "val": 0.1},
            r"data\.test is test, but without \{split\} .* set data\.val=0\.1 data\.test=0\.1",
        ),
        ({"val": "train"}, "is in both train and val"),
        ({"tasks": ["classify"]}, "no targets for classify"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(make(tmp_path), **({"classes": CLASSES} | changes))


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path)
    write(root / "images/train/train0.png", np.zeros((8, 10, 3), np.uint8))
    with pytest.raises(ValueError, match="have one name"):
        load(root, classes=CLASSES)


def test_root_must_be_set() -> None:
    with pytest.raises(FileNotFoundError, match=r"data.root is not set"):
        load(None, classes=CLASSES)


@pytest.mark.skipif(not (SHARED / "camvid").exists(), reason="needs ../shared/data/camvid")
def test_camvid() -> None:
    data = load(SHARED / "camvid", "camvid")
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 367, "val": 101, "test": 233}
    assert len(data.classes["segment"]) == 11
    for sample in data.splits["val"][:10]:
        raw = np.array(Image.open(sample.image.replace("images", "masks").replace(".jpg", ".png")))
        assert np.array_equal(sample.targets["segment"].load(), np.where(raw == 11, IGNORE, raw))
        assert sample.size == (360, 480)
