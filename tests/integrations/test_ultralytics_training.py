"""Adapters trained by ultralytics' own trainers, on a few generated images: what trains, what is saved, resumed and run."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("ultralytics")

import convpeft
from convpeft import HostError
from convpeft.hosts.guards import has_adapters
from convpeft.hosts.wrappers import inside
from convpeft.integrations.ultralytics import load_adapter, serve, set_active, trainer

LABELS = {
    "detect": "0 .5 .5 .4 .4\n",
    "segment": "0 .3 .3 .7 .3 .7 .7 .3 .7\n",
    "obb": "0 .3 .3 .7 .3 .7 .7 .3 .7\n",
    "pose": "0 .5 .5 .4 .4 .4 .4 2 .6 .6 2\n",
}
SPEC = {
    "rules": [{"match": "model.{2,4,12}.**", "kind": "lora", "rank": 2, "only": "Conv2d", "lr_mult": 2.0}],
    "unfreeze": ["model.22.cv3.*.2"],
}
IMAGE = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)


def data(folder: Path, task: str = "detect") -> str:
    """Write four images with one object each in ultralytics' layout, and return what ``data=`` takes."""
    generator = np.random.default_rng(0)
    if task == "classify":
        for part in ("train", "val"):
            for kind in ("a", "b"):
                (folder / part / kind).mkdir(parents=True)
                for number in range(2):
                    image = generator.integers(0, 255, (64, 64, 3), np.uint8)
                    Image.fromarray(image).save(folder / part / kind / f"{number}.png")
        return str(folder)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for number in range(4):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"images/{number}.png")
        (folder / f"labels/{number}.txt").write_text(LABELS[task])
    shape = "kpt_shape: [2, 3]\n" if task == "pose" else ""
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: a}}\n{shape}")
    return str(folder / "data.yaml")


def arguments(folder: Path, task: str = "detect", **options) -> dict:
    """Return the arguments of a training run that takes a second or two."""
    folder.mkdir(exist_ok=True)
    return {
        "data": data(folder, task), "epochs": 1, "imgsz": 64, "batch": 2, "workers": 0, "device": "cpu", "plots": False,
        "verbose": False, "amp": False, "project": str(folder / "runs"), "name": "run", "optimizer": "SGD", "nbs": 2,
        "warmup_epochs": 0, "mosaic": 0.0, "lr0": 0.1, "deterministic": False, **options,
    }  # fmt: skip


def base_of(run: Path) -> nn.Module:
    return torch.load(run / "weights/base.pt", weights_only=False)["model"]


def raw(model: nn.Module) -> torch.Tensor:
    """Return a model's decoded output on one image."""
    image = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].to(next(model.parameters()).dtype) / 255
    with torch.no_grad():
        found = model.eval()(image)
    while not isinstance(found, torch.Tensor):
        found = found[0]
    return found


