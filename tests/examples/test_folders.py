"""The example's imports point one way: programs, commands, training, data; and its files and functions stay short."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

pytest.importorskip("ultralytics")

import examples.yolo_world as example

ROOT = Path(example.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
RANK = {"data": 0, "training": 1, "commands": 2}
TOP = 3


def rank(parts: list[str]) -> int:
    """Return how high a module of the example stands, by its path's parts."""
    return RANK.get(parts[0], TOP) if parts else TOP


def imported(path: Path) -> list[tuple[int, list[str]]]:
    """Return what a file imports of the example: line, and the parts of the module's path."""
    own = list(path.relative_to(ROOT).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = own[: len(own) + 1 - node.level]
            named = [node.module.split(".")] if node.module else [[each.name] for each in node.names]
            found += [(node.lineno, [*base, *parts]) for parts in named]
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("examples."):
            found.append((node.lineno, str(node.module).split(".")[2:]))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    own = rank(list(path.relative_to(ROOT).parts))
    upward = [(line, ".".join(parts)) for line, parts in imported(path) if rank(parts) > own]
    assert not upward


def test_no_module_is_imported_by_what_it_imports():
    modules = {tuple(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    below = {
        name: {tuple(parts) for _, parts in imported(path) if tuple(parts) in modules} for name, path in modules.items()
    }
    while below:
        leaves = {name for name, others in below.items() if not others & below.keys()}
        assert leaves, f"in a circle: {sorted('.'.join(name) for name in below)}"
        below = {name: others for name, others in below.items() if name not in leaves}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_its_own_modules_are_imported_at_the_top(path):
    text = path.read_text(encoding="utf-8").splitlines()
    inside = [line for line, _ in imported(path) if text[line - 1].startswith(" ")]
    assert not inside


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 420
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_in_docstrings_are_true(path):
    if path.name == "__main__.py":
        return
    name = ".".join(["examples.yolo_world", *path.relative_to(ROOT).with_suffix("").parts])
    assert doctest.testmod(importlib.import_module(name.removesuffix(".__init__"))).failed == 0
