"""Predict: every kind of run on every kind of input; what is written, what is refused, what it costs."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_models import TINY_SCENES, write_run
from fixtures import ROOT, SHARED
from PIL import Image

from tasks import load, predictor
from tasks.cli import compose, quoted
from tasks.deploy import choice, export
from tasks.deploy import predict as command
from tasks.deploy.frames import BEGIN, Frame, Stems, open_frames, video_suffix
from tasks.deploy.predictor import Predictor, Room, Seen, ahead, exported_from, open_predictor, predicted, read
from tasks.deploy.session import open_model
from tasks.deploy.video import Video
from tasks.deploy.writers import Growing, Ids
from tasks.reporting.drawing import colour
from tasks.reporting.overlay import draw, picture
from tasks.training import checkpoint
from tasks.training.build import complete, make_model, plain

TASKS = ("classify", "detect", "segment", "multitask")
CLASSES = ("background", "cat", "dog")
LIMIT = 10**8


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder of an untrained 64 px model for each task."""
    folders = {}
    for task in TASKS:
        torch.manual_seed(1)
        parts = [f"heads.{t}.num_classes=3" for t in TASKS[:3]] if task == "multitask" else ["head.num_classes=3"]
        config, classes = complete(plain(compose(task, [*parts, "image_size=[64,64]"])))
        folders[task] = tmp_path_factory.mktemp(task)
        content = {"config": config, "classes": {name: list(CLASSES) for name in classes}}
        checkpoint.save(folders[task] / "best.pt", content | {"model": make_model(config, classes).state_dict()})
    return folders


def photo(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, seed: int = 0, height: int = 48, width: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(seed, height, width)).save(path)
    return path