def lively(model: nn.Module) -> None:
    """Give the norms of an untrained model the statistics of noise, in place: without them it hardly looks at its images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 64, 64))
    for norm in norms:
        norm.momentum = 0.03
    model.eval()


nightly = pytest.mark.nightly


class Interrupted(Exception):
    """Ends a training where a crash would."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a training of two epochs that was interrupted after the first and resumed: the YOLO, the run's folder, what was seen."""
    from ultralytics import YOLO

    folder, made = tmp_path_factory.mktemp("trained"), trainer(SPEC, name="screw")
    seen: dict = {}

    def stop(trainer) -> None:
        seen["first"] = copied(inside(trainer.model))
        raise Interrupted

    yolo = YOLO("yolov8n.yaml")
    yolo.add_callback("on_model_save", stop)
    with pytest.raises(Interrupted):
        yolo.train(trainer=made, **arguments(folder, epochs=2, freeze=5))
    run = folder / "runs/run"
    seen["saved"] = copied(torch.load(run / "weights/last.pt", weights_only=False)["ema"])
    seen["base"] = copied(base_of(run))

    def begin(trainer) -> None:
        live, groups = inside(trainer.model), trainer.optimizer.param_groups
        seen["groups"] = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        seen["held"] = [id(p) for group in groups for p in group["params"]]
        seen["trains"] = [id(p) for p in live.parameters() if p.requires_grad]
        seen["resumed"] = copied(live)

    def end(trainer) -> None:
        seen.update(live=copied(inside(trainer.model)), average=copied(trainer.ema.ema), epoch=trainer.epoch)

    yolo = YOLO(run / "weights/last.pt")
    yolo.add_callback("on_train_start", begin)
    yolo.add_callback("on_model_save", end)
    yolo.train(trainer=made, resume=True)
    return yolo, run, seen


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def ups(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {key: value for key, value in state.items() if key.endswith(".up")}
    assert len(found) > 10
    return found


class TestATraining:
    def test_only_the_adapter_trains_in_groups_of_its_rates(self, trained):
        _, _, seen = trained
        assert sorted(seen["held"]) == sorted(seen["trains"])
        rates = {
            (group["name"], group["param_group"]): (group["initial_lr"], group["weight_decay"])
            for group in seen["groups"]
        }
        assert rates["screw.lora x2", "weight"] == (0.2, pytest.approx(5e-4))
        assert rates["screw.unfrozen", "weight"] == (0.1, pytest.approx(5e-4))
        assert rates["screw.unfrozen (no decay)", "bias"] == (0.1, 0.0)

    def test_the_base_keeps_its_bits_in_the_model_and_in_the_average(self, trained):
        _, _, seen = trained
        moved = {key for key in seen["base"] if not torch.equal(seen["base"][key], seen["live"][key])}
        assert {key.rpartition(".")[0] for key in moved} == {f"model.22.cv3.{number}.2" for number in range(3)}
        assert moved == {key for key in seen["base"] if not torch.equal(seen["base"][key], seen["average"][key])}
        assert all(value.abs().max() > 0 for value in ups(seen["live"]).values())

    def test_a_resumed_run_begins_with_the_adapter_that_was_saved(self, trained):
        _, _, seen = trained
        assert seen["epoch"] == 1
        assert all(value.abs().max() > 0 for value in ups(seen["first"]).values())
        assert seen["saved"].keys() == seen["resumed"].keys()
        assert all(torch.equal(value, seen["resumed"][key]) for key, value in seen["saved"].items())
        assert not any(torch.equal(value, seen["resumed"][key]) for key, value in ups(seen["live"]).items())

    def test_the_adapter_file_is_that_of_the_best_epoch_on_the_saved_base(self, trained):
        _, run, seen = trained
        model = base_of(run)
        assert all(torch.equal(value, seen["base"][key]) for key, value in model.state_dict().items())
        convpeft.load_adapter(model, run / "weights/last.safetensors")
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, seen["average"][key], rtol=0, atol=0)
        assert convpeft.inspect_adapter(run / "weights/best.safetensors").name == "screw"

    def test_best_is_the_merged_model_in_half_precision(self, trained):
        yolo, run, _ = trained
        model = base_of(run)
        convpeft.load_adapter(model, run / "weights/best.safetensors")
        assert not any(map(has_adapters, yolo.model.modules()))
        plain = convpeft.merge(model).half().float()
        torch.testing.assert_close(raw(yolo.model), raw(plain), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(raw(base_of(run)), raw(plain), rtol=1e-3, atol=1e-3)

    @nightly  # a process of its own takes five seconds
    def test_plain_ultralytics_validates_and_predicts_with_it_without_convpeft(self, trained, tmp_path):
        _, run, _ = trained
        script = (
            "import sys; sys.modules['convpeft'] = None\n"
            "import numpy as np; from ultralytics import YOLO\n"
            f"yolo = YOLO({str(run / 'weights/best.pt')!r})\n"
            f"options = dict(imgsz=64, device='cpu', verbose=False)\n"
            f"yolo.val(data={str(run.parents[1] / 'data.yaml')!r}, workers=0, plots=False, project={str(tmp_path)!r}, **options)\n"
            "assert len(yolo.predict(np.zeros((64, 64, 3), np.uint8), **options)) == 1\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr


def test_another_adapter_or_spec_cannot_be_resumed():
    from ultralytics.nn.tasks import DetectionModel

    saved = DetectionModel("yolov8n.yaml", verbose=False)
    with pytest.raises(HostError, match=r"has no adapter 'screw' \(it has: none\)"):
        trainer(SPEC, name="screw", base=Fake)()._restore(saved, None)
    convpeft.inject(saved, SPEC, name="screw")
    with pytest.raises(HostError, match=r"has no adapter 'other' \(it has: screw\)"):
        resumed(saved, made="other")
    with pytest.raises(HostError, match="made by another spec"):
        resumed(saved, made="screw", spec={**SPEC, "unfreeze": []})


def resumed(saved: nn.Module, *, made: str, spec=SPEC) -> None:
    """Resume from a checkpoint that still has its adapter."""
    class_ = trainer(spec, name=made, base=Fake)
    class_()._restore(None, convpeft.AdaptedModel.of(saved))


class Fake:
    """Has the arguments of a trainer and nothing else."""

    args = type("Args", (), {"model": "last.pt"})


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("yolov8n-cls.yaml", "classify"),
        pytest.param("yolov8n-seg.yaml", "segment", marks=nightly),
        pytest.param("yolov8n-pose.yaml", "pose", marks=nightly),
        pytest.param("yolov8n-obb.yaml", "obb", marks=nightly),
        pytest.param("rtdetr-resnet50.yaml", "detect", marks=nightly),
        pytest.param("yolov8s-worldv2.yaml", "detect", marks=nightly),
    ],
)
def test_every_task_trains_from_the_same_factory(tmp_path, monkeypatch, model, task):
    from ultralytics import RTDETR, YOLO
    from ultralytics.models.yolo.world import WorldTrainer
    from ultralytics.nn.tasks import WorldModel

    vectors = torch.nn.functional.normalize(torch.randn(4, 512), dim=-1)  # the text encoder would be downloaded
    monkeypatch.setattr(
        WorldTrainer, "generate_text_embeddings", lambda self, texts, *args, **kwargs: dict.fromkeys(texts, vectors[0])
    )
    monkeypatch.setattr(WorldModel, "get_text_pe", lambda self, text, *args, **kwargs: vectors[None, : len(text)])
    yolo = (RTDETR if "rtdetr" in model else YOLO)(model)
    spec = {"rules": [{"match": "model.{2,4}.**", "kind": "lora", "rank": 2, "only": "Conv2d"}]}
    yolo.train(trainer=trainer(spec, name="a"), **arguments(tmp_path / task, task, val=False))
    own = type(yolo.trainer).__mro__[2].__name__
    assert type(yolo.trainer).__name__ == f"Adapter{own}"
    assert own == type(yolo)._smart_load(yolo, "trainer").__name__
    weights = Path(yolo.trainer.save_dir) / "weights"
    model = base_of(weights.parent)
    convpeft.load_adapter(model, weights / "best.safetensors")
    assert any(value.abs().max() > 0 for key, value in copied(model).items() if key.endswith(".up"))
    assert not any(map(has_adapters, yolo.model.modules()))
    assert len(yolo.predict(IMAGE, imgsz=64, verbose=False)) == 1


