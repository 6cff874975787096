"""From a spec and a model to a plan: what each module would get. Finds every problem; touches nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from .adapters.base import Adapter, AdapterOptions, Place, Site, read_options
from .errors import HostError, PatternError, SpecError, closest, raise_problems, shortened
from .geometry import ConvGeometry, output_geometry
from .hosting import base_class, base_modules, is_batchnorm_like
from .matching import is_literal, matches
from .probing import OutputShape, known_channels, probe_outputs, unlike_its_convolution
from .registry import LEAVE, adapter_class
from .reports import table
from .spec import Rule, Spec, Unfreeze
from .state import LayerRecord

_READS_WEIGHTS = {  # parents that read a child's weight themselves, past any adapter on it
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}
_PLAIN_HOSTS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class PlannedLayer:
    """One adapter the plan would put in.

    Attributes:
        name: of the module.
        class_name: of the module's own class.
        kind: of adapter.
        site: where on the module.
        options: checked options of the kind.
        rule: number of the rule, from 1.
        parameters: how many the adapter has.
        lr_mult: relative learning rate.
        output: adapted entry of the module's output.
        merge_refusal: why it cannot merge, or None.
    """

    name: str
    class_name: str
    kind: str
    site: Site
    options: AdapterOptions
    rule: int
    parameters: int
    lr_mult: float = 1.0
    output: int | str | None = None
    merge_refusal: str | None = None

    def record(self) -> LayerRecord:
        """Return the layer as the plain data that state and adapter files keep."""
        options = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.options).items()}
        geometry = self.site.geometry.to_dict()
        return LayerRecord(self.kind, self.site.place, options, geometry, self.output, self.lr_mult, self.rule)


@dataclass(frozen=True)
class Plan:
    """What ``inject`` would do; print it.

    Attributes:
        layers: the adapters, in module order.
        owned: modules that train along (unfrozen, or norms under ``norm: adapt``), with relative learning rates.
        shadowed: for each module an earlier rule had taken: (module, the later rule, the winning rule).
        left: modules a ``leave`` rule keeps bare.
        base_parameters: of the model, without adapters.
        owned_parameters: how many of those train along.
    """

    model_class: str
    layers: tuple[PlannedLayer, ...]
    owned: dict[str, float]
    shadowed: tuple[tuple[str, int, int], ...]
    left: tuple[str, ...]
    norm: str
    base_parameters: int
    owned_parameters: int
    spec: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def adapter_parameters(self) -> int:
        """Parameters of all adapters together."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def trainable_parameters(self) -> int:
        """Adapter parameters and unfrozen ones."""
        return self.adapter_parameters + self.owned_parameters

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(1, self.base_parameters)
        head = (
            f"{self.model_class}: {len(self.layers)} adapters, {self.adapter_parameters:,} parameters; "
            f"{self.owned_parameters:,} unfrozen; trainable {self.trainable_parameters:,} = "
            f"{share:.2f} % of the base's {self.base_parameters:,}; norm {self.norm}"
        )
        rows = [
            (
                layer.name or "(root)",
                layer.class_name,
                str(layer.site.geometry),
                layer.kind,
                layer.site.place,
                str(layer.rule),
                f"{layer.parameters:,}",
                layer.merge_refusal or "yes",
            )
            for layer in self.layers
        ]
        titles = ("module", "class", "geometry", "kind", "place", "rule", "parameters", "can merge")
        parts = [head, table(titles, rows)] if rows else [head]
        if self.owned:
            parts.append(f"unfrozen modules ({len(self.owned)}): {shortened(list(self.owned))}")
        if self.left:
            parts.append(f"left bare ({len(self.left)}): {shortened(list(self.left))}")
        lost: dict[tuple[int, int], list[str]] = {}
        for name, rule, winner in self.shadowed:
            lost.setdefault((rule, winner), []).append(name)
        parts += [
            f"rule {rule} gave way to rule {winner} at: {shortened(names)}" for (rule, winner), names in lost.items()
        ]
        return "\n".join(parts)