def run(task_folder: Path, images: object, out: object, **settings: object) -> None:
    words = [quoted(f"run={task_folder}"), quoted(f"images={images}"), quoted(f"out={out}"), "threads=1"]
    defaults: dict[str, object] = {"engine": "torch"}
    command.predict(compose("predict", [*words, *(f"{k}={v}" for k, v in (defaults | settings).items())]))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images in two folders; two of one stem, one of another size."""
    for i, name in enumerate(("a10.jpg", "a2.jpg", "sub/b.jpg", "sub/b.png")):
        save(tmp_path / "photos" / name, i)
    save(tmp_path / "photos" / "wide (1), x=2.png", 4, 20, 90)
    (tmp_path / "photos" / "notes.md").write_text("no image")
    return tmp_path / "photos"


def names(images: object) -> list[str]:
    return [frame.name for frame in open_frames(str(images), LIMIT).items]


@pytest.mark.parametrize("task", TASKS)
def test_a_predictor_gives_what_the_model_gives(runs: dict[str, Path], task: str) -> None:
    image = photo(3, 70, 50)
    expected, got = load(runs[task]).predict(image), predictor(runs[task], "torch").predict(image)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if not isinstance(value, dict):
            torch.testing.assert_close(got[name], value, atol=1e-4, rtol=1e-4)
            continue
        torch.testing.assert_close(got[name]["scores"], value["scores"], atol=1e-4, rtol=1e-4)
        ours, theirs = (torch.cat([one["boxes"], 100 * one["labels"][:, None]], 1) for one in (got[name], value))
        # of scores that are equal but for rounding either may lead, which of the two differs from CPU to CPU
        apart = torch.cdist(ours, theirs, p=float("inf"))
        assert apart.min(0).values.max() < 1e-3
        assert apart.min(1).values.max() < 1e-3


def test_an_engine_has_the_cores_to_itself(runs: dict[str, Path]) -> None:
    pytest.importorskip("openvino")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        model = open_predictor(runs["detect"], "openvino", threads=2)
        assert (model.runner.threads, torch.get_num_threads()) == (2, 1)
        open_predictor(runs["classify"], "torch", threads=2).predict(photo(0))
        assert torch.get_num_threads() == 2  # where torch is the engine
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("task", TASKS)
def test_the_stream_gives_what_single_images_give(runs: dict[str, Path], task: str) -> None:
    model = open_predictor(runs[task], "torch", threads=1)
    frames = [Frame(str(i), str(i), lambda i=i, **_: photo(i, 30 + i, 50)) for i in range(5)]
    stream = list(predicted(model, (read(frame, model.fit, False) for frame in frames), 2))
    assert [seen.frame.name for seen in stream] == ["0", "1", "2", "3", "4"]
    for i, seen in enumerate(stream):
        assert seen.size == (30 + i, 50)
        alone = model.predict(photo(i, 30 + i, 50))
        for name, value in alone.items():
            for part, one in value.items() if isinstance(value, dict) else [("", value)]:
                got = seen.predictions[name]
                torch.testing.assert_close(got[part] if part else got, one, atol=1e-4, rtol=1e-4)


def test_classes_are_written_as_csv(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run(runs["classify"], photos, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").open()))
    assert [row["file"] for row in rows] == ["a2.jpg", "a10.jpg", "sub/b.jpg", "sub/b.png", "wide (1), x=2.png"]
    model = load(runs["classify"])
    for row in rows:
        scores = model.predict(photos / row["file"])["classify"]
        assert CLASSES.index(row["class_1"]) == int(scores.argmax())
        assert float(row["score_1"]) == pytest.approx(float(scores.max()), abs=1e-4)
        assert float(row["score_1"]) >= float(row["score_2"]) >= float(row["score_3"])
    drawn = sorted(p.relative_to(tmp_path / "out" / "drawn").as_posix() for p in (tmp_path / "out").rglob("*.jpg"))
    assert drawn == ["a10.jpg", "a2.jpg", "sub/b.jpg", "sub/b.png.jpg", "wide (1), x=2.jpg"]
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_detections_load_in_pycocotools(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    run(runs["detect"], photos, tmp_path / "out", limit=7, draw="false")
    assert not (tmp_path / "out" / "drawn").exists()
    truth = coco.COCO(str(tmp_path / "out" / "images.json"))
    found = truth.loadRes(str(tmp_path / "out" / "detections.json"))
    assert [image["file_name"] for image in truth.loadImgs(truth.getImgIds())] == names(photos)
    model = load(runs["detect"])
    for image in truth.loadImgs(truth.getImgIds()):
        expected = model.predict(photos / image["file_name"])["detect"]
        entries = found.loadAnns(found.getAnnIds([image["id"]]))
        assert len(entries) == min(7, len(expected["scores"]))
        for entry, box, label in zip(entries, expected["boxes"].tolist(), expected["labels"].tolist(), strict=False):
            wanted = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            assert entry["bbox"] == pytest.approx(wanted, abs=0.02)
            assert (entry["category_id"], entry["category_name"]) == (label + 1, CLASSES[label])


def test_ids_are_those_of_the_annotations(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 397133, "file_name": "a.jpg"}, {"id": 7, "file_name": "sub/b.jpg"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 90, "name": "cat"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    ids = Ids(("cat", "dog"), str(tmp_path / "instances.json"))
    assert ids.categories == {0: 90, 1: 18}
    assert [ids.image(name) for name in ("val/a.jpg", "sub/b.jpg", "new.jpg", "newer.jpg")] == [
        397133,
        7,
        397134,
        397135,
    ]
    with pytest.raises(ValueError, match="no category 'bird'"):
        Ids(("bird",), str(tmp_path / "instances.json"))
    with pytest.raises(ValueError, match="no COCO file"):
        Ids(("bird",), str(tmp_path / "missing.json"))


def test_masks_are_palette_images_of_the_originals_size(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run(runs["segment"], photos, tmp_path / "out", draw="false")
    model = load(runs["segment"])
    for name, stem in (("a2.jpg", "a2"), ("sub/b.png", "sub/b.png"), ("wide (1), x=2.png", "wide (1), x=2")):
        mask = Image.open(tmp_path / "out" / "masks" / f"{stem}.png")
        assert mask.mode == "P"
        assert tuple(mask.getpalette()[3:6]) == colour(1)
        expected = model.predict(photos / name)["segment"].numpy()
        assert (np.asarray(mask) != expected).mean() < 0.01
    listed = json.loads((tmp_path / "out" / "masks.json").read_text())["classes"]
    assert [entry["name"] for entry in listed] == list(CLASSES)


def test_a_joint_run_writes_everything(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run(runs["multitask"], photos / "a2.jpg", tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    data = {"classes.csv", "detections.json", "images.json", "masks.json"}
    assert found == {*data, "masks/a2.png", "drawn/a2.jpg"}


def test_what_images_may_name(photos: Path, tmp_path: Path) -> None:
    assert names(photos / "a2.jpg") == ["a2.jpg"]
    assert names(photos / "*.jpg") == ["a2.jpg", "a10.jpg"]
    assert names(photos / "**" / "*.png") == ["sub/b.png", "wide (1), x=2.png"]
    assert open_frames(str(photos), LIMIT).left_alone == {".md": 1}
    (tmp_path / "list.txt").write_text(
        "photos/a10.jpg\r\n\n" + f"{photos}/a2.jpg\n../{tmp_path.name}/photos/sub/b.jpg\n"
    )
    frames = list(open_frames(str(tmp_path / "list.txt"), LIMIT).items)
    assert frames[0].load().shape == (48, 64, 3)
    assert frames[2].load().shape == (48, 64, 3)
    assert not any(".." in frame.stem or frame.stem.startswith("/") for frame in frames)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("a10.jpg", "a2.jpg", "sub/b.jpg"):
            archive.write(photos / name, name)
        archive.write(photos / "a2.jpg", "../../evil.jpg")
        archive.write(photos / "a2.jpg", "__MACOSX/a2.jpg")
    frames = list(open_frames(str(tmp_path / "all.zip"), LIMIT).items)
    assert [f.name for f in frames if "evil" not in f.name] == ["a2.jpg", "a10.jpg", "sub/b.jpg"]
    (evil,) = (f for f in frames if "evil" in f.name)
    assert evil.stem == "evil"
    with pytest.raises(ValueError, match="points outside its archive"):
        evil.load()


@pytest.mark.parametrize("images", ["nowhere", "nowhere/*.jpg", "", None])
def test_images_that_are_not_there_are_named(images: str | None) -> None:
    with pytest.raises(FileNotFoundError, match="set images="):
        open_frames(images, LIMIT)


def test_stems_are_unique_and_stay_inside() -> None:
    stems = Stems()
    given = ["a.jpg", "a.png", "A.jpg", "b/a.jpg", "../a.jpg", "/etc/x.jpg", "C:\\x\\y.jpg", "..", "a.jpg.png", "a.jpg"]
    found = [stems.add(name) for name in given]
    assert found[:2] == ["a", "a.png"]
    assert found[3] == "b/a"
    assert len({stem.casefold() for stem in found}) == len(found)
    assert not any(stem.startswith(("/", "\\")) or ".." in stem.split("/") or ":" in stem for stem in found)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_odd_files_are_named_and_nothing_hangs(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    photos = tmp_path / "photos"
    save(photos / "good.jpg")
    (photos / "empty.jpg").touch()
    (photos / "text.jpg").write_text("hello there")
    (photos / "folder.jpg").mkdir()
    (photos / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (photos / "circle").symlink_to(photos)
    os.mkfifo(photos / "pipe.jpg")
    run(runs["classify"], photos, tmp_path / "out", draw="false")
    said = capsys.readouterr().out
    assert "1 of 5 images" in said
    for name, reason in (("empty", "it is empty"), ("text", "it is text"), ("dangling", "missing"), ("pipe", "a pipe")):
        (line,) = (line for line in said.splitlines() if f"{name}.jpg" in line)
        assert reason in line
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match=r"dangling\.jpg is missing.*on_error=skip"):
        run(runs["classify"], photos, tmp_path / "out2", on_error="fail")
    (photos / "good.jpg").unlink()
    with pytest.raises(ValueError, match="none of the 4 images could be read"):
        run(runs["classify"], photos, tmp_path / "out3")
    (skipped,) = (tmp_path / "out3").iterdir()  # the names of the bad ones are all there is
    assert len(skipped.read_text().splitlines()) == 4


def test_results_may_lie_beside_the_images_and_are_no_input(runs: dict[str, Path], tmp_path: Path) -> None:
    shots = tmp_path / "shots"
    shots.mkdir()
    Image.fromarray(photo(0)).save(shots / "a.jpg")
    run(runs["classify"], shots / "*.jpg", shots)
    assert (shots / "drawn" / "a.jpg").is_file()
    with pytest.raises(ValueError, match=r"drawn.a\.jpg lies in out=, it is a result"):
        run(runs["classify"], shots / "drawn" / "*.jpg", shots)


def test_no_way_into_the_results_makes_them_input(runs: dict[str, Path], tmp_path: Path) -> None:
    """Or a picture would be replaced by its own drawing."""
    source = tmp_path / "shots" / "drawn" / "a.jpg"
    source.parent.mkdir(parents=True)
    Image.fromarray(photo(0)).save(source)
    (tmp_path / "link").symlink_to(tmp_path / "shots")
    before = source.read_bytes()
    for folder in (tmp_path / "link" / "drawn", tmp_path / "shots" / ".." / "shots" / "drawn"):
        with pytest.raises(ValueError, match=r"a\.jpg lies in out=, it is a result"):
            run(runs["classify"], folder, tmp_path / "shots")
    assert source.read_bytes() == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "b.jpg").symlink_to(source)  # a link is where it lies
    run(runs["classify"], tmp_path / "photos", tmp_path / "out")
    assert (tmp_path / "out" / "drawn" / "b.jpg").is_file()


def test_results_of_another_run_are_said_to_be_there(
    runs: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(runs["classify"], photos / "a2.jpg", tmp_path / "out", draw="false")
    assert "of an earlier run" not in capsys.readouterr().out
    run(runs["detect"], photos / "a2.jpg", tmp_path / "out", draw="false")
    assert "classes.csv of an earlier run in" in capsys.readouterr().out


def test_an_out_that_would_be_read_again_is_refused(runs: dict[str, Path], photos: Path) -> None:
    with pytest.raises(ValueError, match="lies in images="):
        run(runs["classify"], photos, photos / "shown")
    with pytest.raises(ValueError, match="lies in images="):
        run(runs["classify"], photos, photos)
    with pytest.raises(ValueError, match="is a file"):
        run(runs["classify"], photos / "sub", photos / "a2.jpg")
    assert not (photos / "shown").exists()
    run(runs["classify"], photos / "*.jpg", photos / "shown", draw="false")
    with pytest.raises(ValueError, match="lies in images="):
        run(runs["classify"], photos / "**" / "*.jpg", photos / "shown")


def test_a_stop_leaves_whole_files(
    runs: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = command.Tally.add

    def stop(self: command.Tally, seen: Seen) -> None:
        add(self, seen)
        if self.good == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.Tally, "add", stop)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run(runs["multitask"], photos, tmp_path / "out", batch_size=1)
    assert threading.active_count() == before
    assert len(json.loads((tmp_path / "out" / "images.json").read_text())["images"]) == 2
    assert {d["image_id"] for d in json.loads((tmp_path / "out" / "detections.json").read_text())} <= {1, 2}
    assert len(list(csv.DictReader((tmp_path / "out" / "classes.csv").open()))) == 2
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_full_disk_leaves_lists_that_end_with_what_fitted(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = [json.dumps({"id": i, "name": "x" * (i % 90)}) for i in range(5000)]

    def fill(one: Growing, line_end: str) -> None:
        for row in rows:
            one.add(row + line_end)

    for fits in range(9990, 10_090, 7):  # wherever a row is cut
        lists = {"json": Growing(tmp_path / "a.json", "[\n", ",\n", "\n]\n"), "csv": Growing(tmp_path / "a.csv")}
        resource.setrlimit(resource.RLIMIT_FSIZE, (fits, before[1]))
        try:
            for kind, one in lists.items():
                with pytest.raises(OSError, match="too large"):
                    fill(one, "" if kind == "json" else "\n")
                with pytest.raises(OSError, match=rf"a\.{kind} ends with what fitted .*; free space"):
                    one.close(True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        found = json.loads((tmp_path / "a.json").read_text())
        assert len(found) > 120
        assert found == [json.loads(row) for row in rows[: len(found)]]
        lines = (tmp_path / "a.csv").read_text().splitlines()
        assert lines == rows[: len(lines)]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json"]


def test_what_cannot_be_ended_is_kept_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()  # the name is taken: nothing can be renamed to it
    one = Growing(tmp_path / "a.json", "[\n", ",\n", "\n]\n")
    one.add("1")
    with pytest.raises(OSError, match=r"a\.json cannot be written .* lies in .*\.partial"):
        one.close(True)
    assert json.loads(one.partial.read_text()) == [1]


def test_a_name_that_begins_with_a_tilde_is_a_name(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "~$IMG_1.jpg")
    run(runs["classify"], "~$IMG_1.jpg", "~out", draw="false")
    assert (tmp_path / "~out" / "classes.csv").is_file()
    with pytest.raises(FileNotFoundError, match="no run folder ~no_such_user"):
        predictor("~no_such_user")


def test_images_that_are_decoded_at_once_share_the_room() -> None:
    room, taken, most, small = Room(100), [0], [0], [0]
    lock = threading.Lock()

    def load(pixels: int, admit: Callable[[int], None]) -> np.ndarray:
        admit(pixels)
        with lock:
            taken[0] += pixels
            most[0] = max(most[0], taken[0])
            small[0] = max(small[0], taken[0] if pixels < 250 else 0)
        time.sleep(0.01)
        with lock:
            taken[0] -= pixels
        if pixels == 30:
            raise ValueError("a bad one gives its room back, too")
        return photo(0)

    frames = [Frame(str(i), str(i), partial(load, pixels)) for i, pixels in enumerate([40, 30, 250, 40, 40, 30] * 4)]
    seen = list(ahead(partial(read, fit=lambda image: image, draws=False, room=room), frames, 6, 8))
    assert [one.frame.name for one in seen] == [str(i) for i in range(24)]
    assert [one.problem is None for one in seen] == [i % 6 not in (1, 5) for i in range(24)]
    assert 70 <= small[0] <= 100  # several at once
    assert most[0] == 250  # the large one alone
    assert room.taken == 0


def test_bad_images_do_not_wait_for_ever_behind_a_good_one(runs: dict[str, Path]) -> None:
    model = open_predictor(runs["classify"], "torch", threads=1)
    frame = Frame("", "", lambda: photo(0))
    good = Seen(frame, (48, 64), model.fit(photo(0)))
    drawn = []

    def items() -> Any:
        for i in range(100):
            drawn.append(i)
            yield Seen(frame, problem="bad") if i else good

    results = predicted(model, items(), 4)
    assert next(results).predictions
    assert len(drawn) <= 8
    assert len(list(results)) == 99


def test_ahead_keeps_order_and_bound() -> None:
    running, most = [0], [0]
    lock = threading.Lock()

    def work(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i

    def items() -> Any:
        for i in range(30):
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            yield i

    out = []
    for i in ahead(work, items(), 3, 5):
        with lock:
            running[0] -= 1
        out.append(i)
    assert out == list(range(30))
    assert most[0] <= 5


class Engine:
    """A stand-in for a runner: torch's outputs, changed or delayed."""

    def __init__(self, name: str, runner: Any, change: float, delay: float) -> None:
        self.name, self.runner, self.change, self.delay = name, runner, change, delay
        self.session = runner.session

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(self.delay)
        return {name: value + value.dtype.type(self.change) for name, value in self.runner.run(image).items()}


