"""Both sides of the training rows: a step on a batch in memory, and our step fed by our own loader."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from tasks.cli import compose
from tasks.data.loader import Batch, Collate, prepared, training_loader
from tasks.deploy.peer_worker import Work
from tasks.training import setup
from tasks.training.build import complete, make_model, plain, read_data
from tasks.training.module import TaskModule
from tasks.training.run import make_module
from tasks.training.weights import load_model

MEAN, STD = (torch.tensor(rgb, device="cpu").view(3, 1, 1) for rgb in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
LIKE_THEIRS = ["optimizer=sgd", "ema.share=0", "trainer.clip_norm=null", "head.dropout=0.2"]
OBJECTS = 7  # an image, as in COCO
STEPS = 12  # of a turn of the input rows
BEFORE = 6  # steps untimed, a loader process: more than the batches that it prepares ahead


def step_classifier(asked: Mapping[str, Any], ours: bool) -> Work:
    """A step of a classifier: forward, loss, backward, optimizer."""
    variant = "small" if asked["row"] == "step_small" else "large"
    size = asked["batch"] or 32
    torch.manual_seed(0)
    theirs = get_model(f"mobilenet_v3_{variant}", weights=None).train()
    image, label = torch.randint(0, 256, (size, 3, 224, 224), dtype=torch.uint8), torch.randint(0, 1000, (size,))
    if not ours:
        normal = (image / 255 - MEAN) / STD  # torchvision's scripts normalise in the loader
        loss = nn.CrossEntropyLoss()
        check = without_dropout(theirs, lambda: loss(theirs(normal), label).item())
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        return Work(lambda: their_step(optimizer, lambda: loss(theirs(normal), label)), size, [check])
    words = [f"backbone={variant}", "data=imagenet", "head.num_classes=1000", "image_size=[224,224]"]
    words += [] if asked["row"].endswith("whole") else LIKE_THEIRS
    module, clip = our_module("classify", words, theirs.state_dict(), asked["threads"])
    batch = Batch(image, {"classify": label}, {}, {}, [], [], [])
    check = without_dropout(module.model, lambda: sum(our_losses(module, batch)["classify"].values()))
    return Work(our_step(module, batch, clip), size, [check])


def step_ssdlite(asked: Mapping[str, Any], ours: bool) -> Work:
    """A step of SSDLite: forward, matching, loss, backward, optimizer."""
    size = asked["batch"] or 16
    torch.manual_seed(0)
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91).train()
    image = torch.randint(0, 256, (size, 3, 320, 320), dtype=torch.uint8)
    corners = torch.rand(size, OBJECTS, 2, 2) * 280
    boxes = torch.cat((corners.amin(2), corners.amax(2) + 16), dim=-1)
    labels = torch.randint(0, 90, (size, OBJECTS))
    detail = "synthetic"
    if asked["row"] == "step_ssdlite_real":
        image, (boxes, labels), detail = real_batch(asked["roots"]["bccd"], size)
    if not ours:
        theirs.to(memory_format=torch.channels_last)
        pixels = list(image / 255)
        targets = [{"boxes": b[n >= 0], "labels": n[n >= 0] + 1} for b, n in zip(boxes, labels, strict=True)]

        def losses() -> dict[str, Tensor]:
            return theirs(pixels, targets)

        with torch.no_grad():
            first = losses()
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        check = [first["classification"].item(), first["bbox_regression"].item()]

        def total() -> Tensor:
            return torch.stack(list(losses().values())).sum()

        return Work(lambda: their_step(optimizer, total), size, check, detail)
    words = ["backbone=large", "backbone.reduced_tail=detection", "data=coco", "head=ssdlite", "head.num_classes=90"]
    words += ["image_size=[320,320]", *LIKE_THEIRS[:-1]]
    module, clip = our_module("detect", words, theirs.state_dict(), asked["threads"])
    batch = Batch(image, {"detect": {"boxes": boxes, "labels": labels}}, {}, {}, [], [], [])
    found = our_losses(module, batch)["detect"]
    return Work(our_step(module, batch, clip), size, [found["cls"], found["box"]], detail)


def real_batch(root: str | None, size: int) -> tuple[Tensor, tuple[Tensor, Tensor], str]:
    """The first training batch of BCCD as our loader gives it, without a folder of drawn scenes.

    Returns:
        Images [B, 3, 320, 320] uint8, their boxes and labels as a head takes them, and what they are.
    """
    drawn = ["data=scenes", "data.train=100", "data.val=1", "data.test=1"]
    words = ["data=bccd", f"data.root={root}"] if root else drawn
    config = plain(compose("detect", [*words, f"batch_size={size}", "image_size=[320,320]", "cache_gb=0"]))
    samples = setup.load_splits(read_data(config), config, Console(file=None, quiet=True))["train"]
    batch: Batch = next(iter(training_loader(samples, size, 0, 0, 0, 1, Collate(("detect",)))))
    target = batch.targets["detect"]
    objects = int((target["labels"] >= 0).sum())
    what = f"{'photos of BCCD' if root else 'drawn scenes, not photos'}, {objects} objects in {size} images"
    return batch.image, (target["boxes"], target["labels"]), what


def their_step(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> None:
    """As torchvision's reference scripts step."""
    loss = loss_of()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def without_dropout(model: nn.Module, call: Callable[[], float]) -> float:
    """A call in training mode whose result does not hang on drawn masks."""
    parts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    shares = [part.p for part in parts]
    for part in parts:
        part.p = 0.0
    with torch.no_grad():
        result = call()
    for part, share in zip(parts, shares, strict=True):
        part.p = share
    return result


