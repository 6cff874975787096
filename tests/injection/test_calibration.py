"""Calibrated statistics are the pooled moments of what reached a norm, and nothing else of the model changes."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
import torch.multiprocessing as processes
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import convpeft
from convpeft.hosts.modules import is_batchnorm_like
from tests.cases import bits, same_bits
from tests.detector import LORA, Untouched, detector, images

AFFINE = {"rules": [LORA], "norm": "affine"}
SIZES = (3, 1, 4)


def data() -> list[torch.Tensor]:
    """Return batches of different sizes, far from what the norms know."""
    return [3 + 2 * images(count) for count in SIZES]


def plainly(model: nn.Module, batches: list) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the moments of all that reaches each norm while torch's own norms run in training mode: kept, then pooled."""
    model = copy.deepcopy(model).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if is_batchnorm_like(module):
            module.training = True
            module.register_forward_hook(
                lambda _, args, __, name=name: seen.setdefault(name, []).append(args[0].detach())
            )
    for batch in batches:
        model(batch)
    pooled = {name: torch.cat([x.transpose(0, 1).flatten(1) for x in parts], 1) for name, parts in seen.items()}
    return {name: (values.mean(1), values.var(1, correction=1)) for name, values in pooled.items()}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class TestCalibrate:
    @pytest.mark.parametrize("norm", ["affine", "adapt"])
    def test_statistics_are_the_pooled_moments(self, norm):
        model, batches = detector(), data()
        wanted = plainly(model, batches)
        convpeft.inject(model, {"rules": [LORA], "norm": norm})
        report = convpeft.calibrate(model, iter(batches), progress=False)
        assert set(report.norms) == set(wanted) == {"stem.norm", "body.0.norm", "body.1.norm"}
        assert (report.batches, report.unreached) == (3, ())
        assert str(report) == "3 norms have the statistics of 3 batches"
        for name, (mean, variance) in wanted.items():
            close(model.get_submodule(name).running_mean, mean)
            close(model.get_submodule(name).running_var, variance)

    def test_order_of_the_batches_changes_nothing(self):
        model, batches = detector(), data()
        convpeft.inject(model, AFFINE)
        convpeft.calibrate(model, batches, progress=False)
        once = bits(model)
        convpeft.calibrate(model, batches[::-1], progress=False)
        for key, value in bits(model).items():
            close(value.double(), once[key].double())

    def test_only_statistics_change_and_they_belong_to_the_adapter(self, tmp_path):
        model, x = detector(), images()
        model.neck.train()
        bare, before = model(x), bits(model)
        convpeft.inject(model, AFFINE, name="a")
        tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        flags = [(module, module.training) for module in model.modules()]
        injected = bits(model)
        convpeft.calibrate(model, data(), progress=False)
        changed = [name for name, value in bits(model).items() if not torch.equal(value, injected[name])]
        assert {name.rsplit(".", 1)[1] for name in changed} == {"running_mean", "running_var"}
        assert not any("_stash" in name for name in changed)  # the base's
        assert tensors == {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        assert all(module.training == flag for module, flag in flags)
        assert not any(module._forward_pre_hooks for module in model.modules())
        model.eval()
        own = model(x)
        convpeft.set_active(model, None)
        assert torch.equal(model(x), bare)
        convpeft.set_active(model, "a")
        convpeft.save_adapter(model, tmp_path / "a.safetensors")
        fresh = detector()
        fresh.load_state_dict(before)
        convpeft.load_adapter(fresh, tmp_path / "a.safetensors")
        assert torch.equal(fresh(x), own)
        assert same_bits(before, bits(convpeft.eject(model)))

    def test_merged_statistics_are_the_calibrated_ones(self):
        model, x = detector(), images()
        convpeft.inject(model, AFFINE)
        convpeft.calibrate(model, data(), progress=False)
        torch.testing.assert_close(convpeft.merge(model)(x), model(x), rtol=1e-12, atol=1e-12)

    def test_unfrozen_norms_and_those_inside_adapters_are_owned_and_no_others(self):
        model = detector()
        rules = [{"match": "stem.conv", "kind": "rep_mona", "rank": 2, "branch_norm": True}]
        convpeft.inject(model, {"rules": rules, "unfreeze": ["body.0"]})
        before = bits(model)
        report = convpeft.calibrate(model, data(), progress=False)
        inner = [f"stem.conv: default.branches.{number}.norm" for number in range(3)]
        assert sorted(report.norms) == sorted(["body.0.norm", *inner])
        assert torch.equal(model.stem.norm.running_mean, before["stem.norm.running_mean"])
        assert torch.equal(model.body[1].norm.running_mean, before["body.1.norm.running_mean"])
        assert not torch.equal(model.body[0].norm.running_mean, before["body.0.norm.running_mean"])

    def test_norms_that_never_train_normalise_with_the_batch_as_well(self):
        torch.manual_seed(1)
        frozen = nn.Sequential(
            nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 1), FrozenBatchNorm2d(4, eps=1e-5)
        )
        plain = nn.Sequential(frozen[0], nn.BatchNorm2d(4), frozen[2], nn.BatchNorm2d(4))
        frozen, plain = frozen.double().eval(), plain.double().eval()
        batches = data()
        wanted = plainly(plain, batches)
        convpeft.inject(frozen, {"rules": [{"match": "0", "kind": "lora", "rank": 1}], "norm": "affine"})
        convpeft.calibrate(frozen, batches, progress=False)
        for name, (mean, variance) in wanted.items():
            close(frozen.get_submodule(name).running_mean, mean)
            close(frozen.get_submodule(name).running_var, variance)

    def test_run_takes_batches_of_any_form_in_training_mode(self):
        model, batches = detector(), data()
        wanted = plainly(model, batches)
        convpeft.inject(model, AFFINE)
        modes = []

        def run(model, batch):
            modes.append((model.training, model.stem.norm.training))
            return model(batch["image"])

        convpeft.calibrate(model, [{"image": x, "label": 0} for x in batches], run=run, training=True, progress=False)
        assert modes == [(True, False)] * 3
        assert not model.training
        close(model.stem.norm.running_mean, wanted["stem.norm"][0])

    def test_an_error_leaves_the_model_as_it_was(self):
        model = detector()
        convpeft.inject(model, AFFINE)
        before = Untouched(model)
        with pytest.raises(ZeroDivisionError):
            convpeft.calibrate(
                model, [*data(), None], run=lambda model, x: 1 / 0 if x is None else model(x), progress=False
            )
        before.check()

    @pytest.mark.parametrize(
        ("batches", "run", "text"),
        [
            ([], None, "there was no batch"),
            ([1], lambda model, x: x, "no batch reached any of the 3 norms"),
            ([torch.full((2, 3, 8, 8), torch.inf, dtype=torch.float64)], None, "stem.norm.* are not finite"),
            (
                [torch.zeros(1, 3, 8, 8)],
                lambda model, x: model.stem.norm(torch.zeros(8)),
                r"shape \(8,\) and has 8 channels",
            ),
        ],
        ids=["none", "elsewhere", "infinite", "one sample"],
    )
    def test_refusals(self, batches, run, text):
        model = detector()
        convpeft.inject(model, AFFINE)
        before = Untouched(model)
        with pytest.raises(convpeft.StateError, match=text):
            convpeft.calibrate(model, batches, run=run, progress=False)
        before.check()

    def test_nothing_owned_is_said(self):
        model = detector()
        convpeft.inject(model, {"rules": [LORA]}, name="screw")
        with pytest.raises(convpeft.StateError, match=r"own no statistics: 'screw' \(norm: frozen\).*norm: affine"):
            convpeft.calibrate(model, data(), progress=False)
        convpeft.set_active(model, None)
        with pytest.raises(convpeft.StateError, match="no adapter is active"):
            convpeft.calibrate(model, data(), progress=False)

    def test_norms_that_did_not_run_keep_theirs_and_are_named(self):
        model = detector()
        convpeft.inject(model, AFFINE)
        before = model.body[1].norm.running_mean.clone()
        report = convpeft.calibrate(model, data(), run=lambda model, x: model.body[0](model.stem(x)), progress=False)
        assert report.unreached == ("body.1.norm",)
        assert str(report).endswith("1 did not run and keep theirs: body.1.norm")
        assert torch.equal(model.body[1].norm.running_mean, before)


def _calibrated(rank: int, port: int, fails: bool, results) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    torch.manual_seed(0)
    model, batches = detector(), data()
    convpeft.inject(model, AFFINE)
    own = batches[:1] if rank == 0 else batches[1:]
    try:
        convpeft.calibrate(model, [] if fails and rank else own, progress=False)
        results[rank] = (model.body[1].norm.running_mean.tolist(), model.body[1].norm.running_var.tolist())
    except convpeft.StateError as error:
        results[rank] = str(error)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fails", [False, True])
def test_processes_pool_what_they_saw_and_fail_together(fails):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with processes.get_context("fork").Manager() as manager:
        results = manager.dict()
        processes.start_processes(_calibrated, (port, fails, results), nprocs=2, start_method="fork")
        found = dict(results)
    if fails:
        assert "calibrate failed in process 1" in found[0]
        assert "there was no batch" in found[1]
        return
    torch.manual_seed(0)
    model, batches = detector(), data()
    mean, variance = plainly(model, batches)["body.1.norm"]
    assert found[0] == found[1]
    close(torch.tensor(found[0][0], dtype=torch.float64), mean)
    close(torch.tensor(found[0][1], dtype=torch.float64), variance)
