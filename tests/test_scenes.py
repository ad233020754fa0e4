"""The drawn scenes: equal on every machine and number of processes, right in every target, never half there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tasks.data import DataSet, coco, scenes
from tasks.data.drawing import draw_scene
from tasks.data.shapes import SHAPES

ROOT = Path(__file__).parents[1]
TASKS = ["classify", "detect", "segment"]


def read(root: Path | None, **changes: Any) -> DataSet:
    arguments: dict[str, Any] = {
        "root": None if root is None else str(root),
        "image_size": 96,
        "train": 30,
        "val": 6,
        "test": 5,
        "workers": 1,
        "tasks": TASKS,
        "seed": 0,
    }
    return scenes.read(**{**arguments, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    read(root)
    return root


@pytest.fixture(scope="module")
def drawn() -> list[Any]:
    return [draw_scene(0, 0, index, 128) for index in range(150)]


def content(root: Path) -> dict[str, bytes]:
    (folder,) = root.glob("scenes-*")
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_scenes_vary_and_hold_what_they_promise(drawn: list[Any]) -> None:
    counts = np.array([len(scene.labels) for scene in drawn])
    assert counts.min() >= 1
    assert counts.max() == 4
    frequency = np.bincount(np.concatenate([scene.labels for scene in drawn]), minlength=len(SHAPES))
    assert len(SHAPES) >= 8
    assert frequency.min() > 0.5 * frequency.mean()
    sides, cut = [], 0
    for scene in drawn:
        seen = np.bincount(scene.instances.ravel(), minlength=len(scene.labels) + 1)[1:]
        assert len(seen) == len(scene.labels)
        assert seen.min() >= 10
        for number in range(1, len(scene.labels) + 1):
            rows, columns = np.nonzero(scene.instances == number)
            sides.append((max(np.ptp(rows), np.ptp(columns)) + 1) / 128)
            cut += min(rows.min(), columns.min()) == 0 or max(rows.max(), columns.max()) == 127
    assert 0.04 < np.quantile(sides, 0.02) < 0.12
    assert 0.5 < max(sides) <= 0.75
    assert 0.05 < cut / len(sides) < 0.3


def test_scenes_depend_on_seed_split_and_index_alone() -> None:
    first = draw_scene(3, 1, 7, 96)
    again = draw_scene(3, 1, 7, 96)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.instances, again.instances)
    for other in ((4, 1, 7), (3, 2, 7), (3, 1, 8)):
        assert (draw_scene(*other, 96).image != first.image).mean() > 0.5


def test_all_tasks_agree_with_each_other(cache: Path) -> None:
    data = read(cache)
    names = tuple(SHAPES)
    assert data.classes == {"classify": names, "detect": names, "segment": ("background", *names)}
    assert {split: len(samples) for split, samples in data.splits.items()} == {"train": 30, "val": 6, "test": 5}
    assert data.note == "synthetic"
    for index, sample in enumerate(data.splits["val"]):
        scene = draw_scene(0, 1, index, 96)
        boxes = sample.targets["detect"]
        mask = sample.targets["segment"].load()
        assert boxes.labels.tolist() == scene.labels
        for number, (box, label) in enumerate(zip(boxes.xyxy, boxes.labels, strict=True), 1):
            rows, columns = np.nonzero(scene.instances == number)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert (mask[rows, columns] == label + 1).all()
        assert ((mask == 0) == (scene.instances == 0)).all()
        areas = [(scene.instances == number).sum() for number in range(1, len(scene.labels) + 1)]
        assert boxes.area.tolist() == areas
        assert sample.targets["classify"] == scene.labels[int(np.argmax(areas))]
        with Image.open(sample.image) as image:
            assert np.abs(np.asarray(image, int) - scene.image).mean() < 8
    assert read(cache, tasks=["detect"]).splits["test"][0].targets.keys() == {"detect"}


def test_the_coco_reader_and_pycocotools_read_them_like_any_set(cache: Path) -> None:
    (folder,) = cache.glob("scenes-*")
    data = coco.read(
        str(folder), "train", "val", "test", "annotations/instances_{split}.json", "{split}", "fail",
        ["detect", "segment"], 0,
    )  # fmt: skip
    ours = read(cache)
    for theirs, sample in zip(data.splits["test"], ours.splits["test"], strict=True):
        np.testing.assert_array_equal(theirs.targets["segment"].load(), sample.targets["segment"].load())
    peer = COCO(str(folder / "annotations/instances_train.json"))
    assert [category["name"] for category in peer.cats.values()] == list(SHAPES)
    assert sorted(peer.anns) == list(range(1, len(peer.anns) + 1))
    for annotation in peer.anns.values():
        mask = peer.annToMask(annotation)
        x, y, width, height = annotation["bbox"]
        assert mask.sum() == mask[y : y + height, x : x + width].sum() == annotation["area"]


def test_two_processes_write_the_same_bytes_as_one(cache: Path, tmp_path: Path) -> None:
    read(tmp_path, workers=2)
    assert content(tmp_path) == content(cache)


def test_arguments_have_folders_of_their_own(cache: Path, tmp_path: Path) -> None:
    read(tmp_path, train=2, val=1, test=0)
    read(tmp_path, train=2, val=1, test=0, seed=1)
    read(tmp_path, train=2, val=1, test=0, image_size=64)
    assert len(list(tmp_path.iterdir())) == 3
    before = sorted(cache.rglob("*"))
    read(cache, workers=5)
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize("lost", ["train/000001.jpg", "masks/val/000000.png", "annotations/instances_train.json"])
def test_a_cache_that_has_lost_a_file_is_drawn_anew(tmp_path: Path, lost: str) -> None:
    read(tmp_path, train=2, val=1, test=0)
    whole = content(tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / lost).unlink()
    read(tmp_path, train=2, val=1, test=0)
    assert content(tmp_path) == whole


def test_a_killed_run_leaves_nothing_that_is_trusted(cache: Path, tmp_path: Path) -> None:
    code = (
        "from tasks.data import scenes\n"
        "if __name__ == '__main__':\n"
        f"    scenes.read({str(tmp_path)!r}, 96, 5000, 6, 5, 2, ['detect'], 0)\n"
    )
    script = tmp_path.parent / "draw.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/train/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    (partial,) = tmp_path.iterdir()
    assert ".partial-" in partial.name
    time.sleep(0.5)
    count = len(list(partial.rglob("*")))
    time.sleep(0.5)
    assert len(list(partial.rglob("*"))) == count, "the workers outlive their parent"
    read(tmp_path, train=3)
    assert len(list(tmp_path.iterdir())) == 2


def test_old_leavings_are_removed_and_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "scenes-0.partial-x"
    old.mkdir()
    monkeypatch.setattr(scenes, "_STALE_SECONDS", -1)
    write = scenes._write

    def slower(folder: Path, plan: Any, workers: int | None) -> None:
        write(folder, plan, workers)
        rival = tmp_path / plan.name()
        rival.mkdir()
        folder.joinpath("train").rename(rival / "train")
        folder.joinpath("annotations").rename(rival / "annotations")

    monkeypatch.setattr(scenes, "_write", slower)
    data = read(tmp_path, train=2, val=0, test=0, tasks=["detect"])
    assert len(data.splits["train"]) == 2
    assert [path.name.count("partial") for path in tmp_path.iterdir()] == [0]


def test_a_script_without_a_main_guard_still_gets_its_scenes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    cache = tmp_path / "cache"
    script.write_text(
        f"from tasks.data import scenes\nprint(len(scenes.read({str(cache)!r}, 64, 30, 1, 0, 2, ['detect'], 0).splits))"
    )
    done = subprocess.run(
        [sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "3"
    assert len(list(cache.glob("*/train/*.jpg"))) == 30


def test_faults(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.image_size is 32; expected 64 to 1024"):
        read(tmp_path, image_size=32)
    with pytest.raises(ValueError, match=r"data\.train, val and test are 0, 6, 5"):
        read(tmp_path, train=0)
    with pytest.raises(ValueError, match="scenes has no targets for depth; it has classify, detect, segment"):
        read(tmp_path, tasks=["depth"])
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match=r"scenes: cannot write to .*file: .*set data\.root=<another folder>"):
        read(blocked)


def test_the_default_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = read(None, train=1, val=0, test=0)
    assert data.splits["train"][0].image.startswith(str(tmp_path / "mobilenetv3-bench" / "scenes-"))
    assert not any("torch" in line for line in Path(scenes.__file__).read_text().splitlines() if "import" in line)