def our_module(
    command: str, words: list[str], state: Mapping[str, Tensor] | None, threads: int
) -> tuple[TaskModule, float | None]:
    """What the command would train, prepared as it prepares it, with another's weights; and its gradient clipping."""
    config = plain(compose(command, [*words, f"trainer.threads={threads}", "trainer.max_steps=1000000"]))
    setup.check(config)
    setup.prepare_machine(config)
    config, classes = complete(config)
    model = make_model(config, classes)
    if state is not None:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(dict(state), Path(folder) / "theirs.pth")
            load_model(model, str(Path(folder) / "theirs.pth"))
    module = make_module(model, config, samples=1000).train()
    module.on_fit_start()
    return module, config["trainer"]["clip_norm"]


def our_losses(module: TaskModule, batch: Batch) -> dict[str, dict[str, float]]:
    """Loss terms as numbers."""
    batch = prepared(batch)
    with torch.no_grad():
        found = module.model.losses(module.model(batch.image), batch.targets)
    return {task: {name: term.item() for name, term in terms.items()} for task, terms in found.items()}


def our_step(module: TaskModule, batch: Batch, clip: float | None) -> Callable[[], None]:
    """A step of our ``TaskModule``, by its own methods; Lightning's loop around them is left out."""
    run = stepper(module, clip)
    return lambda: run(batch)


def stepper(module: TaskModule, clip: float | None) -> Callable[[Batch], None]:
    """batch -> one optimizer step on it."""
    warnings.filterwarnings("ignore", message=".*self.log.*")  # there is no trainer to log to
    optimizer = module.configure_optimizers()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(batch: Batch) -> None:
        def closure() -> Tensor:
            loss = module.training_step(batch, 0)
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            return loss

        module.optimizer_step(0, 0, optimizer, closure)

    return step


def fed(asked: Mapping[str, Any], ours: bool) -> Work:
    """Our step on batches from our loader (ours), and on one batch in memory (the peer)."""
    name = asked["row"].removeprefix("input_")
    command, root = {"bccd": "detect", "camvid": "segment"}[name], asked["roots"][name]
    words = ["backbone=small", "trainer.max_steps=1000000", f"trainer.threads={asked['threads']}"]
    words += [f"data={name}", f"data.root={root}"] if root else ["data=scenes", "data.train=200", "data.val=20"]
    words += [f"batch_size={asked['batch']}"] if asked["batch"] else []
    config = plain(compose(command, words))
    setup.check(config)
    setup.prepare_machine(config)
    data = read_data(config)
    config, classes = complete(config, data)
    samples = setup.load_splits(data, config, Console(file=None, quiet=True))["train"]
    module = make_module(make_model(config, classes), config, len(samples)).train()
    module.on_fit_start()
    step, size = stepper(module, config["trainer"]["clip_norm"]), config["batch_size"]
    workers = setup.worker_count(config, samples)
    before = BEFORE * max(1, workers)

    def batches() -> Any:
        """Without end, so that the processes work on behind the last timed step as before the first."""
        return iter(training_loader(samples, size, 0, workers, 0, None, Collate(tuple(config["heads"]))))

    one = prepared(next(batches()))
    detail = (
        f"{'real' if root else 'drawn scenes, not'} {name}, V3-Small + {'+'.join(config['heads'])}, "
        f"{config['image_size'][0]}x{config['image_size'][1]}, batch {size}, {workers} loader process(es), "
        f"{STEPS} steps a turn after {before} untimed"
    )

    def turn() -> float:
        stream = batches() if ours else None
        start = 0.0
        for number in range(before + STEPS):
            if number == before:
                start = time.perf_counter()
            step(next(stream) if stream is not None else one)
        return (time.perf_counter() - start) * 1000

    return Work(turn, STEPS * size, "", detail, turn)


WORKS = {
    "step_large": step_classifier,
    "step_small": step_classifier,
    "step_large_whole": step_classifier,
    "step_ssdlite": step_ssdlite,
    "step_ssdlite_real": step_ssdlite,
    "input_bccd": fed,
    "input_camvid": fed,
}
