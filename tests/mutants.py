"""Does every field of ConvGeometry matter to a test? Drop each one, wherever it is read, and see a test fail.

Run ``python -m tests.mutants`` (``make mutants``). The tests are collected once; then each mutant runs them until one
fails. The exit status is 1 if a mutant survives all of them, 2 if the tests fail without any mutant.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from convpeft import ConvGeometry

TESTS = ["tests/convolution/test_geometry.py", "tests/merging/test_merge.py::test_merged_is_adapted"]
SUBSET = (
    "reference_and_geometry or build or plain_data or output_size or imprint"
    " or (lora-parallel-rank and (auto or linear) and not dora and not rslora)"
)
# read from a layer, run, written onto a layer, kept in a file, read from a file
PLACES = ("of", "convolve", "imprint", "to_dict", "from_dict")
EQUIVALENT = {
    ("convolve", "in_channels"): "the weight says it",
    ("convolve", "out_channels"): "the weight says it",
    ("imprint", "dynamic_kernel"): "timm's layer has padding 0 in its own fields, and 0 is what would be written there",
}


@dataclass(frozen=True)
class Mutant:
    """A method of ConvGeometry that has lost a field: it sees, or gives, the field's default instead."""

    place: str
    field: str

    def spoil(self, geometry: ConvGeometry) -> ConvGeometry:
        """Return the geometry without the field; channels, which have no default, become those of the other side."""
        default = next(field.default for field in fields(ConvGeometry) if field.name == self.field)
        other = geometry.out_channels if self.field == "in_channels" else geometry.in_channels
        return replace(geometry, **{self.field: other if default is MISSING else default})

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Replace the method inside the context."""
        original: Any = ConvGeometry.__dict__[self.place]
        if isinstance(original, classmethod):
            mutated: Any = classmethod(lambda cls, source: self.spoil(original.__func__(cls, source)))
        else:
            mutated = lambda geometry, *rest, **named: original(self.spoil(geometry), *rest, **named)  # noqa: E731
        setattr(ConvGeometry, self.place, mutated)
        try:
            yield
        finally:
            setattr(ConvGeometry, self.place, original)


MUTANTS = [
    Mutant(place, field.name)
    for place in PLACES
    for field in fields(ConvGeometry)
    if (place, field.name) not in EQUIVALENT
]


class Hunt:
    """A pytest plugin: in place of one run of the tests, one run for each mutant.

    Attributes:
        survivors: mutants that no test has noticed.
        broken: what fails without any mutant, or None; the collection, until it has succeeded.
    """

    def __init__(self) -> None:
        self.survivors: list[Mutant] = []
        self.broken: str | None = "the collection"

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the mutants and print what became of each."""
        if session.testsfailed or not session.items:
            return True
        self.broken = first_failure(session.items)
        for mutant in MUTANTS if self.broken is None else ():
            with mutant.alive():
                killer = first_failure(session.items)
            if killer is None:
                self.survivors.append(mutant)
            print(f"{mutant.place:<9} {mutant.field:<15} {killer or 'SURVIVED'}", flush=True)
        return True


def first_failure(items: list[pytest.Item]) -> str | None:
    """Run tests until one fails and return its name; None when all pass."""
    for item in items:
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=None)):
            return item.nodeid
    return None


def main() -> int:
    """Return the exit status."""
    hunt = Hunt()
    options = [
        "--nightly",
        "-q",
        "--no-header",
        "--no-summary",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-k",
        SUBSET,
    ]
    pytest.main([*TESTS, *options], plugins=[hunt])
    if hunt.broken is not None:
        print(f"Without any mutant, {hunt.broken} fails: mend that first.")
        return 2
    names = ", ".join(f"{mutant.place}: {mutant.field}" for mutant in hunt.survivors)
    print(
        f"{len(MUTANTS) - len(hunt.survivors)} of {len(MUTANTS)} mutants killed."
        + (f" Alive: {names}." if names else "")
    )
    return 1 if hunt.survivors else 0


if __name__ == "__main__":
    sys.exit(main())
