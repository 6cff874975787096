"""Every test starts from the same seed, on one thread, and without a network."""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="false", HF_HUB_OFFLINE="1")  # read when ultralytics is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # several workers on few cores: idle threads must not spin
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="convpeft-yolo-")

import pytest
import torch
from hypothesis import settings

from convpeft.adapters import registry

torch.set_num_threads(1)
settings.register_profile("ci", max_examples=1_200, deadline=None, derandomize=True, database=None)
settings.register_profile("nightly", max_examples=12_000, deadline=None, database=None, print_blob=True)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--nightly``."""
    text = "run the tests marked nightly as well, and the property tests with the profile nightly"
    parser.addoption("--nightly", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Take the other profile."""
    if config.getoption("nightly", False):
        settings.load_profile("nightly")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked nightly; a ``-m`` in setup.cfg would be lost as soon as somebody gives their own."""
    if not config.getoption("nightly", False):
        left = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=left)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one worker: what its tests share, models above all, is built once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def clean_registry():
    """Give the registry back as it was, whatever a test registers."""
    before = dict(registry._KINDS)
    yield
    registry._KINDS.clear()
    registry._KINDS.update(before)
