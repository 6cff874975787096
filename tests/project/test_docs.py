"""README and docs/ say what the code does: every block runs, every printed text and every name in them is right.

Marks in the pages, as HTML comments on the line before a fence: ``<!-- output -->`` before a text block that the python
block above it prints (``...`` stands for anything), ``<!-- spec -->`` before a YAML block that is a whole spec.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import sys
import types
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import convpeft
from convpeft.adapters.registry import adapter_class, adapter_kinds

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "yolo_world" / "README.md"]
FENCE = re.compile(r"^(?:<!-- (?P<mark>\w+) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One fenced block: its mark, language and text, and the line of the page it begins on."""

    mark: str | None
    language: str
    text: str
    line: int


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if ROOT in page.parents else page.name


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["mark"], found["language"], found["body"], text.count("\n", 0, found.start("body")) + 1)
        for found in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """Return the page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


RUNNABLE = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


def run_page(page: Path, module: types.ModuleType) -> None:
    """Run a page's python blocks in one namespace, and compare what they print with the marked text blocks."""
    printed = ""
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, module.__dict__)
            printed = out.getvalue()
        elif block.mark == "output":
            same = doctest.OutputChecker().check_output(block.text, printed, FLAGS)
            assert same, (
                f"{title(page)}, line {block.line}: the page says\n{block.text}\nbut the code prints\n{printed}"
            )


@pytest.mark.parametrize("page", RUNNABLE, ids=title)
def test_python_blocks_run_and_print_what_the_page_shows(page, tmp_path, monkeypatch, clean_registry):
    module = types.ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, "docs_page", module)
    monkeypatch.chdir(tmp_path)
    run_page(page, module)


def test_a_page_that_shows_a_wrong_output_is_found_out(tmp_path):
    wrong = tmp_path / "wrong.md"
    wrong.write_text("```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"wrong\.md, line 6"):
        run_page(wrong, types.ModuleType("docs_page"))


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_fence_is_one_the_tests_know(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(blocks(page)), "a fence is indented, unclosed, or has more than a language"
    for block in blocks(page):
        assert block.language in {"python", "yaml", "text", "sh"}, f"line {block.line}: {block.language!r}"
        assert block.mark in {None, "output", "spec"}, f"line {block.line}: {block.mark!r}"


def test_yaml_blocks_marked_as_specs_are_sound():
    specs = [(page, block) for page in PAGES for block in blocks(page) if block.mark == "spec"]
    assert specs
    for page, block in specs:
        spec = convpeft.Spec.from_dict(yaml.safe_load(block.text), source=f"{title(page)}, line {block.line}")
        assert convpeft.Spec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_name_in_the_docs_exists(page):
    text = page.read_text(encoding="utf-8")
    for dotted in set(re.findall(r"(?<![\w./`<>-])convpeft((?:\.[A-Za-z]\w*)+)|`convpeft((?:\.[A-Za-z]\w*)+)", text)):
        first, *rest = "".join(dotted).strip(".").split(".")
        found = getattr(convpeft, first, None) or importlib.import_module(f"convpeft.{first}")
        for name in rest:
            if isinstance(found, ModuleType) and not hasattr(found, name):
                importlib.import_module(f"{found.__name__}.{name}")
            assert hasattr(found, name), f"convpeft.{first}.{'.'.join(rest)}"
            found = getattr(found, name)


def test_every_public_name_is_in_the_docs():
    code = "\n".join(
        "\n".join([*re.findall(r"`[^`\n]+`", prose(page)), *(b.text for b in blocks(page) if b.language == "python")])
        for page in sorted(DOCS.rglob("*.md"))
    )
    missing = [name for name in convpeft.__all__ if not re.search(rf"\b{name}\b", code)]
    assert not missing


KINDS = "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("adapters*.md")))
SECTIONS = re.findall(r"^## `(\w+)`\n(.*?)(?=^# |^## |\Z)", KINDS, re.M | re.S)


@pytest.mark.parametrize(("kind", "section"), SECTIONS, ids=[kind for kind, _ in SECTIONS])
def test_tables_of_options_give_the_true_defaults(kind, section):
    defaults = {field.name: field.default for field in fields(adapter_class(kind).Options)}
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    assert rows
    shown = {name: str(list(value) if isinstance(value, tuple) else value) for name, value in defaults.items()}
    plain = {"None": "–", "True": "true", "False": "false"}
    assert rows == {name: plain.get(shown[name], shown[name]) for name in rows if name in shown}
    assert set(rows) == set(shown)


def test_every_kind_has_a_section():
    built_in = {kind for kind in adapter_kinds() if adapter_class(kind).__module__.startswith("convpeft.")}
    assert {kind for kind, _ in SECTIONS} == built_in


@pytest.mark.parametrize("page", LINKED, ids=title)
def test_links_resolve(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{title(page)} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{title(page)} links to {target}"
        if DOCS in page.parents:
            assert DOCS in linked.parents, f"{target} leaves docs/, where the built pages cannot follow"


def test_every_page_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{convpeft.__version__}]" in text
    assert "### Numerics" in text
