"""The command line: quick answers, and mistakes that end in one line with the fix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import ROOT, Command
from omegaconf import OmegaConf

from tasks.cli import compose, quoted
from tasks.data import scenes

PROBE = """
import sys
from importlib import import_module
sys.argv = ["tasks.detect", *{words!r}]
try:
    import_module("tasks.detect").main()
except SystemExit as stop:
    code = stop.code
else:
    code = 0
print("CODE", code, "TORCH", "torch" in sys.modules)
"""


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["backbone=smal"], ["trainer.max_epoch=1"], ["x=[1"]])
def test_answers_without_torch(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(words=words)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "TORCH False" in done.stdout, done.stdout + done.stderr
    assert ("CODE 0" in done.stdout) == words[0].startswith("--")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backbone=smal"], "there is no backbone 'smal', did you mean 'small'?"),
        (["head=ssdlit"], "there is no head 'ssdlit', did you mean 'ssdlite'?"),
        (["data=bcd"], "there is no data 'bcd', did you mean 'bccd'?"),
        (["trainer.max_epoch=1"], "there is no setting 'trainer.max_epoch', did you mean 'trainer.max_epochs'?"),
        (["bakbone=small"], "did you mean 'backbone'?"),
        (["data=bccd"], "set data.root"),
        (["data=bccd", "data.root=/nowhere"], "/nowhere"),
        (["data=bccd", "data.root={voc}", "data.train=trian"], "did you mean 'train'?"),
        (["data=voc", "data.root={voc}", "trainer.max_time=10min"], "expected DD:HH:MM:SS"),
        (["data=voc", "data.root={voc}", "head=linear"], "choose another head"),
        (["data=voc", "data.root={voc}", "head.features=[c9]"], "needs the feature c9"),
        (["data=voc", "data.root={voc}", "head.num_classes=7"], "has 2 classes"),
        (["data=voc", "data.root={voc}", "+freeze.bakbone=1"], "fits no parameter"),
        (["data=voc", "data.root={voc}", "schedule.shape=cosin"], "expected one of cosine"),
        (["resume=nowhere"], "is no run folder"),
        (["data=voc", "data.root={voc}", "batch_size=0"], "batch_size is 0; expected a whole number above 0"),
        (["data=voc", "data.root={voc}", "trainer.max_epochs=ten"], "trainer.max_epochs is ten"),
        (["data=voc", "data.root={voc}", "image_size=16"], "expected at least 32 px"),
        (["data=bccd", "data.root=/nowhere/archive (1), ü"], "data.root is /nowhere/archive (1), ü"),
        (["data=voc", "data.train=a(1"], "quote the value: 'data.train=\"...\"'"),
        (["results=null"], "results is None; expected a path"),
        (["results=/", "skip_done=true"], "results=/ is a folder"),
    ],
)
def test_mistakes_end_in_one_line_with_the_fix(
    command: Command, voc: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    done = command("detect", *(word.format(voc=voc) for word in words), check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "a run that cannot start leaves nothing behind"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A few small scenes that are there already: drawing them would be said."""
    root = tmp_path_factory.mktemp("scenes")
    scenes.read(str(root), 64, 4, 1, 1, 1, ["classify", "detect", "segment"], 0)
    return [f"data.root={root}", "data.image_size=64", "data.train=4", "data.val=1", "data.test=1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["classify", "backbone=smal"], "there is no backbone 'smal', did you mean 'small'?"),
        (["classify", "head=poold"], "there is no head 'poold', did you mean 'pooled'?"),
        (["classify", "data=folder", "data.root={empty}"], "{empty} has no images in"),
        (["classify", "data=clothing", "data.root=/nowhere"], "/nowhere"),
        (["classify", "head=ssdlite"], "choose another head"),
        (["classify", "mix.mixup_alpha=-1"], "mix.mixup_alpha is -1"),
        (["segment", "head=lrasp"], "there is no head 'lrasp', did you mean 'lraspp'?"),
        (["segment", "data=masks", "data.root={empty}", "data.classes=[a,b]"], "has no folder images/train"),
        (["segment", "data=camvid", "data.root=/nowhere"], "/nowhere"),
        (["segment", "evaluation.resize=crop"], "evaluation.resize=crop would cut off"),
        (["segment", "head.class_weights=[1,2]"], "head.class_weights is [1, 2]; expected 11 finite numbers"),
        (["multitask", "head@heads.segment=lrasp"], "there is no head 'lrasp', did you mean 'lraspp'?"),
        (["multitask", "heads.detect=null"], "heads.detect is None"),
        (["multitask", "balance.method=mgd"], "balance.method is 'mgd'"),
        (["multitask", "data=combined"], "data.parts.clothing.root is not set"),
        (["multitask", "backbone=large", "backbone.width=0"], "width=0 is not a multiplier"),
    ],
)
def test_the_other_commands_end_as_cleanly(
    command: Command,
    drawn: list[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    words: list[str],
    message: str,
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    words = words if any(word.startswith("data=") for word in words) else [*words, *drawn]
    done = command(*(word.format(empty=empty) for word in words), check=False)
    assert done.returncode == 1
    assert message.format(empty=empty) in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_sweep_reports_the_failed_run_and_does_the_others(command: Command, voc: Path, tmp_path: Path) -> None:
    small = ["image_size=[64,64]", "trainer.max_steps=1", "batch_size=2", "workers=0"]
    done = command("detect", "-m", "data=voc", f"data.root={voc}", *small, "schedule.warmup=0.1,2", check=False)
    assert done.returncode == 1
    assert "1 of the sweep's runs failed" in done.stderr
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_works_from_any_folder(command: Command, tmp_path: Path) -> None:
    assert "backbone" in command("detect", "--cfg", "job", cwd=tmp_path).stdout


@pytest.mark.parametrize("path", ["/data/archive (1).zip", "/home/jürgen/bilder", "~/photos", "a=b,[c]", "true"])
@pytest.mark.parametrize(
    "key", ["data.root", "data.parts.bccd.root", "backbone.weights", "weights", "resume", "output"]
)
def test_paths_are_taken_as_they_stand(key: str, path: str) -> None:
    overrides = ["data=combined"] if "parts" in key else []
    config = compose("multitask", [*overrides, quoted(f"{key}={path}")])
    assert OmegaConf.select(config, key) == path


@pytest.mark.parametrize(
    "word", ["data.root=../shared/data/cifar10.zip", "weights=imagenet", "resume=null", "output='a b'", "seed=a(1)"]
)
def test_what_needs_no_quotes_gets_none(word: str) -> None:
    assert quoted(word) == word
    assert quoted("data.root=a,b", sweep=True) == "data.root=a,b"
