"""The model: one backbone, a dict of heads, and whole checkpoints of others."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from fixtures import SHARED
from rich.console import Console
from torchvision import transforms
from torchvision.models import detection, segmentation

from tasks import build
from tasks.data.images import decode
from tasks.reporting.closing import introduce_weights
from tasks.training import checkpoint
from tasks.training.weights import load_model

TF_SMALL = SHARED / "weights" / "tf_mobilenetv3_small_100.safetensors"
JOINT = [f"heads.{task}.num_classes=5" for task in ("classify", "detect", "segment")]


def saved(model: torch.nn.Module, tmp_path: Path) -> str:
    path = tmp_path / "theirs.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """With running statistics that are not the trivial ones."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.7, 1.4, generator=generator)
    return model.eval()


def test_the_backbone_runs_once_an_image_for_all_heads() -> None:
    net = build("multitask", JOINT)
    calls = []
    net.backbone.register_forward_hook(lambda *_: calls.append(1))
    outputs = net(torch.rand(2, 3, 64, 64))
    assert len(calls) == 1
    assert set(outputs) == {"classify", "detect", "segment"}


def test_a_single_gives_what_the_joint_model_gives() -> None:
    net = build("multitask", JOINT)
    image = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        joint = net(image)
        assert torch.equal(net.single("segment")(image)["segment"], joint["segment"])
        assert torch.equal(net.single("detect")(image)["detect"]["cls"], joint["detect"]["cls"])


def test_rows_restrict_a_head_to_its_samples() -> None:
    net = build("multitask", JOINT)
    image = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        whole = net(image)
        some = net(image, {"classify": torch.tensor([0, 2]), "detect": torch.tensor([], dtype=torch.int64)})
    assert torch.allclose(some["classify"], whole["classify"][[0, 2]], atol=1e-6)
    assert "detect" not in some
    assert some["segment"].shape[0] == 3


def test_a_head_of_another_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear is a head for classify, not for detect.*tasks\.classify"):
        build("detect", ["head=linear", "head.num_classes=3"])
    with pytest.raises(ValueError, match=r"tasks\.export trains no model"):
        build("export")