@pytest.mark.parametrize(
    ("fast", "second", "chosen", "said"),
    [
        ((0.0, 0.0), (0.0, 0.3), "fast", "second left out: slower than fast here"),
        ((0.0, 0.3), (0.0, 0.0), "second", "fast left out: slower than torch here"),
        ((0.0, 0.05), (0.0, 0.0), "second", "same outputs as torch"),
        ((0.1, 0.0), (0.0, 0.0), "second", "fast left out: its output classify differs from torch's by 0.1"),
        ((0.1, 0.0), (0.0, 0.5), "torch", "second left out: slower than torch"),
        ((float("nan"), 0.0), (0.0, 0.0), "second", "fast left out: its output classify differs"),
        (None, (0.0, 0.0), "second", "fast left out: no such operator"),
    ],
)
def test_auto_takes_the_fastest_engine_that_is_the_same_model(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, fast: Any, second: Any, chosen: str, said: str
) -> None:
    made: dict[str, Any] = {}

    def opened(model: Any, name: str, threads: int | None, precision: str) -> Any:
        if name == "torch":
            made[name] = Engine(name, open_model(model, "torch", 1), 0.0, 0.1)
            return made[name]
        if (setting := {"fast": fast, "second": second}[name]) is None:
            raise RuntimeError("no such operator\nand a long story")
        made[name] = Engine(name, open_model(model, "torch", 1), *setting)
        return made[name]

    monkeypatch.setattr(choice, "open_model", opened)
    monkeypatch.setattr(choice, "available", lambda: ["fast", "second", "torch"])
    image = np.zeros((1, 3, 64, 64), np.uint8)
    model = load(runs["classify"])
    runner, notes = choice.choose(model, image, 1)
    assert runner is made[chosen]
    assert said in " ".join(notes)
    runner, notes = choice.choose(model, image, 1, count=3)
    assert runner is made["torch"]
    assert "3 images are too few to repay an export" in notes[0]