@dataclass(frozen=True)
class _Candidate:
    """One of the user's modules under all its names."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        return self.names[0]

    def matched_by(self, pattern: str) -> bool:
        return any(matches(pattern, name) for name in self.names)


def make_plan(model: nn.Module, spec: Spec, example_inputs: Any = None) -> Plan:
    """Return what ``inject`` would do, or raise for everything that is wrong; touches nothing.

    Raises:
        SpecError: all problems at once (a ``PatternError`` when all are of patterns, and so on).
    """
    heading = f"cannot plan for this {base_class(model).__name__}"
    raise_problems(spec.problems(), heading)
    chosen = _Chooser(model, spec)
    chosen.choose()
    raise_problems(chosen.problems, heading)
    layers = _Siting(model, chosen, example_inputs).plan()
    raise_problems(chosen.problems, heading)
    owned = _owned(chosen, spec)
    raise_problems(chosen.problems, heading)
    parameters: dict[int, int] = {id(p): p.numel() for c in chosen.candidates for p in _own_parameters(c.module)}
    owned_ids = {
        id(p): p.numel()
        for name in owned
        for p in _own_parameters(chosen.by_name[name].module)
        if p.is_floating_point()
    }
    return Plan(
        base_class(model).__name__,
        tuple(layers),
        owned,
        tuple(chosen.shadowed),
        tuple(chosen.left),
        spec.norm,
        sum(parameters.values()),
        sum(owned_ids.values()),
        spec.to_dict(),
    )


class _Chooser:
    """Deals the modules out to the rules, first come first served, and collects problems."""

    def __init__(self, model: nn.Module, spec: Spec) -> None:
        self.spec = spec
        self.model = model
        names: dict[int, list[str]] = {}
        modules: dict[int, nn.Module] = {}
        for name, module in base_modules(model):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
        self.candidates = [_Candidate(tuple(names[key]), module) for key, module in modules.items()]
        self.by_name = {candidate.name: candidate for candidate in self.candidates}
        self.bypassed = _bypassed(self.candidates)
        self.taken: dict[str, int] = {}
        self.chosen: list[tuple[_Candidate, int, Rule, Place]] = []
        self.shadowed: list[tuple[str, int, int]] = []
        self.left: list[str] = []
        self.problems: list[SpecError] = []

    def choose(self) -> None:
        for number, rule in enumerate(self.spec.rules, 1):
            self._deal(number, rule)
        order = {candidate.name: position for position, candidate in enumerate(self.candidates)}
        self.chosen.sort(key=lambda entry: order[entry[0].name])

    def select(self, patterns: Iterable[str], label: str) -> list[tuple[str, bool, list[_Candidate]]]:
        """Return, for each positive pattern, ``(as written, exact names only, the modules it matches)``."""
        resolved = self.spec.resolve(patterns)
        excluding = [(written, pattern[1:]) for written, pattern in resolved if pattern.startswith("!")]
        for written, pattern in excluding:
            if not any(candidate.matched_by(pattern) for candidate in self.candidates):
                self._matches_nothing(label, written, pattern)
        selected: list[tuple[str, bool, list[_Candidate]]] = []
        for written, pattern in resolved:
            if pattern.startswith("!"):
                continue
            matched = [candidate for candidate in self.candidates if candidate.matched_by(pattern)]
            if not matched:
                self._matches_nothing(label, written, pattern)
                continue
            kept = [c for c in matched if not any(c.matched_by(pattern) for _, pattern in excluding)]
            if not kept:
                self.problems.append(
                    PatternError(f"{label}: every module {written!r} matches is excluded again by a '!' pattern")
                )
                continue
            selected.append((written, is_literal(pattern), kept))
        return selected

    def _deal(self, number: int, rule: Rule) -> None:
        label = f"rule {number}"
        mine: dict[str, tuple[_Candidate, Place]] = {}
        for written, literal, matched in self.select(rule.match, label):
            narrowed = [candidate for candidate in matched if _passes(candidate.module, rule)]
            if not narrowed:
                self.problems.append(
                    PatternError(
                        f"{label}: {written!r} matches {len(matched)} modules, but none passes only/where ({_conditions(rule)})"
                    )
                )
                continue
            if rule.kind == LEAVE:
                self.left += [c.name for c in narrowed]
                served: list[tuple[_Candidate, Place]] = [(candidate, "output") for candidate in narrowed]
            else:
                served = self._served(rule, literal, narrowed)
                if not served:
                    self.problems.append(self._cannot_serve(label, written, rule, narrowed))
                    continue
            free = [(candidate, place) for candidate, place in served if candidate.name not in self.taken]
            if not free:
                winners = sorted({self.taken[candidate.name] for candidate, _ in served})
                rules = ", ".join(f"rule {winner}" for winner in winners)
                self.problems.append(
                    PatternError(
                        f"{label}: {written!r} gets nothing, because {rules} already took all {len(served)} modules it "
                        "matches. The first rule wins: put the more particular rule first, or drop one."
                    )
                )
            self.shadowed += [(c.name, number, self.taken[c.name]) for c, _ in served if c.name in self.taken]
            mine.update({candidate.name: (candidate, place) for candidate, place in free})
        for name, (candidate, place) in mine.items():
            self.taken[name] = number
            if rule.kind != LEAVE:
                self.chosen.append((candidate, number, rule, place))

    def _served(self, rule: Rule, literal: bool, matched: list[_Candidate]) -> list[tuple[_Candidate, Place]]:
        """Return the modules the rule's kind can serve, with the place on each."""
        places = (rule.place,) if rule.place else adapter_class(rule.kind).places
        served: list[tuple[_Candidate, Place]] = []
        for candidate in matched:
            module = candidate.module
            if "parallel" in places and isinstance(module, _PLAIN_HOSTS):
                served.append((candidate, "parallel"))
            elif "output" in places and _has_output(module):
                block = next(module.children(), None) is not None or isinstance(module, nn.Identity)
                if "parallel" not in places or (literal and block):
                    served.append((candidate, "output"))
        return served

    def _cannot_serve(self, label: str, written: str, rule: Rule, matched: list[_Candidate]) -> PatternError:
        classes = sorted({base_class(candidate.module).__name__ for candidate in matched})
        places = adapter_class(rule.kind).places
        serves = (
            "the outputs of modules that are called"
            if places == ("output",) or rule.place == "output"
            else "Conv2d and Linear layers"
        )
        hint = (
            " For adapters on the output of these modules say place: output."
            if "output" in places and rule.place is None
            else ""
        )
        return PatternError(
            f"{label}: {written!r} matches only modules that kind {rule.kind!r} cannot serve ({shortened(classes)}); it serves {serves}.{hint}"
        )

    def _matches_nothing(self, label: str, written: str, pattern: str) -> None:
        adaptable = [name for c in self.candidates for name in c.names if isinstance(c.module, _PLAIN_HOSTS)]
        names = [name for c in self.candidates for name in c.names if name]
        near = closest(pattern, adaptable) or closest(pattern, names)
        self.problems.append(
            PatternError(
                f"{label}: {written!r} matches none of the {len(self.candidates)} modules ({len(adaptable)} adaptable layers) "
                f"of {base_class(self.model).__name__}.{f' Closest: {near}.' if near else ''} "
                "List them with [name for name, _ in model.named_modules()]."
            )
        )


