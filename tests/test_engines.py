"""Every engine gives torch's outputs and, from a file alone, the heads' predictions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_models import TINY_SCENES, network, pictures, write_run

from tasks import deploy, load
from tasks.data import Boxes, Sample
from tasks.data.images import decode
from tasks.data.loader import Samples, evaluation_loader
from tasks.deploy import artefact, facts, parity
from tasks.deploy.graph import Form, Graph
from tasks.deploy.parity import Difference, blocks
from tasks.deploy.session import Runner, available, engine, engine_names, has_bf16, open_file, open_graph, open_model
from tasks.training import checkpoint
from tasks.training.build import OURS, read_data
from tasks.training.model import Model

ENGINES = ("torch_export", "onnxruntime", "openvino")
TASKS = ("classify", "detect", "segment", "multitask")
BACKBONES = ("small", "large", "large_minimalistic", "mobilenetv2")
SIZES = ((64, 96), (128, 96))
SCORED = 100
"""Detections of a class that the COCO protocol looks at in an image."""
MATRIX = [(task, backbone, size) for task in TASKS for backbone in BACKBONES for size in SIZES]


def runners(graph: Graph, names: tuple[str, ...] = ENGINES, precision: str = "f32") -> Iterator[Runner]:
    """The graph in every installed engine."""
    for name in names:
        if not deploy.lacking(name):
            yield open_graph(graph, name, artefact.describe(graph, name, None, None), 1, precision, lambda item: item)


def check_parity(graph: Graph, opened: list[Runner], size: tuple[int, int]) -> None:
    for count in (1, 4):
        image = pictures(count, size)
        wanted = graph.named(torch.from_numpy(image))
        for runner in opened:
            found = runner.run(image)
            assert list(found) == list(wanted) == runner.metadata["outputs"]
            for name, value in wanted.items():
                difference = Difference(False)
                difference.take(found[name], value.numpy())
                assert difference.relative < 1e-4, (runner.name, name, difference)
                assert found[name].dtype == value.numpy().dtype


@pytest.mark.parametrize("case", [("multitask", "small", (64, 96)), ("classify", "mobilenetv2", (96, 64))])
def test_outputs_are_torchs(case: tuple[str, str, tuple[int, int]]) -> None:
    graph = Graph(network(*case), Form(case[2]))
    check_parity(graph, list(runners(graph)), case[2])


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: f"{case[0]}-{case[1]}-{case[2][0]}x{case[2][1]}")
def test_outputs_and_metrics_are_torchs_everywhere(case: tuple[str, str, tuple[int, int]], tmp_path: Path) -> None:
    task, backbone, size = case
    words = [f"backbone={backbone}", f"image_size=[{size[0]},{size[1]}]", *TINY_SCENES]
    run = write_run(tmp_path / "run", task, words)
    model = load(run).eval()
    graph = Graph(model, Form(size))
    opened = list(runners(graph))
    check_parity(graph, opened, size)
    (reference,) = runners(graph, ("torch",))
    data = read_data(checkpoint.load(run / checkpoint.BEST)["config"])
    labelled = [self_labelled(model, sample) for sample in data.splits["val"]]
    view = Samples(labelled, tuple(model.heads), model.view, 0, False)
    assert opened
    for count in (1, 4):
        for runner in opened:
            found = parity.compare(runner, reference, reference, evaluation_loader(view, count, 0))
            assert found.images == len(labelled)
            assert min(found.reference[name] for name in found.mains) > 0.99  # else equal scores would say nothing
            assert parity.verdict(found, "f32", None, 0.001) == [], (runner.name, count)


@dataclass(frozen=True)
class Held:
    """A mask in memory."""

    mask: np.ndarray

    def load(self) -> np.ndarray:
        return self.mask


def self_labelled(model: Model, sample: Sample) -> Sample:
    """The sample with torch's own predictions as its truth: torch scores 1 even untrained, another network does not."""
    found = model.predict(decode(sample.image))
    targets: dict[str, Any] = {}
    if "classify" in found:
        targets["classify"] = int(found["classify"].argmax())
    if "detect" in found:
        labels = found["detect"]["labels"].numpy()
        rank = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
        boxes = found["detect"]["boxes"].numpy()
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        kept = (rank < SCORED) & (area > 0)
        targets["detect"] = Boxes(boxes[kept], labels[kept], np.zeros(kept.sum(), bool), area[kept])
    if "segment" in found:
        targets["segment"] = Held(found["segment"].numpy())
    return Sample(sample.image, sample.size, targets)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Predictions of two engines, but for the last bits."""
    assert found.keys() == wanted.keys()
    if "classify" in wanted:
        torch.testing.assert_close(found["classify"], wanted["classify"], atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(found.get("detect", []), wanted.get("detect", []), strict=True):
        assert len(ours["boxes"]) == len(theirs["boxes"])
        torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-5, rtol=1e-4)
        assert (ours["labels"] == theirs["labels"]).float().mean() > 0.98
        assert ((ours["boxes"] - theirs["boxes"]).abs().amax(1) < 0.1).float().mean() > 0.98
    for ours, theirs in zip(found.get("segment", []), wanted.get("segment", []), strict=True):
        assert ours.shape == theirs.shape
        assert (ours == theirs).float().mean() > 0.999


@pytest.mark.parametrize("name", ["torch", *ENGINES])
def test_post_processing_inside_gives_the_heads_predictions(name: str) -> None:
    if deploy.lacking(name):
        pytest.skip(f"{name} is not installed")
    model, size = network("multitask"), (64, 96)
    image, sizes = pictures(2, size), [(64, 96), (64, 96)]
    wanted = open_model(model, "torch", 1).predict(image, sizes)
    runner = open_model(model, name, 1, batch=2, postprocess="inside")
    same(runner.predict(image, sizes), wanted)
    original = [(50, 40), (128, 200)]
    detections = open_model(model, "torch", 1).predict(image, original)["detect"]
    same({"detect": runner.predict(image, original)["detect"]}, {"detect": detections})


def test_suppression_is_torchvisions_on_crowded_boxes() -> None:
    from torchvision.ops import nms

    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(5, 60, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 5 + 30 * torch.rand(5, 60, 2, generator=generator)], 2)
    scores = torch.rand(5, 60, generator=generator).sort(descending=True).values
    kept = torch.ops.mobilenetv3_bench.suppress(boxes, scores, 0.45, 0.2)
    for i in range(5):
        wanted = [j for j in nms(boxes[i], scores[i], 0.45).tolist() if scores[i, j] > 0.2]
        assert kept[i].nonzero().flatten().tolist() == wanted
        assert 1 < len(wanted) < 48


@pytest.mark.parametrize("name", ENGINES)
def test_an_artefact_alone_predicts_as_the_run(name: str, tmp_path: Path) -> None:
    if deploy.lacking(name):
        pytest.skip(f"{name} is not installed")
    classes = ["heads.classify.num_classes=3", "heads.detect.num_classes=3", "heads.segment.num_classes=3"]
    run = write_run(tmp_path / "run", "multitask", [*classes, "image_size=[64,96]", "evaluation.resize=squash"])
    model = load(run)
    graph = Graph(model, Form((64, 96), batch=1))
    config = checkpoint.load(run / checkpoint.BEST)["config"]
    file = tmp_path / f"alone{facts(name)['SUFFIX']}"
    engine(name).export(graph, file, artefact.describe(graph, name, config, run / checkpoint.BEST))
    (run / checkpoint.BEST).unlink()
    runner = open_file(file, 1, trust=name == "torch_export")
    assert runner.metadata["checkpoint"]["sha256"]
    assert runner.classes == model.classes
    photo = pictures(1, (120, 80))[0].transpose(1, 2, 0)
    found = runner.predict(runner.fit(photo)[None], [(120, 80)])
    wanted = model.predict(photo)
    same({"classify": found["classify"]}, {"classify": wanted["classify"][None]})
    same(
        {"detect": found["detect"], "segment": found["segment"]}, {key: [wanted[key]] for key in ("detect", "segment")}
    )


@pytest.mark.parametrize("name", ENGINES)
def test_layers_are_those_of_the_modules(name: str, tmp_path: Path) -> None:
    if deploy.lacking(name):
        pytest.skip(f"{name} is not installed")
    graph = Graph(network("segment"), Form((64, 96), batch=2))
    file, image = tmp_path / f"model{facts(name)['SUFFIX']}", pictures(2, (64, 96))
    engine(name).export(graph, file, artefact.describe(graph, name, None, None))
    found, wanted = engine(name).layers(file, image, "f32"), blocks(graph, image)
    activations = [module for module in wanted if module.endswith((".act", ".gate"))]
    assert len(set(activations) & found.keys()) > 20
    for module in wanted.keys() & found.keys():
        assert np.abs(found[module] - wanted[module]).max() <= 1e-3 * np.abs(wanted[module]).max(), module


def test_sessions_of_onnxruntime_do_not_spin_into_each_other() -> None:
    pytest.importorskip("onnxruntime")
    session = open_model(network("classify"), "onnxruntime", 1).session.session  # type: ignore[attr-defined]
    assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize("name", ["torch", "torch_export", "openvino"])
def test_bfloat16_is_near(name: str) -> None:
    if deploy.lacking(name):
        pytest.skip(f"{name} is not installed")
    if not has_bf16():
        pytest.skip("this CPU has no bfloat16")
    graph, image = Graph(network("classify"), Form((64, 96), batch=2)), pictures(2, (64, 96))
    (runner,) = runners(graph, (name,), "bf16")
    exact, half = graph.named(torch.from_numpy(image))["classify"].numpy(), runner.run(image)["classify"]
    assert half.dtype == np.float32
    gap = np.abs(half - exact).max() / np.abs(exact).max()
    assert 1e-6 < gap < 0.1, "not calculated in bf16, or far off"


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx512f avx512vl", False),  # torch emulates it there, and says yes
    ],
)
def test_bfloat16_is_an_instruction(line: str, has: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert has_bf16(tmp_path / "cpuinfo") is has
    assert has_bf16(tmp_path / "none") in (True, False)


@pytest.mark.slow
def test_dynamic_size_takes_other_sizes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for task, head in (("segment", "lraspp"), ("segment", "lraspp_torchvision"), ("detect", "ssdlite")):
        graph = Graph(network(task, "small", (64, 96), f"head={head}"), Form((64, 96), dynamic_size=True))
        (runner,) = runners(graph, ("onnxruntime",))
        for size in ((64, 96), (96, 128)):
            image = pictures(2, size)
            for name, wanted in graph.named(torch.from_numpy(image)).items():
                np.testing.assert_allclose(runner.run(image)[name], wanted.numpy(), atol=1e-3, rtol=1e-3)


def test_threads_are_the_engines_own() -> None:
    runner, image = open_model(network("classify"), "torch", 2), pictures(1, (64, 96))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        runner.run(image)
        assert torch.get_num_threads() == runner.threads == 2
    finally:
        torch.set_num_threads(before)


def test_engines_are_found_by_their_files_and_named_by_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"torch", *ENGINES, "executorch"} <= set(engine_names())
    installed = available()
    assert "torch" in installed
    known = [name for name in installed if name in deploy.FASTEST_FIRST]
    assert known == sorted(known, key=deploy.FASTEST_FIRST.index)
    monkeypatch.setattr(deploy, "engine_names", lambda: ["torch", "zeta", "torch_export", "openvino"])
    monkeypatch.setattr(deploy, "lacking", lambda name: [])
    assert available() == ["openvino", "zeta", "torch", "torch_export"]  # one that somebody adds may be fast, too


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="did you mean 'onnxruntime'"):
        engine("onnxruntim")
    monkeypatch.setattr(deploy, "lacking", lambda name: ["openvino"] if name == "openvino" else [])
    with pytest.raises(ValueError, match=r'pip install -e "\.\[openvino\]"'):
        engine("openvino")
    with pytest.raises(ValueError, match="expected f32"):
        open_model(network("classify"), "onnxruntime", precision="int4")
    with pytest.raises(ValueError, match="expected outside or inside"):
        open_model(network("classify"), "torch", postprocess="within")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    with pytest.raises(FileNotFoundError, match=r"tasks\.export"):
        open_file(tmp_path / "none.onnx")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a file that ends in .*\.onnx"):
        open_file(tmp_path / "model.bin")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot be read"):
        open_file(tmp_path / "broken.onnx")
    graph = Graph(network("classify"), Form((64, 96), batch=1))
    file = tmp_path / "model.onnx"
    engine("onnxruntime").export(graph, file, artefact.describe(graph, "onnxruntime", None, None))
    with pytest.raises(ValueError, match="says nothing of its heads"):
        open_file(file)
    proto = onnx.load(file)
    evil = {"heads": {"classify": {"_target_": "os.system", "_partial_": True}}, "evaluation": {"_target_": "tasks.x"}}
    del proto.metadata_props[:]
    kept = artefact.describe(graph, "onnxruntime", None, None)
    for key, text in artefact.pack({**kept, **evil}).items():
        proto.metadata_props.add(key=key, value=text)
    onnx.save(proto, file)
    with pytest.raises(ValueError, match=rf"would run os\.system, tasks\.x; expected parts of {OURS[0]}"):
        open_file(file)


def test_executorch_keeps_its_number_of_threads() -> None:
    pytest.importorskip("executorch", reason="the extra executorch is not installed")
    model = network("classify")
    runner = open_model(model, "executorch")
    if runner.threads == 1:
        pytest.skip("there is one core")
    with pytest.raises(ValueError, match=rf"with {runner.threads} threads here and cannot change it"):
        open_model(model, "executorch", runner.threads - 1)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("task", TASKS)
def test_executorch_runs_the_same_models(task: str, batch: int) -> None:
    """Its files take one number of images of one size, and writing one takes a quarter of a minute."""
    pytest.importorskip("executorch", reason="the extra executorch is not installed")
    backbone, size = BACKBONES[(TASKS.index(task) + batch) % len(BACKBONES)], SIZES[batch > 1]
    graph = Graph(network(task, backbone, size), Form(size, batch))
    runner, image = open_model(graph.model, "executorch", batch=batch), pictures(batch, size)
    found = runner.run(image)
    for name, value in graph.named(torch.from_numpy(image)).items():
        difference = Difference(False)
        difference.take(found[name], value.numpy())
        assert difference.relative < 1e-4, (backbone, name, difference)


def test_weights_of_another_export_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = copy.deepcopy(network("classify"))
    for name in ("a", "b"):
        graph = Graph(model, Form((64, 96), batch=1))
        engine("openvino").export(graph, tmp_path / f"{name}.xml", artefact.describe(graph, "openvino", None, None))
        engine("openvino").load(tmp_path / f"{name}.xml", 1, "f32")
        model.requires_grad_(False).head("classify").classifier.weight += 1
    (tmp_path / "b.bin").replace(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin belongs to another export than a\.xml"):
        engine("openvino").load(tmp_path / "a.xml", 1, "f32")
