"""Read the imports of ``convpeft/`` and draw them: ``python docs/draw_architecture.py`` writes the picture anew.

A room is a folder of the package (or a module beside the folders, ``errors``). An arrow from one room to another stands for
at least one import; imports inside functions and under ``TYPE_CHECKING`` count. ``tests/project/test_architecture.py`` reads the same
arrows and compares the picture in the repository with the one that this script would draw.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "convpeft"
PICTURE = ROOT / "docs" / "pictures" / "architecture.svg"
ORDER = (
    "errors", "convolution", "adapters", "hosts", "planning", "injection", "merging", "files", "integrations"
)  # fmt: skip
Edge = tuple[str, str]  # who imports, what is imported


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Return the modules of a package by dotted name below it: ``hosts.slots``, ``hosts`` (its ``__init__``), ````."""
    found: dict[str, Path] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path = PACKAGE) -> set[Edge]:
    """Return every import between two modules of a package, wherever in a file it stands."""
    known = modules(package)
    edges: set[Edge] = set()
    for name, path in known.items():
        inside = name.split(".") if name else []
        folder = inside if path.name == "__init__.py" else inside[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, folder, package.name, known):
                if target != name:
                    edges.add((name, target))
    return edges


def _targets(node: ast.AST, folder: list[str], package: str, known: Iterable[str]) -> list[str]:
    """Return the package's modules that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names if alias.name.split(".")[0] == package]
        return [_module(name.split(".")[1:], known) for name in names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parts = node.module.split(".") if node.module else []
    if node.level:
        parts = [*folder[: len(folder) - node.level + 1], *parts]
    elif parts[0] == package:
        parts = parts[1:]
    else:
        return []
    return [_module([*parts, alias.name], known) for alias in node.names]


def _module(parts: list[str], known: Iterable[str]) -> str:
    """Return the module that a dotted path leads to: the path itself, or the module that defines its last name."""
    return ".".join(parts) if ".".join(parts) in known else ".".join(parts[:-1])


def room(module: str) -> str:
    """Return the room of a module; empty for the package's own ``__init__``."""
    return module.split(".")[0]


def arrows(edges: Iterable[Edge]) -> set[Edge]:
    """Return the imports between different rooms. The package's ``__init__`` is no room: it only names what is public."""
    between = {(room(importer), room(imported)) for importer, imported in edges}
    return {(importer, imported) for importer, imported in between if importer and importer != imported}


def circle(edges: Iterable[Edge]) -> list[str]:
    """Return the names along some circle of imports, or an empty list when there is none."""
    below: dict[str, list[str]] = {}
    for importer, imported in sorted(edges):
        below.setdefault(importer, []).append(imported)
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for each in below.get(name, ()):
                found = walk(each, [*path, name])
                if found:
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(below) if (found := walk(name, []))), [])


def implied(edges: set[Edge]) -> set[Edge]:
    """Return the arrows that other arrows already lead along: a to c, where a leads to b and b to c."""
    below: dict[str, set[str]] = {}
    for name in ORDER:  # from the bottom up
        direct = {imported for importer, imported in edges if importer == name}
        below[name] = direct.union(*(below[each] for each in direct))
    return {
        (importer, imported)
        for importer, imported in edges
        if any(imported in below[other] for start, other in edges if start == importer and other != imported)
    }


# --- the drawing -----------------------------------------------------------------------------------------------------

WIDTH, SIDE, GAP, LANE = 860, 104, 34, 13  # of the picture, its margins, between boxes, between vertical lines
SANS, MONO = 6.5, 6.7  # width of a letter at the sizes below
COLOURS = {
    "adapters": ("#bf7a3a", "#fbeee0"),
    "hosts": ("#5e81ac", "#e5ecf6"),
    "planning": ("#6f9a5b", "#ecf3e7"),
    "injection": ("#5e81ac", "#e5ecf6"),
    "merging": ("#5e81ac", "#e5ecf6"),
    "files": ("#5e81ac", "#e5ecf6"),
}
PLAIN = ("#7b8494", "#f1f3f6")
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif" font-size="12" role="img">
  <title>The rooms of convpeft. An arrow means: imports from. All arrows point down.</title>
  <defs>
    <marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">
      <path d="M0 0 L10 5 L0 10 z" fill="#3b4252"/>
    </marker>
    <marker id="faint" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">
      <path d="M0 0 L10 5 L0 10 z" fill="#aab4c4"/>
    </marker>
  </defs>
  <rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>"""


@dataclass
class Box:
    """One room on the picture."""

    name: str
    level: int
    says: list[str]
    holds: list[str]
    x: float = 0
    y: float = 0
    width: float = 0
    height: float = 0

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def levels(edges: set[Edge]) -> dict[str, int]:
    """Return each room's row from the bottom: above everything it imports. The last room stands in the top row."""
    found: dict[str, int] = {}
    for name in ORDER:
        found[name] = 1 + max((found[imported] for importer, imported in edges if importer == name), default=-1)
    found[ORDER[-1]] = max(found.values())
    return found


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, without its full stop."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return text.split(". ")[0].rstrip(".")


def wrapped(text: str, width: float, lines: int) -> list[str]:
    """Return a text in at most so many lines; a longer one loses its last clauses."""
    while len(found := textwrap.wrap(text, int(width / SANS), break_on_hyphens=False)) > lines:
        text = text[: max(text.rfind(mark) for mark in ",;:")]
    return found


