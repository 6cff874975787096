"""Merging files: bit for bit the tensors of ``merge`` on the loaded model, or a refusal that writes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import convpeft
from convpeft.files import file_merge
from tests.adapter_files import forged


class Net(nn.Module):
    """Every geometry that a file has to tell: strides, dilation, groups, padding modes, transposed and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.reflect = nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 12, (1, 5), padding="same", groups=2, padding_mode="circular")
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1, groups=3)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 6, 1))
        self.head = nn.Conv2d(6, 4, 1)
        self.proj = nn.Linear(4, 5)

    def forward(self, x):
        x = self.up(self.grouped(self.reflect(self.norm(self.stem(x)))))
        return self.proj(self.head(self.block(x)).mean((2, 3)))


RULES = [
    {"match": "stem", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3], "branch_norm": True},
    {"match": "reflect", "kind": "lora", "rank": 2, "dora": True},
    {"match": ["grouped", "up", "proj"], "kind": "lora", "rank": 6},
    {"match": "block", "kind": "lora", "rank": 2, "place": "output"},
]
SPEC = {"rules": RULES, "unfreeze": ["head"], "norm": "adapt"}


def net(dtype=torch.float32, seed=0, kind=Net):
    torch.manual_seed(seed)
    return kind().to(dtype).eval()