KINDS = [
    {"match": "model.4.cv2", "kind": "bottleneck"},
    {"match": "model.6.cv2.conv", "kind": "moe_rep_mona", "rank": 2, "load_balancing": 0.1},
]


class TestWhatUltralyticsFuses:
    """An adapted YOLO in memory: ultralytics runs a merged and fused copy, and the adapted model stays as it is."""

    @pytest.fixture(scope="class")
    def yolo(self, tmp_path_factory):
        from ultralytics import YOLO

        folder = tmp_path_factory.mktemp("served")
        yolo = YOLO("yolov8n.yaml")
        lively(yolo.model)
        for name, rules in (("screw", SPEC["rules"]), ("image", KINDS)):
            convpeft.inject(yolo.model, {"rules": rules}, name=name)
            with torch.no_grad():
                for group in convpeft.param_groups(yolo.model, lr=1.0):
                    for parameter in group["params"]:
                        parameter.normal_(0, 0.1)
            convpeft.save_adapter(yolo.model, folder / f"{name}.safetensors", name=name)
        convpeft.eject(yolo.model)
        for name in ("screw", "image"):
            assert load_adapter(yolo, folder / f"{name}.safetensors").name == name
        return yolo

    @pytest.mark.parametrize("name", ["screw", "image", None])
    def test_predictions_are_those_of_the_active_adapter(self, yolo, name):
        set_active(yolo, name)
        before = copied(yolo.model)
        exact = copy.deepcopy(yolo.model).double()
        fused = exact.fuse()
        assert fused is not exact
        torch.testing.assert_close(raw(fused), raw(exact), rtol=1e-9, atol=1e-9)
        assert any(map(has_adapters, fused.modules())) == (name == "image")
        assert isinstance(getattr(fused.model[0], "bn", None), nn.BatchNorm2d) == (name == "image")
        assert len(yolo.predict(IMAGE, imgsz=64, verbose=False)) == 1
        assert yolo.predictor.model.backend.model is not yolo.model
        now = copied(yolo.model)
        assert before.keys() == now.keys()
        assert all(torch.equal(value, now[key]) for key, value in before.items())
        assert convpeft.active_adapters(yolo.model) == (() if name is None else (name,))

    def test_a_switch_forgets_the_predictor_of_the_adapter_before(self, yolo):
        set_active(yolo, "screw")
        yolo.predict(IMAGE, imgsz=64, verbose=False)
        first = raw(yolo.predictor.model.backend.model)
        set_active(yolo, None)
        yolo.predict(IMAGE, imgsz=64, verbose=False)
        assert not torch.allclose(first, raw(yolo.predictor.model.backend.model), atol=1e-3)

    def test_validation_and_export_take_it(self, yolo, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        set_active(yolo, "screw")
        metrics = yolo.val(
            data=data(tmp_path), imgsz=64, workers=0, device="cpu", plots=False, verbose=False, project=str(tmp_path)
        )
        assert "metrics/mAP50(B)" in metrics.results_dict
        exported = torch.jit.load(yolo.export(format="torchscript", imgsz=64, device="cpu"))
        image = torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 255
        # pixels of boxes in float32, after 60 layers of other kernels; in float64 they agree, see above
        torch.testing.assert_close(exported(image), raw(yolo.model), rtol=5e-3, atol=2e-2)
        set_active(yolo, None)
        assert not torch.allclose(exported(image), raw(yolo.model), rtol=5e-3, atol=2e-2)

    def test_a_module_is_served_as_well_and_its_copies_serve_themselves(self, yolo):
        set_active(yolo.model, "screw")
        twin = copy.deepcopy(yolo.model)
        assert serve(twin) is twin
        with torch.no_grad():
            for group in convpeft.param_groups(twin, lr=1.0):
                for parameter in group["params"]:
                    parameter.zero_()
        twin = copy.deepcopy(twin)
        assert not torch.allclose(raw(twin.fuse()), raw(yolo.model.fuse()), atol=1e-3)


@nightly
def test_auxiliary_losses_are_part_of_the_loss_and_what_cannot_merge_is_saved_adapted(tmp_path):
    from ultralytics import YOLO

    yolo, seen = YOLO("yolov8n.yaml"), {}

    def look(made) -> None:
        live = inside(made.model)
        seen["items"] = sum(float(value) for value in made.loss_items.values()) * 2
        seen["loss"], seen["extra"] = float(made.loss.detach()), float(convpeft.auxiliary_loss(live).detach()) * 2

    yolo.add_callback("on_train_batch_end", look)
    yolo.train(trainer=trainer({"rules": KINDS}, name="image"), **arguments(tmp_path / "moe", val=False, lr0=1e-4))
    assert seen["extra"] > 0
    assert seen["loss"] - seen["extra"] == pytest.approx(seen["items"], rel=1e-4)
    assert convpeft.active_adapters(yolo.model) == ("image",)
    assert yolo.model.fuse() is yolo.model
    assert len(yolo.predict(IMAGE, imgsz=64, verbose=False)) == 1
