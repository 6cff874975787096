"""The file that the tests of this folder read."""

from __future__ import annotations

from pathlib import Path

import pytest

import convpeft
from tests.adapter_files import base, trained


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """An adapter file of all three kinds, an unfrozen layer and adapted norms."""
    path = tmp_path_factory.mktemp("files") / "screw.safetensors"
    return convpeft.save_adapter(trained(base()), path)