def shaken(model, seed=1):
    """Give everything that trains other values, in place, statistics of norms included."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if isinstance(model, Net) and model.norm.weight.requires_grad:
            model.norm.running_mean.add_(0.25)
            model.norm.num_batches_tracked.add_(7)
    return model


def saved(model, folder, name, spec=SPEC, seed=1):
    convpeft.inject(model, spec, name=name)
    return convpeft.save_adapter(shaken(model, seed), folder / f"{name}.safetensors")


def base_file(model, path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    return path


def assert_bitwise(found, expected):
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert (
            found[key].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()
            if (tensor.dtype != torch.bfloat16)
            else torch.equal(found[key].view(torch.int16), tensor.view(torch.int16))
        ), key


def merged_model(model, *paths, form="auto"):
    """Load the files into a model, activate them all, and merge."""
    for number, path in enumerate(paths):
        convpeft.load_adapter(model, path, name=f"a{number}")
    convpeft.set_active(model, [f"a{number}" for number in range(len(paths))])
    return convpeft.merge(model, form=form).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_tensors_are_those_of_merge(tmp_path, dtype):
    path = saved(net(dtype), tmp_path, "screw")
    base = base_file(net(dtype), tmp_path / "base.safetensors")
    done = convpeft.merge_files(base, path, tmp_path / "merged.safetensors")
    found = load_file(tmp_path / "merged.safetensors")
    assert_bitwise(found, merged_model(net(dtype), path))
    assert [row.form for row in done.plan.rows] == ["absorbed"] * 6
    assert set(done.carried) >= {"head.weight", "norm.running_mean", "norm.num_batches_tracked"}
    changed = {key for key, tensor in net(dtype).state_dict().items() if not torch.equal(tensor, found[key])}
    assert {"stem.weight", "reflect.weight", "grouped.weight", "up.weight", "block.2.weight", "head.weight"} <= changed
    assert "block.0.weight" not in changed
    assert done.files == (tmp_path / "merged.safetensors",)
    assert "6 absorbed" in str(done)


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state, "epoch": 3}], ids=["plain", "held"])
def test_a_pickled_base_is_read_as_tensors_alone(tmp_path, wrap):
    path = saved(net(), tmp_path, "screw")
    torch.save(wrap(net().state_dict()), tmp_path / "base.pt")
    convpeft.merge_files(tmp_path / "base.pt", path, tmp_path / "merged.safetensors")
    assert_bitwise(load_file(tmp_path / "merged.safetensors"), merged_model(net(), path))


def test_a_pickled_model_is_refused_and_not_run(tmp_path):
    path = saved(net(), tmp_path, "screw")
    torch.save(net(), tmp_path / "base.pt")
    with pytest.raises(convpeft.AdapterFileError, match=r"weights_only=True.*save its state_dict"):
        convpeft.merge_files(tmp_path / "base.pt", path, tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()


def test_shards_in_and_out(tmp_path):
    model, state = net(), {}
    path = saved(net(), tmp_path, "screw")
    base = base_file(model, tmp_path / "base.safetensors")
    done = convpeft.merge_files(base, path, tmp_path / "one.safetensors.index.json", max_shard_bytes=2000)
    assert len(done.files) > 3
    assert done.files[-1] == tmp_path / "one.safetensors.index.json"
    index = json.loads(done.path.read_text())
    for file in done.files[:-1]:
        assert all(index["weight_map"][key] == file.name for key in load_file(file))
        state.update(load_file(file))
    expected = merged_model(net(), path)
    assert_bitwise(state, expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())

    parts = [
        dict(list(model.state_dict().items())[start::3]) for start in range(3)
    ]  # weight and bias in different ones
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"part{number}.safetensors")
    places = {key: f"part{number}.safetensors" for number, part in enumerate(parts) for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    many = convpeft.merge_files(
        tmp_path / "model.safetensors.index.json", path, tmp_path / "many.safetensors.index.json"
    )
    assert [file.name for file in many.files[:3]] == [f"many-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert_bitwise({key: tensor for file in many.files[:3] for key, tensor in load_file(file).items()}, expected)
    convpeft.merge_files(tmp_path / "model.safetensors.index.json", path, tmp_path / "joined.safetensors")
    assert_bitwise(load_file(tmp_path / "joined.safetensors"), expected)


def test_several_adapters_add_up(tmp_path):
    first = saved(net(), tmp_path, "first")
    second = saved(
        net(), tmp_path, "second", {"rules": [{"match": ["stem", "block.0", "proj"], "kind": "lora", "rank": 1}]}, 2
    )
    base = base_file(net(), tmp_path / "base.safetensors")
    convpeft.merge_files(base, [first, second], tmp_path / "merged.safetensors")
    assert_bitwise(load_file(tmp_path / "merged.safetensors"), merged_model(net(), first, second))


def test_a_coefficient_multiplies_the_update(tmp_path):
    spec = {"rules": [{"match": ["stem", "reflect"], "kind": "lora", "rank": 2}]}
    path = saved(net(torch.float64), tmp_path, "screw", spec)
    other = saved(net(torch.float64), tmp_path, "other", spec, seed=4)
    plain = net(torch.float64).state_dict()
    base = base_file(net(torch.float64), tmp_path / "base.safetensors")
    convpeft.merge_files(base, [path, other], tmp_path / "merged.safetensors", coefficients=[0.25, -2])
    found = load_file(tmp_path / "merged.safetensors")
    alone = [merged_model(net(torch.float64), each) for each in (path, other)]
    for key in ("stem.weight", "reflect.weight"):
        expected = plain[key] + 0.25 * (alone[0][key] - plain[key]) - 2 * (alone[1][key] - plain[key])
        torch.testing.assert_close(found[key], expected, rtol=1e-12, atol=1e-12)


def test_a_kernel_that_grows_takes_form_single(tmp_path):
    spec = {"rules": [{"match": "head", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3, 5]}]}
    path = saved(net(), tmp_path, "screw", spec)
    base, out = base_file(net(), tmp_path / "base.safetensors"), tmp_path / "merged.safetensors"
    with pytest.raises(
        convpeft.MergeError, match=r"1 of 1 layers.*nothing was written.*\n  head: it merges with new modules"
    ) as caught:
        convpeft.merge_files(base, path, out)
    assert "form='single'" in str(caught.value)
    assert list(caught.value.reasons) == ["head"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["base.safetensors", "screw.safetensors"]
    done = convpeft.merge_files(base, path, out, form="single")
    assert_bitwise(load_file(out), merged_model(net(), path, form="single"))
    assert done.grown["head"].kernel_size == (5, 5)
    assert "head: 6→4 5×5, padding (2, 2, 2, 2)" in str(done)


def test_a_bias_that_is_new_is_written(tmp_path):
    spec = {"rules": [{"match": "stem", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3], "branch_norm": True}]}
    path = saved(net(), tmp_path, "screw", spec)
    base = base_file(net(), tmp_path / "base.safetensors")
    convpeft.merge_files(base, path, tmp_path / "merged.safetensors")
    expected = merged_model(net(), path)
    assert "stem.bias" in expected
    assert "stem.bias" not in net().state_dict()
    assert_bitwise(load_file(tmp_path / "merged.safetensors"), expected)


class Twice(nn.Module):
    """A layer under two names, and one whose weight its parent may read itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = self.first
        self.embed = nn.Linear(3, 3)

    def forward(self, x):
        x = self.second(self.first(x)).mean((2, 3))
        return nn.functional.linear(x, self.embed.weight.T) if x.ndim == 3 else self.embed(x)


