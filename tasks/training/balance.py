"""How the losses of several tasks become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

METHODS = ("fixed", "uncertainty", "mgda")


class Balance(nn.Module):
    """Weights of the tasks' losses: fixed, learned, or from the gradients at the features that the tasks share.

    Args:
        tasks: the tasks trained.
        method: ``fixed`` (the weights as given); ``uncertainty`` (each task's log-variance is learned on top); ``mgda``
            (every step the shortest vector in the hull of the tasks' unit gradients, so that none is harmed; tasks of
            different images, as in ``data=combined``, share no feature and get equal shares; a task without a gradient
            at the features stands outside of the hull and keeps factor 1).
        weights: task -> factor; a missing task has 1.
    Raises:
        ValueError: an unknown method, a weight for a task that is not trained, or one that is negative or infinite.
    Source: uncertainty: Kendall et al., arXiv 1705.07115, equation 7 in log-variance form, sum of exp(-s) loss + s / 2.
        mgda: Sener and Koltun, arXiv 1810.04650, MGDA-UB (gradients at the shared representation, section 3.3), with
        each gradient divided by its norm, as in the authors' code (``normalization_type: l2``).
    Differs: heads read several maps, so the gradients are taken at all of them, the earlier ones' through the later
        ones' layers too: each task costs a backward pass through the backbone, which MGDA-UB saves.
    """

    def __init__(self, tasks: Sequence[str], method: str, weights: Mapping[str, float]) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"balance.method is {method!r}; expected one of {', '.join(METHODS)}")
        strangers = set(weights) - set(tasks)
        if strangers:
            raise ValueError(f"balance.weights names {', '.join(sorted(strangers))}; trained are {', '.join(tasks)}")
        for task, weight in weights.items():
            if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise ValueError(f"balance.weights.{task} is {weight}; expected a finite factor of its loss, 0 or more")
        self.method = method
        self.weights = {task: float(weights.get(task, 1.0)) for task in tasks}
        self.log_variance = nn.ParameterDict(
            {task: nn.Parameter(torch.zeros(())) for task in tasks} if method == "uncertainty" else {}
        )

    def forward(self, losses: Mapping[str, Mapping[str, Tensor]], shared: Sequence[Tensor]) -> Tensor:
        """The scalar to train.

        Args:
            losses: task -> term -> scalar.
            shared: the backbone's features, part of the graph.
        """
        sums = {task: self.weights[task] * torch.stack(list(terms.values())).sum() for task, terms in losses.items()}
        if self.method == "uncertainty":
            spread = self.log_variance
            return torch.stack([torch.exp(-spread[t]) * loss + spread[t] / 2 for t, loss in sums.items()]).sum()
        shared = [feature for feature in shared if feature.requires_grad]  # none under a frozen backbone
        if self.method == "mgda" and len(sums) > 1 and shared:
            gradients = [
                torch.cat(
                    [(torch.zeros_like(f) if g is None else g).flatten() for f, g in zip(shared, found, strict=True)]
                )
                for found in (
                    torch.autograd.grad(s, shared, retain_graph=True, allow_unused=True) for s in sums.values()
                )
            ]
            norms = torch.stack([gradient.norm() for gradient in gradients])
            pulls = (norms > 1e-12) & norms.isfinite()  # nothing is shorter than a zero: it would take all the weight
            factors = torch.ones_like(norms)
            if pulls.any():
                units = torch.stack(gradients)[pulls] / norms[pulls, None]
                shares = shortest_in_hull(units @ units.T)
                factors[pulls] = shares / norms[pulls] * norms[pulls].mean() * len(shares)
            return (torch.stack(list(sums.values())) * factors).sum()
        return torch.stack(list(sums.values())).sum()


def shortest_in_hull(gram: Tensor, turns: int = 250) -> Tensor:
    """Weights of the shortest vector in the convex hull of some vectors.

    Args:
        gram: [T, T], the vectors' inner products.
        turns: Frank-Wolfe steps at most.
    Returns:
        [T], at least 0, sum 1.
    Source: Sener and Koltun, arXiv 1810.04650, algorithm 2.
    """
    weights = torch.full((len(gram),), 1 / len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(turns):
        products = gram @ weights
        best = int(products.argmin())
        length, cross, other = weights @ products, products[best], gram[best, best]
        bend = length - 2 * cross + other
        if length - cross < 1e-7 or bend <= 0:
            break
        step = ((length - cross) / bend).clamp(0, 1)
        weights = weights * (1 - step)
        weights[best] += step
    return weights
