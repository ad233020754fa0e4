"""Cityscapes' layout: train ids against torchvision's table, whole cities held out, seeded faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from torchvision.datasets import Cityscapes

from tasks.data import IGNORE, DataSet
from tasks.data.cityscapes import CLASSES, read

ROOT = Path(__file__).parents[1]
CITIES = {"train": {"aachen": 6, "bochum": 3, "ulm": 4, "jena": 7}, "val": {"munster": 3, "lindau": 2}}


def load(root: Path, **changes: Any) -> DataSet:
    """Read as conf/data/cityscapes.yaml says."""
    arguments = yaml.safe_load((ROOT / "conf/data/cityscapes.yaml").read_text())
    assert arguments.pop("name") == "cityscapes"
    assert arguments.pop("_target_") == "tasks.data.cityscapes.read"
    return read(**(arguments | {"root": str(root), "tasks": ["segment"], "seed": 0} | changes))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, cities in CITIES.items():
        for city, count in cities.items():
            for i in range(count):
                name = f"{city}_{i:06}_000019"
                for kind, ending, shape in (
                    ("leftImg8bit", "leftImg8bit", (6, 34, 3)),
                    ("gtFine", "gtFine_labelIds", (6, 34)),
                    ("gtFine", "gtFine_color", (6, 34, 3)),
                ):
                    pixels = rng.integers(0, 255, shape, dtype=np.uint8)
                    if ending == "gtFine_labelIds":
                        pixels[:] = np.arange(34)
                    folder = tmp_path / kind / split / city
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(folder / f"{name}_{ending}.png")
    return tmp_path


def test_ids_and_names_are_the_official_ones(root: Path) -> None:
    official = sorted((c.train_id, c.name, c.id) for c in Cityscapes.classes if 0 <= c.train_id < 255)
    assert [(i, name, value) for i, (name, value) in enumerate(CLASSES.items())] == official
    data = load(root)
    expected = {c.id: c.train_id if 0 <= c.train_id < 255 else IGNORE for c in Cityscapes.classes if c.id >= 0}
    mask = data.splits["train"][0].targets["segment"].load()
    assert mask.tolist() == [[expected[i] for i in range(34)]] * 6
    assert data.classes["segment"] == tuple(name for _, name, _ in official)


def test_whole_cities_are_held_out(root: Path) -> None:
    def cities(data: DataSet, split: str) -> set[str]:
        return {Path(sample.image).parent.name for sample in data.splits[split]}

    held = set()
    for seed in range(12):
        data = load(root, seed=seed, val=0.3)
        assert not cities(data, "train") & cities(data, "val")
        assert cities(data, "train") | cities(data, "val") == set(CITIES["train"])
        assert len(data.splits["val"]) >= 6
        assert cities(data, "test") == {"munster", "lindau"}
        held.add(frozenset(cities(data, "val")))
    assert len(held) > 3
    assert [s.image for s in load(root).splits["val"]] == [s.image for s in load(root).splits["val"]]


def test_a_share_of_frames_for_the_test_would_leak_and_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.test is 0\.2; expected a split"):
        load(root, test=0.2)


def test_splits_by_name(root: Path) -> None:
    data = load(root, val="val", test=None)
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 20, "val": 5, "test": 0}
    assert data.splits["train"][0].size == (6, 34)


def test_an_unknown_id_is_named(root: Path) -> None:
    sample = load(root).splits["test"][0]
    file = root / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png"
    Image.fromarray(np.full((6, 34), 40, np.uint8)).save(file)
    assert sample.image.endswith("lindau_000000_000019_leftImg8bit.png")
    with pytest.raises(
        ValueError, match=r"lindau_000000_000019_gtFine_labelIds.png has the mask value 40 in 204 pixels"
    ):
        sample.targets["segment"].load()


@pytest.mark.parametrize("fault", ["missing mask", "orphan", "size"])
def test_faults_are_named_and_can_be_skipped(root: Path, fault: str) -> None:
    image = root / "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png"
    mask = root / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png"
    if fault == "size":
        Image.fromarray(np.zeros((3, 34), np.uint8)).save(mask)
    else:
        (mask if fault == "missing mask" else image).unlink()
    with pytest.raises(ValueError, match="ulm_000001_000019"):
        load(root)
    data = load(root, on_error="skip")
    assert len(data.skipped) == 1
    assert sum(len(data.splits[split]) for split in ("train", "val")) == 19


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": "test"}, "test split are not public; use data.test=val"),
        ({"train": "trian"}, "no folder leftImg8bit/trian; did you mean 'train'"),
        ({"annotations": "gtfine"}, "expected gtFine or gtCoarse"),
        ({"annotations": "gtCoarse"}, "no folder gtCoarse/train"),
        ({"val": 1.0}, "data.val is 1.0"),
        ({"val": 0.99}, "would hold out all of 4 cities"),
        ({"val": "val"}, "is in both val and test"),
        ({"tasks": ["detect"]}, "no targets for detect"),
    ],
)
def test_bad_arguments_are_named(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(root, **changes)


def test_root_must_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.root"):
        load(tmp_path / "nowhere")
