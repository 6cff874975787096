"""Read the source of a class's forward pass: which attributes below ``self`` it uses, without running it.

Only paths from ``self`` are read: ``self.qkv.weight``, also under another name (``layer = self.qkv``), in loops, and in
the methods and properties that the forward calls. A branch on a plain attribute (``if self.bias is None:``) is noted
with its condition. Asking a tensor for its dtype, device or shape reads nothing of it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from torch import nn

Path = tuple[str | None, ...]  # attribute names and constant keys; None is any child

_DESCRIPTIONS = {
    "dtype", "device", "shape", "ndim", "requires_grad", "layout", "is_cuda", "is_leaf", "grad", "size", "dim", "numel",
    "stride", "element_size", "get_device", "type", "is_floating_point", "is_contiguous",
}  # fmt: skip
_ASKING = {"isinstance", "id", "hasattr", "type", "len", "to", "type_as", "new_tensor", "new_zeros", "new_ones"}


class Condition(NamedTuple):
    """What an attribute of ``self`` must be for a branch to run: None or not (``about_none``), true or not."""

    attribute: str
    about_none: bool
    wanted: bool


class Use(NamedTuple):
    """A path below ``self`` that a forward pass loads, and the conditions of the branch it stands in."""

    path: Path
    conditions: tuple[Condition, ...] = ()

    @property
    def describes(self) -> bool:
        """Return whether the path asks what a tensor is like (its dtype, its shape), and reads none of its values."""
        return any(part in _DESCRIPTIONS for part in self.path[1:])


@dataclass
class Source:
    """What the source of a class's forward pass says.

    Attributes:
        functions: the methods that it consists of.
        uses: the paths that it loads.
    """

    functions: set[Any] = field(default_factory=set)
    uses: set[Use] = field(default_factory=set)


def source_of(owner: Any) -> Source:
    """Return what the source of a class's forward pass says, all methods of its own that it calls included."""
    return _read(owner, getattr(owner, "forward", None))


@cache
def _read(owner: Any, forward: Any) -> Source:
    source, seen = Source(), set()
    waiting: list[tuple[str, type | None, tuple[Condition, ...]]] = [("forward", None, ())]
    while waiting:
        name, after, conditions = waiting.pop()
        defined_in, function = method_of(owner, name, after)
        if function is None or (function, conditions) in seen:
            continue
        seen.add((function, conditions))
        source.functions.add(function)
        tree = _tree(function)
        if tree is None:
            source.uses.add(Use((), conditions))  # it may call anything
            continue
        reading = _Reading(tree, conditions)
        source.uses |= reading.uses
        waiting += [(use.path[0], None, use.conditions) for use in reading.uses if use.path and use.path[0] is not None]
        waiting += [(method, defined_in, at) for method, at in reading.inherited]
    return source


def method_of(owner: Any, name: str, after: type | None = None) -> tuple[type | None, Any]:
    """Return the class that defines a method, ``nn.Module`` itself excluded, and the method.

    Args:
        owner: a class.
        name: of the method.
        after: look only behind this class in the method resolution order, as ``super()`` does.
    """
    order = owner.__mro__ if after is None else owner.__mro__[owner.__mro__.index(after) + 1 :]
    for each in order:
        if each is nn.Module:
            break
        if name in vars(each):
            function = vars(each)[name]
            if isinstance(function, (staticmethod, classmethod)):  # has no self
                return each, None
            function = function.fget if isinstance(function, property) else function
            function = inspect.unwrap(function) if callable(function) else None
            return each, function if inspect.isfunction(function) else None
    return None, None


def _tree(function: Any) -> ast.FunctionDef | None:
    """Return the syntax of a method, or None where there is no source of it."""
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return node if isinstance(node, ast.FunctionDef) and node.args.args else None


