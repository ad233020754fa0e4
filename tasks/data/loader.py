"""From samples to batches: decoding, caching, seeding and collating.

Training is one endless stream: batch ``i`` depends on the seed and on ``i`` alone, not on the number of workers or on
where a run was interrupted. That is what makes a resumed run end where an uninterrupted one does.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors

from heads import Size
from tasks.data import Boxes, Sample
from tasks.data.images import decode

Transform = Callable[[dict[str, Any]], dict[str, Any]]


class Batch(NamedTuple):
    """What the loader yields."""

    image: Tensor
    """[B, 3, H, W] uint8; float32 in [0, 1] once mixed or ``prepared``."""
    targets: dict[str, Any]
    """task -> target as ``heads.Head`` describes it, but masks uint8 until ``prepared``; for the samples in ``rows``.
    Empty in evaluation."""
    rows: dict[str, Tensor]
    """task -> int64 indices of the samples that have this target; a task is missing when all have it."""
    truths: dict[str, list[Any]]
    """task -> one untouched target a sample (None where absent), in original pixels; empty in training."""
    sizes: list[Size]
    """Original height, width of each image."""
    skipped: list[str]
    """What was wrong with samples that ``on_error=skip`` left out."""
    places: list[int]
    """Each sample's place in its split."""


def prepared(batch: Batch) -> Batch:
    """The batch as nets and losses take it: images float32 in [0, 1] and masks int64.

    For the process that trains: with this work in the loader's, they would hand over four times the bytes.
    """
    image = batch.image.float()
    batch = batch._replace(image=image.div_(255) if batch.image.dtype == torch.uint8 else image)
    if "segment" in batch.targets:
        batch = batch._replace(targets=batch.targets | {"segment": batch.targets["segment"].long()})
    return batch


