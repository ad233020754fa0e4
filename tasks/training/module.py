"""The one LightningModule: trains any set of heads, keeps the moving average, sets rates and frozen parts."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tasks.data.loader import Batch, prepared, seed_of
from tasks.data.resize import resized
from tasks.training.balance import Balance
from tasks.training.model import Model
from tasks.training.schedule import Budget, Growth, Schedule, batch_norm_momentum, ema_decay

NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
ONE_VALUE = "more than 1 value per channel"
"""Of torch's message on a batch norm that has nothing to average over."""


class TaskModule(L.LightningModule):
    """Trains a ``Model``; one task is the joint case with one head.

    Args:
        model: what to train.
        optimizer: parameter groups -> optimizer (a partial from ``conf/optimizer``).
        schedule: of the learning rate.
        growth: of the images' size.
        budget: how long to train.
        balance: how the tasks' losses become one.
        samples: in the training split, to count passes over the data.
        batch_size: samples an optimizer step, accumulation included.
        seed: of everything random inside the net (dropout).
        ema: share of the run that the weights' moving average spans; 0 evaluates the raw weights.
        ema_cap: largest decay of the average.
        bn_momentum: ``auto`` (by the run's length) or a number, for every BatchNorm; None leaves each its own.
        backbone_lr: factor on the backbone's learning rate.
        freeze: parameter-name prefix -> share of the run during which these stay frozen (1 = always); the longest
            matching prefix decides. Several prefixes with rising shares are staged unfreezing. May be nested.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        schedule: Schedule,
        growth: Growth,
        budget: Budget,
        balance: Balance,
        samples: int,
        batch_size: int,
        seed: int,
        ema: float,
        ema_cap: float,
        bn_momentum: float | str | None,
        backbone_lr: float,
        freeze: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.balance = balance
        self.make_optimizer = optimizer
        self.schedule, self.growth, self.budget = schedule, growth, budget
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.ema_share, self.ema_cap = ema, ema_cap
        self.bn_momentum, self.backbone_lr = bn_momentum, backbone_lr
        self.average = copy.deepcopy(model).eval().requires_grad_(False) if ema else None
        until = frozen_until(model, freeze)
        self._frozen = [(parameter, until[name]) for name, parameter in model.named_parameters() if name in until]
        self._norms = [
            (part, until.get(f"{name}.weight", 0.0))
            for name, part in model.named_modules()
            if isinstance(part, nn.BatchNorm2d)
        ]
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.step = 0
        self.elapsed_before = 0.0
        self.started: float | None = None
        self.progress = budget.progress(0, 0.0)
        """Share of the budget that was used up at the end of the last step; read once, so that all agree on it."""

    # ---------------------------------------------------------------- where the run is

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.elapsed_before + (time.perf_counter() - self.started if self.started is not None else 0.0)

    @property
    def passes(self) -> float:
        return self.step * self.batch_size / max(1, self.samples)

    @property
    def scored(self) -> Model:
        """The weights that are evaluated and shipped: the moving average, where there is one."""
        return self.average if self.average is not None else self.model

    # ---------------------------------------------------------------- Lightning's hooks

    def on_fit_start(self) -> None:
        self.started = time.perf_counter()
        if self.average is not None:
            self._pairs = (floats(self.average), floats(self.model))

    def on_fit_end(self) -> None:
        self.elapsed_before, self.started = self.elapsed, None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.make_optimizer(parameter_groups(self, self.backbone_lr))
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"] * group["factor"]
        return optimizer

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(seed_of(self.seed, self.step, batch_idx % max(1, self.trainer.accumulate_grad_batches)))
        steps = self.budget.expected_steps(self.step, self.elapsed)
        self._prepare(self.progress, steps * self.trainer.accumulate_grad_batches)

    def _prepare(self, progress: float, expected_steps: float) -> None:
        momentum = batch_norm_momentum(expected_steps) if self.bn_momentum == "auto" else self.bn_momentum
        for norm, until in self._norms:
            if momentum is not None:
                norm.momentum = float(momentum)
            norm.train(until <= progress)
        for parameter, until in self._frozen:
            parameter.requires_grad_(until <= progress)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        batch = prepared(batch)
        batch = resized(batch, self.growth.size((batch.image.shape[-2], batch.image.shape[-1]), self.progress))
        try:
            features = self.model.backbone(batch.image)
            outputs = self.model.read(features, (batch.image.shape[-2], batch.image.shape[-1]), batch.rows)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise ValueError(
                f"batch_size is {len(batch.image)}, but a batch norm behind a pooled or 1 x 1 map needs two images "
                "with a target to train on; set batch_size=2 or more (trainer.accumulate is no help here)"
            ) from error
        losses = self.model.losses(outputs, batch.targets)
        if not losses:  # no sample of the batch has a target
            return None
        total = self.balance(losses, list(features.values()))
        for task, terms in losses.items():
            for name, term in terms.items():
                if not torch.isfinite(term):
                    raise ValueError(
                        f"loss {task}/{name} is {term.item()} at step {self.step}; the last good checkpoint is kept; "
                        f"try a lower optimizer.lr (now {self.trainer.optimizers[0].param_groups[0]['base_lr']:g}), "
                        "a longer schedule.warmup or trainer.clip_norm=1, and start anew"
                    )
                self.log(f"train/{task}/{name}", term.detach(), logger=False)
        self.log("train/loss", total.detach(), logger=False)  # ``callbacks.Log`` writes them, under our step
        return total if total.requires_grad else None  # all that these samples could teach may be frozen

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        factor = self.schedule.factor(self.progress, self.passes)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.step(closure=optimizer_closure)
        self.step += 1
        self.progress = self.budget.progress(self.step, self.elapsed)
        if self.average is not None:
            expected = self.budget.expected_steps(self.step, self.elapsed)
            decay = ema_decay(self.step, expected, self.ema_share, self.ema_cap)
            with torch.no_grad():
                torch._foreach_lerp_(*self._pairs, 1 - decay)

    # ---------------------------------------------------------------- resuming

    def snapshot(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as plain dicts and tensors."""
        return {
            "step": self.step,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "balance": self.balance.state_dict(),
            "optimizer": optimizer.state_dict(),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot; the optimizer's part is restored by the caller once it exists."""
        self.step, self.elapsed_before = snapshot["step"], snapshot["elapsed"]
        self.progress = self.budget.progress(self.step, self.elapsed_before)
        self.model.load_state_dict(snapshot["model"])
        self.balance.load_state_dict(snapshot["balance"])
        if self.average is not None:
            self.average.load_state_dict(snapshot["average"])


def frozen_until(model: Model, freeze: Mapping[str, Any]) -> dict[str, float]:
    """Parameter name -> share of the run during which it is frozen (see ``TaskModule``).

    Args:
        model: whose parameters.
        freeze: prefix -> share, or nested: ``+freeze.heads.detect=1`` makes ``{heads: {detect: 1}}``.
    Raises:
        ValueError: a prefix that fits no parameter, or a share outside [0, 1].
    """
    if not isinstance(freeze, Mapping):
        raise ValueError(f"freeze is {freeze}; expected parameter prefix: share of the run, e.g. '{{backbone: 0.2}}'")
    names = [name for name, _ in model.named_parameters()]
    result: dict[str, float] = {}
    for prefix, share in sorted(flat(freeze).items(), key=lambda item: len(item[0])):
        matching = [name for name in names if name == prefix or name.startswith(f"{prefix}.")]
        if not matching:
            first = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ValueError(f"freeze.{prefix} fits no parameter; there are {', '.join(first)} and what is below them")
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise ValueError(f"freeze.{prefix} is {share}; expected a share of the run from 0 to 1 (1 = always frozen)")
        result.update(dict.fromkeys(matching, 1.1 if share == 1 else share))
    return result


def flat(node: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    """Nested keys in one: ``{heads: {detect: 1}}`` gives ``{heads.detect: 1}``."""
    result: dict[str, Any] = {}
    for key, value in node.items():
        result |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return result


def parameter_groups(module: TaskModule, backbone_lr: float) -> list[dict[str, Any]]:
    """Groups by (backbone or not, decayed or not); norms and biases are not decayed."""
    undecayed = {
        id(parameter)
        for part in module.model.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(part, NORMS) or name == "bias"
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.model.named_parameters():
        groups.setdefault((name.startswith("backbone."), id(parameter) not in undecayed), []).append(parameter)
    result: list[dict[str, Any]] = []
    for (in_backbone, decayed), parameters in groups.items():
        group: dict[str, Any] = {"params": parameters, "factor": backbone_lr if in_backbone else 1.0}
        result.append(group if decayed else group | {"weight_decay": 0.0})
    own = list(module.balance.parameters())
    return [*result, {"params": own, "factor": 1.0, "weight_decay": 0.0}] if own else result


def floats(module: nn.Module) -> list[Tensor]:
    """Weights and running statistics alike, without the counters, in the order of the checkpoint."""
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
