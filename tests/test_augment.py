"""Targets stay on their objects; draws come from torch alone; numbers against torchvision and brute force."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from fixtures import ROOT
from omegaconf import OmegaConf
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tasks.data import augment, colour
from tasks.data.augment import Augmentation
from tasks.data.colour import Photometric, hue_matrix
from tasks.data.mix import Mix, mix_labels, mixup
from tasks.data.view import View, fit, view_boxes, view_image, view_mask
from tasks.data.windows import RandomResized, ZoomAndCrop, draw_rectangle

CONF = Path(__file__).parents[1] / "conf" / "augment"
YAMLS = sorted(CONF.glob("*.yaml"))
MAKE: dict[str, Callable[..., Augmentation]] = {
    "detection": augment.detection,
    "segmentation": augment.segmentation,
    "classification": augment.classification,
    "none": augment.none,
}


def scene(seed: int, height: int = 240, width: int = 320, count: int = 4) -> dict[str, Any]:
    """Rectangles of pure red, each with its own green, on black; the mask and the boxes say where they are."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.uint8)
    mask = np.zeros((height, width), np.uint8)
    boxes, labels = [], []
    for label in range(count):  # one a column, so that none hides another
        lane = width // count
        w, h = rng.integers(20, lane - 12), rng.integers(20, height // 2)
        x, y = label * lane + rng.integers(4, lane - w - 4), rng.integers(0, height - h)
        image[y : y + h, x : x + w] = (255, 60 * label, 0)
        mask[y : y + h, x : x + w] = label + 1
        boxes.append([x, y, x + w, y + h])
        labels.append(label)
    return sample(image, boxes, labels, mask)


def sample(image: np.ndarray, boxes: list[list[int]], labels: list[int], mask: np.ndarray) -> dict[str, Any]:
    xyxy = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)),
        "boxes": tv_tensors.BoundingBoxes(xyxy, format="XYXY", canvas_size=image.shape[:2]),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "mask": tv_tensors.Mask(torch.from_numpy(mask)),
        "label": 7,
    }


def extent(where: Tensor) -> Tensor:
    """[4] xyxy of the true pixels."""
    rows, columns = where.any(1).nonzero()[:, 0], where.any(0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def geometry(name: str, size: tuple[int, int]) -> Augmentation:
    """A transform without colour changes, so that pixels can be recognised."""
    options: dict[str, dict[str, Any]] = {
        "detection": {"photometric": None, "vertical_flip": 0.5, "fill": (0, 0, 0)},
        "segmentation": {"photometric": None, "vertical_flip": 0.5, "fill": (0, 0, 0)},
        "classification": {"vertical_flip": 0.5, "scale": (0.3, 1.0)},
        "none": {},
    }
    return MAKE[name](size, **options[name])


@pytest.mark.parametrize("name", sorted(MAKE))
@pytest.mark.parametrize("size", [(160, 160), (97, 203)])
def test_boxes_and_mask_stay_on_their_object(name: str, size: tuple[int, int]) -> None:
    transform = geometry(name, size)
    seen = 0
    for seed in range(120):
        torch.manual_seed(seed)
        out = transform(scene(seed))
        assert out["image"].shape == (3, *size)
        assert out["image"].dtype == torch.uint8
        assert out["mask"].shape == size
        assert out["label"] == 7
        assert len(out["labels"]) == len(out["boxes"])
        red, green = out["image"].as_subclass(Tensor)[0].float(), out["image"].as_subclass(Tensor)[1].float()
        for box, label in zip(out["boxes"].as_subclass(Tensor), out["labels"].tolist(), strict=True):
            left, top, right, bottom = box.tolist()
            named = (green / red.clamp(1) * 255 / 60).round() == label  # holds in the blur at the edges too
            pixels = extent((red > 127) & named)
            assert (pixels - box).abs().max() < 1.01, (seed, label, box, pixels)  # < 1 px, found in whole pixels
            centre = int((top + bottom) / 2), int((left + right) / 2)
            assert abs(green[centre] - 60 * label) <= 1  # the label is the colour's
            assert (extent(out["mask"].as_subclass(Tensor) == label + 1) - box).abs().max() < 1.01
            seen += 1
        inside = out["mask"].as_subclass(Tensor) != 255
        sure = inside & ((red < 1) | (red > 254))
        agree = ((out["mask"].as_subclass(Tensor) > 0) == (red > 127))[sure].float().mean() if sure.any() else 1.0
        assert agree > 0.995
    assert seen > 100


def test_box_edges_are_exact_to_a_fraction_of_a_pixel() -> None:
    """The blurred edge of an enlarged image crosses half brightness where the box's edge is."""
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:30, 20:50] = 255
    view = fit((7.3, 5.8, 61.2, 44.1), (40, 60), (301, 407))
    moved, keep = view_boxes(torch.tensor([[20.0, 10.0, 50.0, 30.0]]), view)
    row = view_image(image, view)[0, 150].float()
    bright = (row > 127.5).nonzero()[:, 0]
    assert keep.all()
    assert abs(bright[0] - moved[0, 0]) < 0.51
    assert abs(bright[-1] + 1 - moved[0, 2]) < 0.51