def seed_of(*parts: int) -> int:
    """A 63-bit seed from numbers, well mixed and the same on every machine."""
    digest = hashlib.blake2b(np.array(parts, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let torch's CPU generator start at a seed and leave it as it was (``fork_rng`` takes 80 times as long)."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


Decoded = tuple[Tensor, "np.ndarray | None"]
"""An image [3, H, W] uint8 and its semantic mask, if there is one."""


class Samples(Dataset):
    """Decodes, transforms and packs single samples.

    Args:
        samples: the split.
        tasks: which targets to load.
        transform: sample dict -> sample dict (see ``tasks.data.augment``).
        seed: of the augmentation.
        training: whether to pack targets (training) or keep the truth in original pixels (evaluation).
        on_error: ``fail`` raises on an image that cannot be read; ``skip`` scores without it, and trains on the next
            one in its place, so that the stream is the same whether images are cached or not.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tasks: Sequence[str],
        transform: Transform,
        seed: int,
        training: bool,
        on_error: str = "fail",
    ) -> None:
        self.samples = list(samples)
        self.tasks = tuple(tasks)
        self.transform = transform
        self.seed = seed
        self.training = training
        self.on_error = on_error
        self.skipped: dict[str, None] = {}
        """Messages on what was left out, in order, each once."""
        self._decoded: list[Decoded | ValueError] | None = None
        self.cached_bytes = 0

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def in_memory(self) -> bool:
        """Whether all are decoded, see ``cache``."""
        return self._decoded is not None

    def _decode(self, sample: Sample) -> Decoded:
        """The image [3, H, W] uint8 (channels last in memory) and, if there is one, its semantic mask."""
        image = decode(sample.image)
        if sample.size is not None and image.shape[:2] != tuple(sample.size):
            raise ValueError(
                f"{sample.image} is {image.shape[1]}x{image.shape[0]} px, its annotation says "
                f"{sample.size[1]}x{sample.size[0]}; correct one of the two"
            )
        mask = sample.targets["segment"].load() if "segment" in self.tasks and "segment" in sample.targets else None
        if mask is not None and mask.shape != image.shape[:2]:
            raise ValueError(
                f"the mask of {sample.image} is {mask.shape[1]}x{mask.shape[0]} px, the image "
                f"{image.shape[1]}x{image.shape[0]}; they must be equal"
            )
        return torch.from_numpy(image).permute(2, 0, 1), mask

    def cache(self, budget_bytes: float, on_progress: Callable[[int, int], None] | None = None) -> bool:
        """Decode everything into memory if it fits; says whether it did.

        Args:
            budget_bytes: how much memory the decoded images and masks may take.
            on_progress: called with (done, total).
        """
        if not self.samples:
            return False
        probe = self.samples[:: max(1, len(self.samples) // 8)][:8]
        sizes = [sample.size or self._size(sample) for sample in probe]
        channels = 4 if "segment" in self.tasks else 3
        expected = sum(h * w for h, w in sizes) / len(sizes) * channels * len(self.samples)
        if expected > budget_bytes:
            return False
        decoded: list[Decoded | ValueError] = []
        with ThreadPoolExecutor() as pool:
            for done, result in enumerate(pool.map(self._attempt, self.samples), 1):
                if isinstance(result, ValueError):
                    self._refuse(result)
                else:
                    self.cached_bytes += result[0].numel() + (0 if result[1] is None else result[1].nbytes)
                decoded.append(result)
                if on_progress and (done % 100 == 0 or done == len(self.samples)):
                    on_progress(done, len(self.samples))
        self._decoded = decoded
        return True

    def _size(self, sample: Sample) -> Size:
        found = self._attempt(sample)
        return (0, 0) if isinstance(found, ValueError) else (found[0].shape[-2], found[0].shape[-1])

    def _attempt(self, sample: Sample) -> Decoded | ValueError:
        try:
            return self._decode(sample)
        except ValueError as error:
            return error

    def _refuse(self, error: ValueError) -> None:
        if self.on_error == "fail":
            raise ValueError(f"{error}; or set data.on_error=skip") from error
        self.skipped[str(error)] = None

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """One transformed sample, by (pass over the data, index), and what was skipped for it."""
        turn, index = key
        problems: list[str] = []
        for place in range(index, index + (len(self.samples) if self.training else 1)):
            index = place % len(self.samples)
            found = self._decoded[index] if self._decoded is not None else self._attempt(self.samples[index])
            if not isinstance(found, ValueError):
                break
            self._refuse(found)
            problems.append(str(found))
        else:
            if self.training:
                raise ValueError(f"not one training image can be read; {problems[0]}")
            return {"skipped": problems}
        (image, mask), sample = found, self.samples[index]
        item: dict[str, Any] = {"image": tv_tensors.Image(image)}
        size = (image.shape[-2], image.shape[-1])
        truths = {task: sample.targets.get(task) for task in self.tasks} if not self.training else {}
        if mask is not None and not self.training:
            truths["segment"] = mask
        if self.training:
            item |= unpack(sample, mask, size, self.tasks)
        with drawing_from(seed_of(self.seed, turn, index)):
            item = self.transform(item)
        return {
            "item": item,
            "truths": truths,
            "size": size,
            "index": index,
            "seed": seed_of(self.seed, turn, index, 1),
            "skipped": problems,
        }


def unpack(sample: Sample, mask: np.ndarray | None, size: Size, tasks: Sequence[str]) -> dict[str, Any]:
    """A sample's targets in the form that transforms understand; crowd regions are not trained on."""
    item: dict[str, Any] = {}
    boxes: Boxes | None = sample.targets.get("detect") if "detect" in tasks else None
    if boxes is not None:
        keep = ~boxes.crowd
        item["boxes"] = tv_tensors.BoundingBoxes(
            torch.from_numpy(boxes.xyxy[keep]).reshape(-1, 4), format="XYXY", canvas_size=size
        )
        item["labels"] = torch.from_numpy(boxes.labels[keep])
    if mask is not None:
        item["mask"] = tv_tensors.Mask(torch.from_numpy(mask))
    if "classify" in tasks and "classify" in sample.targets:
        item["label"] = int(sample.targets["classify"])
    return item


def pack_labels(items: list[dict[str, Any]]) -> Tensor:
    """[n] int64."""
    return torch.tensor([item["label"] for item in items], dtype=torch.int64)


def pack_boxes(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """{"boxes" [n, N, 4] float32, "labels" [n, N] int64, -1 where padded}; N is the largest count, at least 1."""
    most = max(1, *(len(item["labels"]) for item in items))
    boxes = torch.zeros(len(items), most, 4)
    labels = torch.full((len(items), most), -1, dtype=torch.int64)
    for row, item in enumerate(items):
        count = len(item["labels"])
        boxes[row, :count] = item["boxes"].as_subclass(Tensor)
        labels[row, :count] = item["labels"]
    return {"boxes": boxes, "labels": labels}


def pack_masks(items: list[dict[str, Any]]) -> Tensor:
    """[n, H, W] uint8, 255 = ignore."""
    return torch.stack([item["mask"].as_subclass(Tensor) for item in items])


PACK: dict[str, tuple[str, Callable[[list[dict[str, Any]]], Any]]] = {
    "classify": ("label", pack_labels),
    "detect": ("labels", pack_boxes),
    "segment": ("mask", pack_masks),
}
"""task -> the key that marks a sample as having this target, and how a list of them becomes one target."""


class Collate:
    """Packs samples into a ``Batch``.

    Args:
        tasks: whose targets to pack.
        mix: (images, labels) -> (images, soft labels), for mixup and cutmix; None leaves labels alone. It draws from
            torch's generator, which is seeded by the batch's first sample.
    """

    def __init__(
        self, tasks: Sequence[str], mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> None:
        self.tasks = tuple(tasks)
        self.mix = mix

    def __call__(self, packed: list[dict[str, Any]]) -> Batch:
        skipped = [message for entry in packed for message in entry["skipped"]]
        kept = [entry for entry in packed if "item" in entry]
        if not kept:
            return Batch(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), {}, {}, {}, [], skipped, [])
        items = [entry["item"] for entry in kept]
        image = torch.stack([item["image"].as_subclass(Tensor) for item in items])
        targets: dict[str, Any] = {}
        rows: dict[str, Tensor] = {}
        truths = {task: [entry["truths"].get(task) for entry in kept] for task in kept[0]["truths"]}
        for task in () if truths else self.tasks:
            marker, pack = PACK[task]
            having = [row for row, item in enumerate(items) if marker in item]
            if len(having) == 1 < len(items):
                having *= 2  # a batch norm behind a global pool needs two; the mean loss is the same
            if having:
                targets[task] = pack([items[row] for row in having])
            if having != list(range(len(items))):
                rows[task] = torch.tensor(having, dtype=torch.int64)
        if self.mix is not None and "classify" in targets and "classify" not in rows:
            with drawing_from(kept[0]["seed"]):
                image, targets["classify"] = self.mix(image.float().div_(255), targets["classify"])
        sizes, places = [entry["size"] for entry in kept], [entry["index"] for entry in kept]
        return Batch(image, targets, rows, truths, sizes, skipped, places)


class Stream(Sampler[list[tuple[int, int]]]):
    """The batches of a training run from ``start`` to ``stop``, each pass over the data in a new order.

    A batch may reach over the end of a pass, so that every batch is full.

    Args:
        length: samples in the split.
        batch_size: samples a batch.
        seed: of the order.
        start, stop: the first batch, and the one after the last; ``stop`` None never ends.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0, stop: int | None = None) -> None:
        self.length, self.batch_size, self.seed, self.start, self.stop = length, batch_size, seed, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, np.ndarray] = {}
        step = self.start
        while self.stop is None or step < self.stop:
            batch = []
            for place in range(step * self.batch_size, (step + 1) * self.batch_size):
                turn, offset = divmod(place, self.length)
                if turn not in orders:
                    orders = {k: v for k, v in orders.items() if k >= turn - 1}
                    orders[turn] = np.random.default_rng(seed_of(self.seed, turn)).permutation(self.length)
                batch.append((turn, int(orders[turn][offset])))
            yield batch
            step += 1


def ignore_interrupts(_worker: int) -> None:
    """Leave Ctrl-C to the training process, which finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_loader(
    samples: Samples, batch_size: int, seed: int, workers: int, start: int, stop: int | None, collate: Collate
) -> DataLoader:
    """Batches ``start`` to ``stop`` of the training stream (see ``Stream``)."""
    stream = Stream(len(samples), batch_size, seed, start, stop)
    return DataLoader(
        samples,
        batch_sampler=stream,
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_interrupts,
    )


def evaluation_loader(samples: Samples, batch_size: int, workers: int) -> DataLoader:
    """Every sample once, in order, with its untouched truth."""
    keys = [(0, i) for i in range(len(samples))]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=Collate(samples.tasks),
        worker_init_fn=ignore_interrupts,
    )
