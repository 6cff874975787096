"""The wheel alone is enough: installed without the source tree, its command merges files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.files.test_file_merge import base_file, net, saved

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
@pytest.mark.slow
def test_the_command_of_the_wheel_works_without_the_source_tree(tmp_path):
    source, site, work = tmp_path / "source", tmp_path / "site", tmp_path / "work"
    source.mkdir()
    for name in ("convpeft", "convpeft_commands"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", ".", *offline, "-w", tmp_path / "dist"], cwd=source, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("convpeft-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True, capture_output=True
    )
    shutil.rmtree(source)
    work.mkdir()
    base_file(net(), work / "base.safetensors")
    saved(net(), work, "screw")
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*arguments):
        command = [sys.executable, site / "bin" / "convpeft", *arguments]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)

    done = run(
        "merge", "--base", "base.safetensors", "--adapter", "screw.safetensors", "-o", "merged.safetensors", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] == ["merged.safetensors"]
    where = "import convpeft, convpeft_commands; print(convpeft.__file__, convpeft_commands.__file__)"
    shown = subprocess.run([sys.executable, "-c", where], cwd=work, env=environment, capture_output=True, text=True)
    assert all(Path(each).is_relative_to(site) for each in shown.stdout.split())
    assert run("inspect", "merged.safetensors").returncode == 2