@pytest.mark.parametrize("mirror", [(False, False), (True, False), (False, True), (True, True)])
def test_whole_pixel_views_equal_plain_slicing(mirror: tuple[bool, bool]) -> None:
    image = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    view = fit((5, 2, 25, 22), (30, 40), (20, 20), mirror)
    expected = image[:, 2:22, 5:25]
    if mirror[0]:
        expected = expected.flip(2)
    if mirror[1]:
        expected = expected.flip(1)
    shown = view_image(image, view)
    assert torch.equal(shown, expected)
    shown.zero_()
    assert image.float().mean() > 50  # the source is not touched
    mask = image[0]
    assert torch.equal(view_mask(mask, view), view_mask(expected[0], fit((0, 0, 20, 20), (20, 20), (20, 20))))


@pytest.mark.parametrize("border", ["edge", "reflect", "fill"])
def test_borders_equal_numpy_pad(border: str) -> None:
    image = torch.randint(0, 256, (3, 12, 16), dtype=torch.uint8)
    shown = view_image(image, fit((-3, 2, 13, 14), (12, 16), (12, 16)), fill=(9, 8, 7), border=border)
    part = image[:, 2:12, 0:13].numpy()
    if border == "fill":
        expected = np.stack([np.pad(part[c], ((0, 2), (3, 0)), constant_values=9 - c) for c in range(3)])
    else:
        expected = np.pad(part, ((0, 0), (0, 2), (3, 0)), mode="edge" if border == "edge" else "reflect")
    assert np.array_equal(shown.numpy(), expected)


def test_resize_equals_torchvision() -> None:
    image = torch.randint(0, 256, (3, 120, 90), dtype=torch.uint8)
    ours = augment.none((64, 80))({"image": tv_tensors.Image(image)})["image"]
    assert torch.equal(ours.as_subclass(Tensor), F.resize(image, [64, 80], antialias=True))


def test_crops_are_drawn_as_torchvision_draws_them() -> None:
    boxes = torch.tensor([[30.0, 40, 90, 120], [200, 100, 260, 220], [10, 200, 40, 230]])
    item = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(240, 320))}
    ours, theirs = [], []
    draw = ZoomAndCrop(0.0, 1.0, 1.0, 0.3, 2.0, (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None))
    reference = v2.RandomIoUCrop()
    image = tv_tensors.Image(torch.zeros(3, 240, 320, dtype=torch.uint8))
    torch.manual_seed(0)
    for _ in range(700):
        left, top, right, bottom = draw(item, (240, 320))
        assert left >= 0
        assert top >= 0
        assert right <= 320.001
        assert bottom <= 240.001
        ours.append(((right - left) / 320, (bottom - top) / 240, left / 320, top / 240))
        chosen = reference.make_params([image, item["boxes"]])
        whole = {"width": 320, "height": 240, "left": 0, "top": 0}
        theirs.append(tuple((chosen or whole)[k] / n for k, n in zip(whole, (320, 240, 320, 240), strict=True)))
    mine, peer = np.array(ours), np.array(theirs)
    assert np.abs(mine.mean(0) - peer.mean(0)).max() < 0.04
    assert np.abs(mine.std(0) - peer.std(0)).max() < 0.04
    assert abs((mine[:, 0] == 1).mean() - (peer[:, 0] == 1).mean()) < 0.05


