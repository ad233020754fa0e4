"""Muon against torch's own Muon and AdamW, and through a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tasks.cli import compose
from tasks.training import checkpoint
from tasks.training.build import plain
from tasks.training.muon import Muon, is_matrix, orthogonal
from tasks.training.setup import make_optimizer

SETTINGS = {"lr": 0.01, "others_lr": 0.5, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 20, 1), nn.Flatten(),
        nn.Linear(20 * 4 * 4, 4),
    )  # fmt: skip


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, first: int = 0) -> None:
    for i in range(first, first + steps):
        image = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        model.zero_grad()
        model(image).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16), (1, 5)])
def test_singular_values_come_close_to_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert ((values > 0.5) & (values < 1.5)).all()
    assert (left.T @ found @ right.T).diagonal().min() > 0.5  # the same directions


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_steps_are_those_of_torchs_muon_and_adamw() -> None:
    ours, theirs = net(), net()
    matrices = [p for p in theirs.parameters() if is_matrix(p, 64)]
    others = [p for p in theirs.parameters() if not is_matrix(p, 64)]
    assert [tuple(p.shape) for p in matrices] == [(8, 3, 3, 3), (20, 8, 1, 1), (4, 320)]
    flat = [nn.Parameter(p.detach().flatten(1)) for p in matrices]
    muon = torch.optim.Muon(flat, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.005, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    optimizer = Muon(list(ours.parameters()), momentum=0.9, largest=64, **SETTINGS)
    for i in range(3):
        first = [p.detach().clone() for p in theirs.parameters()]
        train(ours, [optimizer], 1, i)
        train(theirs, [], 1, i)
        for p, f in zip(matrices, flat, strict=True):
            assert p.grad is not None
            f.grad = p.grad.flatten(1)
        muon.step()
        adamw.step()
        with torch.no_grad():
            for p, f in zip(matrices, flat, strict=True):
                p.copy_(f.view_as(p))
        for found, wanted, before in zip(ours.parameters(), theirs.parameters(), first, strict=True):
            # torch's Muon calculates in bfloat16
            atol = (0.05 if is_matrix(found, 64) else 1e-5) * (wanted - before).abs().max().item()
            torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
        ours.load_state_dict(theirs.state_dict())


def test_a_state_from_a_checkpoint_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    models = [net(), net()]
    optimizers = [Muon(list(m.parameters()), momentum=0.9, largest=64, fused=True, **SETTINGS) for m in models]
    train(models[0], [optimizers[0]], 4)
    train(models[1], [optimizers[1]], 2)
    resumed = net()
    resumed.load_state_dict(models[1].state_dict())
    loaded = Muon(list(resumed.parameters()), momentum=0.5, largest=1, fused=True, **SETTINGS)  # the saved ones count
    checkpoint.save(tmp_path / "last.pt", {"model": {}, "optimizer": optimizers[1].state_dict()})
    loaded.load_state_dict(checkpoint.load(tmp_path / "last.pt")["optimizer"])
    train(resumed, [loaded], 2, 2)
    for wanted, found in zip(models[0].state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(wanted, found)


def test_large_matrices_are_adamws() -> None:
    model = net()
    optimizer = Muon(list(model.parameters()), momentum=0.9, largest=4, **SETTINGS)
    train(model, [optimizer], 1)
    with_momentum = [tuple(p.shape) for p, state in optimizer.state.items() if "momentum_buffer" in state]
    assert with_momentum == [(4, 320)]


@pytest.mark.parametrize("override", ["optimizer.betas=[0.9]", "optimizer.momentum=null", "optimizer.lr=-1"])
def test_what_cannot_be_made_is_named_before_a_run_starts(override: str) -> None:
    with pytest.raises(ValueError, match=r"the optimizer cannot be made .*correct optimizer\.<key>"):
        make_optimizer(plain(compose("classify", ["optimizer=muon", override])))


@pytest.mark.parametrize(("key", "value"), [("momentum", 1.5), ("momentum", -0.1), ("others_lr", 0.0), ("largest", 0)])
def test_numbers_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{key} is {value}; expected"):
        Muon(list(net().parameters()), **({"momentum": 0.9, "largest": 64, **SETTINGS} | {key: value}))


def test_a_copy_goes_on() -> None:
    model = net()
    model.optimizer = Muon(list(model.parameters()), momentum=0.9, largest=64, **SETTINGS)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        train(each, [each.optimizer], 2)
    for wanted, found in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(wanted, found)
    assert not torch.equal(next(model.parameters()), next(net().parameters()))


def test_steps_of_scaled_gradients_that_overflow_are_left_out() -> None:
    model = net()
    optimizer = Muon(list(model.parameters()), momentum=0.9, largest=64, fused=True, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu")
    for factor, changes in ((1.0, True), (float("inf"), False)):
        before = [p.detach().clone() for p in model.parameters()]
        model.zero_grad()
        scaler.scale(model(torch.randn(2, 3, 8, 8)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(p.isfinite().all() for p in model.parameters())
        assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) == changes
