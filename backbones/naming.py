"""Other projects' checkpoints in our names: explicit maps, and every key without a counterpart is an error.

Known layouts, told apart by their keys: torchvision's classifiers, its ssdlite320 and its lraspp / deeplabv3 (the
backbone's part), timm's, and our own (a backbone's or a whole model's).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from backbones.blocks import BN_EPS, InvertedResidual

if TYPE_CHECKING:
    from backbones.trunk import Trunk

State = dict[str, Tensor]
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# The classification head's parts have these names in heads/pooled.py.
TORCHVISION_HEAD = {"classifier.0": "hidden", "classifier.3": "classifier", "classifier.1": "classifier"}
TIMM_HEAD = {"conv_head": "hidden", "classifier": "classifier"}


class Split(NamedTuple):
    """A checkpoint's tensors."""

    backbone: State
    """Under our names, complete."""
    rest: State
    """Of its head: a classifier's under the names of ``heads.pooled`` (``hidden``, ``classifier``), others as found."""


class Conventions(NamedTuple):
    """What a state dict does not say of itself."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    same_padding: bool
    eps: float
    """Of the batch norms it was trained with."""


def to_ours(state: Mapping[str, Tensor], backbone: Trunk, timm: Callable[[], Conventions]) -> Split:
    """A state dict of any known naming, in ours.

    Args:
        state: the tensors, their names.
        backbone: the net they are for.
        timm: called if the names are timm's.
    Raises:
        ValueError: unknown naming; keys or shapes without a counterpart.
    """
    if "conv_stem.weight" in state:
        return timm_to_ours(state, backbone, timm())
    if any(key in state for key in ("stem.conv.weight", "backbone.stem.conv.weight")):
        return own_to_ours(state, backbone)
    if any(key in state for key in ("features.0.0.weight", "backbone.0.0.weight", "backbone.features.0.0.0.weight")):
        return torchvision_to_ours(state, backbone)
    raise ValueError(
        f"the naming of its keys ({', '.join(list(state)[:4])}) is unknown; known are torchvision's, timm's and ours"
    )


def own_to_ours(state: Mapping[str, Tensor], backbone: Trunk) -> Split:
    """A backbone's own state dict, or a whole model's with the prefix ``backbone.``."""
    if "backbone.stem.conv.weight" not in state:
        return Split(_checked(dict(state), backbone), {})
    own = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    strays = [key for key in state if not key.startswith(("backbone.", "heads."))]
    return Split(_checked(own, backbone, strays), {k: v for k, v in state.items() if k.startswith("heads.")})


def torchvision_to_ours(state: Mapping[str, Tensor], backbone: Trunk) -> Split:
    """torchvision's mobilenet_v3_*, mobilenet_v2, ssdlite320_, lraspp_ and deeplabv3_mobilenet_v3_large.

    ssdlite320 was trained on inputs in [-1, 1] (mean = std = 0.5), all others on ImageNet's mean and std.
    """
    names, heads = torchvision_names(backbone), dict(TORCHVISION_HEAD)
    mean, std = IMAGENET
    prefixes: tuple[str, ...] = ()
    if "backbone.features.0.0.0.weight" in state:
        names = {_in_ssdlite(theirs, backbone): ours for theirs, ours in names.items()}
        mean, std = HALF
        prefixes = ("head.", "backbone.extra.")
    elif "features.0.0.weight" not in state:
        names = {theirs.replace("features", "backbone", 1): ours for theirs, ours in names.items()}
        prefixes = ("classifier.", "aux_classifier.")
    renamed, rest = _rename(state, names, {} if prefixes else heads, prefixes)
    eps = BN_EPS if any(".block." in key or key.startswith("backbone.") for key in state) else 1e-5
    return Split(_finished(renamed, backbone, Conventions(mean, std, False, eps)), rest)


def timm_to_ours(state: Mapping[str, Tensor], backbone: Trunk, conventions: Conventions) -> Split:
    """timm's mobilenetv3_*, tf_mobilenetv3_*, mobilenetv2_*, mobilenetv1_*, semnasnet_* and mnasnet_small."""
    renamed, rest = _rename(state, timm_names(state, backbone), TIMM_HEAD, ())
    return Split(_finished(renamed, backbone, conventions), rest)


def torchvision_names(backbone: Trunk) -> dict[str, str]:
    """Module names of torchvision's classifiers to ours, in order of depth."""
    names = {"features.0.0": "stem.conv", "features.0.1": "stem.norm"}
    is_v2 = backbone.layout == "v2"
    for index, block in enumerate(backbone.blocks):
        assert isinstance(block, InvertedResidual)
        parts = [
            part for part in ("expand", "depthwise", "squeeze_excite", "project") if getattr(block, part) is not None
        ]
        for place, part in enumerate(parts):
            theirs, ours = f"features.{index + 1}.{'conv' if is_v2 else 'block'}.{place}", f"blocks.{index}.{part}"
            if part == "squeeze_excite":
                names |= {f"{theirs}.fc1": f"{ours}.reduce", f"{theirs}.fc2": f"{ours}.expand"}
            elif is_v2 and part == "project":
                flat = theirs.rpartition(".")[0]
                names |= {theirs: f"{ours}.conv", f"{flat}.{place + 1}": f"{ours}.norm"}
            else:
                names |= {f"{theirs}.0": f"{ours}.conv", f"{theirs}.1": f"{ours}.norm"}
    last = f"features.{len(backbone.blocks) + 1}"
    return names | {f"{last}.0": "last.conv", f"{last}.1": "last.norm"}