def test_auto_takes_what_has_been_exported_of_these_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = write_run(tmp_path / "run", "classify", ["image_size=[64,64]", *TINY_SCENES])
    assert open_predictor(folder, "auto", 1, count=1).runner.name == "torch"
    export.run(compose("export", [f"run={folder}", "engine=onnxruntime", "threads=1"]))
    weights = folder / "best.pt"
    (found,) = exported_from(weights, 1, "f32").values()
    assert found.name == "onnxruntime"
    assert not exported_from(weights, 1, "bf16")
    notes = open_predictor(folder, "auto", 1, count=1).notes
    assert not any("to repay an export" in note for note in notes)
    checkpoint.save(weights, {**checkpoint.load(weights), "later": 1})
    assert not exported_from(weights, 1, "f32")  # of other weights
    (folder / "export" / "onnxruntime.onnx").write_bytes(b"damaged")
    assert not exported_from(weights, 1, "f32")


@pytest.mark.parametrize("size", [(1, 1), (24, 32), (4, 3000), (700, 500)])
def test_pictures_are_legible_at_any_size(size: tuple[int, int]) -> None:
    pixels = np.full((*size, 3), 200, np.uint8)
    height, width = size
    box = [[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]]
    found = {"boxes": np.array(box), "scores": np.array([0.9]), "labels": np.array([1])}
    shown = picture(pixels)
    predictions = {"classify": np.array([0.1, 0.7, 0.2]), "segment": np.full(size, 2, np.uint8), "detect": found}
    drawn = draw(shown, predictions, dict.fromkeys(predictions, CLASSES), 0.3)
    assert 480 <= max(shown.image.size) <= 1600
    assert min(shown.image.size) >= 160
    assert drawn.height > shown.image.height + 3 * shown.type_size
    left, top, right, bottom = shown.place
    middle = drawn.getpixel(((left + right) // 2, (top + bottom) // 2))
    if size == (700, 500):
        assert middle == pytest.approx([(200 + c) / 2 for c in colour(2)], abs=2)
        assert drawn.getpixel((int(0.75 * 500) - 1, 350)) == colour(1)
    assert shown.image.getpixel((left, top)) == (200, 200, 200)  # drawn on a copy


def test_the_background_stays_unpainted() -> None:
    shown = picture(np.full((500, 500, 3), 90, np.uint8))
    drawn = draw(shown, {"segment": np.zeros((500, 500), np.uint8)}, {"segment": CLASSES}, 0.3)
    assert drawn.getpixel((250, 250)) == (90, 90, 90)


def test_a_single_predictor_serves_paths_arrays_and_tensors(runs: dict[str, Path], tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", 5)
    model: Predictor = predictor(runs["classify"], "torch")
    first = model.predict(path)["classify"]
    assert torch.equal(model.predict(photo(5))["classify"], first)
    assert torch.equal(model.predict(torch.from_numpy(photo(5)).permute(2, 0, 1))["classify"], first)
    assert torch.equal(model.predict(Image.fromarray(photo(5)))["classify"], first)
    for wrong in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 3), ">u2"), np.zeros((4, 4), object), None, b"x"):
        with pytest.raises(ValueError, match=r"predict got .* or uint8 RGB"):
            model.predict(wrong)  # type: ignore[arg-type]


