"""Both sides of the rows on finished models: post-processing, one image in and prediction out, predict's own cost."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.transforms._presets import ImageClassification, ObjectDetection, SemanticSegmentation

from heads.ssdlite import SSDLite
from tasks import build
from tasks.data.drawing import draw_scene
from tasks.data.images import decode
from tasks.deploy import predictor, stages
from tasks.deploy.frames import Frame
from tasks.deploy.peer_worker import Check, Work
from tasks.deploy.session import Runner, leave_cores_to_the_engine, open_model
from tasks.training.weights import load_model

Outputs = Callable[[np.ndarray], Any]
"""An image [H, W, 3] uint8 -> a prediction."""
IMAGES = 16
IN_A_ROW = 10
"""Images a turn, one after the other."""
PEAK = 8.0
"""How far background lies above the other classes' logits, whose deviation is 2: a trained detector's look."""
DEVIATION = 3.0
"""Of a classifier's logits: of 1,000 classes the best has a probability of some tenths."""
AHEAD = 3.0
"""The same of a mask's first class, in deviations: in a fifth of all cells the four logits differ in their best class;
of a network trained on CamVid, in a quarter."""


def post_processing(asked: Mapping[str, Any], ours: bool) -> Work:
    """91 classes x 3,234 boxes, batch 8: equal boxes, scores, labels in equal order."""
    batch = asked["batch"] or 8
    model = build("detect", ["backbone=large", "backbone.reduced_tail=detection", "data=coco", "head=ssdlite",
                             "head.num_classes=90", "image_size=[320,320]"])  # fmt: skip
    head = cast(SSDLite, model.heads["detect"])
    with torch.inference_mode():
        output = model(torch.zeros(1, 3, 320, 320))["detect"]
    generator = torch.Generator().manual_seed(0)
    anchors = output["anchors"].clone()
    logits = 2 * torch.randn(batch, len(anchors), 91, generator=generator)
    logits[..., 0] += PEAK if asked["row"] == "post_peaked" else 0.0
    deltas = torch.randn(batch, len(anchors), 4, generator=generator)
    detail = f"{len(anchors)} boxes, 91 classes, batch {batch}"
    if ours:
        raw = {"cls": logits, "deltas": deltas, "anchors": anchors, "size": output["size"].clone()}

        @torch.inference_mode()
        def run() -> Any:
            return head.predict(raw, [(320, 320)] * batch)

        return Work(run, batch, digest(run(), 0), detail)
    limits = head.limits
    peer = SimpleNamespace(
        box_coder=BoxCoder((10.0, 10.0, 5.0, 5.0)), score_thresh=limits.score_threshold, nms_thresh=limits.nms_iou,
        topk_candidates=limits.candidates, detections_per_img=limits.detections,
    )  # fmt: skip
    raw = {"cls_logits": logits, "bbox_regression": deltas}

    @torch.inference_mode()
    def their_run() -> Any:
        return SSD.postprocess_detections(cast(SSD, peer), raw, [anchors] * batch, [(320, 320)] * batch)

    return Work(their_run, batch, digest(their_run(), 1), detail)


def digest(found: list[dict[str, Tensor]], first_label: int) -> str:
    """Of boxes, scores and labels, bit for bit."""
    whole = hashlib.sha256()
    for one in found:
        for part in (one["boxes"], one["scores"], one["labels"] - first_label):
            whole.update(part.contiguous().numpy().tobytes())
    return whole.hexdigest()


def one_image(asked: Mapping[str, Any], ours: bool) -> Work:
    """A decoded image in, a prediction out: ours in an engine, theirs as their documentation runs a model."""
    torch.manual_seed(0)
    build_pair, side, summarised = PAIRS[asked["row"]]
    image = draw_scene(0, 0, 0, side).image
    theirs, their_run, ours_words = build_pair(image)
    if not ours:
        found = torch.inference_mode()(their_run)
        return Work(in_a_row(lambda: found(image)), IN_A_ROW, summarised(found(image), 1))
    leave_cores_to_the_engine()
    command, *words = ours_words
    model = build(command, words)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder) / "theirs.pth")
        load_model(model, str(Path(folder) / "theirs.pth"))
    runner = open_model(model, asked["engine"], asked["threads"], asked["precision"], batch=1)
    run = our_run(runner, command)
    batch = runner.fit(image)[None]
    detail = f"ours in {runner.name} {runner.version}, {runner.precision}"
    check = summarised(run(image), 0)
    return Work(in_a_row(lambda: run(image)), IN_A_ROW, check, detail, floor=in_a_row(lambda: runner.run(batch)))


def in_a_row(call: Callable[[], object]) -> Callable[[], None]:
    """A turn of several calls, for a single one of some milliseconds varies by half from one turn to the next."""

    def turn() -> None:
        for _ in range(IN_A_ROW):
            call()

    return turn


def our_run(runner: Runner, command: str) -> Outputs:
    """Resize, network, post-process."""

    def run(image: np.ndarray) -> Any:
        return runner.predict(runner.fit(image)[None], [(image.shape[0], image.shape[1])])[command][0]

    return run


def as_tensor(image: np.ndarray) -> Tensor:
    """[3, H, W] uint8, as ``torchvision.io`` gives it."""
    return torch.from_numpy(image).permute(2, 0, 1)


