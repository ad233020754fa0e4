"""The command line: Hydra composes the config, every mistake ends in one line that says how to mend it.

Nothing here imports torch: ``--help``, ``--cfg job`` and misspelt overrides answer at once.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tasks.words import suggest

CONF = Path(__file__).resolve().parents[1] / "conf"
MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException)
"""What the user can mend; anything else is a bug of ours and keeps its traceback."""
PATHS = re.compile(
    r"\+*(data\.(parts\.[^.]+\.)?root|(backbone\.)?weights|resume|output|results|run|images|out|annotations)"
)
"""Keys whose values are taken as they stand: ``a(1), b=2.jpg`` is a file, which Hydra's grammar would refuse."""
TEXT = re.compile(r"(?!(?i:true|false|inf|nan)$)([A-Za-z][\w.:-]*|[\w.:-]*/[\w.:/-]*)", re.ASCII)
"""What Hydra takes for text without quotes."""


def command(name: str, work: Callable[[DictConfig, list[str]], object]) -> None:
    """Run a command: compose ``conf/<name>.yaml`` with the overrides of ``sys.argv`` and hand it to ``work``.

    In a sweep (``-m``) a job that fails is reported and the others go on; the exit code says whether all went well.
    An experiment with ``_variants`` is a sweep over them, see ``command_lines``.

    Args:
        name: of the config and of the command.
        work: gets the composed config and the overrides as typed.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # we print errors ourselves
    failed: list[str] = []
    lines: list[list[str]] = []

    def job(config: DictConfig) -> None:
        overrides = list(HydraConfig.get().overrides.task)
        try:
            work(config, overrides)
        except KeyboardInterrupt:
            sys.exit(130)
        except MISTAKES as error:
            complain(error, name)
            if HydraConfig.get().mode != RunMode.MULTIRUN and len(lines) == 1:
                sys.exit(1)
            failed.append(" ".join(overrides))

    job.__module__ = f"tasks.{name}"
    sweep = bool({"-m", "--multirun"} & set(sys.argv))
    sys.argv[1:] = [quoted(word, sweep) for word in sys.argv[1:]]
    try:
        lines += command_lines(name, sys.argv[1:])
        for line in lines:
            sys.argv[1:] = line
            hydra.main(version_base=None, config_path=str(CONF), config_name=name)(job)()
    except KeyboardInterrupt:
        sys.exit(130)
    except MISTAKES as error:
        complain(error, name)
        sys.exit(1)
    if failed:
        print(f"{len(failed)} of the sweep's runs failed: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def quoted(word: str, sweep: bool = False) -> str:
    """An override with its path in quotes, where it needs them; a sweep's commas stay."""
    key, _, value = word.partition("=")
    if not PATHS.fullmatch(key) or value in ("", "null") or value[0] in "'\"" or TEXT.fullmatch(value):
        return word
    if sweep and "," in value:
        return word
    text = re.sub(r"(\\*)('|$)", lambda run: run[1] * 2 + run[2].replace("'", "\\'"), value)
    return f"{key}='{text}'"


