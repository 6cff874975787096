"""The plan of a merge: each layer's form, what it costs, and why; printable."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..planning.tables import table
from .forms import Form, Job, Merged, Operands

FORMS = ("auto", "single", "factored")


@dataclass(frozen=True)
class MergeRow:
    """How one layer merges.

    Attributes:
        name: of the adapted module.
        form: ``absorbed`` into its kernel, one larger ``single`` kernel, a ``factored`` chain of plain layers, or ``kept``.
        kernel_before, kernel_after: in words.
        macs_before, macs_after: multiply-accumulates for one output position (0 before, for a block's output).
        macs_single, macs_factored: what either form would cost; None where there is no such form.
        reason: why this form, or why it cannot merge.
    """

    name: str
    form: Form
    kernel_before: str
    kernel_after: str
    macs_before: int
    macs_after: int | None
    macs_single: int | None
    macs_factored: int | None
    reason: str

    @classmethod
    def of(cls, job: Job | Operands, merged: Merged) -> MergeRow:
        """Return the row of a layer that was worked out."""
        after = None if merged.form == "kept" else merged.macs_after
        costs = (merged.macs_before, after, merged.macs_single, merged.macs_factored)
        return cls(job.name, merged.form, merged.before, merged.after, *costs, merged.reason)


@dataclass(frozen=True)
class MergePlan:
    """What ``merge`` would do with each layer; print it.

    Attributes:
        rows: in module order.
        active: the adapters that would be merged.
    """

    rows: tuple[MergeRow, ...]
    active: tuple[str, ...]

    @property
    def refused(self) -> dict[str, str]:
        """Layers that cannot merge, with the reasons."""
        return {row.name: row.reason for row in self.rows if row.form == "kept"}

    def __str__(self) -> str:
        forms = Counter(row.form for row in self.rows)
        counts = ", ".join(f"{count} {form}" for form, count in forms.items()) or "no adapted layers"
        head = f"merge of {', '.join(self.active) or 'the bare base'}: {counts}; MACs are for one output position"
        cells = [
            (
                r.name or "(root)",
                r.form,
                r.kernel_before,
                r.kernel_after,
                f"{r.macs_before:,}",
                *map(_count, (r.macs_after, r.macs_single, r.macs_factored)),
                r.reason,
            )
            for r in self.rows
        ]
        kernels, macs = ("kernel before", "kernel after"), ("MACs before", "after", "if single", "if factored")
        titles = ("layer", "form", *kernels, *macs, "why")
        return f"{head}\n{table(titles, cells)}" if cells else head


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
