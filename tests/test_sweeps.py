"""Ablations and the reduced-scale reproduction: sweeps that an experiment starts, and what their runs build."""

from __future__ import annotations

import json
import re
import shlex
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from fixtures import ROOT, Command

from tasks import build
from tasks.cli import command_lines, compose
from tasks.reporting.ledger import read_ledger
from tasks.reporting.ledger_counts import count_as
from tasks.reporting.ledger_runs import architecture
from tasks.training.build import complete, plain

FOLDER = ROOT / "conf" / "experiment"
ABLATIONS = sorted(path.stem for path in (FOLDER / "ablation").glob("*.yaml"))
TABLES = read_ledger(ROOT / "conf" / "ledger")
MINI = {"classify": "cifar10", "detect": "bccd", "segment": "camvid"}
CLASSES = {"classify": 10, "detect": 3, "segment": 11}


def header(name: str) -> list[str]:
    """The commands in an experiment's first lines."""
    lines = (FOLDER / f"{name}.yaml").read_text().split("\nhydra:")[0].splitlines()
    return [line.lstrip("# ") for line in lines if line.startswith("#   python -m tasks.") and "experiment=" in line]


def runs_of(command: str, words: list[str]) -> list[list[str]]:
    """The overrides of every run of a sweep, by our variants and Hydra's grid."""
    runs = []
    for line in command_lines(command, words):
        typed = [word for word in line if not word.startswith("-")]
        with hydra.initialize_config_dir(version_base=None, config_dir=str(ROOT / "conf")):
            config = hydra.compose(command, typed, return_hydra_config=True)
        grid = {
            key: values
            for key, values in (config.hydra.sweeper.params or {}).items()
            if key not in {word.partition("=")[0] for word in typed}
        }
        choices = [[f"{key}={value}" for value in split(str(values))] for key, values in grid.items()]
        runs += [[*typed, *choice] for choice in product(*choices)]
    return runs


def split(values: str) -> list[str]:
    """``a,b`` and ``[1,2],[3,4]``."""
    return re.split(r",(?![^\[]*\])", values)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_run_of_an_ablation_builds_another_network(name: str) -> None:
    first = header(f"ablation/{name}")[0]
    words = shlex.split(first)
    command, overrides = words[2].removeprefix("tasks."), words[3:]
    assert overrides == [f"experiment=ablation/{name}", "-m"], "it runs without further arguments"
    runs = runs_of(command, overrides)
    assert len(runs) >= 2
    seen = set()
    for run in runs:
        config = complete(plain(compose(command, [*run, "head.num_classes=5"])))[0]
        seen.add(json.dumps([architecture(config, command), config["image_size"]], sort_keys=True))
        with torch.device("meta"):
            build(command, [*run, "head.num_classes=5"])
    assert len(seen) == len(runs)


def networks(command: str, name: str, *more: str) -> list[dict[str, Any]]:
    runs = runs_of(command, [f"experiment=ablation/{name}"])
    return [architecture(complete(plain(compose(command, [*run, *more])))[0], command) for run in runs]


@pytest.mark.parametrize(
    ("command", "name", "table", "rows"),
    [
        ("classify", "hswish", "5", ["V3-Large 1.0", "ReLU", "h-swish@16", "h-swish@112"]),
        ("classify", "multiplier", "9", [f"large 224/{width}" for width in ("1.25", "1.0", "0.75", "0.5", "0.35")]),
        ("detect", "detection_tail", "6", ["V3", "V3-dagger", "V3-Small", "V3-Small-dagger"]),
        (
            "segment", "segmentation_head", "7",
            ["5 V3 R-ASPP 256", "6 V3 RF2 R-ASPP 256", "7 V3 RF2 LR-ASPP 256", "8 V3 RF2 LR-ASPP 128"],
        ),
        ("segment", "segmentation_head", "8", ["V3 OS16", "V3 OS32"]),
    ],
)  # fmt: skip
def test_an_ablation_trains_the_ledger_s_rows(command: str, name: str, table: str, rows: list[str]) -> None:
    ours = networks(command, name, "head.num_classes=5")
    for wanted in rows:
        (row,) = [one for one in TABLES[table].rows if one.name == wanted]
        assert row.network is not None
        theirs = complete(plain(compose(command, [*row.network.overrides, "head.num_classes=5"])))[0]
        assert architecture(theirs, command) in ours, wanted


