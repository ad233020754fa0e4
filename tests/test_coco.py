"""The COCO reader on tiny folders with seeded faults, and on the real sample that pycocotools is tested with."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tasks.data import DataSet, coco

SAMPLE = Path(__file__).parents[1] / "../shared/data/cocoapi/instances_val2014_100.json"
Content = dict[str, Any]

CROWD = np.zeros((30, 40), np.uint8)
CROWD[20:30, :20] = 1
CROWD_COUNTS = [20, *[10, 20] * 19, 10, 20 * 30]  # column by column
TRAIN: Content = {  # no info, ids with gaps, an empty image, a crowd
    "images": [
        {"id": 7, "file_name": "a.jpg", "height": 30, "width": 40},
        {"id": 900, "file_name": "b.jpg", "height": 30, "width": 40},
        {"id": 42, "file_name": "c.jpg", "height": 30, "width": 40},
    ],
    "annotations": [
        {"id": 1, "image_id": 42, "category_id": 90, "bbox": [1, 2, 10, 8], "area": 40.5, "iscrowd": 0,
         "segmentation": [[1, 2, 11, 2, 11, 10, 1, 10]]},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 20, 20, 10], "area": 200, "iscrowd": 1,
         "segmentation": {"size": [30, 40], "counts": CROWD_COUNTS}},
        {"id": 9, "image_id": 7, "category_id": 18, "bbox": [10, 5, 20.5, 20], "area": 410, "iscrowd": 0,
         "segmentation": [[10, 5, 30, 5, 30, 25, 10, 25]]},
        {"id": 4, "image_id": 7, "category_id": 90, "bbox": [12, 8, 4, 4], "iscrowd": 0,
         "segmentation": [[12, 8, 16, 8, 16, 12, 12, 12]]},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 18, "name": "dog"}],
}  # fmt: skip


def write(root: Path, split: str, content: Content) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    (root / split).mkdir(exist_ok=True)
    for entry in content["images"]:
        if isinstance(entry, dict) and entry.get("file_name", "/")[0] not in "/.":
            Image.new("RGB", (40, 30)).save(root / split / entry["file_name"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "train2017", TRAIN)
    test = {**TRAIN, "info": {}, "images": TRAIN["images"][:1], "annotations": TRAIN["annotations"][1:]}
    write(tmp_path, "val2017", test)
    return tmp_path


def read(root: Path | None, **changes: Any) -> DataSet:
    arguments: dict[str, Any] = {
        "root": None if root is None else str(root),
        "train": "train2017",
        "val": None,
        "test": "val2017",
        "annotations": "annotations/instances_{split}.json",
        "folder": "{split}",
        "on_error": "fail",
        "tasks": ["detect"],
        "seed": 0,
    }
    return coco.read(**{**arguments, **changes})


def test_boxes_labels_crowd_and_empty_images(root: Path) -> None:
    data = read(root)
    assert data.classes == {"detect": ("car", "dog", "toothbrush")}
    a, b, c = data.splits["train"]
    assert [Path(s.image).name for s in (a, b, c)] == ["a.jpg", "b.jpg", "c.jpg"]
    assert a.size == (30, 40)
    boxes = a.targets["detect"]
    assert boxes.xyxy.tolist() == [[0, 20, 20, 30], [10, 5, 30.5, 25], [12, 8, 16, 12]]
    assert boxes.labels.tolist() == [0, 1, 2]
    assert boxes.crowd.tolist() == [True, False, False]
    assert boxes.area.tolist() == [200, 410, 16]  # the last one is not stated: width x height
    assert [array.dtype for array in (boxes.xyxy, boxes.labels, boxes.crowd, boxes.area)] == [
        np.float32, np.int64, bool, np.float32,
    ]  # fmt: skip
    assert b.targets["detect"].xyxy.shape == (0, 4)
    assert c.targets["detect"].area.tolist() == [40.5]
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [3, 0, 1]


def test_validation_is_held_out(root: Path) -> None:
    data = read(root, val=0.4)
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [2, 1, 1]


def test_instances_as_a_semantic_mask(root: Path) -> None:
    data = read(root, tasks=["segment", "detect"])
    assert data.classes["segment"] == ("background", "car", "dog", "toothbrush")
    mask = data.splits["train"][0].targets["segment"].load()
    expected = np.where(CROWD, 255, 0)
    expected[5:25, 10:30] = 2  # over the crowd
    expected[8:12, 12:16] = 3  # the smaller one on top
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == np.uint8
    assert not data.splits["train"][1].targets["segment"].load().any()


def test_more_categories_than_a_mask_can_hold_are_refused(root: Path) -> None:
    more = [{"id": key, "name": f"class {key}"} for key in range(1000, 1252)]
    write(root, "train2017", {**TRAIN, "categories": [*TRAIN["categories"], *more]})
    assert len(read(root, test=None).classes["detect"]) == 255
    with pytest.raises(ValueError, match=r"has 256 classes for masks, the background among them.*at most 255"):
        read(root, test=None, tasks=["detect", "segment"])


def test_a_category_called_background_is_refused_for_masks(root: Path) -> None:
    write(root, "train2017", {**TRAIN, "categories": [*TRAIN["categories"], {"id": 0, "name": "background"}]})
    assert read(root, test=None).classes["detect"][0] == "background"
    with pytest.raises(ValueError, match=r"the class 'background' twice for segment \(voc and coco add it"):
        read(root, test=None, tasks=["segment"])


def test_other_layouts(root: Path) -> None:
    (root / "annotations/instances_train2017.json").rename(root / "train.json")
    (root / "train2017").rename(root / "pictures")
    data = read(root, train="train", test=None, annotations="{split}.json", folder="pictures")
    assert len(data.splits["train"]) == 3


def changed(change: Callable[[Content], Any]) -> Content:
    content = copy.deepcopy(TRAIN)
    change(content)
    return content


FAULTS: dict[str, tuple[Callable[[Content], Any], str]] = {
    "image id": (
        lambda c: c["annotations"][0].update(image_id=5),
        r"instances_train2017.json has annotation 1 of the image_id 5, which images does not list",
    ),
    "category id": (
        lambda c: c["annotations"][0].update(category_id=91),
        r"annotation 1 of the category_id 91, which categories does not list",
    ),
    "zero area": (
        lambda c: c["annotations"][0].update(bbox=[1, 2, 0, 4]),
        r"annotation 1 \(image 42\) with bbox \[1, 2, 0, 4\] without area",
    ),
    "outside": (
        lambda c: c["annotations"][0].update(bbox=[30, 2, 12, 4]),
        r"bbox \[30, 2, 12, 4\] outside its image of 40 x 30 pixels",
    ),
    "not finite": (
        lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]),
        r"annotation 1 .*finite numbers",
    ),
    "three numbers": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 1 .*bbox of four"),
    "list as id": (lambda c: c["annotations"][0].update(id=[1]), r"annotation \[1\] .*expected image_id"),
    "no bbox": (lambda c: c["annotations"][0].pop("bbox"), r"annotation 1 .*expected image_id, category_id and a bbox"),
    "no dict": (lambda c: c["annotations"].append(5), r"an annotation 5; expected"),
    "annotation twice": (lambda c: c["annotations"].append(c["annotations"][0]), r"has annotation 1 a second time"),
    "image twice": (
        lambda c: c["images"].append({**c["images"][0], "file_name": "d.jpg"}),
        r"has the image d.jpg or its id 7 twice",
    ),
    "file twice": (lambda c: c["images"].append({**c["images"][0], "id": 8}), r"has the image a.jpg or its id 8 twice"),
    "traversal": (
        lambda c: c["images"].append({"id": 8, "file_name": "../val2017/a.jpg"}),
        r"image ../val2017/a.jpg, which points outside",
    ),
    "no name": (lambda c: c["images"].append({"id": 8}), r"has the image \{'id': 8\}; expected id and file_name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_once_and_skipped_alone(root: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    write(root, "train2017", changed(change))
    with pytest.raises(ValueError, match=message) as caught:
        read(root, test=None)
    assert "set data.on_error=skip" in str(caught.value)
    data = read(root, test=None, on_error="skip")
    assert len(data.skipped) == 1
    assert re.search(message, data.skipped[0])
    samples = {Path(sample.image).name: sample for sample in data.splits["train"]}
    assert set(samples) == {"a.jpg", "b.jpg", "c.jpg"}
    assert len(samples["a.jpg"].targets["detect"].labels) == 3


@pytest.mark.parametrize(
    ("area", "taken"), [("big", 80), ("81", 81), (None, 80), (-3, 80), (float("nan"), 80), (40.5, 40.5)]
)
def test_an_area_that_is_none_is_the_box_s(root: Path, area: Any, taken: float) -> None:
    write(root, "train2017", changed(lambda c: c["annotations"][0].update(area=area)))
    areas = [sample.targets["detect"].area.tolist() for sample in read(root, test=None).splits["train"]]
    assert [taken] in areas


def test_a_missing_image_takes_its_annotations_along(root: Path) -> None:
    (root / "train2017/a.jpg").unlink()
    with pytest.raises(ValueError, match=r"has the image a\.jpg \(id 7\), which is missing in .*train2017"):
        read(root)
    data = read(root, on_error="skip")
    assert len(data.skipped) == 1
    assert len(data.splits["train"]) == 2


def test_overhang_below_a_pixel_is_clipped(root: Path) -> None:
    write(root, "train2017", changed(lambda c: c["annotations"][0].update(bbox=[-0.5, 2, 41, 28.4])))
    assert read(root).splits["train"][2].targets["detect"].xyxy.tolist() == [[0, 2, 40, np.float32(30)]]


def test_masks_that_cannot_be_drawn_are_named(root: Path) -> None:
    for value, message in (
        ([[1, 2, 3, 4]], "a polygon of 4 numbers"),
        ({"size": [30, 41], "counts": [1]}, r"for height, width \[30, 41\]; expected \[30, 40\]"),
        ({"size": [30, 40], "counts": [5, 5]}, "run lengths that add up to 10; expected 1200"),
    ):
        write(root, "train2017", changed(lambda c, v=value: c["annotations"][0].update(segmentation=v)))
        sample = read(root, tasks=["segment"]).splits["train"][2]
        with pytest.raises(ValueError, match=rf"the mask of .*c\.jpg cannot be drawn: .*{message}"):
            sample.targets["segment"].load()
    write(root, "train2017", changed(lambda c: c["annotations"][0].pop("segmentation")))
    with pytest.raises(ValueError, match="annotation 1 without a segmentation"):
        read(root, tasks=["segment"])


def test_file_faults(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"coco: data\.root is not set"):
        read(None)
    with pytest.raises(
        ValueError, match=r"no annotations/instances_trian2017\.json .*did you mean 'annotations/inst.*train2017"
    ):
        read(root, train="trian2017")
    with pytest.raises(ValueError, match=r"images of .*nowhere, which does not exist; set data\.folder"):
        read(root, folder="nowhere")
    file = root / "annotations/instances_train2017.json"
    for change, message in (
        (lambda c: c.update(annotations=[]), r"instances_train2017\.json has no annotations at all"),
        (lambda c: c.pop("categories"), r"has no list 'categories'"),
        (lambda c: c.update(categories=[]), r"has no categories"),
        (lambda c: c["categories"].append({"id": 3, "name": "cow"}), r"category id 3 twice"),
        (lambda c: c["categories"].append({"id": 4, "name": "car"}), r"category name 'car' twice"),
        (lambda c: c["categories"][0].pop("name"), r"a category has no id or no name"),
        (lambda c: c["categories"].append({"id": 1, "name": "cow"}), r"other categories than the split before it"),
        (lambda c: c.update(images=[]), r"lists no usable image"),
    ):
        write(root, "train2017", changed(change))
        with pytest.raises(ValueError, match=message):
            read(root, on_error="skip")
    file.write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(
        ValueError, match=r"train2017\.json is not readable JSON: .* in line 2, column 18 \(character 32\)"
    ):
        read(root)
    file.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(ValueError, match="is not UTF-8 at byte 12"):
        read(root)
    file.write_text("[]")
    with pytest.raises(ValueError, match="has no list 'images'"):
        read(root)


@pytest.mark.skipif(not SAMPLE.exists(), reason="the shared data are not there")
def test_the_real_sample_against_pycocotools(tmp_path: Path) -> None:
    content = json.loads(SAMPLE.read_text())
    for entry in content["images"]:
        (tmp_path / entry["file_name"]).touch()  # nothing is decoded
    data = read(
        tmp_path,
        train="x",
        test=None,
        annotations=str(SAMPLE),
        folder=".",
        tasks=["detect", "segment"],
        on_error="fail",
    )
    peer = COCO(str(SAMPLE))
    category_ids = sorted(peer.cats)
    assert data.classes["detect"] == tuple(peer.cats[key]["name"] for key in category_ids)
    by_name = {Path(sample.image).name: sample for sample in data.splits["train"]}
    crowds = 0
    for key, entry in peer.imgs.items():
        sample = by_name[entry["file_name"]]
        boxes = sample.targets["detect"]
        truth = peer.imgToAnns[key]
        assert boxes.labels.tolist() == [category_ids.index(a["category_id"]) for a in truth]
        assert boxes.crowd.tolist() == [bool(a["iscrowd"]) for a in truth]
        given = np.array([a["bbox"] for a in truth]).reshape(-1, 4)
        np.testing.assert_allclose(boxes.xyxy, np.hstack([given[:, :2], given[:, :2] + given[:, 2:]]), atol=0.02)
        np.testing.assert_allclose(boxes.area, [a["area"] for a in truth], rtol=1e-6)
        crowds += boxes.crowd.sum()
        union = coco_mask.decode(coco_mask.merge([peer.annToRLE(a) for a in truth])) if truth else 0
        np.testing.assert_array_equal(sample.targets["segment"].load() > 0, np.broadcast_to(union, sample.size) > 0)
    assert crowds == 9
    assert len(by_name) == 100
