"""Deal a model's modules out to the rules of a spec: the first rule that matches a module gets it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..adapters.base import Place
from ..adapters.registry import LEAVE, adapter_class
from ..convolution.geometry import PLAIN_HOSTS
from ..errors import PatternError, SpecError, closest, shortened, shown
from ..hosts.modules import base_modules
from ..hosts.slots import base_class
from ..hosts.wrappers import bare
from .globs import Glob, compile_glob, quoted
from .rules import Rule
from .sites import has_output
from .spec import Spec

_MOST_HINTS = 20  # dead patterns that closest names are searched for


@dataclass(frozen=True)
class Candidate:
    """One of the user's modules under all its names."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def matched_by(self, glob: Glob) -> bool:
        """Return whether any of its names matches a glob."""
        return any(map(glob.matches, self.names))


class Selection:
    """Which modules each rule of a spec gets, first come first served, and every problem of its patterns.

    Attributes:
        check: what is wrong with the spec itself.
        candidates: the user's modules, each once.
        by_name: the same by their first names.
        chosen: ``(module, number of the rule, rule, place)`` of each adapter to put in.
        shadowed: ``(module, the later rule, the rule that had taken it)``.
        left: modules a ``leave`` rule keeps bare.
        problems: of the patterns on this model.
    """

    def __init__(self, model: nn.Module, spec: Spec) -> None:
        self.spec, self.model, self.check = spec, model, spec.check()
        names: dict[int, list[str]] = {}
        modules: dict[int, nn.Module] = {}
        for name, module in base_modules(model):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
        self.candidates = [Candidate(tuple(names[key]), module) for key, module in modules.items()]
        self.by_name = {candidate.name: candidate for candidate in self.candidates}
        self.taken: dict[str, int] = {}
        self.chosen: list[tuple[Candidate, int, Rule, Place]] = []
        self.shadowed: dict[tuple[str, int, int], None] = {}
        self.left: list[str] = []
        self.problems: list[SpecError] = []

    def deal(self) -> None:
        """Deal the modules out; fills ``chosen`` (in module order), ``shadowed``, ``left`` and ``problems``."""
        for number, rule in enumerate(self.spec.rules, 1):
            label = f"rule {number}"
            if label in self.check.unresolved:
                continue
            if label in self.check.unsound:  # it is dealt nothing, but its dead patterns belong to the same report
                self.select(rule.match, label)
            else:
                self._deal(number, rule)
        order = {candidate.name: position for position, candidate in enumerate(self.candidates)}
        self.chosen.sort(key=lambda entry: order[entry[0].name])

    def select(self, patterns: Iterable[str], label: str) -> list[tuple[str, bool, list[Candidate]]]:
        """Return, for each positive pattern, ``(as written, exact names only, the modules it matches)``."""
        resolved = self.resolved(patterns)
        excluding = [(written, pattern[1:]) for written, pattern in resolved if pattern.startswith("!")]
        excluded = [compile_glob(pattern) for _, pattern in excluding]
        for (written, pattern), glob in zip(excluding, excluded, strict=True):
            if not any(candidate.matched_by(glob) for candidate in self.candidates):
                self._matches_nothing(label, written, pattern)
        selected: list[tuple[str, bool, list[Candidate]]] = []
        for written, pattern in resolved:
            if pattern.startswith("!"):
                continue
            glob = compile_glob(pattern)
            matched = [candidate for candidate in self.candidates if candidate.matched_by(glob)]
            if not matched:
                self._matches_nothing(label, written, pattern)
                continue
            kept = [c for c in matched if not any(map(c.matched_by, excluded))] if excluded else matched
            if not kept:
                self._note(f"{label}: every module {shown(written)} matches is excluded again by a '!' pattern")
                continue
            selected.append((written, glob.is_literal, kept))
        return selected

    def resolved(self, patterns: Iterable[str]) -> list[tuple[str, str]]:
        """Return ``(as written, as it fits this model)`` for each pattern, aliases replaced by what they stand for."""
        return [(written, self._fitting(pattern)) for written, pattern in self.spec.resolve(patterns)]

    def _fitting(self, pattern: str) -> str:
        """Return a pattern as it fits this model: one that matches nothing may be of a wrapper's names (``_orig_mod.neck``)."""
        sign, positive = ("!", pattern[1:]) if pattern.startswith("!") else ("", pattern)
        shorter = bare(positive)
        if shorter == positive or self._matches(positive):
            return pattern
        return sign + shorter if self._matches(shorter) else pattern

    def _matches(self, pattern: str) -> bool:
        glob = compile_glob(pattern)
        return any(candidate.matched_by(glob) for candidate in self.candidates)

    def _deal(self, number: int, rule: Rule) -> None:
        label = f"rule {number}"
        mine: dict[str, tuple[Candidate, Place]] = {}
        for written, literal, matched in self.select(rule.match, label):
            narrowed = [candidate for candidate in matched if rule.passes(candidate.module)]
            if not narrowed:
                none = f"none passes only/where ({rule.conditions()})"
                self._note(f"{label}: {shown(written)} matches {len(matched)} modules, but {none}")
                continue
            if rule.kind == LEAVE:
                served: list[tuple[Candidate, Place]] = [(candidate, "output") for candidate in narrowed]
            else:
                served = self._served(rule, literal, narrowed)
                if not served:
                    self._cannot_serve(label, written, rule, narrowed)
                    continue
            free = [(candidate, place) for candidate, place in served if candidate.name not in self.taken]
            if not free:
                winners = sorted({self.taken[candidate.name] for candidate, _ in served})
                rules = ", ".join(f"rule {winner}" for winner in winners)
                self._note(
                    f"{label}: {shown(written)} gets nothing, because {rules} already took all {len(served)} modules it "
                    "matches. The first rule wins: put the more particular rule first, or drop one."
                )
                continue
            lost = [(c.name, number, self.taken[c.name]) for c, _ in served if c.name in self.taken]
            self.shadowed.update(dict.fromkeys(lost))
            mine.update({candidate.name: (candidate, place) for candidate, place in free})
        for name, (candidate, place) in mine.items():
            self.taken[name] = number
            if rule.kind == LEAVE:
                self.left.append(name)
            else:
                self.chosen.append((candidate, number, rule, place))

    def _served(self, rule: Rule, literal: bool, matched: list[Candidate]) -> list[tuple[Candidate, Place]]:
        """Return the modules the rule's kind can serve, with the place on each."""
        kind = adapter_class(rule.kind)
        places = (rule.place,) if rule.place else kind.places
        served: list[tuple[Candidate, Place]] = []
        for candidate in matched:
            module = candidate.module
            if "parallel" in places and isinstance(module, kind.hosts):
                served.append((candidate, "parallel"))
            elif "output" in places and has_output(module):
                block = next(module.children(), None) is not None or isinstance(module, nn.Identity)
                if "parallel" not in places or (literal and block):
                    served.append((candidate, "output"))
        return served

    def _cannot_serve(self, label: str, written: str, rule: Rule, matched: list[Candidate]) -> None:
        classes = shortened(sorted({base_class(candidate.module).__name__ for candidate in matched}))
        kind = adapter_class(rule.kind)
        if kind.places == ("output",) or rule.place == "output":
            serves = "the outputs of modules that are called"
        else:
            *hosts, last = (host.__name__ for host in kind.hosts)
            serves = f"{', '.join(hosts)} and {last} layers"
        could = "output" in kind.places and rule.place is None
        hint = " For adapters on the output of these modules say place: output." if could else ""
        cannot = f"matches only modules that kind {rule.kind!r} cannot serve ({classes})"
        self._note(f"{label}: {shown(written)} {cannot}; it serves {serves}.{hint}")

    def _matches_nothing(self, label: str, written: str, pattern: str) -> None:
        adaptable = [name for c in self.candidates for name in c.names if isinstance(c.module, PLAIN_HOSTS)]
        near = ""
        if len(self.problems) < _MOST_HINTS:
            near = closest(pattern, map(quoted, adaptable)) or closest(
                pattern, (quoted(name) for c in self.candidates for name in c.names if name)
            )
        self._note(
            f"{label}: {shown(written)} matches none of the {len(self.candidates)} modules ({len(adaptable)} adaptable layers) "
            f"of {base_class(self.model).__name__}.{f' Closest: {near}.' if near else ''} "
            "List them with [name for name, _ in model.named_modules()]."
        )

    def _note(self, problem: str) -> None:
        self.problems.append(PatternError(problem))
