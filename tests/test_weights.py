"""Checkpoints of torchvision, timm and ourselves, their files, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, mobilenet_v3_small
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.ssd import SSD
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large
from torchvision.transforms.functional import pil_to_tensor

from backbones.mobilenetv3 import MobileNetV3
from backbones.naming import own_to_ours, timm_to_ours, to_ours, torchvision_to_ours
from backbones.weights import download, load_weights, located, read, timm_conventions

SHARED = Path(__file__).parents[1] / "../shared"
REAL = SHARED / "weights/tf_mobilenetv3_small_100.safetensors"
PHOTOS = SHARED / "data/clothing/test"
HALF = (torch.full((3, 1, 1), 0.5),) * 2
IMAGENET = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@torch.no_grad()
def randomise(net: nn.Module) -> None:
    """Weights and statistics that let errors show; variances so small that a wrong eps shows too."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.6)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.momentum = 1.0
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.1 / math.sqrt(module.weight[0].numel()))
    net.train()
    image = torch.rand(4, 3, 128, 128)
    if isinstance(net, SSD):
        net.backbone(image)
    else:
        net(image)
    net.eval()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


def logits(c5: Tensor, head: dict[str, Tensor]) -> Tensor:
    hidden = nn.functional.linear(c5.mean((2, 3)), head["hidden.weight"], head["hidden.bias"])
    return nn.functional.linear(nn.functional.hardswish(hidden), head["classifier.weight"], head["classifier.bias"])


@pytest.mark.parametrize("size", [(64, 96), (97, 65), (224, 224)])
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("mobilenetv3_large_100", "large"),
        ("mobilenetv3_small_100", "small"),
        ("tf_mobilenetv3_large_100", "large"),
        ("tf_mobilenetv3_small_100", "small"),
    ],
)
@torch.no_grad()
def test_equals_timm(name: str, variant: str, size: tuple[int, int], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name).eval()
    randomise(theirs)
    save_file(theirs.state_dict(), tmp_path / f"{name}.safetensors")
    ours = MobileNetV3(variant).eval()
    head = load_weights(ours, str(tmp_path / f"{name}.safetensors"))
    mean, std = HALF if name.startswith("tf_") else IMAGENET
    image = torch.rand(2, 3, *size)
    expected = theirs.forward_intermediates((image - mean) / std)[1]
    features = ours(image)
    # timm's intermediates: the last map of each stride from 2 to 16, and the map before pooling.
    for level, feature in zip(("c1", "c2", "c3", "c4", "c5"), expected, strict=True):
        assert feature.std() > 0.01, level
        assert_close(features[level], feature)
    assert_close(logits(features["c5"], head), theirs((image - mean) / std))


@pytest.mark.parametrize(
    ("name", "variant", "arguments"),
    [
        ("tf_mobilenetv3_small_075", "small", {"width": 0.75}),
        ("tf_mobilenetv3_large_075", "large", {"width": 0.75}),
        ("mobilenetv3_small_050", "small", {"width": 0.5, "stem_width": 32}),
        ("tf_mobilenetv3_large_minimal_100", "large", {"minimalistic": True}),
        ("tf_mobilenetv3_small_minimal_100", "small", {"minimalistic": True}),
    ],
)
@torch.no_grad()
def test_equals_timms_other_widths_and_minimal_nets(
    name: str, variant: str, arguments: dict[str, float], tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name).eval()
    randomise(theirs)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / f"{name}.pth")
    ours = MobileNetV3(variant, **arguments, weights=str(tmp_path / f"{name}.pth")).eval()  # type: ignore[arg-type]
    mean, std = HALF if name.startswith("tf_") else IMAGENET
    image = torch.rand(1, 3, 75, 100)
    assert_close(ours(image)["c5"], theirs.forward_features((image - mean) / std))


@pytest.mark.skipif(not REAL.is_file() or not PHOTOS.is_dir(), reason="the shared weights and photos are not here")
@torch.no_grad()
def test_real_weights_on_real_photos() -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("tf_mobilenetv3_small_100", checkpoint_path=str(REAL)).eval()
    ours = MobileNetV3("small", weights=str(REAL)).eval()
    head = load_weights(ours, str(REAL))
    files = sorted(PHOTOS.glob("*/*.jpg"))[::40]
    assert len(files) >= 5
    for index, file in enumerate(files):
        side = (224, 224) if index % 2 else (191, 254)
        image = pil_to_tensor(Image.open(file).convert("RGB").resize(side[::-1]))[None] / 255
        x = (image - 0.5) / 0.5
        features = ours(image)
        for level, feature in zip(("c1", "c2", "c3", "c4", "c5"), theirs.forward_intermediates(x)[1], strict=True):
            assert_close(features[level], feature, 1e-4)
        scores = theirs(x)
        assert_close(logits(features["c5"], head), scores, 1e-4)
        assert scores.std() > 0.5
    symmetric = MobileNetV3("small", padding="symmetric", weights=str(REAL)).eval()
    assert not bool(symmetric.same_padding)
    assert (symmetric(image)["c5"] - features["c5"]).abs().max() > 0.1  # the padding matters to these weights