def test_video_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[video\]"'):
        open_frames(str(tmp_path / "x.mp4"), LIMIT)
    pipe = io.BytesIO(b"\0\0\0\x18ftypisom" + bytes(10_000))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(pipe))
    with pytest.raises(ValueError, match="stdin is a video"):
        command.spool(tmp_path)
    assert not (tmp_path / "stdin.mp4").exists()  # nothing more was taken from the pipe


def write_clip(file: Path, sizes: list[tuple[int, int]] = [(64, 48)]) -> None:  # noqa: B006 - only read
    """A video of 12 frames from black to bright; each further size begins another stream appended to the file."""
    import av

    parts = []
    for width, height in sizes:
        part = file.with_name(f"part_{len(parts)}{file.suffix}")
        with av.open(str(part), "w") as out:
            old = file.suffix in (".ts", ".mpg")
            stream = out.add_stream("mpeg2video" if old else "mpeg4", rate=25 if old else 10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for i in range(12):
                frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 20 * i, np.uint8), format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        parts.append(part)
    file.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def test_video(runs: dict[str, Path], tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    file = tmp_path / "clip.mp4"
    write_clip(file)
    frames = open_frames(str(file), LIMIT)
    assert frames.total == 12
    pixels = [frame.load() for frame in frames.items]
    assert [round(float(p.mean())) for p in pixels] == pytest.approx([20 * i for i in range(12)], abs=6)
    run(runs["classify"], file, tmp_path / "out")
    check_clip(tmp_path / "out", "clip.mp4")
    with av.open(str(tmp_path / "out" / "drawn.mp4")) as video:
        assert video.streams.video[0].average_rate == 10
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"bad\.mp4 cannot be read as a video"):
        open_frames(str(tmp_path / "bad.mp4"), LIMIT)