def boxes(package: Path, edges: set[Edge]) -> dict[str, Box]:
    """Return the rooms as boxes in their places, row by row from the top."""
    known, level = modules(package), levels(edges)
    rows = [[name for name in ORDER if level[name] == row] for row in range(max(level.values()), -1, -1)]
    made: dict[str, Box] = {}
    y = 50.0
    for row in rows:
        width = (WIDTH - 2 * SIDE - GAP * (len(row) - 1)) / len(row)
        for column, name in enumerate(row):
            parts = dict.fromkeys(part.split(".")[1] for part in known if part.startswith(f"{name}."))
            folders = {part.split(".")[1] for part in known if part.startswith(f"{name}.") and part.count(".") > 1}
            holds = "  ".join(f"{part}/" if part in folders else part for part in parts)
            says = wrapped(summary(known[name]), width - 28, 2 * len(row) - 1)
            lines = textwrap.wrap(holds, int((width - 28) / MONO), break_on_hyphens=False)
            height = 40 + 16 * (len(says) + len(lines))
            made[name] = Box(name, level[name], says, lines, SIDE + column * (width + GAP), y, width, height)
        for name in row:
            made[name].height = max(made[each].height for each in row)
        y += made[name].height + GAP
    return made


def route(start: Box, end: Box, lanes: list[str]) -> str:
    """Return the way of an arrow: straight down to the next row, else along the vertical line that leads to ``end``."""
    bottom = start.y + start.height
    if start.level == end.level + 1:
        x = start.middle if start.width <= end.width else end.middle
        return f"M{x:g} {bottom:g} V{end.y - 1:g}"
    on_left = is_left(start)
    edge, sign = (SIDE, -1) if on_left else (WIDTH - SIDE, 1)
    lane = edge + sign * (20 + LANE * lanes.index(end.name))
    out, entry, turn = bottom - 16, end.y + 20, 7 * sign
    return (
        f"M{edge:g} {out:g} H{lane - turn:g} Q{lane:g} {out:g} {lane:g} {out + 7:g} "
        f"V{entry - 7:g} Q{lane:g} {entry:g} {lane - turn:g} {entry:g} H{edge + sign:g}"
    )


def is_left(box: Box) -> bool:
    """Whether a room's arrows run along the left margin: they do unless it stands in the right half."""
    return box.x == SIDE


def picture(package: Path = PACKAGE) -> str:
    """Return the picture of a package's rooms as SVG."""
    edges = arrows(imports(package))
    strange = sorted(name for edge in edges for name in edge if name not in ORDER)
    upwards = sorted(edge for edge in edges if not strange and ORDER.index(edge[0]) <= ORDER.index(edge[1]))
    if strange or upwards:
        raise ValueError(f"cannot be drawn with all arrows down: {strange or upwards}")
    faint, made = implied(edges), boxes(package, edges)
    height = max(box.y + box.height for box in made.values()) + 22
    out = [HEAD.format(width=WIDTH, height=f"{height:g}")]
    out += _legend()
    paths: dict[bool, list[str]] = {True: [], False: []}
    for importer, imported in sorted(edges, key=lambda edge: (ORDER.index(edge[0]), ORDER.index(edge[1]))):
        start, end = made[importer], made[imported]
        far = {target for source, target in edges if made[source].level > made[target].level + 1}
        lanes = [name for name in reversed(ORDER) if name in far]  # the lowest room's line is the outermost
        is_faint = (importer, imported) in faint
        paths[is_faint].append(
            f'    <path data-from="{importer}" data-to="{imported}" d="{route(start, end, lanes)}"/>'
        )
    for is_faint, colour, width, tip in ((True, "#aab4c4", 1.2, "faint"), (False, "#3b4252", 1.8, "tip")):
        out += [f'  <g stroke="{colour}" fill="none" stroke-width="{width}" marker-end="url(#{tip})">']
        out += [*paths[is_faint], "  </g>"]
    for box in made.values():
        out += _drawn(box)
    return "\n".join([*out, "</svg>", ""])


def _legend() -> list[str]:
    return [
        '  <g fill="#2e3440">',
        f'    <text x="{SIDE}" y="30" font-size="15" font-weight="bold">convpeft</text>',
        f'    <text x="{WIDTH - SIDE}" y="30" text-anchor="end">An arrow means "imports from". All point down. The dark ones imply the pale ones.</text>',
        "  </g>",
    ]


def _drawn(box: Box) -> list[str]:
    stroke, fill = COLOURS.get(box.name, PLAIN)
    x, y = box.x + 14, box.y + 22
    name = box.name if box.holds else f"{box.name}.py"
    lines = [
        f'  <rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="7" stroke="{stroke}" fill="{fill}" stroke-width="1.5"/>',
        f'  <text x="{x:g}" y="{y:g}" font-size="15" font-weight="bold" fill="#2e3440">{escape(name)}</text>',
    ]
    for line in box.says:
        y += 16
        lines.append(f'  <text x="{x:g}" y="{y + 2:g}" fill="#2e3440">{escape(line)}</text>')
    for line in box.holds:
        y += 16
        lines.append(
            f'  <text x="{x:g}" y="{y + 4:g}" font-family="monospace" font-size="11" fill="#5b6577" xml:space="preserve">{escape(line)}</text>'
        )
    return lines


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {len(arrows(imports()))} arrows")