def _parts(block: InvertedResidual) -> list[str]:
    return [part for part in ("expand", "depthwise", "squeeze_excite", "project") if getattr(block, part) is not None]


def _in_ssdlite(name: str, backbone: Trunk) -> str:
    """A classifier's module name as ssdlite320 has it, which cuts the net after the expansion that leaves stride 16."""
    blocks = [block for block in backbone.blocks if isinstance(block, InvertedResidual)]
    cut = 1 + next(index for index, block in enumerate(blocks) if "c4_expand" in block.taps["expand"])
    _, index, *deeper = name.split(".")
    if int(index) < cut:
        return ".".join(("backbone.features.0", index, *deeper))
    if int(index) > cut:
        return ".".join(("backbone.features.1", str(int(index) - cut), *deeper))
    _, place, *inner = deeper  # "block", its place, ...
    return ".".join(
        ("backbone.features.0", index, *inner) if place == "0" else ("backbone.features.1.0", place, *inner)
    )


def timm_names(keys: Iterable[str], backbone: Trunk) -> dict[str, str]:
    """Module names of timm's nets to ours; timm's blocks.<stage>.<n> are ours in their order."""
    found = {(int(m[1]), int(m[2])) for key in keys if (m := re.match(r"blocks\.(\d+)\.(\d+)\.conv_dw\.", key))}
    names = {"conv_stem": "stem.conv", "bn1": "stem.norm"}
    for (stage, place), (index, block) in zip(sorted(found), enumerate(backbone.blocks), strict=False):
        assert isinstance(block, InvertedResidual)
        theirs, ours = f"blocks.{stage}.{place}", f"blocks.{index}"
        parts = [part for part in _parts(block) if part != "squeeze_excite"]
        convs = ("conv_pw", "conv_dw", "conv_pwl") if len(parts) == 3 else ("conv_dw", "conv_pw")
        for number, (part, conv) in enumerate(zip(parts, convs, strict=True), start=1):
            names |= {f"{theirs}.{conv}": f"{ours}.{part}.conv", f"{theirs}.bn{number}": f"{ours}.{part}.norm"}
        names |= {f"{theirs}.se.conv_{part}": f"{ours}.squeeze_excite.{part}" for part in ("reduce", "expand")}
    if backbone.layout == "v3":
        last = f"blocks.{max(found, default=(0, 0))[0] + 1}.0"
        names |= {f"{last}.conv": "last.conv", f"{last}.bn1": "last.norm"}
    elif backbone.last is not None:
        names |= {"conv_head": "last.conv", "bn2": "last.norm"}
    return names


def _rename(
    state: Mapping[str, Tensor], names: Mapping[str, str], heads: Mapping[str, str], prefixes: tuple[str, ...]
) -> Split:
    """The backbone's tensors under our names, and the head's; a key of neither stays as it is among the backbone's."""
    own, rest = {}, {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in names:
            own[f"{names[module]}.{kind}"] = value
        elif module in heads:
            # A 1x1 convolution on a pooled map is a linear layer.
            rest[f"{heads[module]}.{kind}"] = value.flatten(1) if value.ndim == 4 else value
        elif key.startswith(prefixes) and prefixes:
            rest[key] = value
        else:
            own[key] = value
    return Split(own, rest)


def _finished(state: State, backbone: Trunk, conventions: Conventions) -> State:
    """Adds what others keep outside of the state dict, and moves batch norm's eps to ours."""
    state["mean"] = torch.tensor(conventions.mean).view(1, 3, 1, 1)
    state["std"] = torch.tensor(conventions.std).view(1, 3, 1, 1)
    state["same_padding"] = torch.tensor(conventions.same_padding)
    state = _checked(state, backbone)
    if conventions.eps != BN_EPS:
        for key in [key for key in state if key.endswith("running_var")]:
            weight = key.replace("running_var", "weight")
            # The same function of its input: weight / sqrt(var + eps) stays.
            variance = state[key].double()
            state[weight] = (state[weight] * ((variance + BN_EPS) / (variance + conventions.eps)).sqrt()).float()
    return state


def _checked(state: State, backbone: nn.Module, strays: Sequence[str] = ()) -> State:
    """The state, if keys and shapes are exactly the backbone's.

    Args:
        state: under our names.
        backbone: the net they are for.
        strays: keys of the checkpoint that are neither the backbone's nor a head's.
    Raises:
        ValueError: lists every key that is missing, left over or of another shape.
    """
    wanted = backbone.state_dict()
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    state = counters | state  # old checkpoints are without them
    missing, extra = [k for k in wanted if k not in state], [*(k for k in state if k not in wanted), *strays]
    shapes = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    wrong = [f"missing: {', '.join(missing)}"] if missing else []
    wrong += [f"left over: {', '.join(extra)}"] if extra else []
    wrong += [f"{k} is {list(state[k].shape)} and should be {list(wanted[k].shape)}" for k in shapes]
    if wrong:
        raise ValueError(
            f"the checkpoint is of another net than this {type(backbone).__name__}; choose the backbone and width that "
            f"it was trained with. {'; '.join(wrong)}"
        )
    return state
