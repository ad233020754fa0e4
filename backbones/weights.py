"""Checkpoints in: found or downloaded, read without running them, and put into a backbone (names: ``naming``)."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from backbones.blocks import BN_EPS
from backbones.naming import HALF, IMAGENET, Conventions, State, to_ours

if TYPE_CHECKING:
    from backbones.trunk import Trunk

UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError,
    LookupError, TypeError, AttributeError, struct.error,
)  # fmt: skip
"""What ``torch.load`` raises for a file that is no checkpoint; the second line is for text that looks like a pickle."""
SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")
ZERO_ONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def load_weights(backbone: Trunk, source: str, setting: str = "backbone.weights") -> State:
    """Fills the backbone, its mean and std and, unless ``padding`` was given, its padding.

    Args:
        backbone: of the architecture that the checkpoint has.
        source: "imagenet" (torchvision's published file, downloaded once into torch.hub's folder, hash checked); a file
            (.pth, .pt, .ckpt, .safetensors) in torchvision's, timm's or our own naming; a run's folder.
        setting: the key that the user gave the source by; for the messages.
    Returns:
        The tensors of the checkpoint's own head; see ``Split.rest``.
    Raises:
        FileNotFoundError: no such file, or the download failed.
        ValueError: an unreadable file, an unknown naming, or keys or shapes without a counterpart: all are listed.
    """
    path = download(backbone.published, setting) if source == "imagenet" else located(source)
    state = read(path, setting)
    try:
        own, rest = to_ours(state, backbone, lambda: timm_conventions(path))
    except ValueError as error:
        raise ValueError(f"{setting}={source}: {error}") from error
    if backbone.padding != "auto":
        own["same_padding"] = torch.tensor(backbone.padding == "same")
    backbone.load_state_dict(own)
    return rest


def located(source: str) -> Path:
    """The checkpoint that a path means: a run folder's best weights, or the file itself; ``~`` is the home folder."""
    path = Path(source).expanduser() if source.partition("/")[0] == "~" else Path(source)
    return path / "best.pt" if path.is_dir() else path


def download(url: str | None, setting: str = "backbone.weights") -> Path:
    """The published file in torch.hub's folder ($TORCH_HOME), fetched if it is not there; its hash is always checked.

    Args:
        url: its name ends in the first digits of its SHA-256, as torch.hub's do: ``net-0123abcd.pth``.
        setting: see ``load_weights``.
    Raises:
        FileNotFoundError: not there and not to be had (offline).
        ValueError: nothing is published for this net, or the file's hash is not the one in its name.
    """
    if url is None:
        raise ValueError(f"nobody publishes weights as 'imagenet' for this backbone; give {setting} a file, or null")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlparse(url).path).name
    digits = path.stem.rpartition("-")[2]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digits, progress=False)
        except (URLError, OSError) as error:
            raise FileNotFoundError(
                f"could not download {url} ({error}); put the file into {folder}, or give its path as {setting}"
            ) from error
        except RuntimeError as error:
            raise ValueError(f"{url} is not the file that was published: {error}; try again later") from error
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digits):
        raise ValueError(f"the SHA-256 of {path} does not begin with {digits}; delete the file, it is fetched anew")
    return path


def read(path: Path, setting: str = "backbone.weights") -> State:
    """The tensors of a checkpoint file, without running anything that is in it.

    Args:
        path: .safetensors, or what torch.save wrote: a state dict, or a dict with one as "model" or "state_dict".
        setting: see ``load_weights``.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, unreadable, or no tensors where they belong.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{setting}={path} is neither 'imagenet' nor a file ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; set {setting} to a file that does, 'imagenet' or null")
    try:
        content: object = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
    except (SafetensorError, *UNREADABLE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{setting}={path} cannot be read as a checkpoint ({reason})") from error
    for entry in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{setting}={path} holds no state dict, at the top or as 'model' or 'state_dict'")
    return {key.removeprefix("module."): value for key, value in content.items()}


def timm_conventions(path: Path) -> Conventions:
    """What weights in timm's naming need, by the file's name, or where that names no network by the ``config.json``
    that timm's hub puts beside it.

    Names (or the card's "architecture") that begin with ``tf_`` were trained in TensorFlow: 'SAME' padding, inputs in
    [-1, 1], batch norm's eps 1e-3. All others pad symmetrically with eps 1e-5.

    Raises:
        ValueError: the card cannot be read.
    """
    card = path.with_name("config.json")
    name = path.name
    described: dict[str, Any] = {}
    if "mobilenet" not in path.stem and "mnasnet" not in path.stem and card.is_file():
        try:
            about = json.loads(card.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{card} cannot be read ({error}); mend it, or give the weights their network's name, such as "
                "tf_mobilenetv3_small_100.safetensors"
            ) from error
        if isinstance(about, dict) and "architecture" in about:  # else of something else
            described = about.get("pretrained_cfg") or {}
            name = f"{about['architecture']}.{described.get('tag', '')}"
    from_tf = name.startswith("tf_")
    mean, std = HALF if from_tf or "ra4_" in name else ZERO_ONE if "miil" in name else IMAGENET
    return Conventions(
        tuple(described.get("mean") or mean), tuple(described.get("std") or std), from_tf, BN_EPS if from_tf else 1e-5
    )