def detector(image: np.ndarray) -> tuple[nn.Module, Outputs, list[str]]:
    """torchvision's ssdlite320 with scores as a trained one has them: few objects, much background."""
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91).eval()
    prepare = ObjectDetection()

    def run(pixels: np.ndarray) -> Any:
        return model([prepare(as_tensor(pixels))])[0]

    with torch.no_grad():
        images, _ = model.transform([prepare(as_tensor(image))])
        logits = model.head(list(model.backbone(images.tensors).values()))["cls_logits"]
        for layer in model.head.classification_head.module_list:
            last = cast(nn.Conv2d, layer[-1])
            last.weight.mul_(2 / logits.std())
            assert last.bias is not None
            last.bias.view(-1, 91)[:, 0] += PEAK
    words = ["detect", "backbone=large", "backbone.reduced_tail=detection", "data=coco", "head=ssdlite"]
    return model, run, [*words, "head.num_classes=90", "image_size=[320,320]"]


def classifier(image: np.ndarray) -> tuple[nn.Module, Outputs, list[str]]:
    """torchvision's V3-Large with scores as a trained one has them: random weights give all classes the same."""
    model = get_model("mobilenet_v3_large", weights=None).eval()
    prepare = ImageClassification(crop_size=224, resize_size=256)

    def run(pixels: np.ndarray) -> Any:
        return model(prepare(as_tensor(pixels))[None]).softmax(1)[0]

    with torch.no_grad():
        last = cast(nn.Linear, model.classifier[-1])
        last.weight.mul_(DEVIATION / model(prepare(as_tensor(image))[None]).std())

    return model, run, ["classify", "backbone=large", "data=imagenet", "head.num_classes=1000", "image_size=[224,224]"]


def segmenter(image: np.ndarray) -> tuple[nn.Module, Outputs, list[str]]:
    """torchvision's LR-ASPP with as many edges in its masks as a trained one shows: random ones give one class only."""
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21).eval()
    prepare = SemanticSegmentation(resize_size=512)

    def run(pixels: np.ndarray) -> Any:
        return model(prepare(as_tensor(pixels))[None])["out"].argmax(1)[0]

    with torch.no_grad():
        deviation, mean = torch.std_mean(model(prepare(as_tensor(image))[None])["out"], dim=(0, 2, 3))
        for layer in (model.classifier.low_classifier, model.classifier.high_classifier):
            layer.weight.div_(deviation[:, None, None, None])
            layer.bias.sub_(mean / 2).div_(deviation)
        model.classifier.high_classifier.bias[0] += AHEAD
    words = ["segment", "backbone=large", "backbone.output_stride=16", "data=cityscapes", "head=lraspp_torchvision"]
    return model, run, [*words, "head.num_classes=21", "image_size=[512,512]"]


def detections(found: dict[str, Tensor], first_label: int) -> list[list[float]]:
    """Label, score and box of each."""
    labels = found["labels"] - first_label
    return torch.cat((labels[:, None], found["scores"][:, None], found["boxes"]), dim=1).tolist()


def probabilities(found: Tensor, _first_label: int) -> list[float]:
    """Of every class."""
    return [float(value) for value in found.tolist()]


def regions(found: Tensor, _first_label: int) -> list[float]:
    """Share of every class in each of the mask's 8 x 8 tiles."""
    tiles = nn.functional.one_hot(found.long(), 21).float().unfold(0, 64, 64).unfold(1, 64, 64).mean((3, 4))
    return [float(value) for value in tiles.flatten().tolist()]


Pair = tuple[Callable[[np.ndarray], tuple[nn.Module, Outputs, list[str]]], int, Callable[[Any, int], Check]]
PAIRS: dict[str, Pair] = {
    "image_detect": (detector, 320, detections),
    "image_classify": (classifier, 256, probabilities),
    "image_mask": (segmenter, 512, regions),
}
"""Row -> how both models are built, the image's side, what is compared of a prediction and its first class's label."""


def predict_loop(asked: Mapping[str, Any], ours: bool) -> Work:
    """The loop behind ``tasks.predict`` (ours), and nothing but the engine on prepared images (the peer)."""
    model = build("classify", ["backbone=small", "data=imagenet", "head.num_classes=1000", "image_size=[224,224]"])
    runner = open_model(model, asked["engine"], asked["threads"], asked["precision"])
    folder = tempfile.TemporaryDirectory(prefix="mobilenetv3_bench_", ignore_cleanup_errors=True)
    file = stages.photo(Path(folder.name), None)
    image = decode(str(file))
    fitted, size = runner.fit(image), (image.shape[0], image.shape[1])
    detail = f"{IMAGES} images a turn, one at a time, {runner.name} {runner.version}"
    if not ours:
        batch = fitted[None]

        def bare() -> None:
            for _ in range(IMAGES):
                runner.run(batch)

        return Work(bare, IMAGES, "", detail)
    loop = predictor.Predictor(runner)
    frame = Frame(file.name, file.stem, partial(decode, str(file)), file)

    def from_files() -> Any:
        return predictor.ahead(lambda one: predictor.read(one, loop.fit, False), [frame] * IMAGES, 1, 2)

    def from_memory() -> Any:
        return (predictor.Seen(frame, size, fitted) for _ in range(IMAGES))

    source = from_files if asked["row"] == "predict_files" else from_memory

    def run() -> None:
        for _ in predictor.predicted(loop, source(), 1):
            pass

    return Work(run, IMAGES, "", detail, kept=folder)


WORKS = {
    "post_peaked": post_processing,
    "post_dense": post_processing,
    "image_detect": one_image,
    "image_classify": one_image,
    "image_mask": one_image,
    "predict": predict_loop,
    "predict_files": predict_loop,
}
