"""Costs against the numbers that torchvision publishes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tasks.reporting.costs import Costs, count, count_parts


class Head(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, features: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        return self.norm(self.layer(features["c"]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3, stride=2, padding=1), "norm": nn.BatchNorm2d(8)})
        self.backbone.forward = lambda image: {"c": self.backbone["norm"](self.backbone["stem"](image))}
        self.heads = nn.ModuleDict({"detect": Head(8, 4), "classify": Head(8, 2)})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.backbone(image)
        return {task: head(features, image.shape[-2:]) for task, head in self.heads.items()}


@pytest.mark.parametrize(
    ("name", "size", "params", "gmadds"),
    [
        ("mobilenet_v3_large", 224, 5_483_032, 0.217),
        ("mobilenet_v3_small", 224, 2_542_856, 0.057),
        ("ssdlite320_mobilenet_v3_large", 320, 3_440_060, 0.583),
        ("lraspp_mobilenet_v3_large", 520, 3_221_538, 2.086),
    ],
)
def test_torchvision_s_published_numbers(name: str, size: int, params: int, gmadds: float) -> None:
    more = {} if size == 224 else {"weights_backbone": None}
    model = torchvision.models.get_model(name, weights=None, **more)
    costs = count(model, (size, size))
    assert costs.params == params
    assert round(costs.madds / 1e9, 3) == gmadds
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert costs.params_without_bn == params - norms


def test_parts_by_hand() -> None:
    costs = count_parts(Net(), (31, 32))
    pixels = 16 * 16
    assert costs == {
        "backbone": Costs(8 * 27 + 8 + 16, 8 * 27 + 8, pixels * 8 * 27),
        "heads.detect": Costs(32 + 8, 32, pixels * 32),
        "heads.classify": Costs(16 + 4, 16, pixels * 16),
        "total": Costs(300, 272, pixels * (8 * 27 + 32 + 16)),
    }
    assert count(Net(), (31, 32)) == costs["total"]


def test_shared_weights_count_once_and_their_work_each_time() -> None:
    layer = nn.Conv2d(3, 3, 1, bias=False)
    assert count(nn.Sequential(layer, layer), (4, 4)) == Costs(9, 9, 2 * 9 * 16)


def test_the_model_is_left_as_it_was() -> None:
    model = Net().train()
    model.heads["detect"].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    count_parts(model, (32, 32))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(torch.rand(2, 3, 32, 32))["detect"].sum().backward()


def test_a_model_that_fails_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(7, 7)).train()
    with pytest.raises(RuntimeError):
        count(model, (32, 32))
    assert all(m.training for m in model.modules())


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(0, 32\)"):
        count(Net(), (0, 32))
