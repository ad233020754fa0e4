"""The training stream, caching and packing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from tasks.data import Boxes, Sample
from tasks.data.loader import Batch, Collate, Samples, Stream, evaluation_loader, prepared, seed_of, training_loader
from tasks.training import setup


def keep(item: dict[str, Any]) -> dict[str, Any]:
    return item


def jitter(item: dict[str, Any]) -> dict[str, Any]:
    noise = torch.randint(0, 50, item["image"].shape, dtype=torch.uint8)
    return item | {"image": tv_tensors.Image(item["image"] + noise)}


def boxes(*xyxy: tuple[float, float, float, float], crowd: bool = False) -> Boxes:
    array = np.array(xyxy, np.float32).reshape(-1, 4)
    area = (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])
    return Boxes(array, np.arange(len(array)), np.full(len(array), crowd), area)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    made = []
    for i in range(7):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((8, 10, 3), i * 10, np.uint8)).save(path)
        made.append(Sample(str(path), (8, 10), {"detect": boxes(*[(1, 1, 5, 5)] * i), "classify": i}))
    return made


def test_each_pass_holds_every_sample_once_in_another_order() -> None:
    flat = [key for batch in Stream(7, 3, seed=1, stop=7) for key in batch]
    first, second, third = ([i for turn, i in flat if turn == t] for t in range(3))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(7))
    assert first != second


def test_a_stream_started_late_goes_on_where_it_would_have_been() -> None:
    whole = list(Stream(7, 3, seed=5, stop=20))
    assert list(Stream(7, 3, seed=5, start=11, stop=20)) == whole[11:]
    assert list(Stream(7, 3, seed=6, stop=20)) != whole


def test_seeds_are_mixed_and_fixed() -> None:
    assert seed_of(0, 1, 2) == 4450782424123420391
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900


@pytest.mark.parametrize("cached", [True, False])
def test_batches_do_not_depend_on_workers_or_cache(samples: list[Sample], cached: bool) -> None:
    def batches(workers: int, cache: bool) -> list[Batch]:
        data = Samples(samples, ("detect",), jitter, seed=3, training=True)
        assert data.cache(1e9 if cache else 1) == cache
        return list(training_loader(data, 3, 3, workers, 2, 6, Collate(("detect",))))

    ours, theirs = batches(0, False), batches(2, cached)
    assert all(torch.equal(a.image, b.image) for a, b in zip(ours, theirs, strict=True))
    assert [batch.places for batch in ours] == [batch.places for batch in theirs]


def test_loading_leaves_the_global_generator_alone(samples: list[Sample]) -> None:
    data = Samples(samples, ("detect",), jitter, seed=3, training=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert data[0, 1] is not None
    assert torch.equal(before, torch.get_rng_state())


def test_boxes_are_padded_and_crowds_left_out(samples: list[Sample]) -> None:
    crowd = Sample(samples[1].image, (8, 10), {"detect": boxes((0, 0, 4, 4), crowd=True)})
    data = Samples([samples[2], crowd, samples[0]], ("detect",), keep, seed=0, training=True)
    target = Collate(("detect",))([data[0, 0], data[0, 1], data[0, 2]]).targets["detect"]
    assert target["labels"].tolist() == [[0, 1], [-1, -1], [-1, -1]]
    assert target["boxes"][0].tolist() == [[1, 1, 5, 5]] * 2
    assert target["boxes"].dtype == torch.float32


@pytest.mark.parametrize("having", [0, 1])
def test_a_batch_where_hardly_a_sample_has_a_target_still_trains(samples: list[Sample], having: int) -> None:
    without = [Sample(sample.image, (8, 10), {"classify": 1}) for sample in samples[:4]]
    data = Samples([*without, *samples[4 : 4 + having]], ("detect", "classify"), keep, seed=0, training=True)
    batch = Collate(("detect", "classify"))([data[0, i] for i in range(len(data))])
    assert batch.rows["detect"].tolist() == [4, 4][: 2 * having]  # twice: a batch norm needs two
    assert ("detect" in batch.targets) == bool(having)
    assert "classify" not in batch.rows


def test_a_sample_without_a_target_is_left_out_of_that_task_only(samples: list[Sample]) -> None:
    partly = Sample(samples[0].image, (8, 10), {"classify": 4})
    data = Samples([partly, samples[3]], ("detect", "classify"), keep, seed=0, training=True)
    batch = Collate(("detect", "classify"))([data[0, 0], data[0, 1]])
    assert batch.rows["detect"].tolist() == [1, 1]
    assert "classify" not in batch.rows
    assert batch.targets["classify"].tolist() == [4, 3]
    assert batch.targets["detect"]["labels"].shape == (2, 3)


def test_evaluation_keeps_truth_and_original_size(samples: list[Sample]) -> None:
    def half(item: dict[str, Any]) -> dict[str, Any]:
        return item | {"image": tv_tensors.Image(item["image"][:, ::2, ::2])}

    batches = list(evaluation_loader(Samples(samples, ("detect",), half, 0, training=False), 3, 0))
    assert [batch.places for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches[0].sizes == [(8, 10)] * 3
    assert batches[0].image.shape == (3, 3, 4, 5)
    assert batches[0].truths["detect"][2].xyxy.tolist() == [[1, 1, 5, 5]] * 2
    assert 0 < batches[1].image.max() <= 60


@pytest.mark.parametrize("cached", [True, False])
def test_a_broken_image_is_named_or_skipped(samples: list[Sample], cached: bool) -> None:
    Path(samples[2].image).write_bytes(b"no image")
    strict = Samples(samples, ("detect",), keep, 0, training=False)
    with pytest.raises(ValueError, match=r"2\.png.*data\.on_error=skip"):
        strict.cache(1e9) if cached else strict[0, 2]
    lenient = Samples(samples, ("detect",), keep, 0, training=False, on_error="skip")
    lenient.cache(1e9 if cached else 1)
    assert sum(len(batch.places) for batch in evaluation_loader(lenient, 4, 0)) == 6
    skipped = {line for batch in evaluation_loader(lenient, 4, 0) for line in batch.skipped}
    assert len(skipped) == 1
    assert "2.png" in skipped.pop()


def test_training_goes_on_with_the_next_image_and_the_stream_stays(samples: list[Sample]) -> None:
    Path(samples[2].image).write_bytes(b"no image")
    streams = []
    for budget in (1e9, 1):
        data = Samples(samples, ("detect",), keep, 0, training=True, on_error="skip")
        data.cache(budget)
        streams.append([b.places for b in training_loader(data, 3, 0, 0, 0, 5, Collate(("detect",)))])
    assert streams[0] == streams[1]
    assert all(len(places) == 3 and 2 not in places for places in streams[0])


def test_an_image_of_another_size_than_annotated_is_refused(samples: list[Sample]) -> None:
    wrong = Sample(samples[0].image, (9, 10), {"detect": boxes()})
    with pytest.raises(ValueError, match="10x8 px, its annotation says 10x9"):
        _ = Samples([wrong], ("detect",), keep, 0, training=True)[0, 0]


def test_a_prepared_batch_is_what_nets_and_losses_take(samples: list[Sample]) -> None:
    data = Samples(samples, ("detect",), keep, seed=0, training=True)
    raw = Collate(("detect",))([data[0, 0], data[0, 1]])
    mask = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    batch = prepared(raw._replace(targets=raw.targets | {"segment": mask}))
    assert torch.equal(batch.image, raw.image / 255)
    assert torch.equal(batch.targets["segment"], torch.tensor([[[0, 255]]]))
    assert torch.equal(prepared(batch).image, batch.image)
    assert batch.targets["detect"] is raw.targets["detect"]


def test_two_cores_load_images_in_memory_without_a_process(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def workers(cores: int, cached: bool = True, threads: int | None = None, asked: int | str = "auto") -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        data = Samples(samples, ("detect",), keep, seed=0, training=True)
        assert data.cache(1e9 if cached else 1) == data.in_memory == cached
        return setup.worker_count({"workers": asked, "trainer": {"threads": threads}}, data)

    assert [workers(cores) for cores in (1, 2, 3, 64)] == [0, 0, 2, 8]
    assert [workers(2, cached=False), workers(2, threads=1), workers(2, threads=2), workers(2, asked=3)] == [1, 1, 0, 3]
