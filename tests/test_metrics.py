"""Scores against pycocotools, torchmetrics and brute force."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.data import Boxes
from tasks.training.metrics import COCO_KEYS, METRICS, CocoBoxes, MeanIoU, TopK

COCO_SAMPLE = Path(__file__).parents[1] / "../shared/data/cocoapi"


def random_split(
    images: int, dets: int, objects: int, classes: int, seed: int = 0, coarse: bool = False, crowd: float = 0.1
) -> tuple[list[dict[str, Tensor]], list[Boxes]]:
    """Detections scattered around random objects; ``coarse`` rounds them, so that scores and overlaps tie."""
    rng = np.random.default_rng(seed)
    predictions, truths = [], []
    for _ in range(images):
        n, d = (int(rng.integers(0, 2 * x + 1)) for x in (objects, dets))
        size = np.exp(rng.uniform(1.5, 5.5, (n, 2)))
        corner = rng.uniform(0, 400, (n, 2))
        xyxy = np.concatenate([corner, corner + size], 1)
        labels = rng.integers(0, classes, n)
        near = rng.integers(0, n, d) if n else np.zeros(d, int)
        around = xyxy[near] if n else np.tile([10.0, 10, 60, 90], (d, 1))
        spread = np.tile(around[:, 2:] - around[:, :2], 2) * 0.08
        boxes = around + rng.normal(size=(d, 4)) * spread
        boxes = np.sort(boxes.reshape(d, 2, 2), 1).reshape(d, 4)
        guess = np.where(rng.uniform(size=d) < 0.7, labels[near] if n else 0, rng.integers(0, classes, d))
        scores = rng.uniform(size=d)
        if coarse:
            boxes, xyxy, scores = np.round(boxes / 8) * 8, np.round(xyxy / 8) * 8 + [0, 0, 8, 8], np.round(scores, 1)
        area = (xyxy[:, 2:] - xyxy[:, :2]).prod(1) * 0.8
        floats = xyxy.astype(np.float32), area.astype(np.float32)
        truths.append(Boxes(floats[0], labels, rng.uniform(size=n) < crowd, floats[1]))
        as_tensors = torch.tensor(boxes, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32)
        predictions.append({"boxes": as_tensors[0], "scores": as_tensors[1], "labels": torch.tensor(guess)})
    return predictions, truths


def pycoco(predictions: list[dict[str, Tensor]], truths: list[Boxes], classes: int) -> np.ndarray:
    """pycocotools' twelve numbers; nan for its -1."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box: np.ndarray) -> list[float]:
        x1, y1, x2, y2 = map(float, box)
        return [x1, y1, x2 - x1, y2 - y1]

    gt, dt = COCO(), COCO()
    for coco in (gt, dt):
        coco.dataset = {
            "images": [{"id": i} for i in range(len(truths))],
            "categories": [{"id": k} for k in range(classes)],
            "annotations": [],
        }
    for i, (p, t) in enumerate(zip(predictions, truths, strict=True)):
        for box, label, crowd, area in zip(t.xyxy, t.labels, t.crowd, t.area, strict=True):
            entry = {"image_id": i, "category_id": int(label), "bbox": xywh(box), "iscrowd": int(crowd)}
            entry |= {"area": float(area), "id": len(gt.dataset["annotations"]) + 1}
            gt.dataset["annotations"].append(entry)
        for box, score, label in zip(p["boxes"].numpy(), p["scores"].tolist(), p["labels"].tolist(), strict=True):
            entry = {"image_id": i, "category_id": label, "bbox": xywh(box), "score": score}
            entry |= {"area": entry["bbox"][2] * entry["bbox"][3], "id": len(dt.dataset["annotations"]) + 1}
            dt.dataset["annotations"].append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
        dt.createIndex()
        run = COCOeval(gt, dt, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return np.where(run.stats == -1, np.nan, run.stats)


def score(predictions: list, truths: list, metric: CocoBoxes | MeanIoU, batch: int = 7) -> dict[str, float]:
    for i in range(0, len(truths), batch):
        metric.update(predictions[i : i + batch], truths[i : i + batch])
    return metric.compute()


@pytest.mark.parametrize(
    "split",
    [
        {"images": 30, "dets": 30, "objects": 6, "classes": 3},
        {"images": 60, "dets": 30, "objects": 3, "classes": 4, "coarse": True},
        {"images": 8, "dets": 140, "objects": 30, "classes": 1, "crowd": 0.3},
        {"images": 20, "dets": 10, "objects": 3, "classes": 40},
        {"images": 20, "dets": 0, "objects": 3, "classes": 2},
        {"images": 20, "dets": 10, "objects": 0, "classes": 2},
        {"images": 15, "dets": 10, "objects": 4, "classes": 2, "crowd": 1.0},
        {"images": 600, "dets": 4, "objects": 2, "classes": 2},
    ],
    ids=["usual", "ties", "crowded", "rare-classes", "no-detection", "no-object", "only-crowds", "many-images"],
)
def test_coco_equals_pycocotools(split: dict) -> None:
    predictions, truths = random_split(**split)
    ours = score(predictions, truths, CocoBoxes([str(k) for k in range(split["classes"])]))
    assert tuple(ours) == COCO_KEYS
    np.testing.assert_allclose(list(ours.values()), pycoco(predictions, truths, split["classes"]), rtol=0, atol=1e-9)


def test_coco_gives_the_last_of_equally_overlapped_objects() -> None:
    objects = np.array([[0, 0, 10, 10], [2, 0, 12, 10]], np.float32)
    truth = Boxes(objects, np.zeros(2, np.int64), np.zeros(2, bool), np.full(2, 100, np.float32))
    boxes = torch.tensor(
        [[1.0, 0, 11, 10], [0, 0, 10, 10]]
    )  # the first overlaps both by 9/11, the second is one of them
    found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.zeros(2, dtype=torch.int64)}
    ours = score([found], [truth], CocoBoxes("a"))
    np.testing.assert_allclose(list(ours.values()), pycoco([found], [truth], 1), rtol=0, atol=1e-9)
    assert ours["map_75"] == pytest.approx(1.0)


