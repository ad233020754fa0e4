"""Every yaml composes, says all its arguments, and builds; every backbone works under every head."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import ROOT, Command, write_voc
from hydra.utils import get_method
from omegaconf import OmegaConf

from tasks import build
from tasks.cli import compose
from tasks.data import DataSet
from tasks.reporting.closing import next_commands
from tasks.training.build import complete, plain
from tasks.training.model import Model
from tasks.training.record import describe_budget
from tasks.training.setup import check, make_balance

CONF = ROOT / "conf"
GROUPS = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in CONF.iterdir() if path.is_dir()}
GROUPS["backbone"] += sorted(f"timm/{file.stem}" for file in (CONF / "backbone" / "timm").glob("*.yaml"))
COMMANDS = ("classify", "detect", "segment")
OPTIONAL = {"timm": "timm"}


def head_of(name: str) -> str:
    """The task of a head, read off its class."""
    target = OmegaConf.load(CONF / "head" / f"{name}.yaml").get("_target_") or "heads.lraspp.LRASPP"
    return get_method(target).task


@pytest.mark.parametrize("name", [*COMMANDS, "multitask"])
def test_commands_compose(name: str) -> None:
    config = plain(compose(name))
    assert config["task"] == name
    assert set(config["heads"]) == set(config["tasks"])


@pytest.mark.parametrize("choice", [f"{group}/{name}" for group in ("backbone", "optimizer") for name in GROUPS[group]])
def test_choices_for_all_commands_compose(choice: str) -> None:
    group, name = choice.split("/", 1)
    for command in COMMANDS:
        assert plain(compose(command, [f"{group}={name}"]))[group]["_target_"]


def test_dicts_that_are_empty_by_default_can_be_set() -> None:
    words = ["freeze={backbone: 0.2}", "data=combined", "data.repeats={clothing: 2}", "balance.weights={classify: 0.3}"]
    config = plain(compose("multitask", words))
    assert config["freeze"] == {"backbone": 0.2}
    assert config["balance"]["weights"] == {"classify": 0.3}
    assert config["data"]["repeats"] == {"clothing": 2}


def test_a_recipe_s_weight_of_a_task_taken_out_does_not_count() -> None:
    config = plain(compose("multitask", ["~heads.classify", "tasks=[detect,segment]"]))
    assert "classify" in config["balance"]["weights"]
    left = {task: weight for task, weight in config["balance"]["weights"].items() if task != "classify"}
    assert make_balance(config).weights == left
    config["balance"]["weights"] = {"clasify": 0.3}
    with pytest.raises(ValueError, match="clasify"):
        make_balance(config)


@pytest.mark.parametrize("name", GROUPS["data"])
def test_data_sets_compose_with_their_recipes(name: str) -> None:
    for command in COMMANDS:
        assert plain(compose(command, [f"data={name}"]))["data"]["name"] == name


@pytest.mark.parametrize(
    "choice", [f"{g}/{n}" for g in ("backbone", "head", "data", "augment", "optimizer") for n in GROUPS[g]]
)
def test_a_yaml_gives_every_argument_and_no_other(choice: str) -> None:
    group, name = choice.split("/", 1)
    command = head_of(name) if group == "head" else "detect"
    node = plain(compose(command, [f"{group}={name}"]))[group]
    parameters = inspect.signature(get_method(node["_target_"])).parameters
    given = {key for key in node if not key.startswith("_")} - {
        "name",
        "head_width",
        "head_activation",
        "smallest_object",
    }
    assert given <= parameters.keys() | {"name"}
    supplied = {"specs", "size", "params", "self"}  # by the runner
    needed = {key for key, parameter in parameters.items() if key not in supplied}
    if group != "optimizer":  # torch's have switches that are for nobody
        assert needed - given - {"name"} <= {"variant"}


@cache
def model(task: str, backbone: str, head: str) -> Model:
    if backbone.partition("/")[0] in OPTIONAL:
        pytest.importorskip(OPTIONAL[backbone.partition("/")[0]])
    choices = [f"backbone={backbone}", f"head={head}", "head.num_classes=4", "image_size=[64,96]"]
    return build(task, choices)


def target_of(task: str, size: tuple[int, int]) -> Any:
    if task == "classify":
        return torch.tensor([0, 3])
    if task == "detect":
        boxes = torch.tensor([[[4.0, 4, 40, 40], [30, 10, 90, 60]], [[0, 0, 1, 1], [0, 0, 1, 1]]])
        return {"boxes": boxes, "labels": torch.tensor([[1, 0], [-1, -1]])}
    mask = torch.randint(0, 4, (2, *size), generator=torch.Generator().manual_seed(0))
    mask[0, :8] = 255
    return mask


@pytest.mark.parametrize("backbone", GROUPS["backbone"])
@pytest.mark.parametrize("head", GROUPS["head"])
def test_every_backbone_trains_and_predicts_under_every_head(backbone: str, head: str) -> None:
    task = head_of(head)
    net = model(task, backbone, head).train()
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    losses = net.losses(net(image), {task: target_of(task, (64, 96))})[task]
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert torch.isfinite(total)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    net.eval()
    with torch.inference_mode():
        predicted = net.head(task).predict(net(image)[task], [(64, 96), (50, 70)])
    assert len(predicted) == 2


@pytest.mark.parametrize("backbone", GROUPS["backbone"])
def test_features_are_as_specified(backbone: str) -> None:
    net = model("classify", backbone, "linear").eval()
    image = torch.rand(1, 3, 65, 97)
    with torch.inference_mode():
        features = net.backbone(image)
    specs = net.backbone.specs
    assert features.keys() == specs.keys()
    for name, feature in features.items():
        ceil = [-(-side // specs[name].stride) for side in (65, 97)]
        assert list(feature.shape) == [1, specs[name].channels, *ceil], name


PLUGIN_HEAD = '''
from heads.linear import Linear

class Cautious(Linear):
    """Linear, with its logits halved."""
    def forward(self, features, size):
        return super().forward(features, size) / 2
'''
PLUGIN_DATA = """
from tasks.data import DataSet
from tasks.data.voc import read as read_voc

