"""The package is built as docs/architecture.md says: eight rooms and the errors, every import downwards, the picture true."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "docs" / "draw_architecture.py"
MOST_LINES, MOST_BOXES = 420, 9
MUTATING = {"pop", "popitem", "clear", "update", "setdefault", "move_to_end", "extend", "__setitem__", "__delitem__"}
NOT_SLOTS = {  # writes to the children of modules that are nobody's but convpeft's own
    "adapters.peft_kinds.layers": "takes the base layer out of peft's layer, which was built for one probe",
    "merging.probe": "empties a bare copy of a layer",
}


def load_script():
    spec = importlib.util.spec_from_file_location("draw_architecture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


drawing = load_script()


def package(tmp_path, **files):
    """Write a package ``toy`` with these modules (``__`` for a dot) and return its folder."""
    top = tmp_path / "toy"
    for name, text in {"__init__": "", **files}.items():
        path = top.joinpath(*name.split("__")).with_suffix(".py") if name != "__init__" else top / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return top


@pytest.mark.parametrize(
    "text",
    [
        "from ..hosts.slots import Slots",
        "from ..hosts import slots",
        "from .. import hosts",
        "import toy.hosts.slots",
        "from toy.hosts.slots import Slots",
        "def later():\n    from ..hosts.slots import Slots",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..hosts.slots import Slots",
    ],
)
def test_every_way_to_import_is_seen(tmp_path, text):
    top = package(tmp_path, adapters__base=text, hosts__slots="Slots = 1")
    (top / "hosts" / "__init__.py").write_text("")
    assert drawing.arrows(drawing.imports(top)) == {("adapters", "hosts")}


def test_other_packages_are_not_seen(tmp_path):
    assert not drawing.imports(package(tmp_path, adapters__base="import hosts.slots\nfrom hosts import slots"))


def test_a_circle_is_found(tmp_path):
    top = package(
        tmp_path, hosts__a="from .b import b", hosts__b="def f():\n    from .c import c", hosts__c="from . import a"
    )
    assert drawing.circle(drawing.imports(top)) == ["hosts.a", "hosts.b", "hosts.c", "hosts.a"]


def test_every_import_points_down():
    upwards = sorted(
        f"{importer} imports {imported}"
        for importer, imported in drawing.imports()
        if (below := drawing.room(imported)) != (above := drawing.room(importer))
        and above  # the package's __init__ names what is public, from every room
        and (below not in drawing.ORDER or drawing.ORDER.index(below) > drawing.ORDER.index(above))
    )
    assert not upwards, f"the rooms from the bottom up: {', '.join(drawing.ORDER)}"


def test_no_modules_import_each_other():
    edges = drawing.imports()
    assert not drawing.circle(drawing.arrows(edges))
    assert not drawing.circle(edges)


def test_every_arrow_is_in_the_picture():
    drawn = re.findall(r'<path data-from="(\w+)" data-to="(\w+)"', drawing.PICTURE.read_text(encoding="utf-8"))
    assert sorted(drawn) == sorted(drawing.arrows(drawing.imports()))


def test_the_picture_is_what_the_script_draws_now():
    same = drawing.PICTURE.read_text(encoding="utf-8") == drawing.picture()
    assert same, "the package has changed: run python docs/draw_architecture.py, and look at the picture"


def test_an_arrow_that_points_up_is_not_drawn(tmp_path):
    with pytest.raises(ValueError, match=r"adapters.*hosts"):
        drawing.picture(package(tmp_path, adapters__base="from ..hosts.slots import Slots", hosts__slots="Slots = 1"))


def test_the_top_level_has_the_rooms_and_nothing_else():
    top = {path.stem for path in drawing.PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert top - {"__init__", "__main__"} == set(drawing.ORDER)
    assert len(drawing.ORDER) <= MOST_BOXES


def test_the_page_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [name for name in drawing.ORDER if f"`{name}`" not in text]


def test_no_module_is_long():
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in drawing.modules().items()}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def written_children(text):
    """Return the lines that write into a module's ``_modules``, or hand it on under another name."""

    def holds(node):
        """Whether an expression is ``x._modules``, or an entry of it."""
        while isinstance(node, ast.Subscript):
            node = node.value
        return isinstance(node, ast.Attribute) and node.attr == "_modules"

    lines = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            changed = isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING and holds(node.func.value)
        elif isinstance(node, (ast.Assign, ast.Delete)):
            changed = any(holds(part) for target in node.targets for part in getattr(target, "elts", [target]))
            changed |= isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and holds(node.value)
        else:
            changed = isinstance(node, (ast.AugAssign, ast.AnnAssign)) and holds(node.target)
        if changed:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "text",
    [
        "slots._modules[name] = adapter",
        "del slots._modules[name]",
        "slots._modules.pop(name, None)",
        "slots._modules[STASH]._modules[owner] = tensors",
        "module._modules['convpeft'].pop(name)",
        "slots._modules |= {name: adapter}",
        "slots._modules[a], slots._modules[b] = one, two",
        "children = slots._modules",
    ],
)
def test_a_write_into_children_is_seen(text):
    assert written_children(text) == [1]


def test_reading_children_is_no_write():
    assert not written_children("x = slots._modules[name]\ny = slots._modules.get(name)\nfor z in slots._modules: pass")


def test_only_hosts_writes_into_slots():
    writes = {
        name: lines
        for name, path in drawing.modules().items()
        if drawing.room(name) != "hosts" and (lines := written_children(path.read_text(encoding="utf-8")))
    }
    assert set(writes) == set(NOT_SLOTS), f"{writes}: use the methods of hosts.slots.Slots"
