"""From a spec and a model to a plan: what each module would get. Finds every problem; touches nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .adapters.base import Adapter, AdapterOptions, Place, Site, read_options
from .chains import carries_chains
from .choosing import Candidate, Choice
from .errors import HostError, PatternError, SpecError, raise_problems, shortened
from .geometry import PLAIN_HOSTS, ConvGeometry, output_geometry
from .hosting import BASE, SLOT, base_class, is_batchnorm_like, shown_tensors, slots_of
from .lean import serves
from .probing import OutputShape, known_channels, probe_outputs, unlike_its_convolution, unreadable
from .registry import adapter_class
from .reports import table
from .spec import Rule, Spec, Unfreeze
from .state import LayerRecord

_OWN_CHILD = f"it has a child {SLOT!r} of its own, the very name convpeft needs here; rename that one"


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
        form: its update is computed in, where a kind has several; chosen by what a training step costs.
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
    form: str | None = None

    def record(self) -> LayerRecord:
        """Return the layer as the plain data that state and adapter files keep."""
        values = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
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
                layer.form or "–",
                layer.merge_refusal or "yes",
            )
            for layer in self.layers
        ]
        titles = ("module", "class", "geometry", "kind", "place", "rule", "parameters", "form", "can merge")
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


def make_plan(model: nn.Module, spec: Spec, example_inputs: Any = None) -> Plan:
    """Return what ``inject`` would do, or raise for everything that is wrong; touches nothing.

    Raises:
        SpecError: all problems at once (a ``PatternError`` when all are of patterns, and so on).
    """
    heading = f"cannot plan for this {base_class(model).__name__}"
    chosen = Choice(model, spec)
    lazy = [c.name for c in chosen.candidates if any(is_lazy(parameter) for parameter in _own_parameters(c.module))]
    if lazy:
        raise SpecError(
            f"{heading}: {shortened(lazy)} of it is lazy and has no weights yet; run the model once, on an input such as it "
            "will see, and inject then"
        )
    chosen.choose()
    layers = _Siting(model, chosen, example_inputs).plan()
    owned = _owned(chosen, spec)
    raise_problems(spec.problems() + chosen.problems, heading)
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


class _Siting:
    """Finds the site of each chosen adapter: geometry, channels, refusals, size."""

    def __init__(self, model: nn.Module, chosen: Choice, example_inputs: Any) -> None:
        self.model, self.chosen, self.example_inputs = model, chosen, example_inputs
        self.problems = chosen.problems
        self.options: dict[int, AdapterOptions] = {}
        self.drafts: dict[tuple[str, Site, AdapterOptions], Adapter] = {}

    def plan(self) -> list[PlannedLayer]:
        shapes = self._output_shapes()
        planned = [self._layer(*entry, shapes) for entry in self.chosen.chosen]
        return [layer for layer in planned if layer is not None]

    def _output_shapes(self) -> dict[str, OutputShape]:
        shapes: dict[str, OutputShape] = {}
        unknown: list[tuple[Candidate, Rule]] = []
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
        self, candidate: Candidate, number: int, rule: Rule, place: Place, shapes: dict[str, OutputShape]
    ) -> PlannedLayer | None:
        label = f"rule {number}: {candidate.name or '(root)'} ({base_class(candidate.module).__name__})"
        refusal = self._host_refusal(candidate, place)
        site = None if refusal else self._site(candidate.module, rule, place, shapes.get(candidate.name), label)
        if site is None:
            if refusal:
                self.problems.append(SpecError(f"{label} cannot host an adapter: {refusal}"))
            return None
        adapter = adapter_class(rule.kind)
        options = self._options(number, rule)
        refusal = adapter.refuses(site, options)
        if refusal:
            self.problems.append(SpecError(f"{label} cannot take kind {rule.kind!r}: {refusal}"))
            return None
        draft = self._draft(rule.kind, site, options)
        refusal = unreadable(candidate.module) if draft.reads_host else None
        if refusal:
            self.problems.append(SpecError(f"{label} cannot take kind {rule.kind!r}: {refusal}"))
            return None
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
            draft.form,
        )

    def _options(self, number: int, rule: Rule) -> AdapterOptions:
        """Return a rule's options, read once."""
        if number not in self.options:
            options, _ = read_options(adapter_class(rule.kind), rule.options)
            assert options is not None
            self.options[number] = options
        return self.options[number]

    def _draft(self, kind: str, site: Site, options: AdapterOptions) -> Adapter:
        """Return an adapter without memory, to ask it things; layers alike share one."""
        key = (kind, site, options)
        if key not in self.drafts:
            with torch.device("meta"):
                self.drafts[key] = adapter_class(kind)(site, options)
        return self.drafts[key]

    def _host_refusal(self, candidate: Candidate, place: Place) -> str | None:
        module = candidate.module
        if isinstance(module, torch.jit.ScriptModule):
            return "a TorchScript module has no Python forward to extend"
        if _own_child(module):
            return _OWN_CHILD
        if "forward" in module.__dict__:
            return "its forward was replaced on the object itself (fused already?), so an adapter would never run"
        if id(module) in self.chosen.bypassed:
            return self.chosen.bypassed[id(module)]
        if place == "output" and carries_chains(module):
            return (
                "an earlier factored merge left plain chains here that an adapter on its output would not see; take that "
                "merge with form='single', or put the adapter on the parent's output"
            )
        if place == "parallel" and base_class(module) not in PLAIN_HOSTS:
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


