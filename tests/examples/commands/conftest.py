"""The base, data, texts and adapter files that a module's tests of the commands share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write them once for each module; imported here, so that a module can skip first where ultralytics is missing."""
    from .place import make_place

    return make_place(tmp_path_factory.mktemp("commands"))
