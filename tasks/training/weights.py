"""A whole model's weights in: our own runs, and torchvision's and timm's published models."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor, nn

from backbones.trunk import Trunk
from backbones.weights import load_weights, located, read
from heads import deeplabv3, fcn, lraspp, segmentation, ssdlite
from heads.linear import Linear
from heads.pooled import Pooled
from tasks.training.checkpoint import fill
from tasks.training.metrics import METRICS
from tasks.training.model import Model

State = dict[str, Tensor]

FOREIGN: dict[type[nn.Module], Callable[[State], State]] = {
    Pooled: dict,  # backbones.weights has renamed them already
    Linear: dict,
    ssdlite.SSDLite: ssdlite.torchvision_to_ours,
    lraspp.LRASPP: lraspp.torchvision_to_ours,
    deeplabv3.DeepLabV3: deeplabv3.torchvision_to_ours,
    fcn.FCN: fcn.torchvision_to_ours,
}
"""Head -> what turns the rest of a foreign checkpoint, its backbone taken out, into the head's own names."""


class Loaded(NamedTuple):
    """What a checkpoint gave to a model, and what it did not."""

    filled: dict[str, list[str]]
    """Tasks whose heads were filled, each with its parameters that stay fresh: one output a class, other classes."""
    left_out: list[str]
    """Parts of the checkpoint that the model has no use for."""


def load_model(model: Model, source: str) -> Loaded:
    """Fill backbone and heads from one checkpoint.

    A head that the checkpoint does not have keeps its fresh weights (a joint model starts from a single task's run);
    the heads of tasks that the model does not have are left out, as is torchvision's ``aux_classifier``. A head that
    was trained on other classes is filled but for its last layers.

    Args:
        model: of the checkpoint's architecture.
        source: a run folder; "imagenet"; or a file of ours, torchvision's (classifiers, ssdlite320, lraspp, deeplabv3)
            or timm's.
    Raises:
        FileNotFoundError: no such file.
        ValueError: keys or shapes without a counterpart, all listed; or nothing for any of the heads.
    """
    rest = load_backbone(model.backbone, source)
    ours = any(key.startswith("heads.") for key in rest)
    theirs = None if ours else task_of(rest)
    tasks = [*METRICS, *model.heads]
    strays = [key for key in rest if ours and not key.startswith(tuple(f"heads.{task}." for task in tasks))]
    if strays:
        raise ValueError(
            f"weights={source} has {', '.join(strays)}; expected the backbone's keys and those of heads for "
            f"{', '.join(METRICS)}: take them out of the file"
        )
    filled = {}
    for task, module in model.heads.items():
        prefix = f"heads.{task}."
        own = {key.removeprefix(prefix): value for key, value in rest.items() if key.startswith(prefix)}
        state = FOREIGN[type(module)](rest) if task == theirs and type(module) in FOREIGN else own
        if state:
            fresh = of_other_classes(module.state_dict(), state, len(model.classes[task]))
            fill(module, state | {key: module.state_dict()[key] for key in fresh}, f"{source} ({task})")
            filled[task] = fresh
    if not filled:
        raise ValueError(
            f"{source} has no weights for {', '.join(model.heads)}; for its backbone alone: backbone.weights={source}"
        )
    parts = [f"heads.{task}." for task in METRICS if task not in model.heads] + [segmentation.AUXILIARY]
    return Loaded(filled, [part.rstrip(".") for part in parts if any(key.startswith(part) for key in rest)])


def load_backbone(backbone: nn.Module, source: str) -> State:
    """Fill the backbone of any kind from a whole model's checkpoint.

    Returns:
        The tensors of the checkpoint's heads.
    Raises:
        FileNotFoundError: no such file.
        ValueError: keys or shapes without a counterpart; or, for a backbone that is not of the MobileNet family, a
            checkpoint that is not this suite's.
    """
    if isinstance(backbone, Trunk):
        return load_weights(backbone, source, "weights")
    state = read(located(source), "weights")
    own = {key.removeprefix("backbone."): value for key, value in state.items() if not key.startswith("heads.")}
    if not any(key.startswith("backbone.") for key in state):
        raise ValueError(
            f"weights={source} is no run of this suite; published weights of this backbone come by its yaml"
        )
    fill(backbone, own, f"{source} (backbone)")
    return {key: value for key, value in state.items() if key.startswith("heads.")}


def task_of(rest: State) -> str:
    """Which task a foreign checkpoint's head is for, by the names of its tensors."""
    if any(key.startswith("head.") for key in rest):
        return "detect"
    return "classify" if {key.rpartition(".")[0] for key in rest} <= {"hidden", "classifier"} else "segment"


def of_other_classes(ours: State, theirs: State, classes: int) -> list[str]:
    """The parameters that differ because the checkpoint's head has other classes.

    They differ in the first dimension alone, which is a multiple of the number of classes, background counted or not;
    and one number of classes explains all of the checkpoint's.

    Args:
        ours: the head's.
        theirs: the checkpoint's, in the same naming.
        classes: of our head.
    Returns:
        Their names; none where anything else differs, too: such a head is of another architecture.
    """
    differing = [key for key in ours if key in theirs and ours[key].shape != theirs[key].shape]
    if any(ours[key].shape[1:] != theirs[key].shape[1:] or not ours[key].ndim for key in differing):
        return []
    for outputs in (classes, classes + 1):
        counts = {Fraction(len(theirs[key]) * outputs, len(ours[key])) for key in differing}
        whole = all(len(ours[key]) % outputs == 0 for key in differing)
        if whole and len(counts) == 1 and counts.pop().denominator == 1:
            return differing
    return []