def _owned(chosen: Choice, spec: Spec) -> dict[str, float]:
    """Return the modules with tensors of their own that train along, with their relative learning rates."""
    owned: dict[str, float] = {}
    for number, entry in enumerate(spec.unfreeze, 1):
        assert isinstance(entry, Unfreeze)
        if not spec.can_resolve(entry.match):
            continue
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
    chosen.problems += _half_shared(chosen, owned)
    return owned


def _half_shared(chosen: Choice, owned: dict[str, float]) -> list[SpecError]:
    """Return a problem for each tensor that a module to unfreeze shares with one that stays frozen."""
    frozen = {
        id(tensor): candidate.name
        for candidate in chosen.candidates
        if candidate.name not in owned
        for tensor in shown_tensors(candidate.module, BASE).values()
    }
    return [
        SpecError(
            f"unfreeze: {name!r} shares its {key} with {frozen[id(tensor)]!r}, which would stay frozen; unfreeze both or neither"
        )
        for name in owned
        for key, tensor in shown_tensors(chosen.by_name[name].module, BASE).items()
        if id(tensor) in frozen
    ]


def _is_below(candidate: Candidate, top: Candidate) -> bool:
    return any(
        not above or name == above or name.startswith(above + ".") for name in candidate.names for above in top.names
    )


def _has_tensors(module: nn.Module) -> bool:
    return any(parameter.is_floating_point() for parameter in _own_parameters(module))


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _own_child(module: nn.Module) -> bool:
    return slots_of(module) is None and SLOT in module._modules


def can_be_lean(module: nn.Module) -> bool:
    """Return whether a frozen module gains from the class swap without an adapter on it, and allows it."""
    if isinstance(module, torch.jit.ScriptModule) or _own_child(module) or "forward" in module.__dict__:
        return False
    return serves(base_class(module))


def check_host(module: nn.Module, name: str) -> None:
    """Raise if a module cannot have its class swapped; asked before anything is touched.

    Raises:
        HostError: for TorchScript modules, and those with a child of the name that convpeft's own child needs.
    """
    if _own_child(module):
        raise HostError(f"{name or '(root)'} ({base_class(module).__name__}): {_OWN_CHILD}")
    if isinstance(module, torch.jit.ScriptModule):
        raise HostError(f"{name or '(root)'}: a TorchScript module has no Python class to extend")
