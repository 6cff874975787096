"""The site of each wanted adapter, and everything that keeps an adapter off a module: one list, for specs and for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..adapters.base import Adapter, Place, Site
from ..adapters.options import AdapterOptions
from ..adapters.registry import adapter_class, make_adapter
from ..convolution.geometry import PLAIN_HOSTS, ConvGeometry, output_geometry
from ..errors import shortened
from ..hosts.chains import carries_chains
from ..hosts.guards import swap_refusal
from ..hosts.slots import BASE, Entry, base_class
from ..hosts.unfrozen import tensors_of
from .contracts import OutputShape
from .outputs import Asked, known_output, observed_outputs
from .plan import PlannedLayer
from .probing import unlike_its_convolution, unreadable
from .shapes import Verdict


@dataclass(frozen=True)
class Wanted:
    """One adapter that a rule or a file asks for, before anything is known of the module.

    Attributes:
        name, module: the module.
        origin: what asks for it, as problems begin: ``rule 2: `` or nothing.
        kind, place, options: of the adapter.
        rule: number of the rule.
        lr_mult: relative learning rate.
        output: adapted entry of the module's output.
        channels: that a rule says the output has.
        geometry: of the site in a file; the module's must be the same.
        up_mult: relative learning rate of the last weights, or None.
    """

    name: str
    module: nn.Module
    origin: str
    kind: str
    place: Place
    options: AdapterOptions
    rule: int
    lr_mult: float
    output: Entry
    channels: int | None = None
    geometry: ConvGeometry | None = None
    up_mult: float | None = None

    @property
    def label(self) -> str:
        """What problems call it."""
        return f"{self.origin}{self.name or '(root)'} ({base_class(self.module).__name__})"


class Sites:
    """Finds out where each wanted adapter would sit.

    Attributes:
        layers: those that can be made, in order.
        problems: why the others cannot, a sentence each.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Sequence[Wanted],
        bypassed: Mapping[int, str],
        example_inputs: Any = None,
        *,
        trusting: bool = False,
    ) -> None:
        """Work all of them out; the model is not touched.

        Args:
            model: of the modules.
            wanted: adapters.
            bypassed: by ``id``, modules whose weights a parent reads itself, with the reason to refuse them.
            example_inputs: to run a copy of the model on, where only that tells a shape; unset, a generic image.
            trusting: use the file's shape where only running a copy would tell it; nothing is run.
        """
        self.model, self.bypassed, self.example_inputs, self.trusting = model, bypassed, example_inputs, trusting
        self.problems: list[str] = []
        self.drafts: dict[tuple[str, Site, AdapterOptions], Adapter] = {}
        outputs = self._outputs([each for each in wanted if each.place == "output"])
        self.layers: list[PlannedLayer] = []
        for each in wanted:
            try:
                self.layers.append(self._layer(each, outputs.get(each.name, Verdict())))
            except _Refused as refused:
                self.problems.append(f"{each.label}{refused}")

    def draft(self, kind: str, site: Site, options: AdapterOptions) -> Adapter:
        """Return an adapter on the meta device, to ask it things; layers alike share one."""
        key = (kind, site, options)
        if key not in self.drafts:
            self.drafts[key] = make_adapter(kind, site, options, "meta")
        return self.drafts[key]

    def _outputs(self, wanted: Sequence[Wanted]) -> dict[str, Verdict]:
        """Return what is known of outputs, by module name; what no single layer tells is found by running copies."""
        found: dict[str, Verdict] = {}
        unknown: list[Asked] = []
        wanted = [each for each in wanted if host_refusal(each.module, "output", self.bypassed) is None]
        for each in wanted:
            known = known_output(each.module) if each.output is None else None
            if known is not None:
                found[each.name] = known
            elif each.geometry is not None and self.trusting:
                found[each.name] = Verdict(OutputShape(each.geometry.out_channels, each.geometry.linear))
            else:
                unknown.append(Asked(each.name, each.module, each.output, each.channels))
        if unknown:
            found.update(observed_outputs(self.model, unknown, self.example_inputs))
        for each in wanted:
            if each.geometry is not None and not found[each.name].found:  # nothing runs here: the file is believed
                found[each.name] = Verdict(OutputShape(each.geometry.out_channels, each.geometry.linear))
        return found

    def _layer(self, wanted: Wanted, output: Verdict) -> PlannedLayer:
        refusal = host_refusal(wanted.module, wanted.place, self.bypassed)
        if refusal:
            raise _Refused(f" cannot host an adapter: {refusal}")
        kind = adapter_class(wanted.kind)
        refusal = _place_refusal(kind, wanted)
        site = None if refusal else Site(wanted.place, _geometry(wanted, output))
        try:
            refusal = refusal or kind.refuses(site, wanted.options)  # type: ignore[arg-type]
            draft = None if refusal else self.draft(wanted.kind, site, wanted.options)  # type: ignore[arg-type]
        except Exception as error:  # of a kind from outside; a rule's author sees it whole, a file is refused
            if wanted.geometry is None:
                raise
            refusal, draft = str(error), None
        if draft is not None and draft.reads_host:
            refusal = unreadable(wanted.module)
        if refusal or draft is None or site is None:
            raise _Refused(f" cannot take kind {wanted.kind!r}: {refusal}")
        return PlannedLayer(
            wanted.name,
            base_class(wanted.module).__name__,
            wanted.kind,
            site,
            wanted.options,
            wanted.rule,
            sum(parameter.numel() for parameter in draft.parameters()),
            wanted.lr_mult,
            wanted.output,
            kind.merge_refusal,
            draft.form,
            wanted.up_mult,
        )


