"""The benchmark's command, and what its parts say of known numbers. No test asserts a wall-clock time."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import ROOT, Command

from tasks import benchmark, build
from tasks.deploy import (
    cases,
    fresh,
    latency,
    latency_text,
    peer,
    peer_images,
    peer_profile,
    printed,
    roofline,
    selfcheck,
    timing,
)
from tasks.reporting.comparison import compare
from tasks.reporting.ledger import read_ledger
from tasks.reporting.results import read_records, write_record


def test_help_and_mistakes_leave_torch_alone() -> None:
    code = (
        "import sys\nfrom tasks import benchmark\nfrom tasks.deploy import cases, machine, peer, printed, timing\n"
        "cases.plan(benchmark.parse(['backbone=small', 'engine=torch', 'threads=1']))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bakcbone=small"], "did you mean 'backbone'"),
        (["rofline"], "did you mean 'roofline'"),
        (["backbone=smal"], "did you mean 'small'"),
        (["engine=onnxruntim"], "did you mean 'onnxruntime'"),
        (["task=detekt"], "did you mean 'detect'"),
        (["backbone.widht=1"], "did you mean 'backbone.width'"),
        (["threads=0"], "expected numbers above 0"),
        (["seconds=nan"], "expected numbers above 0"),
        (["seconds=-1"], "expected numbers above 0"),
        (["width=0"], "expected numbers above 0"),
        (["cost", "plot=cost.abc"], "ends in .svg"),
        (["out=."], "out=. is a folder"),
        (["threads=4096"], "this process may use"),
        (["image_size=16"], "at least 32 px"),
        (["backbone="], "is empty"),
        (["small"], "nothing called 'small'"),
        (["engine=torch", "precision=f16"], "no precision f16"),
        (["peer=timm"], "expected peer=torchvision"),
        (["run=nowhere"], "run=nowhere"),
        (["memory=maybe"], "expected true or false"),
        (["peer=torchvision", "photo=x.jpg"], "peer has no key 'photo'"),
        (["peer=torchvision", "threads=1,2"], "peer takes one threads= at a time"),
        (["check=self", "engine=torch,openvino"], "check takes one engine= at a time"),
        (["check=self", "backbone=small,large"], "check takes one backbone= at a time"),
        ([f"results={__file__}/results.jsonl"], "cannot be written to; set results="),
        (["trust=yes"], "expected true or false"),
        (["task=predict"], "there is no task 'predict'"),
    ],
)
def test_a_mistake_says_how_to_mend_it(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        cases.plan(benchmark.parse(words))
    assert message in str(caught.value)


def test_command_answers_help_and_ends_with_an_error(command: Command) -> None:
    assert "peer=torchvision" in command("benchmark", "--help").stdout
    failed = command("benchmark", "backbone=smal", check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: there is no backbone 'smal'")
    listed = command("benchmark", "peer=torchvision", "rows=?").stdout
    assert all(name in listed for name in peer.ROWS)


def test_every_combination_is_planned_once() -> None:
    threads = [1, cases.cores()]
    words = ["backbone=small,large", "width=0.75,1", "image_size=96,64x128", "engine=torch", "precision=f32,bf16"]
    planned = cases.plan(benchmark.parse([*words, f"threads={','.join(map(str, threads))}", "batch=1,4"]))
    assert len(planned.cases) == 2 * 2 * 2 * 2 * 2 * len(threads)
    assert len(set(planned.cases)) == 64 * len(set(threads)) // 2
    labels = [case.label for case in planned.cases]
    assert any("small width=0.75 + pooled 64x128, torch bf16" in label for label in labels)
    heads = [cases.network_of(task, ["backbone=small"]).overrides[-1] for task in ("classify", "detect", "segment")]
    assert heads == ["head.num_classes=1000", "head.num_classes=90", "head.num_classes=19"]


def test_a_sweep_leaves_a_table_and_records_that_compare_reads(command: Command, tmp_path: Path) -> None:
    done = command(
        "benchmark", "backbone=small", "engine=torch", "threads=1", "image_size=64", "rounds=8", "memory=false",
        "out=table.md",
    )  # fmt: skip
    header, _, row = done.stdout.splitlines()[:3]
    assert header.count("|") == row.count("|")
    assert "python -m tasks.benchmark backbone=small" in (tmp_path / "table.md").read_text()
    records, problems = read_records(tmp_path / "results.jsonl")
    assert not problems
    (record,) = records
    latency = record["latency"]
    assert latency is not None
    assert (latency["engine"], latency["threads"], latency["batch_size"], latency["n"]) == ("torch", 1, 1, 8)
    assert {"governor", "load_average", "others_cores"} <= latency.keys()
    assert latency["stages_ms"].keys() == {"decode", "resize", "network", "post-process", "whole"}
    trained = {**record, "metrics": {"top1": 0.5}, "latency": None, "run": "somewhere", "data": "imagenet"}
    write_record(tmp_path / "results.jsonl", trained)
    (table,) = compare(read_records(tmp_path / "results.jsonl")[0]).tables
    assert table.rows[0].latency_ms == latency["median_ms"]


QUICK = ["engine=torch", "threads=1", "rounds=6", "seconds=2"]


@pytest.mark.slow
def test_cost_gives_a_grid_a_plot_and_records(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = command("benchmark", "cost", "backbone=small", "image_size=64,96", "width=0.5,1", *QUICK, "plot=cost.png")
    head, _, *rows = done.stdout.split("\n\n")[0].splitlines()
    assert head == "| ms a batch | 64x64 | 96x96 |"
    assert len(rows) == 2
    records, problems = read_records(tmp_path / "results.jsonl")
    assert not problems
    assert sorted((record["backbone"], str(record["image_size"])) for record in records) == [
        ("small", "[64, 64]"), ("small", "[96, 96]"), ("small width=0.5", "[64, 64]"), ("small width=0.5", "[96, 96]"),
    ]  # fmt: skip
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_roofline_names_peak_layers_and_leaves_a_record(command: Command, tmp_path: Path) -> None:
    done = command("benchmark", "roofline", "backbone=small", "image_size=64", "threads=1", "rounds=3")
    assert "| threads | matrix product GFLOP/s | copy GB/s |" in done.stdout
    assert "slowest layers of small + pooled 64x64" in done.stdout
    assert "depthwise 5x5" in done.stdout
    ((record,), problems) = read_records(tmp_path / "results.jsonl")
    assert not problems
    assert record["latency"] is not None
    assert record["latency"]["engine"] == "torch"
    assert 0 < record["latency"]["share_of_peak"] < 1


@pytest.mark.slow
def test_the_papers_ratios_leave_a_record_a_row(command: Command, tmp_path: Path) -> None:
    done = command("benchmark", "paper", "table=6", *QUICK)
    rows = printed.rows_of(read_ledger(ROOT / "conf" / "ledger")["6"])
    assert all(f"| {row.name} |" in done.stdout for row in rows)
    records, problems = read_records(tmp_path / "results.jsonl")
    assert not problems
    assert len(records) == len(rows)
    assert {record["task"] for record in records} == {"detect"}


@pytest.mark.slow
def test_the_check_counts_its_trials(command: Command) -> None:
    words = ["check=self", "backbone=small", "image_size=64", "engine=torch", "threads=1", "trials=2", "rounds=8"]
    done = command("benchmark", *words, check=False)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [
        "| the same model against itself", "| a delay of 10 % injected", "| a busy loop beside it",
        "| nothing of ours beside it",
    ]  # fmt: skip
    assert all(" of 2 (" in row[2] for row in rows[:3])
    assert done.returncode == any(row[4].startswith("NO") for row in rows)


def test_the_check_keeps_what_it_counted_before_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = itertools.count()

    def measure(contenders: dict[str, Any], rounds: int, seed: int) -> timing.Timings:
        return timing.Timings(tuple(contenders), np.full((rounds, 2), 5.0), 0, True, next(counted) == 3)

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(selfcheck, "runner_call", lambda case: lambda: None)
    options = benchmark.parse(["check=self", "backbone=small", "engine=torch", "threads=1", "trials=2", "rounds=8"])
    assert selfcheck.work(options, cases.plan(options)) == 130
    said = capsys.readouterr().out
    assert "| the same model against itself | called different | 0 of 2 (0.0 %) |" in said
    assert "| a delay of 10 % injected | called slower | 0 of 1 (0.0 %) |" in said
    assert "a busy loop beside it" not in said
    assert "stopped   by Ctrl-C" in said


def test_a_record_that_cannot_be_written_costs_no_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(latency_text, "write_record", full)
    monkeypatch.setattr(latency_text, "record", lambda _: {})
    result: Any = SimpleNamespace(opened=SimpleNamespace(case=SimpleNamespace(label="small")))
    left_out: list[str] = []
    latency_text.keep(result, None, left_out)
    assert not left_out
    latency_text.keep(result, "runs.jsonl", left_out)
    assert left_out == ["the record of small: runs.jsonl cannot be written (No space left on device)"]
    assert latency_text.conclude("runs.jsonl", left_out) == 1
    assert latency_text.conclude("runs.jsonl", []) == 0
    assert capsys.readouterr().err == f"records in {Path('runs.jsonl').resolve()}\n"


def test_a_run_of_ones_own_parts_is_loaded_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"task": "classify", "backbone": "small", "head": "mine", "image_size": 64, "config": {"backbone": {}}}
    (tmp_path / "record.json").write_text(json.dumps(fields))
    asked: list[Any] = []
    monkeypatch.setattr(latency, "load", lambda run, trust: asked.append(trust))
    monkeypatch.setattr(fresh.subprocess, "run", lambda words, **_: asked.append(json.loads(words[-1])["trust"]))
    for words in ([], ["trust=true"]):
        (case,) = cases.plan(benchmark.parse([f"run={tmp_path}", "engine=torch", "threads=1", *words])).cases
        latency.Store(tmp_path).model(case.network)
        with pytest.raises(AttributeError):  # no process ran
            fresh.peak_memory(case, None)
    assert asked == [False, False, True, True]


def test_of_many_cases_all_are_timed_beside_the_first_that_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    network = cases.network_of("classify", ["backbone=small"])
    many = [cases.Case(network, "torch", 1, f"p{i}", 1) for i in range(40)]
    assert latency.grouped([*many, many[0]._replace(batch=4)]) == [many, [many[0]._replace(batch=4)]]
    timed: list[list[cases.Case]] = []
    sessions: list[SimpleNamespace] = []

    def opened(group: list[cases.Case], *_: object) -> list[SimpleNamespace]:
        found = [SimpleNamespace(case=case, runner=case) for case in group if case != many[0]]
        sessions.extend(found)
        assert sum(one.runner is not None for one in sessions) <= latency.TOGETHER
        return found

    monkeypatch.setattr(latency, "open_group", opened)
    monkeypatch.setattr(latency, "time_group", lambda group, *_: timed.append([one.case for one in group]))
    assert not latency.sweep(benchmark.Options(), many, [], [])
    assert [len(group) for group in timed] == [15, 16, 10]
    assert {group[0] for group in timed} == {many[1]}
    assert [*timed[0], *timed[1][1:], *timed[2][1:]] == many[1:] == [one.case for one in sessions]
    assert all(one.runner is None for one in sessions)


@pytest.mark.slow
def test_runs_that_look_alike_are_told_apart(command: Command, tmp_path: Path) -> None:
    tiny = ["data.train=4", "data.val=2", "data.test=2", "trainer.max_steps=1", "batch_size=2", "workers=0"]
    for seed in (0, 1):
        command("classify", "image_size=[64,64]", *tiny, f"seed={seed}", "output=out", "results=runs.jsonl")
    runs = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("out/classify/*/record.json"))
    done = command("benchmark", f"run={','.join(runs)}", *QUICK, "memory=false")
    assert all(f"small ({run})" in done.stdout for run in runs)
    records, problems = read_records(tmp_path / "results.jsonl")
    assert not problems
    assert [record["run"] for record in records] == runs
    assert [record["seed"] for record in records] == [0, 1]


@pytest.mark.slow
def test_an_engine_is_one_file(tmp_path: Path) -> None:
    for part in ("backbones", "heads", "tasks", "conf"):
        shutil.copytree(ROOT / part, tmp_path / part)
    file = tmp_path / "tasks" / "deploy" / "engine_mine.py"
    file.write_text((ROOT / "tasks/deploy/engine_torch_export.py").read_text().replace('".pt2"', '".mine"'))
    words = ["backbone=small", "image_size=64", "engine=mine", "threads=1", "rounds=6", "memory=false"]
    done = subprocess.run(
        [sys.executable, "-m", "tasks.benchmark", *words], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| mine |" in done.stdout
    ((record,), _) = read_records(tmp_path / "results.jsonl")
    assert record["latency"] is not None
    assert record["latency"]["engine"] == "mine"


@pytest.mark.slow
def test_peer_as_a_command(command: Command) -> None:
    done = command("benchmark", "peer=torchvision", "rows=coco,step_ssdlite_real", "images=3", "batch=2", "rounds=2",
                   "threads=1", check=False)  # fmt: skip
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| coco |", "| step_ssdlite_real |"))]
    assert len(rows) == 2
    assert all(" | yes (" in row for row in rows), "equal results"
    assert "step_ssdlite_real: drawn scenes, not photos" in done.stdout
    assert done.returncode == 0


def test_an_artefact_is_written_once_for_all_threads(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network = cases.network_of("classify", ["backbone=small", "image_size=[64,64]", "head.num_classes=3"])
    store = latency.Store(tmp_path)
    one = store.file(cases.Case(network, "onnxruntime", 1, "f32", 1))
    assert store.file(cases.Case(network, "onnxruntime", 2, "f32", 1)) == one
    assert store.file(cases.Case(network, "onnxruntime", 1, "f32", 4)) != one
    assert one.stat().st_size > 1e6


@pytest.mark.slow
def test_a_fresh_process_says_what_it_took_or_why_not(tmp_path: Path) -> None:
    network = cases.network_of("classify", ["backbone=small", "image_size=[64,64]", "head.num_classes=3"])
    case = cases.Case(network, "torch", 1, "f32", 1)
    found = fresh.peak_memory(case, None)
    assert isinstance(found, fresh.Memory)
    assert 50 < found.before < found.peak < 4000
    missing = fresh.peak_memory(case._replace(engine="onnxruntime"), tmp_path / "nowhere.onnx")
    assert isinstance(missing, str)
    assert "ended with 1" in missing


def test_rows_of_peer_are_chosen_by_name_and_pattern() -> None:
    assert peer.chosen(None) == peer.USUAL
    assert peer.chosen(["post_*", "coco", "coco"]) == ["post_peaked", "post_dense", "coco"]
    with pytest.raises(ValueError, match="did you mean 'step_small'"):
        peer.chosen(["step_smal"])


def outcome(ours: float, theirs: float, apart: float | None, n: int = 20) -> peer.Outcome:
    noise = 1 + np.random.default_rng(0).normal(0, 0.01, (n, 2))
    times = timing.Timings(("ours", "theirs"), np.array([ours, theirs]) * noise, 4, True)
    return peer.Outcome("step_small", times, (32, 32), apart, [], "", [])


def test_peers_are_judged_by_ratio_target_and_equal_results() -> None:
    reached, missed = outcome(100, 300, 1e-7), outcome(100, 150, 1e-3)
    lines = peer.table([reached, missed])
    assert "| 3.0" in lines[2]
    assert "| yes | 20 | yes (1.0e-07) |" in lines[2]
    assert "| no | 20 | NO (1.0e-03) |" in lines[3]
    assert peer.agrees(reached)
    assert not peer.agrees(missed)
    rates = [float(rate) for rate in re.findall(r"\(([\d.]+) img/s\)", lines[2])]
    assert rates == pytest.approx([320, 320 / 3], rel=0.01)


def test_a_profile_shows_both_sides_operators_and_the_engine_s_share() -> None:
    x = torch.randn(256, 256)
    seen = [peer_profile.profile(call, None) for call in (lambda: x @ x, lambda: (x @ x).relu())]
    assert seen[0]["operators"]["aten::mm"] > 0
    assert "aten::relu" not in seen[0]["operators"]
    assert seen[1]["operators"]["aten::mm"] > 0
    one = outcome(5, 20, None)._replace(profiles=seen)
    lines = peer.profile_lines(one)
    assert any(line.startswith("| aten::mm | ") for line in lines)
    assert lines[-1].startswith("| all | ")
    assert float(lines[-1].split("|")[2]) == pytest.approx(sum(seen[0]["operators"].values()), abs=0.06)
    engine = peer_profile.profile(lambda: time.sleep(0.004), lambda: time.sleep(0.002))
    assert 0.3 < (engine["engine"] or 0) < 0.7
    (_, line) = peer.profile_lines(one._replace(profiles=[engine | {"engine": 0.5}, seen[1]], items=(10, 10)))
    assert re.search(r"takes 0\.25 of our 0\.(49|50) ms an image", line)
    assert line.endswith("the ratio would be 8.0x")
    assert peer.profile_lines(outcome(5, 20, None)) == []


def test_results_differ_by_their_largest_number_or_their_digest() -> None:
    assert peer.difference([0.5, 200.0], [1.0, 201.0]) == pytest.approx(0.5)
    assert peer.difference([100.0], [200.0]) == 0.5
    assert peer.difference("ab", "ab") == 0
    assert peer.difference("ab", "ac") == math.inf
    assert peer.difference([1.0], [1.0, 2.0]) == math.inf
    assert peer.difference("", []) is None


def test_detections_differ_by_count_score_and_place_but_not_by_order() -> None:
    theirs = [[3.0, 0.9, 0, 0, 10, 10], [3.0, 0.9, 50, 50, 60, 60], [5.0, 0.4, 0, 0, 10, 10], [1.0, 0.2, 5, 5, 5, 5]]
    assert peer.difference(theirs[::-1], theirs) == 0
    lower = [[label, score - 0.05, *box] for label, score, *box in theirs]
    assert peer.difference(lower, theirs) == pytest.approx(0.05)
    moved = [
        [label, score, left, top, right, bottom + 10 * (label == 5)]
        for label, score, left, top, right, bottom in theirs
    ]
    assert peer.difference(moved, theirs) == pytest.approx(0.5 / 4)
    other_class = [[7.0 if label == 5 else label, *rest] for label, *rest in theirs]
    assert peer.difference(other_class, theirs) == pytest.approx(0.4)
    assert peer.difference(theirs * 2, theirs) == 1


def test_a_process_for_each_side_does_its_turns_and_ends() -> None:
    pytest.importorskip("pycocotools")
    sides = [peer.Side("coco", side, {"images": 3}, 1) for side in ("ours", "theirs")]
    try:
        for side in sides:
            side.start()
            assert side.turn() > 0
        assert peer.difference(sides[0].check, sides[1].check) == pytest.approx(0, abs=1e-12)
    finally:
        for side in sides:
            side.stop()
    assert all(side.process.returncode == 0 for side in sides)


@pytest.mark.slow
@pytest.mark.parametrize("row", [name for name, row in peer.ROWS.items() if row.module != "peer_scoring" and row.prime]
                         + ["step_large", "step_small", "step_ssdlite", "step_ssdlite_real"])  # fmt: skip
def test_both_sides_of_a_row_give_the_same(row: str) -> None:
    works = importlib.import_module(f"tasks.deploy.{peer.ROWS[row].module}").WORKS
    before = torch.get_num_threads()
    try:
        asked = {"row": row, "batch": 2, "engine": "torch", "precision": "f32", "threads": 1, "roots": {"bccd": None}}
        ours, theirs = (works[row](asked, side) for side in (True, False))
        ours.call()
    finally:
        torch.set_num_threads(before)
    apart = peer.difference(ours.check, theirs.check)
    assert apart is None if row.startswith("predict") else apart <= peer.ROWS[row].tolerance


def test_the_photo_of_predict_is_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = torch.get_num_threads()
    try:
        work = peer_images.predict_loop(
            {"row": "predict_files", "engine": "torch", "precision": "f32", "threads": 1}, ours=True
        )
        work.call()
        (folder,) = tmp_path.iterdir()
        assert folder.is_dir()
        del work
        gc.collect()
        assert not list(tmp_path.iterdir())
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_the_loader_works_on_behind_the_last_timed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.deploy import peer_training

    asked = {"row": "input_bccd", "roots": {"bccd": None}, "batch": 2, "threads": 1}
    for name in ("STEPS", "BEFORE"):
        monkeypatch.setattr(peer_training, name, 1)
    made: list[Any] = []
    real = peer_training.training_loader
    monkeypatch.setattr(peer_training, "training_loader", lambda *words: made.append(words) or real(*words))
    work = peer_training.fed(asked, ours=True)
    assert work.call() > 0
    assert [words[5] for words in made] == [None, None]  # of a stream that ends, the last steps would run alone


def test_a_side_that_cannot_run_says_why() -> None:
    side = peer.Side("input_bccd", "ours", {"images": 1, "roots": {"bccd": "/nowhere"}, "batch": 1}, 1)
    try:
        with pytest.raises(ValueError, match="/nowhere"):
            side.start()
    finally:
        side.stop()


def test_orderings_follow_the_print() -> None:
    table = read_ledger(ROOT / "conf" / "ledger")["3"]
    rows = {row.name: row for row in printed.rows_of(table)}
    large, v2 = rows["V3-Large 1.0"], rows["V2 1.0"]  # 51 and 64 ms on Pixel 1
    (pair, *_) = printed.judged(large, v2, table.devices, ours=0.8, different=True)
    assert (pair.slower, pair.faster, pair.device, pair.verdict) == ("V2 1.0", "V3-Large 1.0", "Pixel 1", "holds")
    assert pair.printed == pytest.approx(64 / 51)
    assert pair.ours == pytest.approx(1.25)
    assert printed.judged(large, v2, table.devices, 1.2, True)[0].verdict == "reversed"
    assert printed.judged(v2, large, table.devices, 1.2, True)[0].verdict == "holds"
    assert printed.judged(large, v2, table.devices, 1.2, False)[0].verdict == "not told apart"
    assert printed.judged(large, large, table.devices, 1.0, False) == []


def test_layers_add_up_to_the_network() -> None:
    from tasks.reporting.costs import count

    model = build("classify", ["backbone=small", "data=imagenet", "head.num_classes=10", "image_size=[64,64]"])
    layers = roofline.measure_layers(model, torch.rand(1, 3, 64, 64), 1)
    assert sum(layer.flops for layer in layers) == 2 * count(model, (64, 64)).madds
    kinds = roofline.by_kind(layers)
    assert {"depthwise 3x3", "convolution 1x1", "BatchNorm2d"} <= {layer.kind for layer in kinds}
    stem = next(layer for layer in layers if layer.kind == "convolution 3x3")
    assert stem.moved == 4 * (3 * 64 * 64 + 16 * 32 * 32 + 16 * 27)
    peak = roofline.Peak(1e9, 1e9)
    assert stem.share(peak) == pytest.approx(1000 * max(stem.flops, stem.moved) / 1e9 / stem.ms)
    assert not model.training


def test_peak_memory_is_the_fresh_process_own() -> None:
    """A parent far larger than its child must not show in the child's peak."""
    ballast = np.ones(400 * 2**20, np.uint8)
    code = "from tasks.deploy.fresh import resident_peak; import json; print(json.dumps(resident_peak()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert 5 < json.loads(done.stdout) < len(ballast) / 2**20
