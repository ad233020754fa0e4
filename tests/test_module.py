"""The training module: what is frozen until when, and the rates of its parts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tasks import build
from tasks.cli import compose
from tasks.data.loader import Batch
from tasks.training.balance import Balance
from tasks.training.model import Model
from tasks.training.module import TaskModule, frozen_until, parameter_groups
from tasks.training.schedule import Budget, Growth, Schedule


@pytest.fixture(scope="module")
def net() -> Model:
    return build("multitask", [f"heads.{task}.num_classes=2" for task in ("classify", "detect", "segment")])


def module(net: Model, **changes: Any) -> TaskModule:
    balance = Balance(tuple(net.heads), "fixed", {})
    arguments: dict[str, Any] = {"ema": 0.0, "ema_cap": 0.0, "bn_momentum": None, "backbone_lr": 1.0, "freeze": {}}
    arguments |= changes
    return TaskModule(net, torch.optim.SGD, Schedule(), Growth(), Budget(100, None), balance, 8, 2, 0, **arguments)


def test_a_nested_prefix_is_that_with_dots(net: Model) -> None:
    flat = frozen_until(net, {"heads.detect": 1, "backbone.blocks.0": 0.5})
    assert flat == frozen_until(net, {"heads": {"detect": 1}, "backbone": {"blocks": {0: 0.5}}})
    assert {tuple(name.split(".")[:2]) for name in flat} == {("heads", "detect"), ("backbone", "blocks")}
    typed = compose("detect", ["+freeze.heads.detect=1", "+freeze.backbone.blocks.0=0.5"])
    assert flat == frozen_until(net, cast(dict[str, Any], OmegaConf.to_container(typed["freeze"])))
    with pytest.raises(ValueError, match=r"freeze\.heads\.detct fits no parameter"):
        frozen_until(net, {"heads": {"detct": 1}})
    with pytest.raises(ValueError, match=r"freeze\.heads\.detect is 2; expected a share"):
        frozen_until(net, {"heads": {"detect": 2}})


def test_the_longest_prefix_decides(net: Model) -> None:
    for freeze in ({"backbone": 1, "backbone.last": 0.25}, {"backbone.last": 0.25, "backbone": 1}):
        until = frozen_until(net, freeze)
        assert until.keys() == {name for name, _ in net.named_parameters() if name.startswith("backbone.")}
        assert {until[name] for name in until if name.startswith("backbone.last.")} == {0.25}
        assert all(until[name] > 1 for name in until if not name.startswith("backbone.last."))  # to the very end


def test_one_image_is_too_few_for_a_pooled_batch_norm() -> None:
    single = module(build("segment", ["head=deeplabv3", "head.num_classes=2", "image_size=[64,64]"]).train())
    image, mask = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 64, 64, dtype=torch.uint8)
    batch = Batch(image, {"segment": mask}, {}, {}, [], [], [])
    with pytest.raises(ValueError, match=r"batch_size is 1, but a batch norm .* set batch_size=2 or more"):
        single.training_step(batch, 0)


def test_rising_shares_thaw_in_stages(net: Model) -> None:
    staged = module(net, freeze={"backbone.last": 0.2, "backbone.stem": 0.6})
    seen = {}
    for progress in (0.0, 0.2, 0.6):
        staged._prepare(progress, expected_steps=100.0)
        seen[progress] = [net.get_parameter(f"backbone.{part}.conv.weight").requires_grad for part in ("last", "stem")]
        assert seen[progress] == [net.get_submodule(f"backbone.{part}.norm").training for part in ("last", "stem")]
    assert seen == {0.0: [False, False], 0.2: [True, False], 0.6: [True, True]}
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_backbone_has_its_own_rate(net: Model) -> None:
    groups = parameter_groups(module(net), 0.1)
    factor = {id(parameter): group["factor"] for group in groups for parameter in group["params"]}
    for name, parameter in net.named_parameters():
        assert factor[id(parameter)] == (0.1 if name.startswith("backbone.") else 1.0), name
    norms = {id(p) for part in net.modules() if isinstance(part, nn.BatchNorm2d) for p in part.parameters()}
    plain = {id(p) for group in groups if group.get("weight_decay") == 0 for p in group["params"]}
    assert norms < plain
