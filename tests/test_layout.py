"""The house rules that a machine can check: import direction, what a wheel holds, what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
BELOW = {"backbones": {"backbones"}, "heads": {"backbones", "heads"}, "tasks": {"backbones", "heads", "tasks"}}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


TASKS = {"classify", "detect", "segment"}


def asks_for_a_task(node: ast.AST) -> bool:
    """``task == "detect"``, ``"mask" if task in ("segment",) else ...``, ``case "classify":``"""
    if isinstance(node, ast.MatchValue):
        return bool(names_in(node.value))
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    return any(names_in(side) for side in sides) and any(
        isinstance(side, ast.Name | ast.Attribute | ast.Subscript) and "task" in ast.unparse(side).split(".")[-1]
        for side in sides
    )


def names_in(node: ast.AST) -> set[str]:
    """Tasks that an expression of constants names."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)} & TASKS


@pytest.mark.parametrize("name", ["model", "module", "run"])
def test_no_part_of_training_asks_for_the_task(name: str) -> None:
    """What differs between tasks is in their heads, metrics and readers."""
    tree = ast.parse((ROOT / "tasks" / "training" / f"{name}.py").read_text())
    found = [ast.unparse(node) for node in ast.walk(tree) if asks_for_a_task(node)]
    assert not found


@pytest.mark.parametrize("line", ['task == "detect"', '"classify" == head.task', 'self.task in ("segment", "x")'])
def test_the_rule_above_sees(line: str) -> None:
    assert asks_for_a_task(ast.parse(line, mode="eval").body)


@pytest.mark.parametrize("package", list(BELOW))
def test_imports_point_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert imports(path) & BELOW.keys() <= BELOW[package], path


def test_top_level_is_fixed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    top = {name.partition("/")[0] for name in tracked if name and not name.startswith(".")}
    if not top:
        pytest.skip("not a git checkout")
    assert top <= {"pyproject.toml", "backbones", "heads", "tasks", "conf", "tests", "README.md", "LICENSE"}


def test_wheel_holds_every_module_and_yaml(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("backbones", "heads", "tasks", "conf")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".yaml", ".css", ".js")
    }
    assert wanted <= names
    assert not [name for name in names if name.startswith("tests")]


@pytest.mark.parametrize(
    "module",
    [
        "tasks",
        "tasks.cli",
        "tasks.detect",
        "tasks.export",
        "tasks.data",
        "tasks.reporting.results",
        "tasks.deploy",
        "tasks.deploy.fresh",
        "tasks.deploy.engine_onnxruntime",
        "tasks.deploy.engine_openvino",
    ],
)
def test_light_modules_leave_torch_alone(module: str) -> None:
    """Commands start at once; and a fresh process's peak memory is its engine's own."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