def read(root, tasks, seed):
    data = read_voc(root, "train", "val", "test", None, True, "fail", ["detect"], seed)
    for split in data.splits.values():
        for sample in split:
            sample.targets["classify"] = int(sample.targets["detect"].labels[0])
    data.classes = {"classify": data.classes["detect"]}
    return data
"""


@pytest.mark.parametrize("name", GROUPS["recipe"])
def test_a_recipe_belongs_to_a_command_and_a_data_set_and_changes_something(name: str) -> None:
    command, data = name.split("_", 1)
    without = {"classify": "folder", "detect": "voc", "segment": "masks", "multitask": "combined"}[command]
    given, usual = (plain(compose(command, [f"data={choice}"])) for choice in (data, without))
    assert {**given, "data": None} != {**usual, "data": None}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "recipe" / "augment").glob("*.yaml")))
def test_a_recipe_changes_only_the_augmentation_it_is_for(name: str) -> None:
    augment, data = name.split("_", 1)
    commands = {"detection": "detect", "classification": "classify", "segmentation": "segment", "joint": "multitask"}
    command = commands[augment]
    own = OmegaConf.load(CONF / "augment" / f"{augment}.yaml")
    changed = OmegaConf.load(CONF / "recipe" / "augment" / f"{name}.yaml")
    assert set(changed) <= set(own)
    config = plain(compose(command, [f"data={data}"]))
    assert all(config["augment"][key] == value for key, value in changed.items())
    assert plain(compose(command, [f"data={data}", "augment=none"]))["augment"].keys() == {"_target_", "_partial_"}


def test_a_head_and_a_data_set_are_added_by_one_file_and_one_yaml_each(command: Command, tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc")
    (tmp_path / "cautious.py").write_text(PLUGIN_HEAD)
    (tmp_path / "shapes_reader.py").write_text(PLUGIN_DATA)
    for group in ("head", "data"):
        (tmp_path / "conf" / group).mkdir(parents=True)
    linear = (CONF / "head" / "linear.yaml").read_text()
    (tmp_path / "conf/head/cautious.yaml").write_text(
        linear.replace("name: linear", "name: cautious").replace("heads.linear.Linear", "cautious.Cautious")
    )
    (tmp_path / "conf/data/shapes.yaml").write_text(
        "name: shapes\n_target_: shapes_reader.read\nroot: null\ntasks: ${tasks}\nseed: ${data_seed}\n"
    )
    done = command(
        "classify", "--config-dir", str(tmp_path / "conf"), "head=cautious", "data=shapes", f"data.root={root}",
        "image_size=[32,32]", "batch_size=4", "trainer.max_steps=2", "workers=0",
    )  # fmt: skip
    assert "small + cautious on shapes" in done.stdout


SETTINGS = [
    f"{path.stem.partition('_')[0]} data={path.stem.partition('_')[2]}" for path in (CONF / "recipe").glob("*.yaml")
]
SETTINGS += [
    f"{command} experiment={path.relative_to(CONF / 'experiment').with_suffix('')}"
    for path in (CONF / "experiment").rglob("*.yaml")
    for command in COMMANDS
    if f"tasks.{command} experiment=" in path.read_text()
]


def tried(command: str, words: list[str]) -> Model | str:
    """The network, or why there is none."""
    try:
        with torch.device("meta"):
            return build(command, words)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("setting", sorted(setting for setting in SETTINGS if not setting.startswith("multitask")))
def test_any_head_under_any_recipe_is_built_or_refused_with_the_fix(setting: str) -> None:
    """Recipes and experiments write settings into whatever head was chosen."""
    command, choice = setting.split()
    for head in GROUPS["head"]:
        words = [choice, f"head={head}", f"head.num_classes={11 if 'camvid' in choice else 3}"]
        if compose(command, [choice]).backbone.get("weights"):
            words.append("backbone.weights=null")
        net = tried(command, words)
        if head_of(head) != command:
            assert isinstance(net, str)
            assert f"is a head for {head_of(head)}, not for {command}" in net
        elif isinstance(net, str):
            leave_out = re.findall(r"~head\.\w+", net)
            assert leave_out, net
            assert isinstance(tried(command, [*words, *leave_out]), Model)


def test_another_augmentation_under_an_experiment_is_refused_with_the_fix(command: Command, voc: Path) -> None:
    words = ["data=voc", f"data.root={voc}", "augment=none", "+augment.scale=[0.5,1]"]
    done = command("detect", *words, check=False)
    assert done.returncode == 1
    assert "has no scale" in done.stderr
    assert done.stderr.strip().endswith("~augment.scale")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["segment", "head.class_weights=2"], "correct head.<key>"),
        (["classify", "head.label_smoothing=2"], "label_smoothing is 2; expected a share"),
        (["classify", "backbone.width=wide"], "backbones"),
    ],
)
def test_values_of_the_wrong_kind_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(words[0], [*words[1:], "head.num_classes=3"])


@pytest.mark.parametrize(
    ("task", "setting", "message"),
    [
        ("detect", "head.detections=-3", "head.detections is -3"),
        ("detect", "head.candidates=0", "head.candidates is 0"),
        ("detect", "head.features=[]", "head.features is empty"),
        ("detect", "head.nms_iou=7", "head.nms_iou is 7"),
        ("detect", "head.nms_iou=true", "head.nms_iou is True"),
        ("detect", "head.max_scale=95", "head.max_scale 95"),
        ("detect", "head.negatives=-1", "head.negatives is -1"),
        ("detect", "head.box_weight=nan", "head.box_weight is nan"),
        ("segment", "head.pool=[0,0]", "head.pool is [0, 0]"),
        ("segment", "head.channels=0", "head.channels is 0"),
        ("segment", "head.class_weights=[0,0,0]", "not all 0"),
        ("segment", "head.num_classes=256", "head.num_classes is 256"),
        ("classify", "head.hidden=0", "head.hidden is 0"),
        ("classify", "head.dropout=1.5", "head.dropout is 1.5"),
        ("classify", "head.num_classes=-2", "head.num_classes is -2"),
        ("classify", "head.num_classes=2.5", "head.num_classes is 2.5"),
        ("classify", "image_size=[0,5]", "image_size is [0, 5]"),
    ],
)
def test_a_setting_out_of_its_range_is_named(task: str, setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(task, ["head.num_classes=3", setting])


def test_a_joint_models_key_is_named_as_it_is_typed() -> None:
    words = [f"heads.{task}.num_classes=3" for task in ("classify", "detect", "segment")]
    with pytest.raises(ValueError, match=r"heads\.detect\.nms_iou is 7"):
        build("multitask", [*words, "heads.detect.nms_iou=7"])
    with pytest.raises(ValueError, match=r"heads\.detect\.num_classes is 0"):
        build("multitask", [*words, "heads.detect.num_classes=0"])


def test_dilations_are_checked() -> None:
    with pytest.raises(ValueError, match=r"head\.dilations is 0, 1, 2"):
        build("segment", ["head=deeplabv3", "head.num_classes=3", "head.dilations=[0,1,2]"])


def test_a_single_number_is_a_square() -> None:
    assert build("classify", ["head.num_classes=3", "image_size=64"]).image_size == (64, 64)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("trainer.save_every=null", "trainer.save_every is None"),
        ("trainer.validations=null", "trainer.validations is None"),
        ("trainer.clip_norm=abc", "trainer.clip_norm is abc"),
        ("trainer.threads=-1", "trainer.threads is -1"),
        ("trainer.precision=bf16-true", "trainer.precision is bf16-true; expected one of auto, 32-true"),
        ("cache_gb=null", "cache_gb is None"),
        ("cache_gb=4G", "cache_gb is 4G"),
        ("backbone_lr=-1", "backbone_lr is -1"),
        ("mix.mixup_alpha=a", "mix.mixup_alpha is a"),
        ("schedule.warmup=abc", "schedule.warmup is abc"),
        ("schedule.final=-1", "schedule.final is -1"),
        ("schedule.every=0", "schedule.every is 0"),
        ("+schedule.warmupp=1", "there is no setting schedule.warmupp, did you mean 'warmup'?"),
        ("+trainer.max_epoch=1", "there is no setting trainer.max_epoch, did you mean 'max_epochs'?"),
        ("+balance.wieghts=1", "there is no setting balance.wieghts, did you mean 'weights'?"),
        ("+image_sise=[64,64]", "there is no setting image_sise, did you mean 'image_size'?"),
        ("~trainer.clip_norm", "trainer.clip_norm was taken out"),
        ("~workers", "workers was taken out"),
        ("~heads", "heads was taken out"),
        ("trainer=null", "trainer is None; set trainer.<key>"),
        ("seed=1.5", "seed is 1.5; expected a whole number"),
        ("trainer.max_steps=2.5", "trainer.max_steps is 2.5; expected a whole number"),
        ("growth.start=abc", "growth.start is abc"),
        ("ema.share=5", "ema.share is 5; expected 0 to 1"),
        ("ema=null", "ema is None; set ema.<key>: share, cap"),
        ("bn_momentum=slow", "bn_momentum is slow"),
        ("workers=two", "workers is two"),
        ("backbone.bn_momentum=0.1", "backbone.bn_momentum is 0.1, but bn_momentum=auto overrules it; set"),
        ("head.bn_momentum=0.1", "head.bn_momentum is 0.1"),
        ("results=.", "results=. is a folder"),
        ("output=null", "output is None"),
    ],
)
def test_a_runs_setting_of_the_wrong_kind_is_named(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(plain(compose("detect", [setting])))


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        (["trainer.max_steps=1234568"], "1234568 steps"),
        (["trainer.max_epochs=0.5", "trainer.max_steps=7"], "0.5 epochs or 7 steps"),
        (["trainer.max_time='00:00:10:00'"], "10 min"),
        (["trainer.default_epochs=60"], "60 epochs"),
    ],
)
def test_other_budgets_have_other_names(words: list[str], budget: str) -> None:
    assert describe_budget(plain(compose("classify", words))) == budget


@pytest.mark.parametrize(
    ("words", "seeds", "other"),
    [
        (["backbone=small"], "backbone=small", ["backbone=large"]),
        (
            ["backbone=small_minimalistic", "batch_size=8"],
            "backbone=small_minimalistic",
            ["backbone=small", "batch_size=8"],
        ),
        (["backbone=large", "backbone.last_stage=original"], "backbone=large", ["backbone=small"]),
    ],
)
def test_the_commands_to_try_next_are_of_this_backbone(words: list[str], seeds: str, other: list[str]) -> None:
    config = plain(compose("classify", words))
    again, another = next_commands({"overrides": words, "config": config})
    assert again[0][:2] == ["-m", seeds]
    assert another[0] == other
    for found in (again[0][1:-1], another[0]):
        build("classify", [*found, "head.num_classes=3"])


def test_what_may_stand_for_a_number_is_taken() -> None:
    words = ["trainer.clip_norm=null", "trainer.threads=null", "workers=3", "bn_momentum=null"]
    config = plain(compose("detect", [*words, "head.bn_momentum=0.1", "results='~/r.jsonl'"]))
    check(config)
    assert config["results"] == str(Path.home() / "r.jsonl")


def test_a_data_sets_number_of_classes_is_contradicted_by_the_key_that_was_typed() -> None:
    data = DataSet("voc", dict.fromkeys(("classify", "detect", "segment"), ("a", "b")), {})
    with pytest.raises(ValueError, match=r"heads\.detect\.num_classes is 7, but voc has 2 classes"):
        complete(plain(compose("multitask", ["heads.detect.num_classes=7"])), data)