@pytest.mark.parametrize("size", [(320, 320), (257, 301)])
def test_torchvisions_ssdlite_loads_whole(tmp_path: Path, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs = shaken(detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91))
    source = saved(theirs, tmp_path)
    words = [
        "backbone=large",
        "backbone.reduced_tail=detection",
        "head.num_classes=90",
        "image_size=[320,320]",
        "data=coco",
    ]
    ours = build("detect", [*words, f"weights={source}"])
    assert sum(p.numel() for p in ours.parameters()) == 3_440_060
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = list(theirs.backbone((image - 0.5) / 0.5).values())
        heads = theirs.head(features)
        anchors = theirs.anchor_generator(
            torchvision.models.detection.image_list.ImageList(image, [size] * 2), features
        )
        raw = ours(image)["detect"]
    torch.testing.assert_close(raw["cls"], heads["cls_logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(raw["deltas"], heads["bbox_regression"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(raw["anchors"], anchors[0], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize(("name", "head"), [("lraspp", "lraspp_torchvision"), ("deeplabv3", "deeplabv3")])
def test_torchvisions_segmenters_load_whole(tmp_path: Path, name: str, head: str) -> None:
    torch.manual_seed(0)
    make = getattr(segmentation, f"{name}_mobilenet_v3_large")
    theirs = shaken(make(weights=None, weights_backbone=None, num_classes=21))
    words = ["backbone=large", "backbone.output_stride=16", f"head={head}", "head.num_classes=21"]
    ours = build("segment", [*words, f"weights={saved(theirs, tmp_path)}"])
    image = torch.rand(1, 3, 129, 190, generator=torch.Generator().manual_seed(1))
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        raw = ours(image)["segment"]
        mine = torch.nn.functional.interpolate(raw, size=(129, 190), mode="bilinear", align_corners=False)
        torch.testing.assert_close(mine, theirs(normalise(image))["out"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", ["small", "large"])
def test_torchvisions_classifiers_load_whole(tmp_path: Path, size: str) -> None:
    torch.manual_seed(0)
    theirs = shaken(getattr(torchvision.models, f"mobilenet_v3_{size}")(weights=None))
    ours = build("classify", [f"backbone={size}", "head.num_classes=1000", f"weights={saved(theirs, tmp_path)}"])
    image = torch.rand(2, 3, 97, 130, generator=torch.Generator().manual_seed(1))
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        torch.testing.assert_close(ours(image)["classify"], theirs(normalise(image)), atol=1e-5, rtol=1e-5)


def test_real_imagenet_weights_give_timms_logits_on_real_photos() -> None:
    timm = pytest.importorskip("timm")
    if not TF_SMALL.is_file():
        pytest.skip("the shared weights are not here")
    theirs = timm.create_model("tf_mobilenetv3_small_100", checkpoint_path=str(TF_SMALL)).eval()
    ours = build("classify", ["backbone=small", "head.num_classes=1000", f"weights={TF_SMALL}"])
    photos = sorted((SHARED / "data" / "clothing" / "test").rglob("*.jpg"))[::40]
    assert len(photos) > 5
    for photo in photos:
        seen = ours.view({"image": torch.from_numpy(np.moveaxis(decode(str(photo)), 2, 0).copy())})["image"]
        image = seen.as_subclass(torch.Tensor)[None].float() / 255
        with torch.inference_mode():
            torch.testing.assert_close(ours(image)["classify"], theirs(image * 2 - 1), atol=1e-4, rtol=1e-4)


def test_a_joint_model_starts_from_a_single_tasks_checkpoint(tmp_path: Path) -> None:
    single = build("detect", ["head.num_classes=5"])
    path = tmp_path / "single.pt"
    checkpoint.save(path, {"model": single.state_dict()})
    joint = build("multitask", [*JOINT, f"weights={path}"])
    ours, theirs = joint.state_dict(), single.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert len(ours) > len(theirs)


FAMILIES = {"classify": ["linear", "pooled"], "detect": ["fcoslite", "ssd", "ssdlite"],
            "segment": ["deeplabv3", "fcn", "lraspp", "lraspp_torchvision", "raspp"]}  # fmt: skip


@pytest.mark.parametrize(("task", "head"), [(task, head) for task, heads in FAMILIES.items() for head in heads])
def test_a_head_of_other_classes_is_filled_but_for_its_last_layers(task: str, head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = [f"head={head}", "image_size=[128,128]"]
    theirs = build(task, [*words, "head.num_classes=7"])
    path = tmp_path / "seven.pt"
    checkpoint.save(path, {"model": theirs.state_dict()})
    ours = build(task, [*words, "head.num_classes=3"])
    fresh = {f"heads.{task}.{key}" for key in load_model(ours, str(path)).filled[task]}
    was, now = theirs.state_dict(), ours.state_dict()
    other = {key for key in now if now[key].shape != was[key].shape}
    assert fresh == other
    assert other
    assert all(torch.equal(value, was[key]) for key, value in now.items() if key not in other)
    same = build(task, [*words, "head.num_classes=7"])
    assert load_model(same, str(path)) == ({task: []}, [])


def test_a_head_of_another_form_is_no_head_of_other_classes(tmp_path: Path) -> None:
    path = tmp_path / "wide.pt"
    checkpoint.save(path, {"model": build("classify", ["head.num_classes=7", "head.hidden=64"]).state_dict()})
    with pytest.raises(ValueError, match=r"another architecture.*classifier\.weight \(3, 1024\) here, \(7, 64\) there"):
        build("classify", ["head.num_classes=3", f"weights={path}"])
    checkpoint.save(path, {"model": build("detect", ["head.num_classes=7"]).state_dict()})
    with pytest.raises(ValueError, match="another architecture"):
        build("detect", ["head.num_classes=3", "head=ssd", f"weights={path}"])


@pytest.mark.parametrize(
    ("task", "words", "make"),
    [
        ("classify", ["backbone=large"], torchvision.models.mobilenet_v3_large),
        ("detect", ["backbone=large", "backbone.reduced_tail=detection"], detection.ssdlite320_mobilenet_v3_large),
        (
            "segment",
            ["backbone=large", "backbone.output_stride=16", "head@heads.segment=lraspp_torchvision"],
            segmentation.lraspp_mobilenet_v3_large,
        ),
    ],
)
def test_a_joint_model_starts_from_a_published_checkpoint(
    task: str, words: list[str], make: Callable[..., torch.nn.Module], tmp_path: Path
) -> None:
    arguments = {} if task == "classify" else {"weights_backbone": None}
    joint = build("multitask", [*JOINT, *words])
    fresh = {key: value.clone() for key, value in joint.state_dict().items()}
    filled, left_out = load_model(joint, saved(make(weights=None, **arguments), tmp_path))
    assert filled.keys() == {task}
    assert not left_out
    changed = {key.split(".")[1] for key, value in joint.state_dict().items() if not torch.equal(value, fresh[key])}
    assert {"classify", "detect", "segment"} & changed == {task}


def test_a_single_task_starts_from_a_joint_models_checkpoint_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "joint.pt"
    state = build("multitask", JOINT).state_dict()
    checkpoint.save(path, {"model": state})
    single = build("detect", ["head.num_classes=5"])
    filled, left_out = load_model(single, str(path))
    assert (filled, left_out) == ({"detect": []}, ["heads.classify", "heads.segment"])
    assert all(torch.equal(value, state[key]) for key, value in single.state_dict().items())
    said = io.StringIO()
    introduce_weights(Console(file=said, width=200), "joint.pt", single.backbone, filled, left_out)
    assert "joint.pt for the backbone (padding=symmetric, mean 0.485, 0.456, 0.406) and detect" in said.getvalue()
    assert "this model has no heads.classify, heads.segment: left out" in said.getvalue()
    checkpoint.save(path, {"model": state | {"heads.depth.weight": torch.zeros(1), "heads.x": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"has heads\.depth\.weight, heads\.x; expected .* classify, detect, segment"):
        load_model(single, str(path))


def test_torchvisions_auxiliary_classifier_is_left_out_and_said(tmp_path: Path) -> None:
    arguments = {"weights": None, "weights_backbone": None, "num_classes": 3, "aux_loss": True}
    theirs = segmentation.deeplabv3_mobilenet_v3_large(**arguments)
    words = ["backbone=large", "backbone.output_stride=16", "head=deeplabv3", "head.num_classes=3"]
    loaded = load_model(build("segment", words), saved(theirs, tmp_path))
    assert loaded == ({"segment": []}, ["aux_classifier"])


def test_weights_of_a_backbone_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    words = ["backbone=timm", "backbone.model=mobilenetv4_conv_small_050", "head.num_classes=3"]
    theirs = build("classify", words)
    path = tmp_path / "ours.pt"
    checkpoint.save(path, {"model": theirs.state_dict()})
    ours = build("classify", [*words, f"weights={path}"])
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    with pytest.raises(ValueError, match="is no run of this suite"):
        build("classify", [*words, f"weights={saved(theirs.backbone, tmp_path)}"])
    checkpoint.save(path, {"model": theirs.state_dict() | {"stray": torch.zeros(1)}})
    with pytest.raises(ValueError, match="stray is left over"):
        build("classify", [*words, f"weights={path}"])
    with pytest.raises(FileNotFoundError, match=r"absent\.pt does not exist; set weights to"):
        build("classify", [*words, f"weights={tmp_path / 'absent.pt'}"])


def test_a_classifier_of_v2_loads_whole(tmp_path: Path) -> None:
    theirs = shaken(torchvision.models.mobilenet_v2(weights=None))
    words = ["backbone=mobilenetv2", "head=linear", "head.num_classes=1000"]
    ours = build("classify", [*words, f"weights={saved(theirs, tmp_path)}"])
    image = torch.rand(2, 3, 97, 130, generator=torch.Generator().manual_seed(1))
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        torch.testing.assert_close(ours(image)["classify"], theirs(normalise(image)), atol=1e-5, rtol=1e-5)


def test_predict_refuses_what_is_no_image() -> None:
    net = build("classify", ["head.num_classes=3", "image_size=[64,64]"])
    with pytest.raises(ValueError, match="uint8 RGB"):
        net.predict(torch.rand(3, 64, 64))
    assert net.predict(np.zeros((50, 40, 3), np.uint8))["classify"].shape == (3,)
