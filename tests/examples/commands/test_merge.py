"""Merge: a plain model that every other program takes, checked, or refused; and the same as ONNX."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics")
import convpeft
from examples.yolo_world.commands import merge, proofs
from examples.yolo_world.training.model import load_world_model, use_classes
from tests.cases import same_bits
from tests.world import moved, pictures, world

from .place import LORA, MIXED, NONLINEAR, SIZE, read, run


def test_merge_writes_a_plain_model_that_weights_takes(place, tmp_path, capsys):
    file = place.adapter("m", MIXED, 3)
    assert run(merge, [*place.options, "--adapter", file, "--out", tmp_path]) == 0
    model = world("n")
    convpeft.load_adapter(model, file)
    expected = convpeft.merge(model)
    written = load_world_model(tmp_path / "merged.pt")
    assert same_bits(dict(written.state_dict()), dict(expected.state_dict()))
    from safetensors.torch import load_file

    assert same_bits(
        dict(sorted(load_file(tmp_path / "merged.safetensors").items())), dict(sorted(expected.state_dict().items()))
    )
    for each in (model, written):
        use_classes(each, place.texts).eval()
    torch.testing.assert_close(proofs.raw_output(written, pictures()), proofs.raw_output(model, pictures()))
    results = read(tmp_path / "merge.json")
    assert results["plain"] is True
    assert 0 < results["float64"] < proofs.EXACT
    assert "largest difference" not in capsys.readouterr().out


def test_merge_refuses_what_cannot_merge_unless_partial(place, tmp_path, capsys):
    options = [*place.options, "--adapter", place.adapter("n", NONLINEAR, 4), place.adapter("a", LORA, 3)]
    assert run(merge, [*options, "--out", tmp_path / "no"]) == 2
    assert "model.15: its GELU is not linear" in capsys.readouterr().err
    assert not list((tmp_path / "no").iterdir())
    assert run(merge, [*options, "--out", tmp_path / "part", "--partial"]) == 0
    assert read(tmp_path / "part" / "merge.json")["plain"] is False
    assert "some layers stay adapted" in capsys.readouterr().out


def test_a_merge_that_computes_something_else_is_found_and_not_written(place, tmp_path, capsys, monkeypatch):
    real = convpeft.merge

    def wrong(model, **options):
        merged = real(model, **options)
        with torch.no_grad():
            merged.get_submodule("model.12.cv2.conv").weight[0, 0, 0, 0] += 1e-3
        return merged

    monkeypatch.setattr(convpeft, "merge", wrong)
    assert run(merge, [*place.options, "--adapter", place.adapter("m", MIXED, 3), "--out", tmp_path]) == 2
    assert "from the adapted one in float64" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_operators_that_a_form_does_not_allow_are_refused():
    base = collections.Counter({"Conv": 5, "Add": 2, "Mul": 1})
    assert merge.check_operators(base, base, chains=False) == "the same 8 operators as the base"
    more = base + collections.Counter({"Conv": 3, "Add": 1})
    assert merge.check_operators(base, more, chains=True) == "the base's 8 operators and 1 Add, 3 Conv more"
    with pytest.raises(proofs.CheckError, match=r"3 Conv more, 1 Add more.*no chains, so there must be no difference"):
        merge.check_operators(base, more, chains=False)
    with pytest.raises(proofs.CheckError, match=r"1 Erf more"):
        merge.check_operators(base, more + collections.Counter({"Erf": 1}), chains=True)
    with pytest.raises(proofs.CheckError, match=r"1 Mul fewer"):
        merge.check_operators(base, collections.Counter({"Conv": 5, "Add": 2}), chains=True)


def operators(path: Path):
    import onnx

    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.nightly
@pytest.mark.slow
def test_onnx_has_the_bases_operators_and_gives_the_adapted_models_output(place, tmp_path, capsys, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = place.adapter("m", MIXED, 3)
    options = [*place.options, "--adapter", file, "--onnx"]
    assert run(merge, [*options, "--out", tmp_path]) == 0
    assert "12 Conv" not in capsys.readouterr().out
    found = read(tmp_path / "merge.json")["onnx"]
    base = collections.Counter(found["base_operators"])
    more = operators(tmp_path / "merged.onnx") - base
    assert set(more) == {"Add", "Conv"}
    assert base - operators(tmp_path / "merged.onnx") == collections.Counter()

    model = world("n")
    convpeft.load_adapter(model, file)
    use_classes(model, place.texts).eval()
    session = onnxruntime.InferenceSession(str(tmp_path / "merged.onnx"), providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]
    image = pictures()[:1]
    given = torch.from_numpy(session.run(None, {name: image.numpy()})[0])
    torch.testing.assert_close(
        given, proofs.raw_output(model, image), rtol=1e-4, atol=1e-4
    )  # two float32 runtimes, pixels
    bare = proofs.compare_outputs(given, proofs.raw_output(use_classes(world("n"), place.texts), image))
    assert not bare.within(1e-4, SIZE)

    model = load_world_model(place.root / "tiny-worldv2.pt")
    convpeft.inject(model, {"rules": MIXED["rules"][:1]})
    single = convpeft.merge(use_classes(moved(model), place.texts).eval(), form="single")
    assert not merge.has_chains(single)
    ours = merge.export_onnx(merge.fused_for_export(single), image, tmp_path / "single.onnx")
    assert merge.check_operators(base, ours, chains=False).startswith("the same")
    given = merge.run_onnx(tmp_path / "single.onnx", image)
    torch.testing.assert_close(given, proofs.raw_output(model, image), rtol=1e-4, atol=1e-4)

    monkeypatch.setattr(merge, "export_onnx", lambda *_: base)
    monkeypatch.setattr(merge, "run_onnx", lambda path, images: proofs.raw_output(single, images) + 1e-2)
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / ".base.onnx").touch()
    assert run(merge, [*options, "--out", tmp_path / "off"]) == 2
    assert "differs from the merged model by" in capsys.readouterr().err
