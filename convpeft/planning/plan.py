"""What a plan is: one ``PlannedLayer`` for each adapter, and the printable ``Plan`` of them all."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..adapters.base import Site
from ..adapters.options import AdapterOptions
from ..errors import shortened
from ..hosts.records import LayerRecord
from .tables import table


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
        up_mult: relative learning rate of its last weights, or None.
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
    up_mult: float | None = None

    def record(self) -> LayerRecord:
        """Return the layer as the plain data that state and adapter files keep."""
        later = {field.name: field.default for field in fields(self.options) if field.name in self.options.later}
        values = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        values = {key: value for key, value in values.items() if key not in later or value != later[key]}
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        geometry = self.site.geometry.to_dict()
        return LayerRecord(
            self.kind, self.site.place, options, geometry, self.output, self.lr_mult, self.rule, self.up_mult
        )


@dataclass(frozen=True)
class Plan:
    """What ``inject`` would do; print it.

    Attributes:
        layers: the adapters, in module order.
        owned: modules that train along (unfrozen, or norms under ``norm: affine`` and ``adapt``), with relative learning
            rates.
        shadowed: for each module an earlier rule had taken: (module, the later rule, the winning rule).
        left: modules a ``leave`` rule keeps bare.
        base_parameters: of the model, without adapters.
        owned_parameters: how many of those train along.
        warnings: what the plan can do and probably should not, a sentence each.
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
    warnings: tuple[str, ...] = ()

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
        parts += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(parts)