def test_random_resized_is_drawn_as_torchvision_draws_it() -> None:
    reference = v2.RandomResizedCrop((8, 8))
    image = torch.zeros(3, 200, 300, dtype=torch.uint8)
    draw = RandomResized((0.08, 1.0), (3 / 4, 4 / 3))
    torch.manual_seed(0)
    mine = np.array([draw({}, (200, 300)) for _ in range(2000)])
    peer = np.array([list(reference.make_params([image]).values()) for _ in range(2000)])  # top, left, height, width
    sides = (mine[:, 2] - mine[:, 0]).mean(), (mine[:, 3] - mine[:, 1]).mean()
    assert abs(sides[0] - peer[:, 3].mean()) < 4
    assert abs(sides[1] - peer[:, 2].mean()) < 4
    assert abs(mine[:, 0].mean() - peer[:, 1].mean()) < 4
    assert mine.min() >= 0
    assert draw_rectangle((10, 1000), (1.0, 1.0), (1.0, 1.0)) == (495, 0, 505, 10)  # nothing fits: the centre


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_builds_lists_every_argument_and_takes_any_sample(path: Path) -> None:
    config = OmegaConf.load(path)
    partial = hydra.utils.instantiate(config)
    names = partial.func.__code__.co_varnames[1 : partial.func.__code__.co_argcount]
    assert {str(key) for key in config if not str(key).startswith("_")} == set(names)
    transform = partial(size=(64, 96))
    if partial.func.__name__ == path.stem:  # joint.yaml is segmentation with other values
        assert partial.func((64, 96)) == transform
    assert pickle.loads(pickle.dumps(transform)) == transform  # it can be sent to a worker
    full = scene(0)
    for keys in ((), ("boxes", "labels"), ("mask",), ("label",), ("boxes", "labels", "mask", "label")):
        out = transform({"image": full["image"], **{key: full[key] for key in keys}})
        assert set(out) == {"image", *keys}
        assert out["image"].shape == (3, 64, 96)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (480, 2)])
@pytest.mark.parametrize("name", sorted(MAKE))
def test_images_without_boxes_and_tiny_images(name: str, size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 200, np.uint8)
    transform = MAKE[name]((32, 48))
    for seed in range(60):
        torch.manual_seed(seed)
        out = transform(sample(image, [], [], np.zeros(size, np.uint8)))
        assert out["boxes"].shape == (0, 4)
        assert out["labels"].shape == (0,)
        assert (out["mask"].as_subclass(Tensor) == 0).any()  # some of the image is in sight


