"""Nothing of the zoo is skipped without a word."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from benchmarks.detectors.zoo import FAMILIES

SETUP = Path(__file__).parents[2] / "setup.cfg"
NEEDED = {package for family in FAMILIES.values() for package in family.packages} | {"peft", "lycoris_lora"}


def test_no_package_of_the_zoo_is_missing() -> None:
    """Where one is, all tests of its families skip; this one fails, so that it is seen."""
    missing = sorted({package for family in FAMILIES.values() for package in family.missing})
    assert not missing, f"tests skipped for want of {', '.join(missing)}: pip install 'convpeft[detectors]'"


def test_the_detectors_extra_installs_every_package_of_the_zoo() -> None:
    config = configparser.ConfigParser()
    config.read(SETUP, encoding="utf-8")
    lines = config["options"]["install_requires"] + config["options.extras_require"]["detectors"]
    installed = {re.split(r"[<>=~!]", line)[0].strip().replace("-", "_") for line in lines.splitlines()}
    assert installed >= NEEDED
