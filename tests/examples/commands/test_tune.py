"""Tune: what a trial changes in a spec, and a study that several processes share and that survives a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("ultralytics")
pytest.importorskip("optuna")

import optuna

import convpeft
from examples.yolo_world.commands import tune
from examples.yolo_world.commands.series import train_in
from examples.yolo_world.commands.session import CommandError, load_data, open_session
from examples.yolo_world.training.model import load_world_model

from .place import NONLINEAR, Place, read, run

NAMED = {
    "aliases": {"early": ["model.2.cv1.conv"], "late": ["model.{12,15}.cv2.conv"], "top": ["model.18"]},
    "rules": [
        {"match": ["@early", "@late", "!model.15.**"], "kind": "lora", "rank": 4, "alpha": 8},
        {"match": "@top", "kind": "bottleneck", "reduction": 4},
        {"match": "model.4.cv1.conv", "kind": "leave"},
    ],
    "unfreeze": ["model.22.cv2.*.2"],
}


def test_a_trial_changes_rank_reduction_and_positions_and_nothing_else():
    spec = convpeft.Spec.from_dict(NAMED)
    values = {"lr": 1.0, "rank": 16, "reduction": 2, "positions": "late+top"}
    varied = tune.vary(spec, values, ["early", "late", "top"]).to_dict()
    assert varied["rules"] == [
        {"match": ["@late", "!model.15.**"], "kind": "lora", "rank": 16, "alpha": 8},
        {"match": "@top", "kind": "bottleneck", "reduction": 2},
        {"match": "model.4.cv1.conv", "kind": "leave"},
    ]
    assert varied["unfreeze"] == spec.to_dict()["unfreeze"]
    only_top = tune.vary(spec, {**values, "positions": "top"}, ["early", "late", "top"]).to_dict()
    assert [rule["kind"] for rule in only_top["rules"]] == ["bottleneck", "leave"]
    kept = tune.vary(spec, {"lr": 1.0, "reduction": 8}, []).to_dict()
    assert [rule.get("rank", rule.get("reduction")) for rule in kept["rules"]] == [4, 8, None]
    wide = {"rules": [{"match": "model.18", "kind": "bottleneck", "rank": 4}]}
    assert tune.vary(convpeft.Spec.from_dict(wide), values, []).to_dict()["rules"][0] == {
        **wide["rules"][0],
        "rank": 16,
    }
    assert kept["rules"][0]["match"] == NAMED["rules"][0]["match"]


def space_of(spec, *arguments: str) -> tune.Space:
    return tune.make_space(tune.parse(list(arguments)), convpeft.Spec.from_dict(spec))


def test_the_space_is_what_the_spec_has_and_the_options_name():
    space = space_of(NAMED, "--positions", "--ranks", "2", "4", "--lr-range", "0.1", "0.2")
    assert space == tune.Space((2, 4), (2, 4, 8, 16), (0.1, 0.2), ("early", "late", "top"))
    assert space_of(NONLINEAR) == tune.Space((), (2, 4, 8, 16), (1e-4, 1e-2), ())
    fixed = optuna.trial.FixedTrial({"lr": 0.15, "rank": 2, "reduction": 4, "positions": "early+top"})
    assert space.suggest(fixed) == {"lr": 0.15, "rank": 2, "reduction": 4, "positions": "early+top"}
    choices = fixed.distributions["positions"].choices
    assert len(choices) == 7
    assert "" not in choices
    many = {**NAMED, "aliases": {str(n): ["model.2"] for n in range(7)}, "rules": [{"match": [f"@{n}" for n in range(7)], "kind": "lora"}]}  # fmt: skip
    with pytest.raises(CommandError, match="7 positions have 127 combinations; name at most 6"):
        space_of(many, "--positions")


def steps(place: Place, count: int, *more: object) -> list[object]:
    training = ["--steps", count, "--evaluations", 1, "--checkpoint-every", 1, "--heartbeat", 1]
    return [*place.options, *training, "--spec", place.spec("named", NAMED), "--positions", "early", "late", *more]


def fake_training(folder, args, session, data, base, spec, *, title, lr, on_scores=None):
    """Stand in for a training: as good as its learning rate is near 1e-3."""
    folder.mkdir(parents=True)  # two trials in one folder would fail here
    (folder / f"by-{os.getpid()}").touch()
    if folder.name == "0000" and args.trials == 9:  # the others must be able to begin meanwhile
        limit = time.monotonic() + 60
        while not (folder.parent / "0001").is_dir() and time.monotonic() < limit:
            time.sleep(0.02)
        (folder / "met").write_text(str((folder.parent / "0001").is_dir()))
    scores = SimpleNamespace(map50_95=1 - abs(lr - 1e-3), map50=0.5)
    return None, SimpleNamespace(curves=SimpleNamespace(scores=[(1, scores)]), trainable=7)


def test_processes_that_share_a_study_run_exactly_its_trials(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "train_in", fake_training)
    options = steps(place, 1, "--trials", 9, "--out", tmp_path)
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=run, args=(tune, options)) for _ in range(2)]
    for other in others:
        other.start()
    assert run(tune, options) == 0
    for other in others:
        other.join(120)
    assert [other.exitcode for other in others] == [0, 0]
    results = read(tmp_path / "study.json")
    assert sorted(trial["number"] for trial in results["trials"]) == list(range(9))
    assert {trial["state"] for trial in results["trials"]} == {"complete"}
    assert len({path.name for path in tmp_path.glob("trials/*/by-*")}) > 1
    assert (tmp_path / "trials" / "0000" / "met").read_text() == "True"
    rates = [trial["lr"] for trial in results["trials"]]
    assert len(set(rates)) == 9
    best = min(results["trials"], key=lambda trial: abs(trial["lr"] - 1e-3))
    assert results["best"] == best
    written, varied = (
        convpeft.Spec.load(tmp_path / "best.yaml"),
        tune.vary(convpeft.Spec.from_dict(NAMED), best, ["early", "late"]),
    )
    assert (written.rules, written.unfreeze) == (varied.rules, varied.unfreeze)
    assert f"--lr {best['lr']:.4g}" in (tmp_path / "best.yaml").read_text(encoding="utf-8")
    assert (
        (tmp_path / "trials.md")
        .read_text(encoding="utf-8")
        .splitlines()[2]
        .startswith(f"| {best['number']} | complete |")
    )


def test_the_same_command_goes_on_and_another_is_refused(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "train_in", fake_training)
    assert run(tune, steps(place, 1, "--trials", 2, "--out", tmp_path)) == 0
    first = read(tmp_path / "study.json")["trials"]
    assert run(tune, steps(place, 1, "--trials", 4, "--out", tmp_path)) == 0
    assert read(tmp_path / "study.json")["trials"][:2] == first
    assert len(read(tmp_path / "study.json")["trials"]) == 4
    whole = tmp_path / "whole"
    assert run(tune, steps(place, 1, "--trials", 4, "--out", whole)) == 0
    assert read(whole / "study.json")["trials"] == read(tmp_path / "study.json")["trials"]
    capsys.readouterr()
    assert run(tune, steps(place, 1, "--ranks", 2, "--out", tmp_path)) == 2
    assert "holds results of other options: --ranks [4, 8, 16, 32] then, [2] now" in capsys.readouterr().err


def test_a_trial_that_cannot_be_is_given_up_with_its_reason(place, tmp_path, monkeypatch, capsys):
    def refuse(*args, **options):
        raise convpeft.SpecError("rank is more than this layer has")

    monkeypatch.setattr(tune, "train_in", refuse)
    assert run(tune, steps(place, 1, "--trials", 2, "--out", tmp_path)) == 2
    assert "none of the 2 trials came to its end" in capsys.readouterr().err
    trials = read(tmp_path / "study.json")["trials"]
    assert [(trial["state"], trial["why"]) for trial in trials] == [("pruned", "rank is more than this layer has")] * 2


def test_an_interrupted_trial_is_queued_again(place, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    options = steps(place, 1, "--trials", 2, "--out", tmp_path)
    monkeypatch.setattr(tune, "train_in", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tune, options)
    monkeypatch.setattr(tune, "train_in", fake_training)
    assert run(tune, options) == 0
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    found = optuna.load_study(study_name=tune.STUDY, storage=storage).trials
    assert [trial.state.name for trial in found] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert found[0].params == found[1].params != found[2].params
    assert [trial["folder"] for trial in read(tmp_path / "study.json")["trials"]] == ["0000", "0002"]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_study_survives_the_kill_of_a_process_and_takes_its_trial_up(place, tmp_path):
    options = [str(option) for option in steps(place, 8, "--trials", 2, "--pruner", "none", "--out", tmp_path)]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "examples.yolo_world", "tune", *options]
    other = subprocess.Popen(command, cwd=Path(__file__).parents[3], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    checkpoint, limit = tmp_path / "trials" / "0000" / "checkpoint.safetensors", time.monotonic() + 240
    while not checkpoint.is_file():
        assert other.poll() is None, other.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert not (tmp_path / "trials" / "0000" / "log.json").exists()

    assert run(tune, options) == 0
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    found = optuna.load_study(study_name=tune.STUDY, storage=storage).trials
    assert sorted(trial.state.name for trial in found) == ["COMPLETE", "COMPLETE", "FAIL"]
    (again,) = [trial for trial in found[1:] if trial.params == found[0].params]
    assert again.user_attrs["folder"] == "0000"
    folder = tmp_path / "trials" / "0000"
    assert "resumed from" in (folder / "log.txt").read_text(encoding="utf-8")
    assert not (folder / "checkpoint.safetensors").exists()

    args = tune.parse(options)
    args.out = tmp_path / "unbroken"
    session = open_session(args)
    data, base = load_data(args), load_world_model(args.weights)
    spec = convpeft.Spec.from_dict(yaml.safe_load((folder / "spec.yaml").read_text(encoding="utf-8")))
    _, outcome = train_in(args.out, args, session, data, base, spec, title="trial_0000", lr=found[0].params["lr"])
    assert read(folder / "log.json")["losses"] == outcome.curves.losses
    assert len(outcome.curves.losses) == 8