@pytest.mark.parametrize("side", [32, 33, 64, 75])
@pytest.mark.parametrize("output_stride", [32, 16])
@torch.no_grad()
def test_same_padding_keeps_the_sizes(side: int, output_stride: int) -> None:
    for variant in ("large", "small"):
        net = MobileNetV3(variant, padding="same", output_stride=output_stride).eval()
        for name, feature in net(torch.rand(1, 3, side, side + 5)).items():
            step = net.specs[name].stride
            assert feature.shape[2:] == (math.ceil(side / step), math.ceil((side + 5) / step)), name


def test_padding_travels_with_the_weights(tmp_path: Path) -> None:
    """A run's checkpoint says how it pads, and mean and std; no file name is needed a second time."""
    trained = MobileNetV3("small", padding="same")
    trained.mean.fill_(0.5)
    torch.save({"model": {f"backbone.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "best.pt")
    again = MobileNetV3("small", weights=str(tmp_path / "best.pt"))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(image), trained.eval()(image), rtol=0, atol=0)
    assert bool(again.same_padding)
    assert again.blocks[0].depthwise.pads_same  # type: ignore[union-attr]
    plain = MobileNetV3("small")
    plain.load_state_dict(trained.state_dict())
    assert plain.stem.pads_same
    assert not MobileNetV3("small", padding="symmetric", weights=str(tmp_path / "best.pt")).stem.pads_same


def test_runs_and_state_dicts_of_ours(tmp_path: Path) -> None:
    net = MobileNetV3("small")
    head = {"heads.classify.hidden.weight": torch.zeros(2)}
    whole = {f"backbone.{key}": value for key, value in net.state_dict().items()} | head
    (tmp_path / "run").mkdir()
    torch.save({"model": whole, "step": 3}, tmp_path / "run/best.pt")
    save_file(net.state_dict(), tmp_path / "plain.safetensors")
    torch.save({f"module.{key}": value for key, value in net.state_dict().items()}, tmp_path / "parallel.pt")
    for source, rest in (("run", head), ("run/best.pt", head), ("plain.safetensors", {}), ("parallel.pt", {})):
        other = MobileNetV3("small")
        assert load_weights(other, str(tmp_path / source)).keys() == rest.keys()
        for key, value in other.state_dict().items():
            assert torch.equal(value, net.state_dict()[key]), (source, key)


@torch.no_grad()
def test_whole_models_of_torchvision() -> None:
    image = torch.rand(1, 3, 96, 96)
    for build in (lraspp_mobilenet_v3_large, deeplabv3_mobilenet_v3_large):
        theirs = build(weights=None, weights_backbone=None, num_classes=5).eval()
        randomise(theirs)
        ours = MobileNetV3("large", output_stride=16).eval()
        state, rest = torchvision_to_ours(theirs.state_dict(), ours)
        ours.load_state_dict(state)
        assert rest.keys() == {key for key in theirs.state_dict() if not key.startswith("backbone.")}
        expected = theirs.backbone((image - IMAGENET[0]) / IMAGENET[1])
        features = ours(image)
        assert_close(features["c5"], expected.get("high", expected.get("out")))
        if "low" in expected:
            assert_close(features["c3_first"], expected["low"])


@pytest.mark.parametrize("reduced", [True, False])
@torch.no_grad()
def test_torchvisions_ssdlite(reduced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not reduced:  # torchvision builds the full tail only around downloaded weights
        from torchvision.models.detection import ssdlite

        monkeypatch.setattr(
            ssdlite, "mobilenet_v3_large", lambda *, norm_layer, **_: mobilenet_v3_large(norm_layer=norm_layer)
        )
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    randomise(theirs)
    ours = MobileNetV3("large", reduced_tail="detection" if reduced else None).eval()
    state, rest = to_ours(theirs.state_dict(), ours, lambda: timm_conventions(Path("none.pth")))
    ours.load_state_dict(state)
    assert rest.keys() == {k for k in theirs.state_dict() if k.startswith(("head.", "backbone.extra."))}
    image = torch.rand(1, 3, 320, 320)
    expected = theirs.backbone((image - 0.5) / 0.5)
    features = ours(image)
    assert_close(features["c4_expand"], expected["0"])
    assert_close(features["c5"], expected["1"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "home/hub/checkpoints"


def published(folder: Path, state: dict[str, Tensor]) -> Path:
    """A file named by its own hash, as torchvision's are."""
    torch.save(state, folder / "net.pth")
    digits = hashlib.sha256((folder / "net.pth").read_bytes()).hexdigest()[:8]
    return (folder / "net.pth").rename(folder / f"net-{digits}.pth")


def test_imagenet_is_downloaded_once_and_checked(hub: Path, tmp_path: Path) -> None:
    theirs = mobilenet_v3_small().eval()
    randomise(theirs)
    file = published(tmp_path, theirs.state_dict())
    ours = MobileNetV3("small").eval()
    ours.published = file.as_uri()
    head = load_weights(ours, "imagenet")
    assert (hub / file.name).is_file()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(logits(ours(image)["c5"], head), theirs((image - IMAGENET[0]) / IMAGENET[1]))
    file.unlink()
    load_weights(ours, "imagenet")  # from the cache
    (hub / file.name).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"SHA-256 of .* delete the file"):
        load_weights(ours, "imagenet")


def test_a_download_with_another_hash_is_refused(hub: Path, tmp_path: Path) -> None:
    file = published(tmp_path, {}).rename(tmp_path / "net-00000000.pth")
    with pytest.raises(ValueError, match="not the file that was published"):
        download(file.as_uri())
    assert not (hub / file.name).exists()


def test_offline_says_what_to_do(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"could not download .*backbone\.weights"):
        download((tmp_path / "absent-01234567.pth").as_uri())
    assert list(hub.iterdir()) == []


def test_imagenet_names_the_published_files() -> None:
    from torchvision.models import MobileNet_V3_Large_Weights, MobileNet_V3_Small_Weights

    assert MobileNetV3("large").published == MobileNet_V3_Large_Weights.IMAGENET1K_V1.url
    assert MobileNetV3("small").published == MobileNet_V3_Small_Weights.IMAGENET1K_V1.url
    with pytest.raises(ValueError, match="nobody publishes"):
        MobileNetV3("small", minimalistic=True, weights="imagenet")


def test_every_unmatched_key_is_listed() -> None:
    net = MobileNetV3("small")
    state = mobilenet_v3_small().state_dict()
    state["features.5.block.9.weight"] = state.pop("features.4.block.0.0.weight")
    state["stray"] = torch.zeros(1)
    state["features.0.0.weight"] = torch.zeros(32, 3, 3, 3)
    with pytest.raises(ValueError, match="missing") as caught:
        torchvision_to_ours(state, net)
    message = str(caught.value)
    assert "missing: blocks.3.expand.conv.weight" in message
    assert "left over: stray, features.5.block.9.weight" in message or "features.5.block.9.weight, stray" in message
    assert "stem.conv.weight is [32, 3, 3, 3] and should be [16, 3, 3, 3]" in message


@pytest.mark.parametrize("make", [lraspp_mobilenet_v3_large, ssdlite320_mobilenet_v3_large])
def test_strays_of_whole_models_are_listed(make: Callable[..., nn.Module]) -> None:
    state = make(weights=None, weights_backbone=None).state_dict()
    detects = make is ssdlite320_mobilenet_v3_large
    stray = "classifier.x" if detects else "backbone.extra.x"  # the other one's
    net = MobileNetV3("large", reduced_tail="detection" if detects else None)
    with pytest.raises(ValueError, match=rf"left over: {stray}, odd$"):
        torchvision_to_ours(state | {stray: torch.zeros(1), "odd": torch.zeros(1)}, net)


def test_strays_of_a_run_are_listed() -> None:
    net = MobileNetV3("small")
    state = {f"backbone.{key}": value for key, value in net.state_dict().items()}
    strays = {"head.weight": torch.zeros(1), "stem.conv.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"left over: head\.weight, stem\.conv\.bias$"):
        own_to_ours(state | strays, net)


def test_messages_name_the_setting_that_was_given(hub: Path, tmp_path: Path) -> None:
    net = MobileNetV3("small", minimalistic=True)
    (tmp_path / "noise.pth").write_bytes(b"\x00noise")
    torch.save([1], tmp_path / "list.pth")
    torch.save(mobilenet_v3_large().state_dict(), tmp_path / "large.pth")
    for source, message in (
        (tmp_path / "noise.pth", r"^weights=.*cannot be read"),
        (tmp_path / "list.pth", r"^weights=.*holds no state dict"),
        (tmp_path / "large.pth", r"^weights=.*of another net"),
        (tmp_path / "net.onnx", r"^weights=.*is neither"),
        (tmp_path / "absent.pth", r"does not exist; set weights to"),
        ("imagenet", r"give weights a file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_weights(net, str(source), "weights")
    with pytest.raises(FileNotFoundError, match=r"its path as weights$"):
        download((tmp_path / "absent-01234567.pth").as_uri(), "weights")


def test_another_net_is_refused(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    for state in (
        mobilenet_v3_large().state_dict(),
        MobileNetV3("small", width=0.75).state_dict(),
        timm.create_model("mobilenetv3_large_100").state_dict(),
        timm.create_model("tf_mobilenetv3_small_minimal_100").state_dict(),
    ):
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"backbone\.weights=.*other\.pth: the checkpoint is of another net"):
            MobileNetV3("small", weights=str(tmp_path / "other.pth"))


def test_a_failed_load_leaves_the_net_alone() -> None:
    net = MobileNetV3("small")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = mobilenet_v3_small().state_dict()
    del state["features.0.1.bias"]
    with pytest.raises(ValueError, match=r"missing: stem\.norm\.bias"):
        torchvision_to_ours(state, net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_checkpoint_without_counters_is_whole() -> None:
    net = MobileNetV3("small")
    state = {k: v for k, v in mobilenet_v3_small().state_dict().items() if not k.endswith("num_batches_tracked")}
    assert torchvision_to_ours(state, net).backbone.keys() == net.state_dict().keys()


class Code:
    """Pickles as a call."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must not run",)


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise.pth").write_bytes(b"\x00noise")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "noise.safetensors").write_bytes(b"noise and more noise")
    torch.save(Code(), tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    (tmp_path / "net.onnx").touch()
    for name in ("noise.pth", "empty.pt", "noise.safetensors", "code.pth"):
        with pytest.raises(ValueError, match=rf"backbone\.weights=.*{name} cannot be read as a checkpoint"):
            read(tmp_path / name)
    for name in ("list.ckpt", "none.ckpt"):
        with pytest.raises(ValueError, match="holds no state dict"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match=r"\.pth, \.pt, \.ckpt, \.safetensors"):
        read(tmp_path / "net.onnx")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist; set backbone\.weights"):
        read(tmp_path / "absent.pth")
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"naming of its keys \(layer1\.0\.conv1\.weight\) is unknown"):
        MobileNetV3("small", weights=str(tmp_path / "resnet.pth"))
    assert "must not run" not in capsys.readouterr().out


def test_timms_conventions(tmp_path: Path) -> None:
    def of(name: str) -> tuple[float, float, bool, float]:
        mean, std, same, eps = timm_conventions(tmp_path / name)
        return mean[0], std[0], same, eps

    assert of("tf_mobilenetv3_small_100.safetensors") == (0.5, 0.5, True, 1e-3)
    assert of("mobilenetv3_large_100_ra-f55367f5.pth") == (0.485, 0.229, False, 1e-5)
    assert of("mobilenetv3_large_100.ra4_e3600_r224_in1k.safetensors") == (0.5, 0.5, False, 1e-5)
    assert of("mobilenetv3_large_100_1k_miil_78_0-66471c13.pth") == (0.0, 1.0, False, 1e-5)
    card = {
        "architecture": "tf_mobilenetv3_small_100",
        "pretrained_cfg": {"tag": "in1k", "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(card))
    assert of("model.safetensors") == (0.5, 0.5, True, 1e-3)
    card = {
        "architecture": "mobilenetv3_large_100",
        "pretrained_cfg": {"tag": "x", "mean": [0.1] * 3, "std": [0.2] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(card))
    assert of("model.safetensors") == (0.1, 0.2, False, 1e-5)
    assert of("tf_mobilenetv3_small_100.safetensors") == (0.5, 0.5, True, 1e-3), "the file's own name comes first"
    card = {"architecture": "tf_mobilenetv3_small_100", "pretrained_cfg": None}
    (tmp_path / "config.json").write_text(json.dumps(card))
    assert of("model.safetensors") == (0.5, 0.5, True, 1e-3)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read \(.*mend it, or give the weights"):
        of("model.safetensors")
    ours = MobileNetV3("small")
    torch.save(ours.state_dict(), tmp_path / "best.pt")
    load_weights(ours, str(tmp_path / "best.pt"))  # has nothing to do with the card


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "net.pt").touch()
    assert located("~/net.pt") == tmp_path / "net.pt"
    assert located("~/run") == tmp_path / "run" / "best.pt"
    assert located("~nobody/net.pt") == Path("~nobody/net.pt")


def test_converters_are_pure() -> None:
    timm = pytest.importorskip("timm")
    net = MobileNetV3("large")
    theirs = timm.create_model("mobilenetv3_large_100").state_dict()
    before = {key: value.clone() for key, value in theirs.items()}
    timm_to_ours(theirs, net, timm_conventions(Path("mobilenetv3_large_100.pth")))
    assert theirs.keys() == before.keys()
    assert all(torch.equal(theirs[key], before[key]) for key in before)
    own = net.state_dict()
    assert own_to_ours(own, net).backbone.keys() == own.keys()
