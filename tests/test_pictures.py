"""Pictures: what must be seen is there, whatever the images, names and numbers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.data import Boxes
from tasks.reporting import drawing, pictures
from tasks.reporting.confusion import confusion_picture
from tasks.reporting.pictures import GRIDS, save

CLASSES = ("cat", "細胞", "<script>", "a name that is much too long for any tile that one could draw it on", "é")


def grey(height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), 127, np.uint8)


def boxes(
    *rows: tuple[float, float, float, float], labels: list[int], scores: list[float] | None = None
) -> dict[str, Any]:
    found: dict[str, Any] = {"boxes": np.array(rows, np.float32).reshape(-1, 4), "labels": np.array(labels)}
    return found if scores is None else found | {"scores": np.array(scores)}


def has(picture: Image.Image, colour: tuple[int, int, int]) -> bool:
    """A colour in the grid, above the legend."""
    pixels = np.asarray(picture)[:250]
    return bool((pixels == np.array(colour)).all(axis=2).any())


SAMPLES: dict[str, tuple[Any, Any]] = {
    "classify": (1, np.array([0.1, 0.6, 0.1, 0.1, 0.1])),
    "detect": (boxes((10, 10, 60, 60), labels=[1]), boxes((12, 9, 60, 63), labels=[1], scores=[0.9])),
    "segment": (np.zeros((120, 160), np.uint8), np.ones((120, 160), np.int64)),
}


@pytest.mark.parametrize("task", GRIDS)
@pytest.mark.parametrize("size", [(8, 8), (33, 500), (700, 40), (2000, 3000)])
def test_every_grid_at_every_size(task: str, size: tuple[int, int]) -> None:
    truth, prediction = SAMPLES[task]
    if task == "segment":
        truth, prediction = (np.resize(mask, size) for mask in (truth, prediction))
    picture = GRIDS[task]([grey(*size)] * 3, [truth, truth, None], [prediction] * 3, CLASSES, columns=2)
    assert 300 < picture.width < 2000
    assert 200 < picture.height < 2000


@pytest.mark.parametrize("task", GRIDS)
def test_tensors_give_the_same_picture(task: str) -> None:
    truth, prediction = SAMPLES[task]

    def tensor(value: Any) -> Any:
        return {k: torch.as_tensor(v) for k, v in value.items()} if isinstance(value, dict) else torch.as_tensor(value)

    arrays = GRIDS[task]([grey()], [truth], [prediction], CLASSES)
    chw = torch.from_numpy(grey()).permute(2, 0, 1)
    assert GRIDS[task]([chw], [tensor(truth)], [tensor(prediction)], CLASSES) == arrays


@pytest.mark.parametrize("task", GRIDS)
def test_bad_input_is_named(task: str) -> None:
    truth, prediction = SAMPLES[task]
    with pytest.raises(ValueError, match="got 0, 0, 0"):
        GRIDS[task]([], [], [], CLASSES)
    with pytest.raises(ValueError, match="got 2, 1, 1"):
        GRIDS[task]([grey(), grey()], [truth], [prediction], CLASSES)
    with pytest.raises(ValueError, match="image 0 is float32"):
        GRIDS[task]([grey().astype(np.float32)], [truth], [prediction], CLASSES)


def test_a_prediction_is_drawn_where_it_is_in_its_class_s_colour() -> None:
    prediction = boxes((40, 30, 120, 90), labels=[4], scores=[0.9])
    picture = np.asarray(GRIDS["detect"]([grey()], [None], [prediction], CLASSES))
    at = np.argwhere((picture[:-32] == np.array(drawing.colour(4))).all(axis=2))
    scale = 400 / 160  # the tile is 400 px wide, 8 px from the border
    assert abs(at.max(axis=0) - (np.array([90, 120]) * scale + 8)).max() <= 2
    assert abs(at.min(axis=0)[1] - (40 * scale + 8)) <= 2


def test_weak_predictions_and_padding_are_left_out() -> None:
    weak = boxes((10, 10, 60, 60), labels=[1], scores=[0.29])
    assert not has(GRIDS["detect"]([grey()], [None], [weak], CLASSES), drawing.colour(1))
    assert has(pictures.detection_grid([grey()], [None], [weak], CLASSES, threshold=0.2), drawing.colour(1))
    nothing = GRIDS["detect"]([grey()], [None], [None], CLASSES)
    padding = boxes((0, 0, 0, 0), labels=[-1])
    assert GRIDS["detect"]([grey()], [padding], [None], CLASSES) == nothing


def test_true_boxes_are_drawn_and_named_only_where_missed() -> None:
    truth = Boxes(np.array([[10, 40, 60, 90]], np.float32), np.array([1]), np.zeros(1, bool), np.zeros(1, np.float32))

    def white(prediction: dict[str, Any] | None) -> int:
        picture = np.asarray(GRIDS["detect"]([grey()], [truth], [prediction], CLASSES))[8:300, 8:400]
        return int((picture == 255).all(axis=2).sum())

    found = white(boxes((10, 40, 60, 90), labels=[1], scores=[0.9]))
    wrong_class = white(boxes((10, 40, 60, 90), labels=[0], scores=[0.9]))
    assert found > 100
    assert wrong_class > found + 100  # the plate with the name
    assert white(None) > found + 100


def test_labels_stay_inside_and_apart() -> None:
    draw = drawing.ImageDraw.Draw(Image.new("RGB", (200, 200)))
    labels = drawing.Labels(draw, (0, 0, 199, 199), 12)
    for i in range(30):
        labels.add("a name", "0.50", (180, 190 - i, 250, 220), drawing.colour(i))
    assert len(labels.taken) >= 2
    for i, place in enumerate(labels.taken):
        assert 0 <= place[0] <= place[2] <= 199
        assert 0 <= place[1] <= place[3] <= 199
        for other in labels.taken[:i]:
            wide = min(place[2], other[2]) - max(place[0], other[0])
            high = min(place[3], other[3]) - max(place[1], other[1])
            assert max(wide, 0) * max(high, 0) <= 0.15 * (place[2] - place[0]) * (place[3] - place[1])


def test_boxes_outside_the_image_and_not_finite_do_no_harm() -> None:
    wild = boxes(
        (-50, -50, 500, 500), (300, 300, 200, 200), (np.nan, 0, 1, 1), labels=[0, 1, 2], scores=[0.9, 0.8, 0.7]
    )
    GRIDS["detect"]([grey()], [wild], [wild], CLASSES)


def test_right_and_wrong_differ() -> None:
    scores = SAMPLES["classify"][1]
    right, wrong = (GRIDS["classify"]([grey()], [label], [scores], CLASSES) for label in (1, 0))
    assert has(right, drawing.RIGHT)
    assert not has(right, drawing.WRONG)
    assert has(wrong, drawing.WRONG)
    assert not has(wrong, drawing.RIGHT)


def test_ignored_pixels_are_hatched() -> None:
    mask = np.full((120, 160), 255, np.uint8)
    picture = np.asarray(GRIDS["segment"]([grey()], [mask], [np.zeros((120, 160), np.int64)], CLASSES))
    truth, prediction = picture[20:180, 300:560], picture[20:180, 580:840]
    assert np.ptp(truth[..., 0] - truth[..., 2]) == 0  # grey
    assert len(np.unique(truth)) == 2  # two stripes
    assert (prediction.reshape(-1, 3) == prediction[0, 0]).all()


def test_a_mask_is_read_when_needed() -> None:
    class Mask:
        def load(self) -> np.ndarray:
            return np.full((120, 160), 3, np.uint8)

    prediction = SAMPLES["segment"][1]
    lazy, eager = (GRIDS["segment"]([grey()], [truth], [prediction], CLASSES) for truth in (Mask(), Mask().load()))
    assert lazy == eager


def test_colours_are_apart_for_every_eye() -> None:
    assert len({drawing.colour(i) for i in range(80)}) == 80
    views = {  # Machado et al. 2009, severity 1
        "normal": np.eye(3),
        "red-blind": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "green-blind": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    }
    srgb = np.array(drawing.PALETTE) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for view in views.values():
        xyz = (linear @ np.array(view).T).clip(0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
        distance = np.linalg.norm(lab[:, None] - lab, axis=2) + 1000 * np.eye(len(lab))
        assert distance.min() > 15


def test_names_no_font_has_are_said_differently() -> None:
    assert drawing.readable("cat", 12)[0] == "cat"
    assert drawing.readable("\U0010fffd", 12, "class 3")[0] == "class 3"
    text, font = drawing.readable("a\U0010fffd b", 12)
    assert text.startswith("a")
    assert font.getlength(text) > 0


@pytest.mark.parametrize("k", [1, 2, 10, 31, 100, 120])
def test_confusion_of_any_size(k: int) -> None:
    matrix = np.eye(k, dtype=np.int64) * 5
    matrix[0] = 0
    picture = confusion_picture(torch.from_numpy(matrix), [f"class {i}" for i in range(k)])
    assert picture.width >= k * 14
    pixels = np.asarray(picture)
    assert (pixels == (8, 48, 107)).all(axis=2).any() == (k > 1)  # a full share is the darkest blue


def test_confusion_of_a_thousand_classes_stays_small() -> None:
    matrix = np.eye(1000, dtype=np.int64)
    matrix[7] = 0
    picture = confusion_picture(matrix, [f"class {i}" for i in range(1000)])
    assert 1000 < picture.width < 1200
    left = picture.width - 20 - 1000
    assert picture.getpixel((left + 5, 34 + 5)) == (8, 48, 107)
    assert picture.getpixel((left + 7, 34 + 7)) != (8, 48, 107)


def test_confusion_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        confusion_picture(np.zeros((2, 3)), ["a", "b"])


def test_saving_never_leaves_half_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "predictions.png"
    save(Image.new("RGB", (4, 4), (1, 2, 3)), path)
    assert Image.open(path).getpixel((0, 0)) == (1, 2, 3)

    def fail(self: Image.Image, where: Path) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="space"):
        save(Image.new("RGB", (4, 4)), path)
    assert [p.name for p in path.parent.iterdir()] == ["predictions.png"]
    assert Image.open(path).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("folder", ["bccd/JPEGImages", "camvid/images/test", "clothing/test/hat"])
def test_real_photos(folder: str) -> None:
    shared = Path(__file__).parents[1] / "../shared/data" / folder
    if not shared.is_dir():
        pytest.skip(f"{shared} is not there")
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(shared.glob("*.jpg"))[:3]]
    for task, grid in GRIDS.items():
        truth, prediction = SAMPLES[task]
        assert grid(photos, [truth] * 3, [prediction] * 3, CLASSES).width > 300
