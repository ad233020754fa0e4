"""The Pascal VOC reader on tiny folders with seeded faults, and on BCCD."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tasks.data import DataSet, voc

BCCD = Path(__file__).parents[1] / "../shared/data/bccd"
Box = tuple[str, float, float, float, float]


def annotate(root: Path, name: str, *boxes: Box, size: tuple[int, int] = (40, 30), difficult: int = 0) -> None:
    things = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><ymin>{y1}</ymin><xmin>{x1}</xmin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox><part><bndbox><xmin>-9</xmin></bndbox></part></object>"
        for label, x1, y1, x2, y2 in boxes
    )
    text = f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{things}</annotation>"
    (root / "Annotations" / f"{name}.xml").write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images of 40 x 30; a, b and c train, d validates, e and f test; masks of a, b and d."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationClass"):
        (tmp_path / part).mkdir(parents=True)
    for k, name in enumerate("abcdef"):
        Image.new("RGB", (40, 30), (k, k, k)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        annotate(tmp_path, name, ("cat", 1, 1, 40, 30), ("dog", 5, 6, 7 + k, 9))
    for name in "abd":
        mask = np.zeros((30, 40), np.uint8)
        mask[2:9, 3:20], mask[9:12] = 2, 255
        palette = Image.fromarray(mask, "P")
        palette.putpalette([(7 * i) % 256 for i in range(768)])
        palette.save(tmp_path / "SegmentationClass" / f"{name}.png")
    lists = {"train": "a  1\nb -1\n\nc  1\n", "val": "d\n", "test": "e\nf\n", "cat_train": "a 1\n", "none": "\n"}
    for name, text in lists.items():
        (tmp_path / "ImageSets/Main" / f"{name}.txt").write_text(text)
    for name, text in {"train": "a\nb\n", "val": "d\n"}.items():
        (tmp_path / "ImageSets/Segmentation" / f"{name}.txt").write_text(text)
    return tmp_path


def read(root: Path | str | None, **changes: Any) -> DataSet:
    arguments: dict[str, Any] = {
        "root": None if root is None else str(root),
        "train": "train",
        "val": "val",
        "test": "test",
        "classes": None,
        "one_based": True,
        "on_error": "fail",
        "tasks": ["detect"],
        "seed": 0,
    }
    return voc.read(**{**arguments, **changes})


def test_boxes_labels_and_splits(root: Path) -> None:
    data = read(root)
    assert data.classes == {"detect": ("cat", "dog")}
    assert {split: [Path(s.image).stem for s in samples] for split, samples in data.splits.items()} == {
        "train": ["a", "b", "c"],
        "val": ["d"],
        "test": ["e", "f"],
    }
    first = data.splits["train"][0]
    boxes = first.targets["detect"]
    assert first.size == (30, 40)
    assert boxes.xyxy.tolist() == [[0, 0, 40, 30], [4, 5, 7, 9]]
    assert boxes.xyxy.dtype == np.float32
    assert (boxes.labels.tolist(), boxes.labels.dtype) == ([0, 1], np.int64)
    assert boxes.area.tolist() == [1200, 12]
    assert not boxes.crowd.any()


def test_pixels_from_zero_and_listed_classes(root: Path) -> None:
    annotate(root, "a", ("dog", 0, 0, 40, 30))
    data = read(root, one_based=False, classes=["dog", "cat"])
    assert data.splits["train"][0].targets["detect"].xyxy.tolist() == [[0, 0, 40, 30]]
    assert data.splits["train"][1].targets["detect"].labels.tolist() == [1, 0]


def test_a_text_beside_a_picture_is_not_taken_for_it(root: Path) -> None:
    (root / "JPEGImages/b.jpg").rename(root / "JPEGImages/b.PNG")
    for name in ("b.json", "b.txt", "a.txt"):
        (root / "JPEGImages" / name).write_text("{}")
    assert [Path(sample.image).name for sample in read(root).splits["train"]] == ["a.jpg", "b.PNG", "c.jpg"]


def test_names_in_lists_may_have_spaces_and_a_column_behind_them(root: Path) -> None:
    for old, new in (("a", "my  photo"), ("b", "photo 1")):
        (root / f"JPEGImages/{old}.jpg").rename(root / f"JPEGImages/{new}.jpg")
        (root / f"Annotations/{old}.xml").rename(root / f"Annotations/{new}.xml")
    file = root / "ImageSets/Main/train.txt"
    for text in ("my  photo\nphoto 1\nc\n", "my  photo  1\nphoto 1 -1\nc\t0\n"):
        file.write_text(text)
        assert [Path(sample.image).stem for sample in read(root).splits["train"]] == ["my  photo", "photo 1", "c"]
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"train\.txt is not UTF-8 at byte 3; save it so"):
        read(root)


def test_difficult_objects_are_crowd(root: Path) -> None:
    annotate(root, "a", ("cat", 1, 1, 9, 9), difficult=1)
    assert read(root).splits["train"][0].targets["detect"].crowd.tolist() == [True]


def test_empty_images_stay(root: Path) -> None:
    annotate(root, "b")
    boxes = read(root).splits["train"][1].targets["detect"]
    assert boxes.xyxy.shape == (0, 4)
    assert boxes.labels.shape == (0,)


def test_held_out_shares_do_not_overlap_and_follow_the_seed(root: Path) -> None:
    everything = ["train", "val", "test"]
    first = read(root, train=everything, val=0.34, test=0.17)
    assert [len(first.splits[split]) for split in ("train", "val", "test")] == [3, 2, 1]
    again = read(root, train=everything, val=0.34, test=0.17)
    assert [s.image for s in again.splits["val"]] == [s.image for s in first.splits["val"]]
    images = [s.image for samples in first.splits.values() for s in samples]
    assert len(set(images)) == len(images) == 6
    names = [
        {s.image for s in read(root, train=everything, val=0.5, test=None, seed=k).splits["val"]} for k in range(6)
    ]
    assert len({frozenset(chosen) for chosen in names}) > 1
    assert read(root, val=None, test=None).splits["val"] == []
    with pytest.raises(ValueError, match=r"data\.val is 1\.5; expected a split's name, or a share"):
        read(root, val=1.5)
    with pytest.raises(ValueError, match=r"data\.val=0\.6 and data\.test=0\.6 leave nothing to train on"):
        read(root, val=0.6, test=0.6)
    with pytest.raises(ValueError, match="both train and test"):
        read(root, test="train")


def test_segmentation(root: Path) -> None:
    data = read(root, tasks=["segment"], test=None)
    assert data.classes == {"segment": ("background", "cat", "dog")}
    assert [Path(s.image).stem for s in data.splits["train"]] == ["a", "b"]
    mask = data.splits["val"][0].targets["segment"].load()
    assert np.unique(mask).tolist() == [0, 2, 255]
    both = read(root, tasks=["detect", "segment"])
    assert [sorted(sample.targets) for sample in both.splits["train"]] == [["detect", "segment"]] * 2 + [["detect"]]
    shutil.rmtree(root / "SegmentationClass")
    with pytest.raises(ValueError, match=r"not one of 6 images has a mask in .*SegmentationClass"):
        read(root, tasks=["detect", "segment"])
    with pytest.raises(ValueError, match="voc has no targets for classify; it has detect, segment"):
        read(root, tasks=["classify"])


def test_masks_count_the_classes_of_all_annotations(root: Path) -> None:
    """The lists' images show dogs, 2 in the masks; cat stands only in annotations that no list names."""
    for name in "abd":
        annotate(root, name, ("dog", 1, 1, 9, 9))
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    data = read(root, tasks=["detect", "segment"], test=None)
    assert data.classes == {"detect": ("cat", "dog"), "segment": ("background", "cat", "dog")}
    sample = data.splits["train"][0]
    assert sample.targets["detect"].labels.tolist() == [1]
    assert np.unique(sample.targets["segment"].load()).tolist() == [0, 2, 255]
    assert read(root, test=None).classes == {"detect": ("dog",)}