class _Siting:
    """Finds the site of each chosen adapter: geometry, channels, refusals, size."""

    def __init__(self, model: nn.Module, chosen: _Chooser, example_inputs: Any) -> None:
        self.model, self.chosen, self.example_inputs = model, chosen, example_inputs
        self.problems = chosen.problems

    def plan(self) -> list[PlannedLayer]:
        shapes = self._output_shapes()
        planned = [self._layer(*entry, shapes) for entry in self.chosen.chosen]
        return [layer for layer in planned if layer is not None]

    def _output_shapes(self) -> dict[str, OutputShape]:
        shapes: dict[str, OutputShape] = {}
        unknown: list[tuple[_Candidate, Rule]] = []
        for candidate, _, rule, place in self.chosen.chosen:
            if place == "parallel":
                continue
            known = known_channels(candidate.module) if rule.output is None else None
            if known is not None:
                shapes[candidate.name] = known
            elif rule.channels is not None and self.example_inputs is None:
                shapes[candidate.name] = OutputShape(rule.channels, False)
            else:
                unknown.append((candidate, rule))
        if unknown:
            entries = {candidate.name: rule.output for candidate, rule in unknown}
            shapes.update(probe_outputs(self.model, list(entries), entries, self.example_inputs))
        return shapes

    def _layer(
        self, candidate: _Candidate, number: int, rule: Rule, place: Place, shapes: dict[str, OutputShape]
    ) -> PlannedLayer | None:
        label = f"rule {number}: {candidate.name or '(root)'} ({base_class(candidate.module).__name__})"
        refusal = self._host_refusal(candidate, place)
        site = None if refusal else self._site(candidate.module, rule, place, shapes.get(candidate.name), label)
        if site is None:
            if refusal:
                self.problems.append(SpecError(f"{label} cannot host an adapter: {refusal}"))
            return None
        adapter = adapter_class(rule.kind)
        options, _ = read_options(adapter, rule.options)
        assert options is not None
        refusal = adapter.refuses(site, options)
        if refusal:
            self.problems.append(SpecError(f"{label} cannot take kind {rule.kind!r}: {refusal}"))
            return None
        with torch.device("meta"):
            draft: Adapter = adapter(site, options)
        return PlannedLayer(
            candidate.name,
            base_class(candidate.module).__name__,
            rule.kind,
            site,
            options,
            number,
            sum(parameter.numel() for parameter in draft.parameters()),
            float(rule.lr_mult),
            rule.output,
            adapter.merge_refusal,
        )

    def _host_refusal(self, candidate: _Candidate, place: Place) -> str | None:
        module = candidate.module
        if isinstance(module, torch.jit.ScriptModule):
            return "a TorchScript module has no Python forward to extend"
        if "forward" in module.__dict__:
            return "its forward was replaced on the object itself (fused already?), so an adapter would never run"
        if id(module) in self.chosen.bypassed:
            return self.chosen.bypassed[id(module)]
        if place == "parallel" and base_class(module) not in _PLAIN_HOSTS:
            return unlike_its_convolution(module)
        return None

    def _site(self, module: nn.Module, rule: Rule, place: Place, shape: OutputShape | None, label: str) -> Site | None:
        if place == "parallel":
            return Site("parallel", ConvGeometry.of(module))
        if shape is None:
            self.problems.append(
                SpecError(
                    f"{label}: the channels of its output could not be found out (it did not run, or returned no tensor). "
                    "Give channels: in the rule, output: for an entry of a tuple or dict, or example_inputs= to inject()."
                )
            )
            return None
        if rule.channels is not None and rule.channels != shape.channels:
            self.problems.append(
                SpecError(f"{label}: the rule says channels: {rule.channels}, but its output has {shape.channels}")
            )
            return None
        return Site("output", output_geometry(shape.channels, shape.channels_last))