def test_coco_on_the_official_sample() -> None:
    if not COCO_SAMPLE.exists():
        pytest.skip(f"{COCO_SAMPLE} is absent")
    gt = json.loads((COCO_SAMPLE / "instances_val2014_100.json").read_text())
    results = json.loads((COCO_SAMPLE / "instances_val2014_fakebbox100_results.json").read_text())
    ids = [c["id"] for c in gt["categories"]]
    label_of = {id_: i for i, id_ in enumerate(ids)}

    def corners(entries: list[dict]) -> np.ndarray:
        boxes = np.array([e["bbox"] for e in entries], np.float64).reshape(-1, 4)
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).astype(np.float32)

    predictions, truths = [], []
    for image in sorted(i["id"] for i in gt["images"]):
        real, found = ([e for e in entries if e["image_id"] == image] for entries in (gt["annotations"], results))
        labels = [torch.tensor([label_of[e["category_id"]] for e in part], dtype=torch.int64) for part in (real, found)]
        crowd, area = np.array([e["iscrowd"] for e in real], bool), np.array([e["area"] for e in real], np.float32)
        truths.append(Boxes(corners(real), labels[0].numpy(), crowd, area))
        scores = torch.tensor([e["score"] for e in found], dtype=torch.float32)
        predictions.append({"boxes": torch.tensor(corners(found)), "scores": scores, "labels": labels[1]})
    metric = CocoBoxes([c["name"] for c in gt["categories"]])
    ours = score(predictions, truths, metric)
    # What pycocotools 2.0.11 prints for these two files.
    expected = [0.504581, 0.696973, 0.572982, 0.585626, 0.519400, 0.501398]
    expected += [0.386813, 0.593680, 0.595353, 0.639811, 0.566421, 0.564291]
    np.testing.assert_allclose(list(ours.values()), expected, rtol=0, atol=6e-7)
    known = [ap for ap in metric.per_class().values() if not math.isnan(ap)]
    assert np.mean(known) == pytest.approx(ours["map"], abs=1e-12)
    assert len(metric.per_class()) == 80


