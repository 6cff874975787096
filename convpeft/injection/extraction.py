"""What an extraction did, module by module: the report that ``extract`` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import shortened
from ..planning.plan import Plan
from ..planning.tables import table


@dataclass(frozen=True)
class ExtractedLayer:
    """What became of one layer's change.

    Attributes:
        name: of the module.
        how: ``lora``, ``whole`` (its own tensors, unfrozen) or ``left`` (nothing was taken).
        rank: of the adapter, in each group; 0 without one.
        full_rank: of the change, at most; 0 for modules that are no convolution or linear layer.
        parameters: that were spent on it.
        change: norm of the difference between the two models' tensors (Frobenius).
        left: norm of what is not in the adapter.
    """

    name: str
    how: str
    rank: int
    full_rank: int
    parameters: int
    change: float
    left: float


@dataclass(frozen=True)
class Extraction:
    """What ``extract`` did; print it.

    Attributes:
        plan: of the adapter, as ``inject`` returns it.
        layers: every module whose tensors differ.
        unreached: layers that the batches never reached: their change is not weighted.
    """

    plan: Plan
    layers: tuple[ExtractedLayer, ...]
    unreached: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Parameters of the adapter, unfrozen ones included."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def left(self) -> float:
        """What is not in the adapter, relative to the whole change: norm over norm."""
        change = math.sqrt(sum(layer.change**2 for layer in self.layers))
        return math.sqrt(sum(layer.left**2 for layer in self.layers)) / change if change else 0.0

    def __str__(self) -> str:
        share = 100 * self.parameters / max(1, self.plan.base_parameters)
        head = (
            f"{self.plan.model_class}: {len(self.layers)} modules differ; {self.parameters:,} parameters = {share:.2f} % of "
            f"the base's {self.plan.base_parameters:,} leave {100 * self.left:.3g} % of the change"
        )
        rows = [
            (
                layer.name or "(root)",
                layer.how,
                f"{layer.rank} of {layer.full_rank}" if layer.full_rank else "–",
                f"{layer.parameters:,}",
                f"{layer.change:.3g}",
                f"{100 * layer.left / layer.change if layer.change else 0:.3g} %",
            )
            for layer in self.layers
        ]
        parts = [head, table(("module", "as", "rank", "parameters", "change", "left"), rows)]
        if self.unreached:
            parts.append(f"never reached by the batches, so not weighted: {shortened(self.unreached)}")
        return "\n".join(parts)