def _owned(chosen: _Chooser, spec: Spec) -> dict[str, float]:
    """Return the modules with tensors of their own that train along, with their relative learning rates."""
    owned: dict[str, float] = {}
    for number, entry in enumerate(spec.unfreeze, 1):
        assert isinstance(entry, Unfreeze)
        label, earlier = f"unfreeze {number}", set(owned)
        excluded = [pattern[1:] for _, pattern in spec.resolve(entry.match) if pattern.startswith("!")]
        for written, _, matched in chosen.select(entry.match, label):
            below = [
                c for c in chosen.candidates if _has_tensors(c.module) and any(_is_below(c, top) for top in matched)
            ]
            names = [c.name for c in below if not any(c.matched_by(pattern) for pattern in excluded)]
            if not names:
                chosen.problems.append(
                    PatternError(f"{label}: nothing that {written!r} matches has parameters to unfreeze")
                )
            elif earlier.issuperset(names):
                chosen.problems.append(
                    PatternError(
                        f"{label}: {written!r} gets nothing, because earlier unfreeze entries already took all of it"
                    )
                )
            for name in names:
                owned.setdefault(name, float(entry.lr_mult))
    if spec.norm == "adapt":
        for candidate in chosen.candidates:
            if is_batchnorm_like(candidate.module):
                owned.setdefault(candidate.name, 1.0)
    return owned


def _is_below(candidate: _Candidate, top: _Candidate) -> bool:
    return any(
        not above or name == above or name.startswith(above + ".") for name in candidate.names for above in top.names
    )


def _bypassed(candidates: list[_Candidate]) -> dict[int, str]:
    """Return the modules whose weights a parent is known to read by itself, with the reason."""
    found: dict[int, str] = {}
    for candidate in candidates:
        for parent, children in _READS_WEIGHTS.items():
            if isinstance(candidate.module, parent):
                for child in children:
                    module = getattr(candidate.module, child, None)
                    if module is not None:
                        found[id(module)] = (
                            f"its parent {parent.__name__} reads {child}.weight itself and would bypass the adapter; "
                            "put the adapter on the parent's output instead"
                        )
    return found


def _has_output(module: nn.Module) -> bool:
    """Whether the module is one that is called (a ModuleList is not)."""
    forward = base_class(module).forward
    return getattr(forward, "__name__", "") != "_forward_unimplemented"


def _has_tensors(module: nn.Module) -> bool:
    return any(parameter.is_floating_point() for parameter in _own_parameters(module))


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _passes(module: nn.Module, rule: Rule) -> bool:
    classes = {base.__name__ for base in base_class(module).__mro__}
    if rule.only and not classes & set(rule.only):
        return False
    if not rule.where:
        return True
    if not isinstance(module, _PLAIN_HOSTS):
        return False
    geometry = ConvGeometry.of(module)
    sides = (geometry.in_channels, geometry.out_channels)
    size = rule.where.get("kernel_size", geometry.kernel_size)
    tests = {
        "min_channels": lambda value: min(sides) >= value,
        "max_channels": lambda value: max(sides) <= value,
        "kernel_size": lambda value: geometry.kernel_size == ((size, size) if isinstance(size, int) else tuple(size)),
        "groups": lambda value: geometry.groups == value,
        "depthwise": lambda value: (geometry.groups > 1 and geometry.in_per_group == 1) == value,
    }
    return all(tests[key](value) for key, value in rule.where.items())


def _conditions(rule: Rule) -> str:
    parts = [f"only: {', '.join(rule.only)}"] if rule.only else []
    return "; ".join(parts + [f"{key}: {value}" for key, value in rule.where.items()])


def check_host(module: nn.Module, name: str) -> None:
    """Raise if a module cannot have its class swapped; asked before anything is touched.

    Raises:
        HostError: for TorchScript modules.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise HostError(f"{name or '(root)'}: a TorchScript module has no Python class to extend")