@pytest.mark.parametrize("name", sorted(MAKE))
def test_only_torchs_generator_decides(name: str) -> None:
    transform = MAKE[name]((48, 48))

    def draw(seed: int, others: int) -> list[Tensor]:
        random.seed(others)
        np.random.seed(others)  # noqa: NPY002
        torch.manual_seed(seed)
        out = transform(scene(1))
        return [out[key].as_subclass(Tensor) for key in ("image", "boxes", "labels", "mask")]

    first, again = draw(3, 0), draw(3, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if name != "none":
        assert any(not torch.equal(draw(3, 0)[0], draw(seed, 0)[0]) for seed in range(4, 8))


@pytest.mark.parametrize("auto", ["rand", "trivial", "auto", "auto_cifar10"])
def test_automatic_policies_change_pixels_and_repeat_by_seed(auto: str) -> None:
    transform = augment.classification((40, 40), crop="shift", shift=2, border="reflect", auto=auto, erase=0.5)
    image = {"image": scene(0)["image"], "label": 1}

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return transform(image)["image"].as_subclass(Tensor)

    shown = [draw(seed) for seed in range(12)]
    assert all(x.shape == (3, 40, 40) and x.dtype == torch.uint8 for x in shown)
    assert all(torch.equal(x, draw(seed)) for seed, x in enumerate(shown))
    assert len({x.float().sum().item() for x in shown}) > 4


def test_erase_paints_a_part() -> None:
    image = {"image": tv_tensors.Image(torch.zeros(3, 50, 50, dtype=torch.uint8)), "label": 0}
    transform = augment.classification((50, 50), crop=None, flip=0, erase=1.0, fill=(255, 255, 255))
    shares = torch.tensor([(transform(image)["image"][0] > 0).float().mean().item() for _ in range(200)])
    assert shares.min() > 0.01
    assert shares.max() < 0.36
    assert abs(shares.mean() - 0.17) < 0.03
    assert image["image"].sum() == 0


def test_segmentation_scale_one_shows_all_and_scale_range_is_kept() -> None:
    item = scene(0)
    out = augment.segmentation((240, 320), scale=(1, 1), flip=0, photometric=None)(item)
    assert torch.equal(out["image"].as_subclass(Tensor), item["image"].as_subclass(Tensor))
    out = augment.segmentation((240, 320), scale=(0.5, 0.5), photometric=None, fill=(1, 2, 3))(item)
    padding = out["mask"].as_subclass(Tensor) == 255
    assert abs(padding.float().mean() - 0.75) < 0.01
    assert (out["image"].as_subclass(Tensor)[:, padding] == torch.tensor([[1], [2], [3]])).all()
    crop = augment.segmentation((60, 60), scale=(1, 1), base=(240, 320), flip=0, photometric=None)(item)
    window = item["image"].as_subclass(Tensor).unfold(1, 60, 1).unfold(2, 60, 1)  # every 60x60 piece at full scale
    assert (window == crop["image"].as_subclass(Tensor)[:, None, None]).all((0, 3, 4)).any()


@pytest.mark.parametrize("field", ["brightness", "contrast", "saturation", "hue"])
def test_each_colour_change_follows_torchvision(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(90, 160, (3, 20, 20)).astype(np.uint8))  # muted: nothing clips
    strengths = {"brightness": 0.3, "contrast": 0.4, "saturation": 0.4, "hue": 0.04}
    draws = torch.tensor([0.0] * 5 + [1.0] * 5)  # every change on, at its greatest
    monkeypatch.setattr(torch, "rand", lambda *shape: draws)
    ours = Photometric(1.0, **{name: value if name == field else 0.0 for name, value in strengths.items()})(image)
    change: dict[str, Callable[[Tensor, float], Tensor]] = {
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "saturation": F.adjust_saturation,
        "hue": F.adjust_hue,
    }
    theirs = change[field](image, strengths[field] + (field != "hue"))
    ours, theirs, plain = ours.float(), theirs.float(), image.float()
    assert (theirs - plain).abs().mean() > 2
    if field == "hue":  # HSV keeps the greatest channel, a turn about grey their mean: compare what is left of it
        ours, theirs, plain = (x - x.mean(0) for x in (ours, theirs, plain))
    assert (ours - theirs).abs().mean() < max(0.8, (theirs - plain).abs().mean() / 3)


@pytest.mark.parametrize("turn", [1 / 3, -1 / 3])
def test_a_third_of_a_turn_equals_torchvisions_exactly(turn: float) -> None:
    image = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    ours = torch.einsum("ij,jhw->ihw", hue_matrix(turn), image.double())
    assert (ours - F.adjust_hue(image, turn).double()).abs().max() <= 1


def test_compiled_colour_is_torchs_in_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    if colour.library(colour.SOURCE)[0] is None:
        pytest.skip("no C++ compiler")
    pixels = torch.randint(0, 256, (3, 37, 53), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    matrix = torch.tensor(
        [[1.4871, -0.4123, 0.1017, -20.3], [0.1093, 0.9041, 0.2011, 3.1], [-0.3019, 0.2003, 0.7117, 60.7]]
    )
    last = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for image in (pixels, last, last[:, 2:, 3:], pixels.flip(2), pixels[:, :1, :1]):
        found = colour.channel_means(image), colour.mapped(image, matrix)
        with monkeypatch.context() as patch:
            patch.setattr(colour, "library", lambda *_: (None, ""))
            means, mapped = colour.channel_means(image), colour.mapped(image, matrix)
        torch.testing.assert_close(found[0], means, rtol=1e-6, atol=1e-6)
        assert (found[1].int() - mapped.int()).abs().max() <= 1
        assert (found[1] == mapped).float().mean() > 0.999


def test_colour_leaves_grey_alone_and_permutes() -> None:
    grey = torch.full((3, 8, 8), 90, dtype=torch.uint8)
    assert torch.equal(Photometric(1.0, 0, 0, 0.5, 0.5)(grey), grey)
    image = torch.stack([torch.full((4, 4), value, dtype=torch.uint8) for value in (10, 20, 30)])
    orders = {tuple(Photometric(0.0, permute=1.0)(image)[:, 0, 0].tolist()) for _ in range(60)}
    assert len(orders) == 6
    assert Photometric(0.0)(image) is image


def test_evaluation_resizes_the_image_and_nothing_else() -> None:
    item = scene(0)
    out = augment.evaluation((100, 100))(item)
    assert out["image"].shape == (3, 100, 100)
    assert out["boxes"] is item["boxes"]
    assert out["mask"] is item["mask"]
    image = torch.randint(0, 256, (3, 301, 437), dtype=torch.uint8)
    ours = augment.evaluation((224, 224), resize="crop")({"image": tv_tensors.Image(image)})["image"]
    theirs = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
    assert (ours.float() - theirs.float()).abs().max() <= 1
    small = augment.evaluation((64, 96), resize="crop")({"image": tv_tensors.Image(image[:, :20, :10])})["image"]
    assert small.shape == (3, 64, 96)
    strip = (torch.arange(20_000) // 100).to(torch.uint8).expand(3, 1, 20_000)  # 99 and 100 in the middle
    middle = augment.evaluation((224, 224), resize="crop")({"image": tv_tensors.Image(strip)})["image"]
    assert middle.shape == (3, 224, 224)
    assert set(middle.flatten().tolist()) == {99, 100}


def test_mixup_and_cutmix_labels_say_what_is_in_the_image() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    images = torch.nn.functional.one_hot(labels, 3).float()[:, :, None, None].expand(4, 3, 40, 40).contiguous()
    for mix in (Mix(3, mixup_alpha=0.4), Mix(3, cutmix_alpha=1.0), Mix(3, 0.4, 1.0)):
        for seed in range(30):
            torch.manual_seed(seed)
            mixed, soft = mix(images, labels)
            assert torch.allclose(mixed.mean((2, 3)), soft, atol=1e-5)  # the image's channels are its label
            assert torch.allclose(soft.sum(1), torch.ones(4))
    assert torch.equal(images[0, 0], torch.ones(40, 40))  # in place would spoil a cache
    plain, hard = Mix(3, 0.4, p=0.0)(images, labels)
    assert plain is images
    assert torch.equal(hard.argmax(1), labels)


def test_mixup_equals_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.rand(6, 3, 8, 8), torch.randint(0, 5, (6,))
    monkeypatch.setattr("tasks.data.mix.draw_share", lambda alpha: 0.3)
    reference = v2.MixUp(num_classes=5)
    monkeypatch.setattr(reference, "make_params", lambda flat: {"lam": 0.3})
    monkeypatch.setattr(reference, "_get_params", lambda flat: {"lam": 0.3}, raising=False)
    theirs, theirs_soft = reference(images, labels)
    ours, soft = mixup(images, labels, 5, 1.0)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(soft, theirs_soft)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: augment.detection((32, 32), zoom_out=1.5), "augment.zoom_out is 1.5"),
        (lambda: augment.detection((32, 32), overlaps=[0.5]), "augment.overlaps"),
        (lambda: augment.detection((32, 32), min_scale=0), "augment.min_scale"),
        (lambda: augment.detection((32,)), r"image_size is \[32\]"),
        (lambda: augment.detection((32, 32), fill=[300, 0, 0]), "augment.fill"),
        (lambda: augment.segmentation((32, 32), scale=[2.0, 0.5]), r"augment.scale is \[2.0, 0.5\]"),
        (lambda: augment.classification((32, 32), crop="pad"), "expected random_resized, shift or null"),
        (lambda: augment.classification((32, 32), auto="randaug"), "augment.auto is 'randaug'"),
        (lambda: augment.classification((32, 32), border="mirror"), "augment.border is 'mirror'"),
        (lambda: augment.evaluation((32, 32), resize="stretch"), "evaluation.resize is 'stretch'"),
        (lambda: Photometric(hue=0.7), "augment.photometric.hue is 0.7"),
        (lambda: Mix(3), "mix.mixup_alpha is 0"),
        (lambda: Mix(3, float("nan")), "mix.mixup_alpha is nan"),
        (lambda: mix_labels(torch.tensor([-1, 0]), 3, 0.5), "expected int64"),
        (lambda: augment.none((8, 8))({"image": scene(0)["image"], "masks": 1}), "cannot move masks"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build()


def test_views_never_leave_the_image_or_the_output() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        height, width, out_h, out_w = rng.integers(1, 60, 4).tolist()
        low = rng.uniform(-80, 80, 2)
        high = low + rng.uniform(0, 90, 2)
        view: View = fit((*low.tolist(), *high.tolist()), (height, width), (out_h, out_w))
        for (a, b, c, d), (h, w) in ((view.source, (height, width)), (view.place, (out_h, out_w))):
            assert 0 <= a < c <= w
            assert 0 <= b < d <= h


def test_colour_stays_on_the_cpu_when_first_imported_under_another_device() -> None:
    code = (
        "import torch\nwith torch.device('meta'):\n    from tasks.data.colour import Photometric\n"
        "image = torch.full((3, 4, 4), 90, dtype=torch.uint8)\n"
        "assert Photometric(p=1.0)(image).device.type == 'cpu'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