def test_coco_per_class_is_the_map_of_that_class_alone() -> None:
    predictions, truths = random_split(25, 20, 5, 3, seed=4)
    metric = CocoBoxes("abc")
    score(predictions, truths, metric)
    for k, name in enumerate("abc"):
        own = [{key: part[p["labels"] == k] for key, part in p.items()} for p in predictions]
        rest = [Boxes(*(part[t.labels == k] for part in (t.xyxy, t.labels, t.crowd, t.area))) for t in truths]
        assert metric.per_class()[name] == pytest.approx(score(own, rest, CocoBoxes("abc"))["map"], abs=1e-12)


def test_coco_does_not_depend_on_batches_or_their_order() -> None:
    predictions, truths = random_split(41, 15, 5, 3, seed=1)
    one = score(predictions, truths, CocoBoxes("abc"), batch=1)
    assert score(predictions, truths, CocoBoxes("abc"), batch=41) == one
    order = np.random.default_rng(0).permutation(41)
    shuffled = score([predictions[i] for i in order], [truths[i] for i in order], CocoBoxes("abc"))
    np.testing.assert_allclose(list(shuffled.values()), list(one.values()), rtol=0, atol=1e-12)


def test_coco_resets_and_is_nan_without_images() -> None:
    predictions, truths = random_split(5, 10, 3, 2)
    metric = CocoBoxes("ab")
    assert all(math.isnan(v) for v in metric.compute().values())
    first = score(predictions, truths, metric)
    metric.reset()
    assert all(math.isnan(v) for v in metric.per_class().values())
    assert score(predictions, truths, metric) == first


def test_coco_takes_bfloat16_and_refuses_nonsense() -> None:
    predictions, truths = random_split(3, 10, 3, 2)
    half = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in p.items()} for p in predictions]
    CocoBoxes("ab").update(half, truths)
    with pytest.raises(ValueError, match="3 images for 2 truths"):
        CocoBoxes("ab").update(predictions, truths[:2])
    with pytest.raises(ValueError, match="labels 0 to 1, but there are 1 classes"):
        CocoBoxes("a").update(predictions, truths)
    predictions[0]["scores"] = torch.full_like(predictions[0]["scores"], float("nan"))
    with pytest.raises(ValueError, match="nan or infinite"):
        CocoBoxes("ab").update(predictions, truths)