def test_a_layer_of_two_names_is_merged_under_both(tmp_path):
    path = saved(net(kind=Twice), tmp_path, "screw", {"rules": [{"match": "first", "kind": "lora", "rank": 2}]})
    torch.save(net(kind=Twice).state_dict(), tmp_path / "base.pt")
    convpeft.merge_files(tmp_path / "base.pt", path, tmp_path / "merged.safetensors")
    expected = merged_model(net(kind=Twice), path)
    assert not torch.equal(expected["second.weight"], net(kind=Twice).state_dict()["second.weight"])
    assert_bitwise(load_file(tmp_path / "merged.safetensors"), expected)


def test_a_layer_that_others_may_read_is_refused(tmp_path):
    path = saved(net(kind=Twice), tmp_path, "screw", {"rules": [{"match": "embed", "kind": "lora", "rank": 2}]})
    torch.save(net(kind=Twice).state_dict(), tmp_path / "base.pt")
    with pytest.raises(convpeft.MergeError, match=r"embed: another module may read its weight \(embed.weight\)"):
        convpeft.merge_files(tmp_path / "base.pt", path, tmp_path / "merged.safetensors")


class Odd(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = Odd(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.plain = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.plain(self.body(self.odd(x)))


def test_what_needs_the_model_is_refused_and_named(tmp_path):
    rules = [
        {"match": ["odd", "plain"], "kind": "lora", "rank": 2},
        {"match": "body", "kind": "bottleneck", "reduction": 2},
    ]
    path = saved(net(kind=Strange), tmp_path, "screw", {"rules": rules})
    base = base_file(net(kind=Strange), tmp_path / "base.safetensors")
    with pytest.raises(convpeft.MergeError, match="2 of 3 layers cannot merge; nothing was written") as caught:
        convpeft.merge_files(base, path, tmp_path / "merged.safetensors", form="single")
    assert caught.value.reasons["odd"].startswith("its class Odd may compute more than the convolution of its weight")
    assert caught.value.reasons["body"].startswith("an adapter on the output of a ReLU becomes a new module")
    assert not (tmp_path / "merged.safetensors").exists()


def test_timm_same_padding_is_known(tmp_path):
    from timm.layers import Conv2dSame

    def model():
        torch.manual_seed(0)
        return nn.Sequential(Conv2dSame(3, 4, 3, stride=2), nn.Conv2d(4, 4, 1)).eval()

    spec = {"rules": [{"match": "0", "kind": "lora", "rank": 2}]}
    path = saved(model(), tmp_path, "screw", spec)
    convpeft.merge_files(base_file(model(), tmp_path / "base.safetensors"), path, tmp_path / "merged.safetensors")
    assert_bitwise(load_file(tmp_path / "merged.safetensors"), merged_model(model(), path))


def test_another_base_is_refused_and_any_base_takes_it(tmp_path):
    path = saved(net(), tmp_path, "screw")
    other = base_file(net(seed=5), tmp_path / "base.safetensors")
    with pytest.raises(convpeft.BaseMismatch, match=r"made on another base.*layers differ") as caught:
        convpeft.merge_files(other, path, tmp_path / "merged.safetensors")
    assert {"stem", "proj", "block.0"} <= set(caught.value.layers)
    assert "norm" not in caught.value.layers
    convpeft.merge_files(other, path, tmp_path / "merged.safetensors", any_base=True)
    model = net(seed=5)
    convpeft.load_adapter(model, path, any_base=True)
    assert_bitwise(load_file(tmp_path / "merged.safetensors"), convpeft.merge(model).state_dict())


def test_a_prefix_is_taken_off(tmp_path):
    path = saved(net(), tmp_path, "screw")
    whole = {f"backbone.{key}": tensor for key, tensor in net().state_dict().items()} | {"neck.weight": torch.ones(2)}
    save_file(whole, tmp_path / "base.safetensors")
    out = tmp_path / "merged.safetensors"
    with pytest.raises(convpeft.AdapterFileError, match=r"no tensor .*prefix='backbone\.' \(--prefix\)"):
        convpeft.merge_files(tmp_path / "base.safetensors", path, out, any_base=True)
    convpeft.merge_files(tmp_path / "base.safetensors", path, out, prefix="backbone.")
    expected = {f"backbone.{key}": tensor for key, tensor in merged_model(net(), path).items()}
    assert_bitwise(load_file(out), expected | {"neck.weight": torch.ones(2)})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"form": "factored"}, convpeft.OptionError, "auto, single, not 'factored'; a factored merge makes new modules"),
        ({"coefficients": [1, 2]}, convpeft.OptionError, "2 coefficients for 1 adapter files"),
        ({"coefficients": [float("nan")]}, convpeft.OptionError, "not a finite number"),
        ({"coefficients": [0.5]}, convpeft.OptionError, "brings tensors of its own .*has to be 1"),
        ({"out": "merged.pt"}, convpeft.OptionError, "has to be a .safetensors file"),
        ({"out": "base.safetensors"}, convpeft.OptionError, "is one of the files to merge"),
        ({"adapters": []}, convpeft.OptionError, "no adapter file"),
        ({"adapters": "missing.safetensors"}, convpeft.AdapterFileError, "cannot be read"),
        ({"base": "missing.safetensors"}, convpeft.AdapterFileError, "cannot be read"),
        ({"base": "notes.txt"}, convpeft.AdapterFileError, "no base that can be read"),
        ({"base": "screw.safetensors"}, convpeft.BaseMismatch, "made on another base"),
        ({"adapters": ["screw.safetensors", "screw.safetensors"]}, convpeft.AdapterConflict, "both bring their own"),
    ],
)  # fmt: skip
def test_wrong_uses_are_refused(tmp_path, monkeypatch, change, error, match):
    monkeypatch.chdir(tmp_path)
    saved(net(), tmp_path, "screw")
    base_file(net(), tmp_path / "base.safetensors")
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    wanted = {"base": "base.safetensors", "adapters": "screw.safetensors", "out": "merged.safetensors", **change}
    with pytest.raises(error, match=match):
        convpeft.merge_files(wanted.pop("base"), wanted.pop("adapters"), wanted.pop("out"), **wanted)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_a_file_of_an_earlier_version_has_to_be_saved_again(tmp_path):
    path = saved(net(), tmp_path, "screw")
    old = forged(path, tmp_path / "old.safetensors", lambda metadata: metadata.pop("hosts"))
    assert convpeft.inspect_adapter(old).hosts is None
    base = base_file(net(), tmp_path / "base.safetensors")
    with pytest.raises(convpeft.AdapterFileError, match=r"load it on its base .* save it again"):
        convpeft.merge_files(base, old, tmp_path / "merged.safetensors")
    model = net()
    convpeft.load_adapter(model, old)
    again = convpeft.save_adapter(model, tmp_path / "again.safetensors")
    convpeft.merge_files(base, again, tmp_path / "merged.safetensors")