def command_lines(name: str, words: list[str]) -> list[list[str]]:
    """The command lines that stand for what was typed: one a variant of the experiment, or just this one.

    A variant is a list of overrides that belong together (``[backbone=mobilenetv2, head=linear]``), which Hydra's own
    sweeps, grids of all combinations, cannot say. A key that was typed chooses among the variants.

    Raises:
        ValueError: no variant has the value that was typed.
    """
    # argparse wants the overrides side by side, wherever -m was typed
    overrides = [word for word in words if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    words = [word for word in words if word not in overrides] + overrides
    asks = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"} & set(words)
    telling = [word for word in words if word.partition("=")[0] in ("experiment", "_variants")]
    if asks or not telling:
        return [words]
    try:
        for word in telling:
            key, _, names = word.partition("=")
            for one in names.split(",") if key == "experiment" and "," in names and names[0] != "[" else ():
                if composed(name, [f"{key}={one}"])._variants:
                    raise ValueError(f"{word}: {one} is a sweep of its own; type the experiments one after the other")
        variants = [[str(word) for word in variant] for variant in composed(name, telling)._variants]
    except (HydraException, OmegaConfBaseException):
        return [words]  # Hydra will say what is wrong
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    lines = []
    for variant in variants:
        values = dict(word.split("=", 1) for word in variant)
        if all(value in (typed.get(key, value), *typed.get(key, "").split(",")) for key, value in values.items()):
            lines.append([word for word in words if word.partition("=")[0] not in values] + variant)
    if variants and not lines:
        there = ", ".join(" ".join(variant) for variant in variants)
        raise ValueError(f"{' '.join(telling)} has no variant that fits what was typed; there are {there}")
    return lines or [words]


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a command, as the command line would compose it.

    Raises:
        ValueError: an unknown command, or an override that fits nothing; says what there is.
    """
    commands = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "base")
    if name not in commands:
        raise ValueError(f"there is no task {name!r}{suggest(name, commands)}; there are {', '.join(commands)}")
    try:
        return composed(name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, name, overrides)) from error


def composed(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Hydra's composition, leaving a surrounding Hydra application as it was."""
    surrounding = GlobalHydra.get_state()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base=None, config_dir=str(CONF)):
            return hydra.compose(name, list(overrides))
    finally:
        GlobalHydra.set_state(surrounding)


def describe(group: str, part: Mapping[str, Any]) -> str:
    """A part's name and what sets it apart from its yaml: ``large width=0.75``."""
    path = CONF / group / f"{str(part['name']).partition('/')[0]}.yaml"  # timm/...: timm
    if not path.is_file():  # somebody's own part, from another config folder
        return str(part["name"])
    own = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path), resolve=False))
    differing = [
        f"{key}={part[key]}"
        for key, value in own.items()
        if key in part
        and key not in ("num_classes", "weights", "model")
        and "${" not in str(value)
        and part[key] != value
    ]
    return " ".join([str(part["name"]), *differing])


def complain(error: BaseException, name: str) -> None:
    """Print one error to stderr: a line for people, the traceback only on request."""
    if os.environ.get("TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {explain(error, name, sys.argv[1:])}", file=sys.stderr)


def explain(error: BaseException, name: str, words: Sequence[str]) -> str:
    """What went wrong and how to mend it, in one line; ``words`` are the overrides as typed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, slash, choice = str(error.missing_cfg_file).partition("/")
        if not slash:
            group, choice = "", group
        nested = (CONF / group).glob("*/*.yaml") if group else ()  # experiment/paper: Hydra lists no folders in a group
        found = {path.relative_to(CONF / group).with_suffix("").as_posix() for path in nested}
        options = sorted({*(str(option) for option in error.options or []), *found})
        return f"there is no {group or 'config'} {choice!r}{suggest(choice, options)}; there are {', '.join(options)}"
    if isinstance(error, OverrideParseException) and "=" in error.override:
        key, reason = error.override.partition("=")[0], str(error).partition("\n")[0]
        return f"{error.override} cannot be read ({reason}); if it is text, quote the value: '{key}=\"...\"'"
    text = str(error)
    if "in DataLoader worker process" in text:  # a traceback of the worker; its last line is the message
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    if isinstance(error, CompactHydraException | OmegaConfBaseException):
        for word in words:
            key = word.lstrip("+~").partition("=")[0]
            if f"'{key}'" in text or f"{key}" == getattr(error, "full_key", None):
                known = keys(name)
                if key not in known:
                    fix = f"python -m tasks.{name} --cfg job lists them all"
                    return f"there is no setting {key!r}{suggest(key, known)}; {fix}"
    return text


def keys(name: str) -> list[str]:
    """Every key and group that can be overridden on a command's command line."""
    config = composed(name)
    groups = [path.name for path in CONF.iterdir() if path.is_dir() and not path.name.startswith("_")]
    return sorted({*groups, *flatten(OmegaConf.to_container(config))})


def flatten(tree: Any, prefix: str = "") -> Iterable[str]:
    """Dotted names of all nodes of a nested dict."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from flatten(value, f"{prefix}{key}.")