def test_an_unreadable_annotation_is_named_once_where_all_are_read(root: Path) -> None:
    for name in "be":  # of a list, and of none
        (root / "Annotations" / f"{name}.xml").write_text("<annotation>")
    data = read(root, tasks=["detect", "segment"], test=None, on_error="skip")
    assert [line.split()[0] for line in data.skipped] == ["b.xml", "e.xml"]
    assert data.classes["segment"] == ("background", "cat", "dog")


def test_more_classes_than_a_mask_can_hold_are_refused(root: Path) -> None:
    names = [f"class {i}" for i in range(254)]
    assert len(read(root, tasks=["segment"], test=None, classes=names).classes["segment"]) == 255
    with pytest.raises(ValueError, match=r"has 256 classes for masks.*expected at most 255"):
        read(root, tasks=["segment"], test=None, classes=[*names, "one more"])


def test_a_value_outside_the_class_list_is_named_with_its_count(root: Path) -> None:
    data = read(root, tasks=["segment"], test=None, classes=["cat"])
    with pytest.raises(ValueError, match=r"a\.png has the mask value 2 in 119 pixels"):
        data.splits["train"][0].targets["segment"].load()


Fault = tuple[Callable[[Path], Any], str]
FAULTS: dict[str, Fault] = {
    "outside": (
        lambda r: annotate(r, "b", ("cat", 5, 5, 48, 9)),
        r"b.xml has box \(5, 5, 48, 9\) outside the image of 40",
    ),
    "from zero": (lambda r: annotate(r, "b", ("cat", 0, 5, 8, 9)), r"b.xml has box \(0, 5.*set data.one_based=false"),
    "zero area": (lambda r: annotate(r, "b", ("cat", 5, 5, 5, 5)), r"b.xml has box \(5, 5, 5, 5\) of zero area"),
    "zero width": (lambda r: annotate(r, "b", ("cat", 5, 5, 5, 9)), r"box \(5, 5, 5, 9\) of zero width"),
    "negative": (lambda r: annotate(r, "b", ("cat", 9, 5, 2, 9)), r"box \(9, 5, 2, 9\) of negative width"),
    "not finite": (lambda r: annotate(r, "b", ("cat", float("nan"), 5, 2, 9)), r"b.xml has box \(nan, .*not finite"),
    "no xml": (lambda r: (r / "Annotations/b.xml").unlink(), r"b stands in a list .* Annotations/b.xml is missing"),
    "bad xml": (lambda r: (r / "Annotations/b.xml").write_text("<annotation>"), r"b.xml is not a readable annotation"),
    "no box": (
        lambda r: (r / "Annotations/b.xml").write_text("<annotation><object><name>cat</name></object></annotation>"),
        r"b.xml is not a readable annotation: an <object> has no <name>, or its <bndbox> lacks",
    ),
    "bomb": (
        lambda r: (r / "Annotations/b.xml").write_text('<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>'),
        r"b.xml declares a document type or entities",
    ),
    "hidden bomb": (
        lambda r: (r / "Annotations/b.xml").write_text("<!DOCTYPE a><annotation/>", encoding="utf-16"),
        r"b.xml declares a document type or entities",
    ),
    "no image": (lambda r: (r / "JPEGImages/b.jpg").unlink(), r"b stands in a list .* JPEGImages has no image"),
    "bad image": (lambda r: (r / "JPEGImages/b.jpg").write_bytes(b""), r"b.jpg is not an image \(it is empty\)"),
    "size": (
        lambda r: annotate(r, "b", ("cat", 1, 1, 9, 9), size=(30, 40)),
        r"b.xml is of 30 x 40 pixels, but image b.jpg has 40 x 30 .*EXIF",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_once_and_skipped_alone(root: Path, fault: str) -> None:
    seed, message = FAULTS[fault]
    seed(root)
    with pytest.raises(ValueError, match=message) as caught:
        read(root)
    assert str(caught.value).endswith("; fix it, or set data.on_error=skip")
    data = read(root, on_error="skip")
    assert len(data.skipped) == 1
    assert re.search(message, data.skipped[0])
    only_box = "has box" in data.skipped[0]
    assert [Path(s.image).stem for s in data.splits["train"]] == (["a", "b", "c"] if only_box else ["a", "c"])
    assert len(data.splits["train"][0].targets["detect"].labels) == 2


def test_overhang_below_a_pixel_is_clipped(root: Path) -> None:
    annotate(root, "a", ("cat", 0.5, 1, 40.6, 30.9))
    assert read(root).splits["train"][0].targets["detect"].xyxy.tolist() == [[0, 0, 40, 30]]


def test_segmentation_faults(root: Path) -> None:
    Image.new("L", (30, 40)).save(root / "SegmentationClass/a.png")
    with pytest.raises(ValueError, match=r"mask a\.png is of 30 x 40 pixels, but image a has 40 x 30"):
        read(root, tasks=["segment"], test=None)
    (root / "SegmentationClass/a.png").unlink()
    with pytest.raises(ValueError, match=r"SegmentationClass/a\.png is missing"):
        read(root, tasks=["segment"], test=None)


def test_unknown_class_has_a_suggestion(root: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.xml has class 'dog', not in data\.classes; did you mean 'dogs'\?"):
        read(root, classes=["cat", "dogs"])
    with pytest.raises(ValueError, match=r"not one of 6 images has a box; check data\.classes"):
        read(root, classes=["elephant"], on_error="skip")
    with pytest.raises(ValueError, match=r"data\.classes is 'cat'; expected a list: data\.classes=\[cat\]"):
        read(root, classes="cat")
    with pytest.raises(ValueError, match="has the class 'dog' twice for detect; remove or rename one"):
        read(root, classes=["dog", "cat", "dog"])


def test_layout_faults(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root is not set"):
        read(None)
    with pytest.raises(FileNotFoundError, match=r"data\.root is .*nowhere, which does not exist"):
        read(root / "nowhere")
    with pytest.raises(
        ValueError, match=r"no split 'trian' in .*did you mean 'train'\? There are: none, test, train, val$"
    ):
        read(root, train="trian")
    with pytest.raises(ValueError, match=r"none\.txt is empty"):
        read(root, val="none")
    with pytest.raises(ValueError, match=r"data\.val is \[\]; expected a split's name or a list"):
        read(root, val=[])
    parent = tmp_path_factory.mktemp("devkit")
    shutil.copytree(root, parent / "VOC2012")
    with pytest.raises(ValueError, match=r"is not a Pascal VOC folder.*did you mean data\.root=.*VOC2012\?"):
        read(parent)
    for file in (root / "Annotations").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="has no annotations at all"):
        read(root)
    with pytest.raises(ValueError, match="on_error is 'ignore'; expected fail or skip"):
        read(root, on_error="ignore")


@pytest.mark.skipif(not BCCD.exists(), reason="the shared data are not there")
def test_bccd() -> None:
    changes: dict[str, Any] = {"train": "trainval", "val": 0.1, "classes": ["RBC", "WBC", "Platelets"]}
    data = read(BCCD, on_error="skip", **changes)
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [263, 29, 72]
    assert data.skipped == [
        "BloodImage_00338.xml has box (504, 337, 504, 337) of zero area",
        "BloodImage_00343.xml has box (181, 329, 181, 329) of zero area",
    ]
    samples = [sample for split in data.splits.values() for sample in split]
    labels = np.concatenate([sample.targets["detect"].labels for sample in samples])
    stated = [
        element.text for file in (BCCD / "Annotations").iterdir() for element in ElementTree.parse(file).iter("name")
    ]
    assert len(stated) == 4888
    assert len(labels) == 4886
    classes = ("RBC", "WBC", "Platelets")
    lost = [stated.count(name) - int((labels == k).sum()) for k, name in enumerate(classes)]
    assert sum(lost) == 2
    boxes = np.concatenate([sample.targets["detect"].xyxy for sample in samples])
    assert boxes.min() == 0
    assert boxes.max(axis=0)[2:].tolist() == [640, 480]
    with pytest.raises(ValueError, match=r"bccd: BloodImage_00\d+\.xml has box .* \(and 1 more\); fix it"):
        read(BCCD, **changes)