@pytest.mark.parametrize(
    "hosts",
    [[], {"stem": 1}, {"stem": {"other": "x"}}, {"stem": {"names": "x"}}, {"stem": {"class": 3}}, {"stem": {"target": "a"}},
     {"block": {"target": "block.2", "geometry": {"in_channels": -1}}}],
)  # fmt: skip
def test_notes_that_are_not_sound_are_refused(tmp_path, hosts):
    path = saved(net(), tmp_path, "screw")
    bad = forged(path, tmp_path / "bad.safetensors", lambda metadata: metadata.update(hosts=hosts))
    with pytest.raises(convpeft.AdapterFileError, match=r"metadata is not sound: .*(hosts is|note on layer)"):
        convpeft.inspect_adapter(bad)


def test_what_fails_while_writing_leaves_nothing(tmp_path, monkeypatch):
    path = saved(net(), tmp_path, "screw")
    base = base_file(net(), tmp_path / "base.safetensors")
    out = tmp_path / "merged.safetensors"
    out.write_bytes(b"old")
    monkeypatch.setattr(file_merge, "_cast", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convpeft.merge_files(base, path, out)
    assert out.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 3


PEAK = """
import json, sys
from pathlib import Path
import convpeft
def kilobytes(what):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
base, adapter, out = sys.argv[1:]
before = kilobytes("VmRSS:")
convpeft.merge_files(base, adapter, out)
print(json.dumps([before, kilobytes("VmHWM:")]))
"""


def measured(tmp_path, blocks: int, width: int) -> tuple[int, int]:
    """Return the bytes of a made-up base, and by how much the peak memory of a second process grew while it was merged."""

    def model():
        return nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(blocks)))

    torch.manual_seed(0)
    big = model()
    base = base_file(big, tmp_path / "base.safetensors")
    path = saved(big, tmp_path, "a", {"rules": [{"match": "*", "kind": "lora", "rank": 2}]})
    del big
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process's memory is read from /proc")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PEAK, base, path, tmp_path / "out.safetensors"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    return base.stat().st_size, (after - before) * 1024


def test_memory_is_that_of_a_few_layers(tmp_path):
    size, grown = measured(tmp_path, 40, 256)  # 2.4 MB each, 4.7 MB in float64
    assert size > 90e6
    assert grown < 60e6


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_base(tmp_path):
    size, grown = measured(tmp_path, 160, 512)
    assert size > 1.5e9
    assert grown < 160e6
