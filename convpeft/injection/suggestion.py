"""What ``suggest`` returns: the spec, and why it is so; printable, and as a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from ..planning.spec import Spec
from ..planning.tables import table

_COLOURS = {"lora": "#2c7fb8", "rep_mona": "#d95f0e", "conv_lora": "#756bb1", "whole": "#31a354"}
_BYTES = 4


@dataclass(frozen=True)
class Choice:
    """One thing that a layer could have.

    Attributes:
        kind: of adapter; ``whole``: the layer trains as it is; ``norms``: the scale and shift of all norms train.
        rank: of the adapter.
        parameters: that it trains.
        gain: how far the loss falls, to first order, for a step of Adam of rate 1, measured on the other half of the batches.
    """

    kind: str
    rank: int
    parameters: int
    gain: float


@dataclass(frozen=True)
class Layer:
    """A layer that was measured.

    Attributes:
        name, geometry: of the layer.
        macs: multiply-accumulates of its largest call.
        choices: all that it could have.
    """

    name: str
    geometry: str
    macs: int
    choices: list[Choice] = field(default_factory=list)

    @property
    def most(self) -> float:
        """The largest gain of any choice."""
        return max((choice.gain for choice in self.choices), default=0.0)


@dataclass(frozen=True)
class Suggestion:
    """A spec, and what was measured for it; print it.

    Attributes:
        spec: to inject.
        budget: share of parameters that it was to keep.
        base_parameters: of the model.
        layers: all that were measured, in the model's order.
        chosen: what each of them gets, or None.
        norms: what was chosen for the norms, or None.
        batches: that were measured on.
    """

    spec: Spec
    budget: float
    base_parameters: int
    layers: tuple[Layer, ...]
    chosen: tuple[Choice | None, ...]
    norms: Choice | None
    batches: int

    @property
    def parameters(self) -> int:
        """How many parameters the spec trains."""
        return sum(choice.parameters for choice in (self.norms, *self.chosen) if choice is not None)

    def __str__(self) -> str:
        picked = [(layer, choice) for layer, choice in zip(self.layers, self.chosen, strict=True) if choice is not None]
        whole = sum(layer.macs for layer in self.layers)
        extra = sum(layer.macs * _share_of_work(layer, choice) for layer, choice in picked)
        head = (
            f"{len(picked)} of {len(self.layers)} layers; {self.parameters:,} parameters = "
            f"{100 * self.parameters / self.base_parameters:.2f} % of {self.base_parameters:,} (budget {100 * self.budget:g} %), "
            f"{self.parameters * _BYTES:,} bytes in float32; {100 * extra / max(1, whole):.1f} % more multiply-adds in training; "
            f"norm: {self.spec.norm}"
        )
        rows = [
            (
                layer.name,
                layer.geometry,
                choice.kind if choice.kind != "whole" else "unfreeze",
                str(choice.rank or "–"),
                f"{choice.parameters:,}",
                f"{choice.gain:.3g}",
                f"{100 * choice.gain / layer.most:.0f} %",
                f"{1000 * choice.gain / choice.parameters:.3g}",
            )
            for layer, choice in picked
        ]
        titles = ("layer", "geometry", "kind", "rank", "parameters", "gain", "of the most", "per 1,000")
        lines = [head, table(titles, rows)]
        if self.norms is not None:
            per = 1000 * self.norms.gain / self.norms.parameters
            lines.append(
                f"norms: {self.norms.parameters:,} parameters, gain {self.norms.gain:.3g}, {per:.3g} per 1,000"
            )
        lines.append(
            f"gain: fall of the loss for a step of Adam of rate 1, chosen and measured on halves of {self.batches} batches"
        )
        return "\n".join(lines)

    def draw(self, path: str | Path) -> Path:
        """Write a picture of the network as SVG, and return the path: a bar for each layer, its gain, and the rank it gets."""
        width, height, left, foot = 14 * len(self.layers) + 90, 330, 70, 210
        most = max((layer.most for layer in self.layers), default=0.0) or 1.0
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="10">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{left}" y="16" font-size="12">gain of each layer at most (grey) and as chosen; above it the rank</text>',
        ]
        for number, (layer, choice) in enumerate(zip(self.layers, self.chosen, strict=True)):
            x, tall = left + 14 * number, 170 * (layer.most / most) ** 0.5
            parts.append(f'<rect x="{x}" y="{foot - tall:.1f}" width="11" height="{tall:.1f}" fill="#dddddd"/>')
            if choice is not None:
                part = 170 * (max(0.0, choice.gain) / most) ** 0.5
                colour = _COLOURS[choice.kind]
                parts.append(f'<rect x="{x}" y="{foot - part:.1f}" width="11" height="{part:.1f}" fill="{colour}"/>')
                mark = choice.rank or "•"
                parts.append(f'<text x="{x + 5}" y="{foot - tall - 3:.1f}" text-anchor="middle">{mark}</text>')
            name = escape(layer.name)
            parts.append(
                f'<text transform="translate({x + 9},{foot + 6}) rotate(-60)" text-anchor="end" font-size="7">{name}</text>'
            )
        for number, (kind, colour) in enumerate(_COLOURS.items()):
            y = 40 + 14 * number
            parts.append(
                f'<rect x="4" y="{y - 8}" width="9" height="9" fill="{colour}"/><text x="16" y="{y}">{kind}</text>'
            )
        path = Path(path)
        path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")
        return path


def _share_of_work(layer: Layer, choice: Choice) -> float:
    """Return the multiply-adds of a choice as a share of the layer's: its parameters as a share of the layer's."""
    whole = next((each.parameters for each in layer.choices if each.kind == "whole"), 0)
    return 0.0 if choice.kind == "whole" or not whole else choice.parameters / whole
