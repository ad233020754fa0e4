"""What a network costs: exact parameters, and multiply-adds counted on one forward.

Convention: a multiply-add (MAdd, MAC) is half a FLOP of ``torch.utils.flop_counter``: convolutions (transposed ones
too), linear layers and matrix products. Biases, BatchNorm, activations, pooling, resizing and element-wise products are
not counted, as in the papers' and torchvision's tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle


class Costs(NamedTuple):
    """Of a network or a part of it, for one image."""

    params: int
    """All parameters, a shared one once."""
    params_without_bn: int
    """Without BatchNorm's scale and shift: the rule of the paper's Table 6."""
    madds: int
    """Multiply-adds of one image."""


def count(model: nn.Module, size: tuple[int, int]) -> Costs:
    """The costs of a whole network.

    Args:
        model: takes ``[1, 3, H, W]`` float32. Its mode, statistics, gradients and the random state stay as they are.
        size: height, width of the input, px.
    Returns:
        Parameters and the multiply-adds of one image.
    Raises:
        ValueError: a side is not positive.
    """
    return _count(model, size, {})[""]


def count_parts(model: nn.Module, size: tuple[int, int]) -> dict[str, Costs]:
    """The costs of a model's backbone and of each of its heads, from one forward.

    Args:
        model: has ``backbone`` and ``heads``, a ``ModuleDict`` by task.
        size: height, width of the input, px.
    Returns:
        ``backbone``, ``heads.<task>`` for each head, and ``total``. Parts sum to the total unless they share
        parameters or the model computes something outside of them.
    """
    heads = model.heads
    assert isinstance(heads, nn.ModuleDict)
    assert isinstance(model.backbone, nn.Module)
    parts = {"backbone": model.backbone} | {f"heads.{task}": head for task, head in heads.items()}
    costs = _count(model, size, parts)
    costs["total"] = costs.pop("")
    return costs


def _count(model: nn.Module, size: tuple[int, int], parts: Mapping[str, nn.Module]) -> dict[str, Costs]:
    if min(size) < 1:
        raise ValueError(f"the image size is {size}; expected height and width of at least 1 px")
    counter = FlopCounterMode(display=False)
    flops = dict.fromkeys(parts, 0)
    handles: list[RemovableHandle] = []
    for name, part in parts.items():
        handles += _watch(name, part, counter, flops)
    try:
        with _undisturbed(model), torch.no_grad(), counter:
            model(_image(model, size))
    finally:
        for handle in handles:
            handle.remove()
    flops[""] = counter.get_total_flops()
    modules = {**parts, "": model}
    return {name: Costs(*_params(modules[name]), flops[name] // 2) for name in modules}


def _watch(name: str, part: nn.Module, counter: FlopCounterMode, flops: dict[str, int]) -> list[RemovableHandle]:
    """Let ``flops[name]`` grow by what each call of the part adds to the counter."""
    before: list[int] = []

    def enter(_module: nn.Module, _inputs: object) -> None:
        before.append(counter.get_total_flops())

    def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
        flops[name] += counter.get_total_flops() - before.pop()

    return [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]


def _image(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """A grey image where the model's parameters are."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.full((1, 3, *size), 0.5, dtype=like.dtype, device=like.device)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """In eval mode inside, as before outside: each module's own mode, and the random state.

    The flag itself is set: a module's ``train()`` may do more (keep a part frozen).
    """
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _params(module: nn.Module) -> tuple[int, int]:
    total = _numel(module.parameters())
    norms = [p for m in module.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
    return total, total - _numel({id(p): p for p in norms}.values())


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