def random_masks(images: int, classes: int, absent: int, seed: int = 0) -> tuple[list[Tensor], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    sizes = [tuple(rng.integers(3, 30, 2)) for _ in range(images)]
    present = [k for k in range(classes) if k != absent]
    truths = [rng.choice([*present, 255], size).astype(np.uint8) for size in sizes]
    noise = [rng.choice(present, size) for size in sizes]
    agree = [rng.uniform(size=size) < 0.6 for size in sizes]
    guesses = [np.where(a & (t != 255), t, n) for a, t, n in zip(agree, truths, noise, strict=True)]
    return [torch.tensor(g) for g in guesses], truths


def test_miou_equals_a_brute_force_count() -> None:
    guesses, truths = random_masks(20, 5, absent=3)
    metric = MeanIoU("abcde")
    ours = score(guesses, truths, metric)
    pairs = [
        (int(t), int(g))
        for G, T in zip(guesses, truths, strict=True)
        for g, t in zip(G.ravel(), T.ravel(), strict=True)
    ]
    pairs = [(t, g) for t, g in pairs if t != 255]
    iou, recall = {}, {}
    for k in range(5):
        both, either = sum(t == g == k for t, g in pairs), sum(k in (t, g) for t, g in pairs)
        if either:
            iou["abcde"[k]], recall[k] = both / either, both / sum(t == k for t, _ in pairs)
    assert "d" not in iou
    assert math.isnan(metric.per_class()["d"])
    assert {k: v for k, v in metric.per_class().items() if k != "d"} == pytest.approx(iou, abs=1e-12)
    assert ours["miou"] == pytest.approx(sum(iou.values()) / 4, abs=1e-12)
    assert ours["mean_accuracy"] == pytest.approx(sum(recall.values()) / 4, abs=1e-12)
    assert ours["pixel_accuracy"] == pytest.approx(sum(t == g for t, g in pairs) / len(pairs), abs=1e-12)
    assert score(guesses, truths, MeanIoU("abcde"), batch=1) == ours
    assert score(guesses[::-1], truths[::-1], MeanIoU("abcde"), batch=20) == ours


def test_miou_counts_a_class_that_is_only_predicted() -> None:
    metric = MeanIoU("ab")
    metric.update([torch.tensor([[0, 1]])], [np.zeros((1, 2), np.uint8)])
    assert metric.compute() == {"miou": 0.25, "mean_accuracy": 0.5, "pixel_accuracy": 0.5}


def test_miou_counts_two_classes_of_one_name() -> None:
    metric = MeanIoU(["a", "b", "b"])
    metric.update([torch.tensor([[0, 1, 1, 1]])], [np.array([[0, 1, 2, 2]], np.uint8)])
    assert metric.compute()["miou"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert metric.compute()["mean_accuracy"] == pytest.approx((1 + 1 + 0) / 3)


def test_miou_of_ignored_pixels_only_is_nan() -> None:
    metric = MeanIoU("ab")
    metric.update([torch.zeros(2, 2, dtype=torch.uint8)], [np.full((2, 2), 255, np.uint8)])
    assert all(math.isnan(v) for v in metric.compute().values())


def test_miou_names_strange_values_with_their_count() -> None:
    mask = np.array([[0, 1, 7], [7, 9, 255]], np.uint8)
    with pytest.raises(ValueError, match=r"7 \(2 pixels\), 9 \(1 pixels\).*classes are 0 to 1"):
        MeanIoU("ab").update([torch.zeros(2, 3, dtype=torch.int64)], [mask])
    with pytest.raises(ValueError, match=r"\(2, 2\) for a mask of \(2, 3\)"):
        MeanIoU("ab").update([torch.zeros(2, 2, dtype=torch.int64)], [mask])
    with pytest.raises(ValueError, match="predicted classes 0 to 2"):
        MeanIoU("ab").update([torch.tensor([[0, 2]])], [np.zeros((1, 2), np.uint8)])


def test_top1_top5_and_confusion_equal_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(500, 12, generator=g).softmax(1), torch.randint(0, 11, (500,), generator=g)
    results = []
    for batch in (1, 64, 500):
        metric = TopK([str(k) for k in range(12)])
        for i in range(0, 500, batch):
            metric.update(scores[i : i + batch], labels[i : i + batch].tolist())
        results.append(metric.compute())
    assert results[0] == results[1] == results[2]
    for k in (1, 5):
        theirs = MulticlassAccuracy(12, top_k=k, average="micro")(scores, labels)
        assert results[0][f"top{k}"] == pytest.approx(float(theirs), abs=1e-6)
    np.testing.assert_array_equal(metric.confusion, MulticlassConfusionMatrix(12)(scores, labels).numpy())
    recall = MulticlassAccuracy(12, average="none")(scores, labels)[:11]
    ours = list(metric.per_class().values())
    assert ours[:11] == pytest.approx(recall.tolist(), abs=1e-6)
    assert math.isnan(ours[11])


def test_top1_breaks_ties_by_class_index() -> None:
    metric = TopK("abcdefg")
    metric.update(torch.zeros(7, 7), list(range(7)))
    assert metric.compute() == pytest.approx({"top1": 1 / 7, "top5": 5 / 7})
    assert "top5" not in TopK("abcde").compute()


def test_top1_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) for 2 labels of 2 classes"):
        TopK("ab").update(torch.zeros(2, 3), [0, 1])
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        TopK("ab").update(torch.zeros(2, 2), [0, 2])
    with pytest.raises(ValueError, match="nan or infinite"):
        TopK("ab").update(torch.full((1, 2), float("nan")), [0])


def test_every_task_has_a_metric_with_the_main_key() -> None:
    assert {task: metric.main for task, metric in METRICS.items()} == {
        "classify": "top1",
        "detect": "map",
        "segment": "miou",
    }
    assert all(metric.main in metric("ab").compute() for metric in METRICS.values())