def test_a_legend_that_grows_moves_no_picture(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    video = Video(tmp_path / "drawn.mp4", Fraction(10), 0.15)
    for strip in (20, 60, 80, 40):
        frame = np.full((300 + strip, 481, 3), 255, np.uint8)
        frame[:300] = 0
        video.add(Image.fromarray(frame))
    video.close()
    with av.open(str(tmp_path / "drawn.mp4")) as written:
        drawn = [frame.to_ndarray(format="rgb24") for frame in written.decode(video=0)]
    assert [frame.shape for frame in drawn] == [(392, 482, 3)] * 4
    assert all(frame[:290].max() < 60 and frame[310:].min() > 190 for frame in (one[:, :470] for one in drawn))


def check_clip(out: Path, name: str) -> None:
    """What is predicted of ``write_clip``'s video, and drawn on it."""
    rows = list(csv.DictReader((out / "classes.csv").open()))
    assert [row["file"] for row in rows] == [f"{name}#{i + 1}" for i in range(12)]
    assert sorted(path.name for path in out.iterdir()) == ["classes.csv", "drawn.mp4"]
    drawn = [frame.load() for frame in open_frames(str(out / "drawn.mp4"), LIMIT).items]
    corner = [float(picture[:2, -2:].mean()) for picture in drawn]  # away from the label
    assert corner == pytest.approx([20 * i for i in range(12)], abs=12)


def test_a_video_whose_size_grows_over_the_limit_is_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_clip(tmp_path / "clip.ts", [(64, 48), (320, 240)])
    frames = list(open_frames(str(tmp_path / "clip.ts"), 64 * 48).items)
    assert frames[0].load().shape == (48, 64, 3)
    with pytest.raises(ValueError, match=r"clip\.ts, frame \d+, has 320 x 240 pixels, over the limit 3,072"):
        frames[-1].load()


def test_a_video_that_is_cut_off_is_said(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("av")
    write_clip(tmp_path / "whole.mkv")
    content = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 2 // 3])
    run(runs["classify"], tmp_path / "whole.mkv", tmp_path / "out")
    assert "cut off" not in capsys.readouterr().out
    run(runs["classify"], tmp_path / "cut.mkv", tmp_path / "out2", draw=False)
    assert "cut.mkv ends after 7 of about 12 frames" in capsys.readouterr().out.replace(" 8 ", " 7 ")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts", ".mpg"])
def test_a_video_from_stdin(
    suffix: str, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    file = tmp_path / f"clip{suffix}"
    write_clip(file)
    assert video_suffix(file.read_bytes()[:BEGIN]) == suffix
    if suffix == ".mp4":  # the others differ in nothing behind that
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
        words = [f"run={runs['classify']}", "images=-", f"out={tmp_path}/out", "threads=1"]
        command.predict(compose("predict", words))
        check_clip(tmp_path / "out", "stdin.mp4")


def test_pictures_are_no_videos(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif"):
        save(tmp_path / f"a.{suffix}", 0, 40, 60)
        assert video_suffix((tmp_path / f"a.{suffix}").read_bytes()[:BEGIN]) is None
    assert video_suffix(b"\0\0\0\x1cftypavif" + bytes(500)) is None
    assert video_suffix(b"") is None


PROBE = """
import sys
sys.argv = ["tasks.predict", *{words!r}]
from tasks.predict import main
try:
    main()
except SystemExit as stop:
    print("CODE", stop.code)
print("TORCH", "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--help"], "on_error"), (["--cfg", "job"], "max_megapixels"), (["imagse=x"], "did you mean 'images'?")],
)
def test_answers_without_torch(words: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(words=words)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "TORCH False" in done.stdout
    assert message in done.stdout + done.stderr


@pytest.mark.parametrize(
    "path", ["a(1), b=[2]{3}.jpg", "it's.jpg", "trailing\\", "back\\'slash.jpg", "~/photos/*.jpg", "-", "12"]
)
def test_a_path_reaches_the_command_as_typed(path: str) -> None:
    assert compose("predict", [quoted(f"images={path}")])["images"] == path


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"engine": "onxruntime"}, "did you mean 'onnxruntime'"),
        ({"engine": "null"}, "there is no engine None; there are"),
        ({"engine": 1}, "there is no engine 1; there are"),
        ({"limit": 0}, "limit is 0"),
        ({"score": 2}, "score is 2"),
        ({"on_error": "ignore"}, "expected skip or fail"),
        ({"draw": 3}, "expected true or false"),
        ({"threads": 100_000}, "threads is 100000, more than the"),
        ({"max_megapixels": 0}, "max_megapixels is 0"),
    ],
)
def test_settings_are_checked(runs: dict[str, Path], photos: Path, setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(runs["classify"], photos, photos.parent / "out", **setting)


def test_detections_alone_take_ids_from_annotations(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"annotations=.* is for detections"):
        run(runs["classify"], photos, tmp_path / "out", annotations=photos / "notes.md")


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_what_came_before_a_bad_image_is_kept(runs: dict[str, Path], tmp_path: Path, batch_size: int) -> None:
    for i, name in enumerate(("a.jpg", "b.jpg", "d.jpg")):
        save(tmp_path / "photos" / name, i)
    (tmp_path / "photos" / "c.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"c\.jpg is not an image"):
        run(runs["classify"], tmp_path / "photos", tmp_path / "out", on_error="fail", batch_size=batch_size)
    with (tmp_path / "out" / "classes.csv").open(newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(("threads", "engine"), [(0, "torch"), (-1, "torch"), (1.5, "auto"), ("2", "torch"), (1, None)])
def test_a_services_settings_are_checked(runs: dict[str, Path], threads: Any, engine: Any) -> None:
    with pytest.raises(ValueError, match=r"threads is .*; expected a whole number|engine is None"):
        predictor(runs["classify"], engine, threads)


def test_one_image_from_stdin(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    content = io.BytesIO()
    Image.fromarray(photo(2)).save(content, "PNG")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.getvalue())))
    monkeypatch.chdir(tmp_path)
    command.predict(compose("predict", [f"run={runs['multitask']}", "images=-", "threads=1"]))
    said = json.loads(capsys.readouterr().out)
    assert (said["height"], said["width"]) == (48, 64)
    assert sum(entry["score"] for entry in said["classify"]) == pytest.approx(1, abs=1e-3)
    assert sum(entry["share"] for entry in said["segment"]) == pytest.approx(1, abs=1e-3)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    with pytest.raises(ValueError, match=r"^stdin is not an image"):
        command.predict(compose("predict", [f"run={runs['multitask']}", "images=-"]))


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims a size; its pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def test_a_bomb_is_refused_by_its_header_and_the_limit_can_be_raised(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    save(tmp_path / "small.png", 0, 100, 110)
    (frame,) = open_frames(str(tmp_path / "bomb.png"), LIMIT).items
    with pytest.raises(ValueError, match=r"bomb\.png.*over the limit of 100,000,000 pixels"):
        frame.load()
    (frame,) = open_frames(str(tmp_path / "small.png"), 10_000).items
    with pytest.raises(ValueError, match="over the limit of 10,000;"):
        frame.load()
    (tmp_path / "legal.png").write_bytes(png_header(9_900, 10_000))  # over Pillow's own bound, below ours
    (frame,) = open_frames(str(tmp_path / "legal.png"), LIMIT).items
    with pytest.raises(ValueError, match=r"truncated|cannot be decoded"):
        frame.load()


def mixed(folder: Path, count: int) -> dict[str, str]:
    """Photos of every kind; returns the bad ones with what is to be said of them."""
    kinds: list[Callable[[Path, int], None]] = [
        lambda path, i: Image.fromarray(photo(i, 40 + i % 50, 60)).save(path.with_suffix(".jpg")),
        lambda path, i: Image.fromarray(photo(i, 1 + i % 3, 1 + i % 2)).save(path.with_suffix(".png")),
        lambda path, i: Image.fromarray(photo(i)).convert("CMYK").save(path.with_suffix(".jpg")),
        lambda path, i: Image.fromarray(photo(i)).convert("P").save(path.with_suffix(".png")),
        lambda path, i: Image.fromarray(photo(i)).convert("L").save(path.with_suffix(".bmp")),
        lambda path, i: Image.fromarray(photo(i)[..., 0].astype(np.uint16) * 257).save(path.with_suffix(".png")),
        lambda path, i: Image.fromarray(photo(i)).convert("RGBA").save(path.with_suffix(".webp")),
    ]
    bad = {}
    whole = io.BytesIO()
    Image.fromarray(photo(0, 300, 400)).save(whole, "JPEG")
    broken: dict[str, tuple[bytes, str]] = {
        "truncated.jpg": (whole.getvalue()[:-2000], "truncated"),
        "empty.jpg": (b"", "it is empty"),
        "text.png": (b"this is a text", "it is text"),
        "bomb.png": (png_header(60_000, 60_000), "over the limit of 100,000,000 pixels"),
        "noise.jpg": (bytes(range(256)) * 20, "not an image"),
    }
    for i in range(count):
        place = folder / f"part {i % 7}"
        place.mkdir(parents=True, exist_ok=True)
        if i % 20 == 13:
            kind, (content, reason) = list(broken.items())[i // 20 % len(broken)]
            (place / f"{i}_{kind}").write_bytes(content)
            bad[f"{i}_{kind}"] = reason
        else:
            kinds[i % len(kinds)](place / str(i), i)
    large = Image.fromarray(photo(1)).resize((8000, 5000), Image.Resampling.BILINEAR)
    for name in ("large", "large_2", "large_3"):
        large.save(folder / f"{name}.jpg", quality=70)
    large.convert("CMYK").save(folder / "large_cmyk.jpg", quality=70)
    return bad


MEASURE = """
import sys
sys.argv = ["tasks.predict", *sys.argv[1:]]
from tasks.predict import main
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code
# not ru_maxrss: Linux hands it on from parent to child, so the child of a large process would seem as large
print("PEAK", next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) / 1024)
sys.exit(code)
"""
LARGEST_MB = 2000
"""What the process may take: some 700 MB for torch, the rest for 40-megapixel photos on their way."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [["engine=torch", "threads=1", "workers=1"], ["workers=4"]], ids=["plain", "usual"])
def test_a_thousand_mixed_photos(runs: dict[str, Path], tmp_path: Path, how: list[str]) -> None:
    bad = mixed(tmp_path / "photos", 996)
    words = [f"run={runs['multitask']}", f"images={tmp_path}/photos", f"out={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words, *how],
        cwd=ROOT, capture_output=True, text=True, timeout=1800, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{1000 - len(bad)} of 1000 images" in done.stdout
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert len(skipped) == len(bad) > 40
    for name, reason in bad.items():
        (line,) = (line for line in skipped if f"/{name} " in line)
        assert reason in line
    assert f"skipped {len(bad)}" in done.stdout
    assert len(json.loads((tmp_path / "out" / "images.json").read_text())["images"]) == 1000 - len(bad)
    masks = {path.stem: Image.open(path).size for path in (tmp_path / "out" / "masks").glob("*.png")}
    assert masks["large"] == (8000, 5000)
    peak = float(done.stdout.rpartition("PEAK ")[2])
    print(f"peak {peak:.0f} MB")
    assert peak < LARGEST_MB, f"{peak:.0f} MB"


def test_real_photos_with_odd_headers_pass(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = SHARED / "data" / "clothing" / "test"
    if not folder.is_dir():
        pytest.skip("the shared photos are not here")
    listed = sorted(folder.rglob("*.jpg"))[::40]
    (tmp_path / "list.txt").write_text("".join(f"{path.resolve()}\n" for path in listed))
    run(runs["classify"], tmp_path / "list.txt", tmp_path / "out", draw="false")
    assert len(list(csv.DictReader((tmp_path / "out" / "classes.csv").open()))) == len(listed)
