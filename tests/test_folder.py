"""Image folders, plain and zipped, against torchvision's reader and with seeded faults."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from torchvision.datasets import ImageFolder

from tasks.data import DataSet
from tasks.data.folder import read
from tasks.data.images import decode

ROOT = Path(__file__).parents[1]
SHARED = ROOT / "../shared/data"
SIZES = {"train": 20, "val": 4, "test": 3}


def load(root: Path | str | None, name: str = "folder", **changes: Any) -> DataSet:
    """Read as conf/data/<name>.yaml says."""
    arguments = yaml.safe_load((ROOT / f"conf/data/{name}.yaml").read_text())
    assert arguments.pop("name") == name
    assert arguments.pop("_target_") == "tasks.data.folder.read"
    return read(**(arguments | {"root": root and str(root), "tasks": ["classify"], "seed": 0} | changes))


def write(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 5, 3), shade, np.uint8)).save(path)


def make(root: Path, splits: dict[str, int] = SIZES, classes: tuple[str, ...] = ("cat", "Dog", "ant")) -> Path:
    for s, (split, count) in enumerate(splits.items()):
        for label, name in enumerate(classes):
            for i in range(count):
                write(root / split / name / f"{i:03}.jpg", 60 * s + 10 * label)
    return root


def pack(root: Path) -> Path:
    archive = root.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as opened:
        for file in sorted(root.rglob("*")):
            opened.write(file, file.relative_to(root))
    return archive


def shown(data: DataSet, root: Path) -> dict[str, list[tuple[str, int]]]:
    start = {
        len(str(root)) + len(sep) for sep in ("/", "!/") if data.splits["train"][0].image.startswith(f"{root}{sep}")
    }
    cut = start.pop()
    return {split: [(s.image[cut:], s.targets["classify"]) for s in each] for split, each in data.splits.items()}


def test_equals_torchvisions_image_folder(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    write(root / "train/cat/deep/er/001.PNG")
    data = load(root)
    theirs = ImageFolder(str(root / "train"))
    assert data.classes == {"classify": tuple(theirs.classes)} == {"classify": ("Dog", "ant", "cat")}
    assert {(s.image, s.targets["classify"]) for s in data.splits["train"]} == set(theirs.samples)
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 61, "val": 12, "test": 9}
    assert (data.skipped, data.note) == ([], "")


def test_a_zip_gives_the_same_and_decodes(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    write(root / "train/cat/deep/001.png")
    archive = pack(root)
    assert shown(load(archive), archive) == shown(load(root), root)
    for sample in load(archive).splits["test"]:
        expected = 120 + 10 * ("cat", "Dog", "ant").index(sample.image.split("/")[-2])
        assert abs(int(decode(sample.image)[0, 0, 0]) - expected) <= 2


@pytest.mark.parametrize("zipped", [False, True])
def test_without_split_folders_splits_are_held_out_by_seed(tmp_path: Path, zipped: bool) -> None:
    root = make(tmp_path / "set", {".": 20})
    root = pack(root) if zipped else root
    data = load(root)
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 48, "val": 6, "test": 6}
    assert "val: 10% of train" in data.note
    assert "test: 10% of train" in data.note
    names = Counter(s.image for each in data.splits.values() for s in each)
    assert len(names) == 60
    assert set(names.values()) == {1}
    assert shown(load(root), root) == shown(data, root)
    assert shown(load(root, seed=1), root) != shown(data, root)


@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_auto_finds_the_usual_names(tmp_path: Path, name: str) -> None:
    data = load(make(tmp_path, {"train": 10, name: 2}))
    assert len(data.splits["val"]) == 6
    assert len(data.splits["test"]) == 3
    assert data.note == "test: 10% of train"


@pytest.mark.parametrize("zipped", [False, True])
def test_auto_finds_the_usual_names_in_capitals(tmp_path: Path, zipped: bool) -> None:
    root = make(tmp_path / "set", {"Training": 10, "Testing": 2})
    data = load(pack(root) if zipped else root)
    assert data.classes["classify"] == ("Dog", "ant", "cat")
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 27, "val": 3, "test": 6}
    assert data.note == "val: 10% of train"


def test_splits_by_argument(tmp_path: Path) -> None:
    root = make(tmp_path, {"a/train": 10, "b": 4, "c": 2})
    data = load(root, train=["a/train", "b"], val=None, test="c")
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 42, "val": 0, "test": 6}


def test_hidden_files_are_passed_over_and_others_counted(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    hidden = ("train/cat/.x.jpg", "train/.git/x.jpg", "train/lost+found/x.jpg")
    for name in ("train/cat/Thumbs.db", "train/cat/a.txt", "train/b.txt", *hidden):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"-")
    (root / "__MACOSX/train/cat").mkdir(parents=True)
    (root / "__MACOSX/train/cat/._0.jpg").write_bytes(b"-")
    for data in (load(root), load(pack(root))):
        assert len(data.splits["train"]) == 60
        assert len(data.classes["classify"]) == 3
        assert len(data.skipped) == 1
        assert data.skipped[0].startswith("3 files that are no images by their names")


def test_an_empty_class_folder_is_a_problem(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    for split in SIZES:
        (root / split / "newt").mkdir()
    for each in (root, pack(root)):
        with pytest.raises(ValueError, match=r"class folder train/newt has no images \(and 2 more\).*on_error=skip"):
            load(each)
        data = load(each, on_error="skip")
        assert data.classes["classify"] == ("Dog", "ant", "cat", "newt")
        assert len(data.skipped) == 3


def test_classes_that_differ_between_splits_are_named(tmp_path: Path) -> None:
    root = make(tmp_path)
    write(root / "test/newt/0.jpg")
    (root / "val/cat").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"class cat is in 'train', but not in 'val' \(and 1 more\)"):
        load(root)
    data = load(root, on_error="skip")
    assert data.skipped == ["class cat is in 'train', but not in 'val'", "class newt is in 'test', but not in 'train'"]
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 60, "val": 8, "test": 9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": "vall"}, "no folder 'vall'; did you mean 'val'"),
        ({"train": "training"}, "no folder 'training'; did you mean 'train'"),
        ({"val": 1.5}, "data.val is 1.5"),
        ({"train": 0.5}, "data.train is 0.5"),
        ({"val": "train"}, "is in both train and val"),
        ({"tasks": ["detect"]}, "no targets for detect"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(make(tmp_path), **changes)


def test_bad_roots_are_named(tmp_path: Path) -> None:
    for root in (None, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"data\.root"):
            load(root)
    make(tmp_path / "above" / "set")
    with pytest.raises(ValueError, match=r"only the class set.*one folder too high"):
        load(tmp_path / "above")
    make(tmp_path / "untrained", {"val": 3})
    with pytest.raises(ValueError, match="folder val, but none to train on"):
        load(tmp_path / "untrained")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        load(tmp_path / "empty")
    unlabelled = make(tmp_path / "unlabelled", {"train": 3})
    write(unlabelled / "test" / "0.jpg")
    with pytest.raises(ValueError, match=r"no images in 'test'.*without labels cannot be scored"):
        load(unlabelled)


def test_bad_zips_are_named(tmp_path: Path) -> None:
    archive = pack(make(tmp_path / "set"))
    content = archive.read_bytes()
    for damaged in (b"not a zip", content.replace(b"PK\1\2", b"PK\0\0", 1)):  # the second: in its list of files
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"set\.zip cannot be read as an archive \(.*\); pack it again"):
            load(archive)
    (tmp_path / "set.cbz").write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.cbz, which is neither a folder nor a \.zip; .*rename it to set\.zip"):
        load(tmp_path / "set.cbz")


def test_a_folder_around_all_of_a_zip_is_named(tmp_path: Path) -> None:
    make(tmp_path / "split/set")
    archive = pack(tmp_path / "split")
    with pytest.raises(ValueError, match=r"set data\.train=set/train data\.val=set/val data\.test=set/test$"):
        load(archive)
    data = load(archive, train="set/train", val="set/val", test="set/test")
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 60, "val": 12, "test": 9}
    make(tmp_path / "whole/set", {".": 20})
    with pytest.raises(ValueError, match=r"set data\.train=set$"):
        load(pack(tmp_path / "whole"))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path)
    listed = os.scandir

    def locked(path: Any) -> Any:  # not by its mode, which root may pass over
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(PermissionError, match=r"train/cat cannot be listed \(Permission denied\); make it readable"):
        load(root)


def test_a_file_that_is_no_image_is_named_when_decoded(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    (root / "train/cat/000.jpg").write_text("hello")
    (bad,) = (s.image for s in load(root).splits["train"] if s.image.endswith("cat/000.jpg"))
    with pytest.raises(ValueError, match=r"000\.jpg is not an image"):
        decode(bad)


def test_imagenets_layout(tmp_path: Path) -> None:
    data = load(make(tmp_path, {"train": 100, "val": 5}, ("n01440764", "n01443537")), "imagenet")
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 198, "val": 2, "test": 10}
    assert all("/val/" in sample.image for sample in data.splits["test"])
    assert all("/train/" in sample.image for sample in data.splits["val"])


def test_reads_without_torch() -> None:
    code = "import sys; from tasks.data import cityscapes, combine, folder, masks; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(not (SHARED / "cifar10.zip").exists(), reason="needs ../shared/data/cifar10.zip")
def test_cifar10() -> None:
    data = load(SHARED / "cifar10.zip", "cifar10")
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 45000, "val": 5000, "test": 10000}
    counts = Counter(s.targets["classify"] for split in ("train", "val") for s in data.splits[split])
    assert counts == dict.fromkeys(range(10), 5000)
    assert data.classes["classify"][:3] == ("airplane", "automobile", "bird")
    assert decode(data.splits["test"][0].image).shape == (32, 32, 3)


@pytest.mark.skipif(not (SHARED / "clothing").exists(), reason="needs ../shared/data/clothing")
@pytest.mark.parametrize("name", ["clothing", "folder"])
def test_clothing(name: str) -> None:
    data = load(SHARED / "clothing", name)
    assert {split: len(each) for split, each in data.splits.items()} == {"train": 3068, "val": 341, "test": 372}
    assert len(data.classes["classify"]) == 10
    assert data.skipped == []
