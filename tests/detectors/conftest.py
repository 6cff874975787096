"""Benches for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.detectors.steps import Bench, Convpeft, Library
from benchmarks.detectors.zoo import FAMILIES

BenchOf = Callable[..., Bench]


@pytest.fixture
def bench_of(tmp_path: Path) -> BenchOf:
    """Return a function from a family's name, and a library, to a bench; test_zoo.py fails where this one skips."""

    def bench(name: str, library: Library | None = None) -> Bench:
        if FAMILIES[name].missing:
            pytest.skip(f"needs {', '.join(FAMILIES[name].missing)}: pip install 'convpeft[detectors]'")
        return Bench(name, library or Convpeft(), tmp_path)

    return bench