class _Reading:
    """Collects the paths below ``self`` that one method loads, and the methods it asks of ``super()``."""

    def __init__(self, function: ast.FunctionDef, conditions: tuple[Condition, ...]) -> None:
        self.uses: set[Use] = set()
        self.inherited: set[tuple[str, tuple[Condition, ...]]] = set()
        self.conditions = conditions
        self.names: dict[str, Path] = {function.args.args[0].arg: ()}
        for _ in range(2):  # names of names
            self._name_aliases(function)
        self._visit_all(function.body)

    def _name_aliases(self, function: ast.FunctionDef) -> None:
        """Remember the local names that stand for one path throughout the method."""
        stored = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        for node in ast.walk(function):
            found = _naming(node)
            if found is not None and stored.count(found[0]) == 1:
                path = self._path(found[1])
                if path:
                    self.names.setdefault(found[0], path if isinstance(node, ast.Assign) else (*path, None))

    def _path(self, node: ast.AST) -> Path | None:
        """Return the path that an expression stands for, or None when it is none."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            path = self._path(node.value)
            if path is None:
                return None
            return (*path, node.attr if isinstance(node, ast.Attribute) else _constant(node.slice))
        if isinstance(node, ast.Call) and _called_name(node) == "getattr" and len(node.args) > 1:
            path, name = self._path(node.args[0]), _constant(node.args[1])
            return None if path is None or name is None else (*path, name)
        return None

    def visit(self, node: ast.AST) -> None:
        """Note what an expression loads, or look inside it."""
        naming = _naming(node)
        path = self._path(node)
        if naming is not None and naming[0] in self.names:  # its value counts where the name is used
            self._visit_all(
                [child for name, child in ast.iter_fields(node) if name not in ("targets", "target", "iter", "value")]
            )
        elif isinstance(node, (ast.If, ast.IfExp)):
            self._visit_branches(node)
        elif isinstance(node, ast.Call) and _only_asks(node):
            self._visit_all([node.func, *(each for each in node.args if self._path(each) is None), *node.keywords])
        elif path is not None:
            if isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
                self.uses.add(Use(path, self.conditions))
        elif not _compares_identity(node):
            if _is_super(node):
                self.inherited.add((node.attr, self.conditions))  # type: ignore[attr-defined]
            for _, child in ast.iter_fields(node):
                self._visit_all(child)

    def _visit_all(self, child: Any) -> None:
        outside = self.conditions
        for each in child if isinstance(child, list) else [child]:
            if isinstance(each, list):
                self._visit_all(each)
            elif isinstance(each, ast.AST):
                self.visit(each)
        self.conditions = outside

    def _visit_branches(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        condition, outside = self._condition(node.test), self.conditions
        for branch, holds in ((node.body, True), (node.orelse, False)):
            self._assume(condition, holds)
            self._visit_all(branch)
            self.conditions = outside
        if _leaves(node.body):  # what follows in this block is the other branch
            self._assume(condition, False)

    def _assume(self, condition: Condition | None, holds: bool) -> None:
        if condition is not None:
            here = condition._replace(wanted=condition.wanted == holds)
            self.conditions = tuple(dict.fromkeys((*self.conditions, here)))

    def _condition(self, test: ast.AST) -> Condition | None:
        """Return what a test asks of one attribute of ``self``, or None when it asks anything else."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._condition(test.operand)
            return None if inner is None else inner._replace(wanted=not inner.wanted)
        about_none = _compares_identity(test) and _is_none(test.comparators[0])  # type: ignore[attr-defined]
        path = self._path(test.left if about_none else test)  # type: ignore[attr-defined]
        if path is None or len(path) != 1 or path[0] is None:
            return None
        return Condition(path[0], about_none, not about_none or isinstance(test.ops[0], ast.Is))  # type: ignore[attr-defined]


def _naming(node: ast.AST) -> tuple[str, ast.AST] | None:
    """Return the local name that a statement or loop gives to an expression (in a loop: to its items), and that."""
    target: Any = None
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target, value = node.targets[0], node.value
    elif isinstance(node, (ast.For, ast.comprehension)):
        target, value = node.target, node.iter
    return (target.id, value) if isinstance(target, ast.Name) else None


def _leaves(body: Any) -> bool:
    """Return whether a branch never reaches what stands behind it."""
    return isinstance(body, list) and isinstance(body[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break))


def _only_asks(node: ast.Call) -> bool:
    """Return whether a call uses only metadata of its arguments (dtype, shape, device), not their values."""
    name = _called_name(node) or ""
    return name in _ASKING or name.endswith("_like")


def _called_name(node: ast.Call) -> str | None:
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def _constant(node: ast.AST) -> str | None:
    try:
        key = ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return None
    return str(key) if isinstance(key, (int, str)) else None


def _compares_identity(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], (ast.Is, ast.IsNot))


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_super(node: ast.AST) -> bool:
    called = getattr(node, "value", None)
    return (
        isinstance(node, ast.Attribute) and isinstance(called, ast.Call) and getattr(called.func, "id", None) == "super"
    )