class _Refused(Exception):  # not an error of ours: the end of the sentence that begins with the module
    """Why there can be no adapter."""


def _geometry(wanted: Wanted, output: Verdict) -> ConvGeometry:
    """Return the geometry of the site of a wanted adapter; ``output`` is what is known of the module's, if need be."""
    shape = output.shape
    if wanted.place == "parallel":
        here = ConvGeometry.of(wanted.module)
    elif output.refusal:
        raise _Refused(f" cannot take an adapter on its output: {output.refusal}")
    elif shape is None:
        raise _Refused(
            f": the channels of its output could not be found out ({output.unclear or 'it did not run'}). "
            "Give channels: in the rule, output: for an entry of a tuple or dict, or example_inputs= to inject()."
        )
    elif wanted.channels not in (None, shape.channels):
        raise _Refused(f": the rule says channels: {wanted.channels}, but its output has {shape.channels}")
    else:
        here = output_geometry(shape.channels, shape.channels_last)
    saved = wanted.geometry
    if saved is not None and saved != here:
        if wanted.place == "output" and here.out_channels != saved.out_channels:
            raise _Refused(f": {here.out_channels} output channels here, {saved.out_channels} in the file")
        differ = ", ".join(key for key, value in vars(here).items() if value != getattr(saved, key))
        raise _Refused(f": {here} here, {saved} in the file; not the same: {differ}")
    return here


def host_refusal(module: nn.Module, place: Place, bypassed: Mapping[int, str]) -> str | None:
    """Return why no adapter of any kind can be at this place of a module, or None when one can.

    Args:
        module: the host to be.
        place: beside it or on its output.
        bypassed: see ``Sites``.
    """
    refusal = swap_refusal(module)
    if refusal:
        return refusal
    if "forward" in module.__dict__:
        return "its forward was replaced on the object itself (fused already?), so an adapter would never run"
    if id(module) in bypassed:
        return bypassed[id(module)]
    if place == "output" and not has_output(module):
        return "it is never called itself, so it has no output"
    if place == "output" and carries_chains(module):
        return (
            "an earlier factored merge left plain chains here that an adapter on its output would not see; take that "
            "merge with form='single', or put the adapter on the parent's output"
        )
    if place == "parallel" and isinstance(module, PLAIN_HOSTS) and base_class(module) not in PLAIN_HOSTS:
        return unlike_its_convolution(module)
    return None


def has_output(module: nn.Module) -> bool:
    """Return whether a module is one that is called (a ModuleList is not)."""
    forward = getattr(base_class(module), "forward", None)  # a TorchScript module's class shows none
    return getattr(forward, "__name__", "") != "_forward_unimplemented"


def _place_refusal(kind: type[Adapter], wanted: Wanted) -> str | None:
    """Return why a kind serves no module of this class at this place, or None when it does."""
    if wanted.place not in kind.places:
        return f"it has no place {wanted.place!r}, only {', '.join(kind.places)}"
    if wanted.place == "parallel" and not isinstance(wanted.module, kind.hosts):
        return f"beside a layer it serves {', '.join(host.__name__ for host in kind.hosts)}"
    return None


def lazy_modules(modules: Mapping[str, nn.Module]) -> str | None:
    """Return a sentence that names modules without weights yet, or None when all have theirs."""
    lazy = [name for name, module in modules.items() if any(is_lazy(p) for p in own_parameters(module))]
    if not lazy:
        return None
    return (
        f"{shortened(lazy)} of it is lazy and has no weights yet; run the model once, on an input such as it "
        "will see, and inject then"
    )


def half_shared(modules: Mapping[str, nn.Module], owned: Mapping[str, nn.Module]) -> list[str]:
    """Return a problem for each tensor that a module to unfreeze shares with one that stays frozen.

    Args:
        modules: the user's, each once.
        owned: those to unfreeze, by any of their names.
    """
    trained = {id(module) for module in owned.values()}
    frozen = {
        id(tensor): name
        for name, module in modules.items()
        if id(module) not in trained
        for tensor in tensors_of(module, BASE).values()
    }
    return [
        f"unfreeze: {name!r} shares its {key} with {frozen[id(tensor)]!r}, which would stay frozen; unfreeze both or neither"
        for name, module in owned.items()
        for key, tensor in tensors_of(module, BASE).items()
        if id(tensor) in frozen
    ]


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are a module's own, not its children's."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]
