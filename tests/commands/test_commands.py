"""The command line: each command's answer as text and JSON, and one line and exit code 2 for what cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import convpeft
from convpeft_commands import Commands, main
from tests.adapter_files import forged
from tests.files.test_file_merge import assert_bitwise, base_file, merged_model, net, saved

ROOT = Path(__file__).parents[2]
LORA = {"rules": [{"match": ["stem", "reflect", "proj"], "kind": "lora", "rank": 2}]}


def run(*arguments, code=0):
    """Run a command in this process and return what it prints."""
    done = CliRunner().invoke(main, [str(each) for each in arguments], prog_name="convpeft")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, (done.stdout, done.stderr)
    return done


def answer(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, two adapters of it, one of another base, and a spec."""
    folder = tmp_path_factory.mktemp("commands")
    base_file(net(), folder / "base.safetensors")
    saved(net(), folder, "screw")
    saved(net(), folder, "first", LORA, 1)
    saved(net(), folder, "second", LORA, 2)
    saved(net(seed=9), folder, "foreign", LORA)
    (folder / "lora.yaml").write_text(
        yaml.safe_dump({"version": 1, "rules": [{"match": "**", "kind": "lora", "rank": 2}]})
    )
    return folder


def test_every_command_has_help_and_an_example():
    names = Commands().list_commands(None)  # type: ignore[arg-type]
    assert {"combine", "diff", "inspect", "merge", "plan", "spec", "verify"} <= set(names)
    top = run("--help").stdout
    for name in names:
        assert f"  {name} " in top
        text = run(name, "--help").stdout
        if name != "spec":
            assert "Example:" in text
            assert "--json" in text