def test_a_claimed_saving_is_the_one_counted_by_hand() -> None:
    """Section 5 prints 30 million multiply-adds for the last stage and 10 million for the first layer."""
    pixels, last = 112 * 112, 7 * 7
    exact = {  # params, multiply-adds
        "the last stage's redesign": (  # depthwise, 960 to 320 to 1280 on the map; not 960 to 1280 after pooling
            9 * 960 + 960 * 320 + 320 * 1280 + 2 * (960 + 320 + 1280) - (960 + 1) * 1280,
            last * (9 * 960 + 960 * 320 + 320 * 1280) - 960 * 1280,
        ),
        "16 filters": (  # of the first layer, of the depthwise after it, and into its projection
            16 * 27 + 16 * 9 + 16 * 16 + 2 * (16 + 16),
            pixels * (16 * 27 + 16 * 9 + 16 * 16),
        ),
        "hard sigmoid": (0, 0),
    }
    rows = {start: row for start in exact for row in TABLES["text"].rows if row.name.startswith(start)}
    for start, row in rows.items():
        assert row.network is not None
        assert row.less is not None
        madds, params = (a - b for a, b in zip(count_as(row.network), count_as(row.less), strict=True))
        assert (params, madds) == exact[start]
    assert len(rows) == 3


def test_one_counting_meets_all_mnasnet_rows_and_others_do_not() -> None:
    """What the ledger says of Table 6's MnasNet, counted from the modules themselves."""
    folded, head_norms = {}, {}
    for row in TABLES["6"].rows:
        if row.name.startswith("MnasNet") and row.network:
            net = build(row.network.command, row.network.overrides)
            norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            in_backbone = [m for m in net.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            total = sum(p.numel() for p in net.parameters())
            gates = sum(
                p.numel() for name, p in net.named_parameters() if "squeeze_excite" in name and name.endswith("bias")
            )
            assert gates
            printed = row.figures["params"].printed
            ours = total - sum(len(norm.weight) for norm in norms) - gates
            assert count_as(row.network._replace(folded=True))[1] == ours
            folded[row.name] = f"{ours / 1e6:.2f}", printed
            head_norms[row.name] = round((total - 2 * sum(len(m.weight) for m in in_backbone)) / 1e6, 2), printed
    assert folded == {"MnasNet": ("4.88", "4.88"), "MnasNet 0.35": ("1.02", "1.02"), "MnasNet 0.5": ("1.68", "1.68")}
    assert head_norms == {"MnasNet": (4.88, "4.88"), "MnasNet 0.35": (1.02, "1.02"), "MnasNet 0.5": (1.67, "1.68")}


def test_variants_become_command_lines() -> None:
    words = ["experiment=ablation/last_stage", "-m", "data=cifar10", "seed=0,1"]
    head = ["-m", "experiment=ablation/last_stage", "data=cifar10", "seed=0,1"]
    assert command_lines("classify", words) == [
        [*head, "backbone.last_stage=efficient"], [*head, "backbone.last_stage=original", "head=linear"],
    ]  # fmt: skip
    for plain_words in (
        ["backbone=small", "seed=0,1", "-m"],
        ["experiment=paper/imagenet_large"],
        ["experiment=nonsense"],
    ):
        assert len(command_lines("classify", plain_words)) == 1
    assert len(command_lines("classify", ["experiment=ablation/hswish", "--cfg", "job"])) == 1


def test_what_is_typed_chooses_among_variants() -> None:
    chosen = command_lines("classify", ["experiment=reproduce/mini", "backbone=small,mobilenetv2"])
    assert [line[1:] for line in chosen] == [["backbone=mobilenetv2", "head=linear"], ["backbone=small", "head=pooled"]]
    with pytest.raises(
        ValueError, match=r"no variant that fits what was typed; there are backbone=mobilenetv1 head=linear"
    ):
        command_lines("classify", ["experiment=reproduce/mini", "backbone=smal"])


def test_a_recipe_and_an_ablation_go_together() -> None:
    config = plain(compose("classify", ["experiment=[paper/imagenet_large,ablation/hswish]"]))
    assert config["optimizer"]["lr"] == 0.1
    assert config["data"]["name"] == "imagenet"
    assert len(command_lines("classify", ["experiment=[paper/imagenet_large,ablation/hswish]"])) == 5


@pytest.mark.parametrize("command", list(MINI))
def test_mini_is_one_recipe_and_one_budget(command: str) -> None:
    runs = runs_of(command, ["experiment=reproduce/mini", f"data={MINI[command]}"])
    assert len(runs) == 12
    configs = [plain(compose(command, run)) for run in runs]
    names = {"mobilenetv1", "mobilenetv2", "mnasnet_a1", "large", "small", "large_minimalistic"}
    assert {(config["backbone"]["name"], config["seed"]) for config in configs} == set(product(names, (0, 1)))
    shared = [
        {key: value for key, value in config.items() if key not in ("backbone", "head", "heads", "seed")}
        for config in configs
    ]
    assert all(one == shared[0] for one in shared)
    trainer = shared[0]["trainer"]
    assert trainer["max_steps"] > 0
    assert trainer["max_time"] is None
    assert trainer["max_epochs"] is None
    assert shared[0]["skip_done"] is True
    common = [
        {k: v for k, v in config["head"].items() if k in ("dropout", "label_smoothing", "loss")} for config in configs
    ]
    assert all(one == common[0] for one in common)
    assert f"python -m tasks.{command} experiment=reproduce/mini data={MINI[command]} data.root=" in "\n".join(
        header("reproduce/mini")
    )


@pytest.mark.parametrize(
    ("command", "table", "rows"),
    [
        ("classify", "3", {"V3-Large 1.0", "MnasNet-A1", "V2 1.0", "V3-Small 1.0"}),
        ("detect", "6", {"V1", "V2", "MnasNet", "V3", "V3-Small"}),
        ("segment", "7", {"4 V2 RF2 LR-ASPP 128", "8 V3 RF2 LR-ASPP 128", "11 V3-Small RF2 LR-ASPP 128"}),
    ],
)
def test_mini_fills_the_ledger_s_rows(command: str, table: str, rows: set[str]) -> None:
    classes = f"head.num_classes={CLASSES[command]}"
    runs = runs_of(command, ["experiment=reproduce/mini", f"data={MINI[command]}", "seed=0"])
    ours = [architecture(complete(plain(compose(command, [*run, classes])))[0], command) for run in runs]
    filled = set()
    for row in TABLES[table].rows:
        if row.network and row.alone:
            theirs = complete(plain(compose(command, [*row.network.overrides, classes])))[0]
            if architecture(theirs, command) in ours:
                filled.add(row.name)
    assert filled == rows


@pytest.mark.slow
def test_an_ablation_runs_without_further_arguments(command: Command, tmp_path: Path) -> None:
    """But for those that keep it short."""
    short = [
        "trainer.max_steps=1",
        "image_size=[64,64]",
        "batch_size=2",
        "workers=0",
        f"data.root={tmp_path}",
        "data.train=4",
        "data.val=2",
        "data.test=2",
    ]
    done = command("classify", "experiment=ablation/last_stage", "-m", *short)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(one["backbone"], one["head"]) for one in records] == [
        ("large", "pooled"),
        ("large last_stage=original", "linear"),
    ]
    assert "_variants" not in records[0]["config"]
    again = shlex.split(records[1]["command"])[3:]
    assert len(command_lines("classify", again)) == 1, "the record's command repeats one run, not the sweep"
    assert "failed" not in done.stderr
