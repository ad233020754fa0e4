"""The export command: what it leaves, that a wrong graph does not pass, that mistakes are named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_models import TINY_SCENES, write_run
from fixtures import ROOT, Command
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from heads.lraspp import LRASPP, scale
from tasks import predictor
from tasks.cli import compose
from tasks.deploy import engine, export, inside, parity
from tasks.deploy.program import trace
from tasks.deploy.session import open_file

SIZE = ["image_size=[64,64]", "workers=0"]
PROBE = """
import sys
from importlib import import_module
sys.argv = ["tasks.export", *{words!r}]
try:
    import_module("tasks.export").main()
except SystemExit as stop:
    code = stop.code
else:
    code = 0
print("CODE", code, "TORCH", "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    return write_run(tmp_path_factory.mktemp("classify") / "run", "classify", [*TINY_SCENES, *SIZE])


def settings(run: Path, *overrides: str) -> Any:
    """The config of an export of a run."""
    return compose("export", [f"run={run}", "threads=1", *overrides])


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["engin=openvino"], ["tol.metrik=1"]])
def test_answers_without_torch(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(words=words)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "TORCH False" in done.stdout, done.stdout + done.stderr
    assert ("CODE 0" in done.stdout) == words[0].startswith("--")
    assert words[0].startswith("--") or "did you mean" in done.stderr


@pytest.mark.slow
def test_the_command_ends_with_lines_that_run(command: Command, voc: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    run = write_run(tmp_path / "run", "detect", ["data=voc", f"data.root={voc}", *SIZE])
    done = command("export", "run=run", "engine=onnxruntime", "threads=1")
    assert "run/export/onnxruntime.onnx" in done.stdout
    assert "detect/cls" in done.stdout
    assert not done.stderr.strip(), "libraries keep quiet"
    assert {path.name for path in (run / "export").iterdir()} == {"onnxruntime.onnx"}
    Image.fromarray(np.full((50, 70, 3), 200, np.uint8)).save(tmp_path / "photo.jpg")
    lines = [line.strip() for line in done.stdout.split("run it\n")[1].splitlines()[:2]]
    code = "\n".join(lines)
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert ran.returncode == 0, ran.stderr
    assert "boxes" in ran.stdout


@pytest.mark.parametrize("name", ["openvino", "torch_export"])
def test_other_engines_pass_the_gate(classifier: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch" if name == "torch_export" else name)
    file = export.run(settings(classifier, f"engine={name}", "limit=3", "image_size=[96,64]"))
    assert file.parent == classifier / "export"
    assert file.stem == f"{name}_96x64"
    assert "on 3 images of scenes val" in capsys.readouterr().out
    if name == "torch_export":  # its files are programs
        with pytest.raises(ValueError, match=r"torch_export can run code that is in it.*trust=true"):
            open_file(file, 1)
    assert open_file(file, 1, trust=name == "torch_export").image_size == (96, 64)


@pytest.mark.parametrize(("name", "place"), [("onnxruntime", 0), ("onnxruntime", 9), ("openvino", 9)])
def test_a_swapped_activation_is_caught_and_named(
    classifier: Path, name: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip(name)
    from tasks.deploy import onnx

    swapped = []
    write = onnx.write

    def faulty(*arguments: Any) -> Any:
        layers = write(*arguments)
        file = arguments[1]
        proto = pytest.importorskip("onnx").load(file)
        node = [node for node in proto.graph.node if node.op_type == "HardSwish"][place]
        node.op_type = "HardSigmoid"
        pytest.importorskip("onnx").save(proto, file)
        swapped.append(max((key for key, value in layers.items() if value == node.output[0]), key=len))
        return layers

    monkeypatch.setattr(onnx, "write", faulty)
    out = tmp_path / f"model{engine(name).SUFFIX}"
    with pytest.raises(ValueError, match="is not the same model") as error:
        export.run(settings(classifier, f"engine={name}", f"out={out}", "batch=2"))
    assert f"They part at {swapped[0]} (Hardswish)" in str(error.value)
    assert not out.exists()
    assert out.with_name(f"model.failed{out.suffix}").exists()


@pytest.mark.parametrize("name", ["torch_export", "executorch"])
def test_a_swapped_activation_of_a_program_is_caught_and_named(
    classifier: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch" if name == "torch_export" else name)
    swapped = []

    def faulty(graph: Any) -> Any:
        program = trace(graph)
        node = [node for node in program.graph.nodes if node.target == torch.ops.aten.hardswish.default][17]
        node.target = torch.ops.aten.hardsigmoid.default
        program.graph_module.recompile()
        swapped.append(list(node.meta["nn_module_stack"].values())[-1][0].removeprefix("model."))
        return program

    monkeypatch.setattr(engine(name), "trace", faulty)
    out = tmp_path / f"model{engine(name).SUFFIX}"
    with pytest.raises(ValueError, match="is not the same model") as error:
        export.run(settings(classifier, f"engine={name}", f"out={out}", "batch=2", "threads=null"))
    assert f"They part at {swapped[0]} (Hardswish)" in str(error.value)
    assert not out.exists()
    assert out.with_name(f"model.failed{out.suffix}").exists()


@pytest.mark.slow
def test_the_command_fails_where_the_gate_does(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    write_run(tmp_path / "run", "classify", [*TINY_SCENES, *SIZE])
    done = command("export", "run=run", "engine=onnxruntime", "threads=1", "tol.output=0", check=False)
    assert done.returncode == 1
    assert "classify differs" in done.stderr
    assert "the largest gap" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "run" / "export").iterdir()} == {"onnxruntime.failed.onnx"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch_export"])
def test_a_head_that_depends_on_the_size_is_not_exported_for_all_sizes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch" if name == "torch_export" else name)

    def gates(head: LRASPP, high: torch.Tensor) -> torch.Tensor:
        """By a window that becomes a constant of the graph."""
        window, stride = (scale(lengths, high.shape[-2:]) for lengths in (head.pool or (), head.pool_stride))
        pooled = nn.functional.avg_pool2d(high, window, stride, ceil_mode=True)
        return nn.functional.interpolate(head.gate(head.gate_conv(pooled)), size=high.shape[-2:], mode="bilinear")

    monkeypatch.setattr(LRASPP, "_gates", gates)
    run = write_run(tmp_path / "run", "segment", [*TINY_SCENES, *SIZE, "head=lraspp"])
    with pytest.raises(ValueError, match=r"size=fixed image_size=|choose another engine="):
        export.run(settings(run, f"engine={name}", "size=dynamic", "limit=1"))
    assert not list((run / "export").iterdir())


def test_a_gate_without_an_image_does_not_pass(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for name in ("a", "b"):
        for i in range(2):
            file = tmp_path / "photos" / "train" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((64, 64, 3), 90 * i, np.uint8)).save(file)
    words = [
        "data=folder",
        f"data.root={tmp_path}/photos",
        "data.val=0.5",
        "data.test=null",
        "data.on_error=skip",
        *SIZE,
    ]
    run = write_run(tmp_path / "run", "classify", words)
    for file in tmp_path.glob("photos/train/*/*.png"):
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"not one image of folder val can be read, so nothing is proved; .*\.png"):
        export.run(settings(run, "engine=onnxruntime"))
    assert not list((run / "export").iterdir())


def test_a_metric_that_differs_is_not_passed() -> None:
    close = parity.Difference(False, 1e-6, 1.0)
    found = parity.Comparison({"classify": close}, {"top1": 0.79}, {"top1": 0.80}, ["top1"], 100, np.zeros(1), [])
    assert parity.verdict(found, "f32", None, 0.02) == []
    assert parity.verdict(found, "f32", None, 0.001) == ["top1 is 0.7900, in torch 0.8000 (0.001 allowed)"]
    broken = parity.Difference(False)
    broken.take(np.array([np.nan]), np.array([1.0]))
    assert "x differs: inf" in parity.verdict(found._replace(differences={"x": broken}), "f32", None, 1)[0]


def test_all_tasks_at_once_inside_the_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    run = write_run(tmp_path / "run", "multitask", [*TINY_SCENES, *SIZE])
    file = export.run(settings(run, "engine=onnxruntime", "postprocess=inside", "batch=2"))
    assert file.name == "onnxruntime_batch2_inside.onnx"
    said = capsys.readouterr().out
    assert predictor(file).predict(np.zeros((90, 70, 3), np.uint8)).keys() == {"classify", "detect", "segment"}
    for name in ("classify/top1", "detect/map", "segment/miou", "detect/boxes"):
        assert name in said
    runner = open_file(file, 1)
    assert runner.run(np.zeros((2, 3, 64, 64), np.uint8))["segment"].shape == (2, 64, 64)
    with pytest.raises(ValueError, match=r"got float32 \(2, 3, 64, 64\); expected uint8"):
        runner.run(np.zeros((2, 3, 64, 64), np.float32))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_detections_inside_a_graph_for_all_sizes(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    run = write_run(tmp_path / "run", "detect", [*TINY_SCENES, *SIZE])
    file = export.run(settings(run, f"engine={name}", "size=dynamic", "postprocess=inside", "limit=2"))
    assert file.stem == f"{name}_dynamic_inside"
    found = open_file(file, 1).run(np.zeros((1, 3, 96, 160), np.uint8))
    assert found["detect/boxes"].shape[1:] == (*found["detect/scores"].shape[1:], 4)


def test_the_score_of_the_gate_is_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    run = write_run(tmp_path / "run", "segment", [*TINY_SCENES, *SIZE])

    def shifted(self: inside.ClassMap, output: Any, size: Any) -> Any:
        return output.argmax(1).roll(1, 1).to(torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)

    monkeypatch.setattr(inside.ClassMap, "forward", shifted)  # in engine and reference alike
    with pytest.raises(ValueError, match=r"miou is 0\.\d+, in torch 0\.\d+ \(0\.001 allowed\).*postprocess=outside"):
        export.run(settings(run, "engine=onnxruntime", "postprocess=inside"))
    assert "segment" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run is not set"),
        (["run=nowhere"], "there is no run folder nowhere"),
        (["run=x", "engine=onnxruntim"], "did you mean 'onnxruntime'?"),
        (["run=x", "engine=torch"], "writes no file"),
        (["run=x", "engine=null"], "there is no engine None; there are"),
        (["run=x", "tol=0.01"], "tol is 0.01; expected tol.metric="),
        (["run='~no_such_user'"], "there is no run folder ~no_such_user"),
        (["run=x", "size=fixd"], "expected fixed or dynamic"),
        (["run=x", "precision=bf17"], "precision=bf17"),
        (["run=x", "batch=0"], "batch is 0"),
        (["run={run}", "postprocess=within"], "expected outside or inside"),
        (["run={run}", "out=model.pt"], "end in .onnx"),
        (["run={run}", "out={run}/folder.onnx"], "is a folder"),
        (["run={run}", "image_size=16"], "at least 32 px"),
        (["run={run}", "image_size=0"], "image_size is 0"),
        (["run=x", "trust=no"], "trust is 'no'; expected true or false"),
        (["run=x", "threads=100000"], "threads is 100000, more than the"),
    ],
)
def test_mistakes_are_named(classifier: Path, words: list[str], message: str) -> None:
    pytest.importorskip("onnxruntime")
    (classifier / "folder.onnx").mkdir(exist_ok=True)
    config = compose("export", [word.format(run=classifier) for word in words])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        export.run(config)
    assert message in str(error.value)


def test_a_run_that_names_foreign_readers_is_refused(classifier: Path, tmp_path: Path) -> None:
    from tasks.training import checkpoint

    content = checkpoint.load(classifier / checkpoint.BEST)
    content["config"]["data"]["_target_"] = "os.system"
    checkpoint.save(tmp_path / checkpoint.BEST, content)
    with pytest.raises(ValueError, match=r"would read its data by os\.system"):
        export.run(settings(tmp_path))


def test_a_head_of_ones_own_is_exported_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "my_head.py").write_text("from heads.linear import Linear\n\n\nclass Mine(Linear):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = write_run(tmp_path / "run", "classify", [*TINY_SCENES, *SIZE, "head=linear", "head._target_=my_head.Mine"])
    with pytest.raises(ValueError, match=r"would run my_head\.Mine"):
        export.run(settings(run, "limit=1"))
    file = export.run(settings(run, "limit=1", "trust=true"))
    assert "trust=True)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"would run my_head\.Mine.*trust=true"):
        open_file(file, 1)
    assert predictor(file, trust=True).predict(np.zeros((90, 70, 3), np.uint8)).keys() == {"classify"}


def test_data_that_were_moved_are_found() -> None:
    joint = {"name": "combined", "parts": {"cells": {"root": "/old", "val": 0.1}, "streets": {"root": "/streets"}}}
    typed = compose("export", ["+data.parts.cells.root=/new"])["data"]
    assert export.relocated(joint, typed["root"], OmegaConf.to_container(typed["parts"])) == {
        "name": "combined", "parts": {"cells": {"root": "/new", "val": 0.1}, "streets": {"root": "/streets"}},
    }  # fmt: skip
    assert export.relocated({"name": "bccd", "root": "/old"}, "/new", {}) == {"name": "bccd", "root": "/new"}
    both = r"\+data\.parts\.cells\.root=, \+data\.parts\.streets\.root="
    with pytest.raises(ValueError, match=rf"data\.root is /new, but .* is made of parts; set {both}"):
        export.relocated(joint, "/new", {})
    with pytest.raises(ValueError, match=rf"data\.parts\.dogs is .*; set {both}"):
        export.relocated(joint, None, {"dogs": {"root": "/new"}})


def test_a_part_that_is_not_there_is_named_as_it_is_typed(tmp_path: Path, voc: Path) -> None:
    from tasks.training import checkpoint

    run = write_run(tmp_path / "run", "detect", ["data=voc", f"data.root={voc}", *SIZE])
    content = checkpoint.load(run / checkpoint.BEST)
    part = {**content["config"]["data"], "root": "/nowhere"}
    content["config"]["data"] = {"name": "combined", "_target_": "tasks.data.combine.read", "parts": {"cells": part}}
    content["config"]["data"]["_recursive_"] = False
    checkpoint.save(run / checkpoint.BEST, content)
    with pytest.raises(FileNotFoundError, match=r"/nowhere.*; set \+data\.parts\.cells\.root"):
        export.run(settings(run))


def test_the_config_says_everything() -> None:
    text = (ROOT / "conf" / "export.yaml").read_text()
    assert all("#" in line for line in text.splitlines() if line and line[0].isalpha() and line.split(":")[1].strip())
    assert OmegaConf.to_container(compose("export"))["tol"]["metric"] == 0.001