def test_help_and_completion_import_no_torch():
    script = (
        "import sys\nfrom convpeft_commands import main\n"
        "try:\n    main(['{}'], prog_name='convpeft')\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for argument in ("--help", "--version", "nothing"):
        done = subprocess.run([sys.executable, "-c", script.format(argument)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    environment = {"_CONVPEFT_COMPLETE": "bash_complete", "COMP_WORDS": "convpeft ins", "COMP_CWORD": "1", "PATH": ""}
    script = script.format("").replace("main([''], ", "main(")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "plain,inspect")


def test_the_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "convpeft", "spec", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Usage: convpeft spec" in done.stderr


def test_inspect(folder):
    said = answer("inspect", folder / "screw.safetensors")
    assert said["layers"]["stem"]["kind"] == "rep_mona"
    assert said["layers"]["stem"]["rank"] == 2
    assert said["unfrozen"].keys() == {"head", "norm"}
    assert said["bytes"] == (folder / "screw.safetensors").stat().st_size
    text = run("inspect", folder / "screw.safetensors").stdout
    assert "adapter 'screw': 6 layers" in text
    assert "3 x lora, parallel, rank 6" in text
    assert "merges: 6 of 6 layers" in text


def test_inspect_says_what_does_not_merge(tmp_path):
    path = saved(net(), tmp_path, "a", {"rules": [{"match": "block", "kind": "bottleneck", "reduction": 2}]})
    text = run("inspect", path).stdout
    assert "merges: 0 of 1 layers\n  block: " in text
    assert "GELU" in text


def test_diff(folder, tmp_path):
    assert (
        run("diff", folder / "screw.safetensors", folder / "screw.safetensors").stdout
        == "the same adapter on the same base\n"
    )
    said = answer("diff", folder / "first.safetensors", folder / "second.safetensors", code=1)
    assert said["differ"]
    assert said["fields"] == ["name"]
    assert set(said["tensors"]) >= {"adapter:stem:up", "adapter:stem:down"}
    first, second = (
        load_file(folder / f"{name}.safetensors")["adapter:stem:up"].double() for name in ("first", "second")
    )
    assert said["tensors"]["adapter:stem:up"] == pytest.approx(
        [float((first - second).abs().max()), float((first - second).norm() / first.norm())]
    )
    text = run("diff", folder / "screw.safetensors", folder / "foreign.safetensors", code=1).stdout
    assert "only in the first" in text
    assert "layers of the base that differ" in text
    assert "stem: kind, options" in text


def test_verify(folder):
    said = answer("verify", folder / "screw.safetensors", "--base", folder / "base.safetensors")
    assert said["fits"]
    other = answer("verify", folder / "foreign.safetensors", "--base", folder / "base.safetensors", code=1)
    assert (other["fits"], "stem" in other["differing"], "norm" in other["differing"]) == (False, True, False)


def test_plan_and_spec(folder, tmp_path):
    model = "tests.files.test_file_merge:Net"
    said = answer("plan", "--spec", folder / "lora.yaml", "--model", model)
    assert said["layers"]["grouped"]["geometry"]["groups"] == 2
    assert said["adapter_parameters"] == sum(layer["parameters"] for layer in said["layers"].values())
    assert "Net: 8 adapters" in run("plan", "--spec", folder / "lora.yaml", "--model", model).stdout
    assert answer("spec", "check", folder / "lora.yaml", "--model", model)["adapters"] == 8
    (tmp_path / "bad.yaml").write_text(
        "version: 1\nrules: [{match: stem, kind: lora, rnk: 2}, {match: x, kind: lroa}]\n"
    )
    wrong = run("spec", "check", tmp_path / "bad.yaml", code=2)
    assert wrong.stdout == ""
    assert wrong.stderr.count("\n") == 1
    assert "'rnk'" in wrong.stderr
    assert "lroa" in wrong.stderr


@pytest.mark.parametrize(
    "model",
    ["tests.files.test_file_merge:Net", "timm:resnet10t", "torchvision:ssdlite320_mobilenet_v3_large", "ultralytics:yolov8n-worldv2.yaml"],
)  # fmt: skip
def test_a_first_spec_fits_its_model(model, tmp_path):
    said = answer("spec", "init", "--model", model, "--rank", "4", "-o", tmp_path / "first.yaml")
    assert said["adapters"] > 4
    text = (tmp_path / "first.yaml").read_text()
    assert text == said["spec"]
    assert text.count("#") > 8
    again = answer("plan", "--spec", tmp_path / "first.yaml", "--model", model)
    assert len(again["layers"]) == said["adapters"]
    kept = run("spec", "init", "--model", model, "-o", tmp_path / "first.yaml", code=2)
    assert "is there already; --force replaces it" in kept.stderr


def test_merge(folder, tmp_path):
    base, screw = folder / "base.safetensors", folder / "screw.safetensors"
    said = answer("merge", "--base", base, "--adapter", screw, "-o", tmp_path / "m.safetensors")
    assert said["written"] == [str(tmp_path / "m.safetensors")]
    assert said["layers"]["stem"]["form"] == "absorbed"
    assert_bitwise(load_file(tmp_path / "m.safetensors"), merged_model(net(), screw))
    two = ["--adapter", folder / "first.safetensors", "--adapter", folder / "second.safetensors"]
    run("merge", "--base", base, *two, "--coefficient", "0", "--coefficient", "1", "-o", tmp_path / "n.safetensors")
    torch.testing.assert_close(
        load_file(tmp_path / "n.safetensors")["stem.weight"],
        merged_model(net(), folder / "second.safetensors")["stem.weight"],
    )


def test_combine(folder, tmp_path):
    files = [folder / "first.safetensors", folder / "second.safetensors"]
    said = answer(
        "combine",
        *files,
        "--weight",
        "1",
        "--weight",
        "0.5",
        "--method",
        "svd",
        "--rank",
        "2",
        "-o",
        tmp_path / "c.safetensors",
    )
    assert 0 < said["error"] < 1
    assert said["ranks"]["stem"] == 2
    assert convpeft.inspect_adapter(tmp_path / "c.safetensors").name == "combined"


BAD = {
    "a missing file": (["inspect", "missing.safetensors"], "missing.safetensors cannot be read"),
    "a folder": (["inspect", "."], "it is a directory"),
    "no adapter file": (["inspect", "base.safetensors"], "not one convpeft wrote"),
    "a text": (["inspect", "lora.yaml"], "no safetensors file"),
    "a changed file": (["inspect", "changed.safetensors"], "metadata is not what was saved"),
    "another base": (["merge", "--base", "base.safetensors", "--adapter", "foreign.safetensors", "-o", "out.safetensors"], "another base"),
    "a wrong output": (["merge", "--base", "base.safetensors", "--adapter", "screw.safetensors", "-o", "out.pt"], "has to be a .safetensors"),
    "a base that is none": (["verify", "screw.safetensors", "--base", "lora.yaml"], "no base that can be read"),
    "a spec that is none": (["spec", "check", "base.safetensors"], "base.safetensors"),
    "no such factory": (["plan", "--spec", "lora.yaml", "--model", "tests.cases:Nothing"], "has no attribute 'Nothing'"),
    "no such module": (["plan", "--spec", "lora.yaml", "--model", "nowhere:Net"], "No module named 'nowhere'"),
    "no factory": (["plan", "--spec", "lora.yaml", "--model", "resnet50"], "--model resnet50 is none of"),
    "no model": (["plan", "--spec", "lora.yaml", "--model", "builtins:dict"], "gave a dict"),
    "weights": (["plan", "--spec", "lora.yaml", "--model", "ultralytics:yolov8n.pt"], "no configuration of ultralytics"),
    "no value": (["plan", "--spec", "lora.yaml", "--model", "builtins:dict", "--set", "x"], "is not NAME=VALUE"),
    "an unknown spec": (["plan", "--spec", "no.yaml", "--model", "tests.files.test_file_merge:Net"], "no.yaml"),
    "a rank for linear": (["combine", "first.safetensors", "second.safetensors", "--rank", "2", "-o", "out.safetensors"], "linear keeps"),
    "an unwritable place": (["combine", "first.safetensors", "-o", "lora.yaml/out.safetensors"], "cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_one_line_and_code_2(folder, case, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(ROOT)
    arguments, match = BAD[case]
    path = folder / "changed.safetensors"
    forged(folder / "screw.safetensors", path, lambda metadata: None)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'\\"name\\": \\"screw\\"', b'\\"name\\": \\"scrow\\"'))
    before = sorted(each.name for each in folder.iterdir())
    done = run(*arguments, code=2)
    assert match in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert sorted(each.name for each in folder.iterdir()) == before
    said = answer(*arguments, code=2)
    assert match in said["error"]["message"]


@pytest.mark.parametrize(
    "arguments", [["instpect"], ["merge", "--form", "factored"], ["inspect"], ["inspect", "a", "--what"]]
)
def test_a_wrong_option_is_code_2(arguments):
    done = run(*arguments, code=2)
    assert "Error: " in done.stderr
    assert done.stdout == ""
