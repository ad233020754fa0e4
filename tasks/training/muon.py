"""Muon: steps whose matrices are orthogonal, for short trainings from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic; the source's."""

ITERATIONS = 5


class Muon(torch.optim.AdamW):
    """Muon for the matrices, AdamW for everything else: depthwise filters, norms, biases.

    A matrix is the weight of a convolution that mixes channels, or of a linear layer, as [outputs, everything else];
    one of a grouped convolution that is not depthwise is taken for one, too. Its step is its momentum with all singular
    values brought close to 1, as long as AdamW's would be, so that both parts share a learning rate.

    Args:
        params: parameter groups.
        lr: of both parts.
        others_lr: factor on it for what AdamW does, above 0.
        momentum: of the matrices' gradients, [0, 1); Nesterov's.
        largest: a matrix whose smaller side is longer is AdamW's, too, to save its time; it wants a low ``others_lr``.
        weight_decay: decoupled, times the learning rate.
        betas: of AdamW.
        eps: of AdamW.
        fused: AdamW in one kernel.
    Raises:
        ValueError: a number out of range.
    Source: https://kellerjordan.github.io/posts/muon; the length, 0.2 sqrt(max(rows, columns)): arXiv 2502.16982,
        section 2.2.
    Differs: ``torch.optim.Muon`` takes matrices only, and calculates in bfloat16, which is slow on many CPUs.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        others_lr: float,
        momentum: float,
        largest: int,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool = False,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"optimizer.momentum is {momentum}; expected a number from 0 to below 1, such as 0.95")
        if not 0 < others_lr < math.inf:
            raise ValueError(f"optimizer.others_lr is {others_lr}; expected a factor above 0, such as 1")
        if not largest >= 1:
            raise ValueError(f"optimizer.largest is {largest}; expected a number of channels above 0, such as 1024")
        super().__init__(params, lr, (betas[0], betas[1]), eps, weight_decay, fused=fused)
        own = {"others_lr": others_lr, "momentum": momentum, "largest": largest}
        self.defaults |= own
        for group in self.param_groups:
            group |= own
        # A fused AdamW unscales float16's gradients by itself; the matrices need it done before.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gradients of matrices are taken away."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and is_matrix(weight, group["largest"]):
                    self._step(weight, weight.grad, group)
                    weight.grad = None  # AdamW passes over it
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate * group["others_lr"]
        super().step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss

    def _step(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
            state["momentum_buffer"] = torch.zeros_like(weight)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        ahead = torch.lerp(gradient, mean, group["momentum"]).flatten(1)
        length = 0.2 * math.sqrt(max(ahead.shape))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(orthogonal(ahead).view(weight.shape), alpha=-group["lr"] * length)


def is_matrix(weight: Tensor, largest: int) -> bool:
    """Whether a weight [outputs, inputs, ...] mixes channels, and as a matrix has a side of at most ``largest``."""
    mixes = weight.ndim > 1 and min(weight.shape[:2]) > 1
    return mixes and min(len(weight), weight[0].numel()) <= largest


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix of orthonormal rows or columns, roughly: singular values come to lie between 0.5 and 1.5.

    Args:
        matrix: [rows, columns] float32.
    """
    a, b, c = COEFFICIENTS
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
