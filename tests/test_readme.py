"""The README's commands are real: what they name exists, and each composes."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest
from fixtures import ROOT

from tasks.cli import compose, quoted
from tasks.training.build import plain

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for line in re.findall(r"python -m tasks\.(?:detect|classify|segment|multitask)[^`\n&]*", TEXT)
        if "--cfg" not in line
    }
)


TOOLS = sorted(
    {line.split("#")[0].strip() for line in re.findall(r"python -m tasks\.(?:benchmark|ledger|compare)[^`\n&]*", TEXT)}
)
SHIPPING = sorted(
    {line.split("#")[0].strip() for line in re.findall(r"python -m tasks\.(?:predict|export) [^`\n&]*", TEXT)}
)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8
    assert len(TOOLS) >= 6
    assert len(SHIPPING) >= 3


@pytest.mark.parametrize("line", TOOLS)
def test_a_tools_command_is_understood(line: str) -> None:
    _, _, module, *words = shlex.split(line)
    importlib.import_module(module).parse(words)


@pytest.mark.parametrize("line", SHIPPING)
def test_a_shipping_command_composes(line: str) -> None:
    _, _, module, *words = shlex.split(line)
    compose(module.removeprefix("tasks."), [quoted(word) for word in words])


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_composes(line: str) -> None:
    words = shlex.split(line)[2:]
    name = words[0].removeprefix("tasks.")
    overrides = [re.sub(r"=(\w+)(,\w+)+$", r"=\1", word) for word in words[1:] if word != "-m"]  # a sweep: its first
    assert plain(compose(name, overrides))["task"] == name


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:backbones|heads|tasks|conf)/[\w/.]*)`", TEXT))))
def test_a_named_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_install_and_test_commands_are_those_of_ci() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install -e ".[dev]" && pytest' in TEXT
    assert 'pip install -q -e ".[dev]"' in script
    assert script.rstrip().endswith("pytest")
