"""Adapters in folders and repositories of the Hub: the card says what is in the file, and no network is asked here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
import torch
from torch import nn

import convpeft
from convpeft import Rule, Spec


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()


def adapted() -> nn.Module:
    model = base()
    convpeft.inject(model, Spec(rules=[Rule("0", "lora", rank=2)], unfreeze=["3"]), name="screw")
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.1
    return model


def image() -> torch.Tensor:
    return torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_a_folder_comes_back_in_another_process(tmp_path):
    model = adapted()
    folder = convpeft.save_pretrained(model, tmp_path / "screw")
    assert sorted(each.name for each in folder.iterdir()) == ["README.md", "adapter.safetensors"]
    script = (
        "import torch, convpeft\nfrom tests.files.test_hub import base, image\nmodel = base()\n"
        f"file = convpeft.from_pretrained(model, {str(folder)!r})\n"
        "print(file.name, convpeft.active_adapters(model))\n"
        f"torch.save(model(image()), {str(tmp_path / 'out.pt')!r})"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "screw ('screw',)"
    assert torch.equal(torch.load(tmp_path / "out.pt"), model(image()))


def test_the_card_is_one_that_the_hub_reads_and_its_numbers_are_true(tmp_path):
    folder = convpeft.save_pretrained(
        adapted(), tmp_path, base_model="someone/base: 1", details={"license": "mit", "tags": ["screws", "lora"]}
    )
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "convpeft"
    assert card.data.base_model == "someone/base: 1"
    assert card.data.license == "mit"
    assert card.data.tags == ["convpeft", "adapter", "lora", "screws"]
    size = (folder / "adapter.safetensors").stat().st_size
    numbers = sum(p.numel() for p in base().parameters())
    down_up, own = 2 * 3 * 9 + 16 * 2, 16 * 4 + 4
    for row in (
        f"| base | someone/base: 1, {numbers:,} parameters |",
        "| adapters | 1 × lora |",
        f"| numbers in adapters | {down_up} |",
        f"| numbers in unfrozen modules | {own} in 1 modules |",
        f"| together | {down_up + own} = {100 * (down_up + own) / numbers:.2f} % of the base |",
        f"| file | {size:,} bytes, content {convpeft.inspect_adapter(folder / 'adapter.safetensors').content} |",
        "- match: '0'",
    ):
        assert row in card.content, row


def test_a_card_of_the_users_is_kept_and_ours_written_anew(tmp_path):
    model = adapted()
    convpeft.save_pretrained(model, tmp_path, base_model="first")
    convpeft.save_pretrained(model, tmp_path, base_model="second")
    assert "base_model: second" in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text("my own words", encoding="utf-8")
    convpeft.save_pretrained(model, tmp_path, base_model="third")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "my own words"


class Api:
    """What huggingface_hub offers at the edge of the network; it notes what it is asked."""

    calls: ClassVar[list] = []

    def __init__(self, token=None) -> None:
        self.calls.append(("token", token))

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, commit_message, files))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_what_is_pushed_is_what_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    model = adapted()
    url = convpeft.push_to_hub(model, "me/screw", private=True, token="secret", message="First")
    assert url == "https://hub/me/screw/commit/1"
    assert Api.calls[:2] == [("token", "secret"), ("create", "me/screw", True, True)]
    _, repo, message, files = Api.calls[2]
    assert (repo, message, sorted(files)) == ("me/screw", "First", ["README.md", "adapter.safetensors"])
    (tmp_path / "adapter.safetensors").write_bytes(files["adapter.safetensors"])
    asked = {}

    def download(repo_id, filename, **options):
        asked.update(repo_id=repo_id, filename=filename, **options)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    other = base()
    convpeft.from_pretrained(other, "me/screw", revision="v1", name="fetched")
    assert asked == {"repo_id": "me/screw", "filename": "adapter.safetensors", "revision": "v1", "token": None}
    assert convpeft.active_adapters(other) == ("fetched",)
    assert torch.equal(other(image()), model(image()))


def test_what_is_not_there_is_an_error_that_says_where_it_was_sought(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(convpeft.AdapterFileError, match="nobody/nothing is no folder here, and adapter"):
        convpeft.from_pretrained(base(), "nobody/nothing")
    with pytest.raises(convpeft.AdapterFileError, match="not a/b/c is no folder here"):
        convpeft.from_pretrained(base(), "not a/b/c")
    with pytest.raises(convpeft.AdapterFileError, match="cannot be read"):
        convpeft.from_pretrained(base(), tmp_path)
    with pytest.raises(convpeft.OptionError, match="details must map"):
        convpeft.save_pretrained(adapted(), tmp_path, details=["mit"])
    convpeft.save_pretrained(adapted(), tmp_path)
    with pytest.raises(convpeft.BaseMismatch):
        convpeft.from_pretrained(base(1), tmp_path)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(convpeft.OptionError, match=r"pip install convpeft\[hub\]"):
        convpeft.push_to_hub(adapted(), "me/screw")


def test_importing_convpeft_imports_none_of_these():
    script = (
        "import sys, convpeft; print([n for n in ('huggingface_hub', 'peft', 'lycoris', 'timm') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
