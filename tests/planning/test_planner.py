"""A plan says what each module would get, or everything that is wrong, and touches nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft import PatternError, Rule, Spec, SpecError
from tests.detector import LORA, Untouched, detector, images
from tests.planning.refusals import refused


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("rules", "text"),
        [
            (
                [{"match": ["body.*.conv", "body.*.cnov"], "kind": "lora"}],
                r"rule 1: 'body\.\*\.cnov' matches none of the 19 modules \(6 adaptable layers\) of Detector\. "
                r"Closest: body\.\d\.conv, .*named_modules",
            ),
            ([LORA, {"match": "bxo", "kind": "lora"}], r"rule 2: 'bxo' matches none .*Closest: box\."),
            ([{**LORA, "match": ["body.**", "!nekc"]}], r"rule 1: '!nekc' matches none .*Closest: neck"),
            ([{**LORA, "match": ["box", "score", "!box"]}], "rule 1: every module 'box' matches is excluded again"),
            ([{"match": "body.*.act", "kind": "lora"}], r"rule 1: .* kind 'lora' cannot serve \(SiLU\); it serves Conv2d"),
            (
                [{"match": "body", "kind": "bottleneck"}],
                r"kind 'bottleneck' cannot serve \(ModuleList\); it serves the outputs of modules that are called",
            ),
            ([LORA, {**LORA, "rank": 4}], r"rule 2: 'body\.\*\.conv' gets nothing, because rule 1 .*first rule wins"),
            (
                [{"match": "body.**", "kind": "leave"}, {"match": "stem.**", "kind": "lora"}, LORA],
                "rule 3: .* gets nothing, because rule 1 already took all 2 modules",
            ),
            (
                [{"match": "body.0.conv", "kind": "lora"}, {"match": "body.1.conv", "kind": "rep_mona"}, LORA],
                "rule 3: .* because rule 1, rule 2 already took all 2 modules",
            ),
            ([LORA, {"match": ["box", "body.0.conv"], "kind": "leave"}], "rule 2: 'body.0.conv' gets nothing"),
        ],
        ids=["dead beside live", "dead rule", "dead exclusion", "all excluded", "wrong class", "never called",
             "contradiction", "left", "two winners", "late leave"],
    )  # fmt: skip
    def test_patterns(self, rules, text):
        refused({"rules": rules}, PatternError, text)

    @pytest.mark.parametrize(
        ("unfreeze", "text"),
        [
            (["score", "scoer"], r"unfreeze 2: 'scoer' matches none .*Closest: score"),
            (["body.*.act"], r"unfreeze 1: nothing that 'body\.\*\.act' matches has parameters to unfreeze"),
            (["body.**", "body.0.conv"], r"unfreeze 2: 'body\.0\.conv' gets nothing, because earlier unfreeze entries"),
            ([{"match": ["body.0", "!body.0.**"]}], "unfreeze 1: every module 'body.0' matches is excluded again"),
            ([{"match": ["box", "!bxo"]}], "unfreeze 1: '!bxo' matches none"),
        ],
    )
    def test_unfreeze(self, unfreeze, text):
        refused({"unfreeze": unfreeze}, PatternError, text)

    def test_a_shared_tensor_is_unfrozen_everywhere_or_nowhere(self):
        model = detector()
        model.twin = nn.Linear(6, 4).double()
        model.twin.weight = model.score.weight
        refused(
            {"unfreeze": ["box", "score"]},
            SpecError,
            "unfreeze: 'score' shares its weight with 'twin', which would stay frozen; unfreeze both or neither",
            model,
        )
        assert set(convpeft.plan(model, {"unfreeze": ["twin", "score"]}).owned) == {"score", "twin"}

    def test_everything_is_said_at_once(self):
        rules = [
            {"match": ["nekc", "body.0.conv"], "kind": "lora"},
            {"match": "body.*.act", "kind": "lora"},
            {"match": "score", "kind": "rep_mona"},
            {"match": "stem.conv", "kind": "lora"},
        ]
        text = refused({"rules": rules, "unfreeze": ["scoer"]}, SpecError, "cannot plan for this Detector: 4 problems")
        for part in (
            "rule 1: 'nekc'",
            "rule 2: 'body.*.act'",
            "rule 3: score (Linear) cannot take",
            "unfreeze 1: 'scoer'",
        ):
            assert part in text


def test_a_plan_touches_nothing():
    model = detector()
    model.stem.norm.train()
    calls = []
    model.box.register_forward_hook(lambda *arguments: calls.append(1))
    model.score.weight.requires_grad_(False)
    x, before, random = images(), Untouched(model), torch.get_rng_state()
    rules = [
        {"match": "body.*", "kind": "bottleneck", "reduction": 2},
        {"match": "*.conv", "kind": "rep_mona", "rank": 2},
    ]
    spec = Spec.from_dict({"rules": rules, "unfreeze": ["score"], "norm": "adapt"})
    data = spec.to_dict()
    convpeft.plan(model, spec)
    convpeft.plan(model, spec, example_inputs=x)
    before.check()
    assert torch.equal(torch.get_rng_state(), random)
    assert spec.to_dict() == data


def test_a_plan_of_an_adapted_model_sees_the_users_modules_only():
    model = detector()
    spec = {"rules": [{"match": "**", "kind": "lora", "rank": 2}], "unfreeze": ["body.0"]}
    first = convpeft.plan(model, spec)
    convpeft.inject(model, spec, name="a")
    before = Untouched(model)
    assert str(convpeft.plan(model, spec)) == str(first)
    before.check()


@pytest.mark.parametrize("norm", ["frozen", "affine", "adapt"])
def test_counts_and_print(norm):
    model = detector()
    base = sum(p.numel() for p in model.parameters())
    model.twin = model.score  # counted once
    rules = [
        LORA,
        {"match": "neck", "kind": "bottleneck", "reduction": 4},
        {"match": "box", "kind": "rep_mona", "rank": 2},
    ]
    report = convpeft.plan(model, {"rules": rules, "unfreeze": [{"match": "score", "lr_mult": 2}], "norm": norm})
    norms = 0 if norm == "frozen" else 2 * 3 * 8
    assert report.base_parameters == base
    assert report.owned_parameters == 6 * 4 + 4 + norms
    assert report.owned["score"] == 2.0
    convpeft.inject(model, {"rules": rules, "unfreeze": ["score"], "norm": norm})
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for layer in report.layers:
        adapter = model.get_submodule(layer.name).convpeft.default
        assert layer.parameters == sum(p.numel() for p in adapter.parameters())
    text = str(report)
    head = text.splitlines()[0]
    assert head.startswith(
        f"Detector: 4 adapters, {report.adapter_parameters:,} parameters; {report.owned_parameters:,} unfrozen"
    )
    assert head.endswith(f"of the base's {base:,}; norm {norm}")
    assert "body.1.conv" in text
    assert "GELU is not linear" in text
    assert f"unfrozen modules ({len(report.owned)}): " in text


def test_the_plan_of_inject_is_the_plan():
    spec = Spec([Rule("**", "lora", only="Conv2d")], unfreeze="score")
    model = detector()
    planned = convpeft.plan(model, spec)
    assert str(convpeft.inject(model, spec)) == str(planned)


def test_what_is_wrong_with_the_spec_and_with_its_fit_is_told_together():
    rules = [
        {"match": "stem.conv", "kind": "lora", "rank": 0},
        {"match": "nowhere", "kind": "lora"},
        {"match": ["box", "elsewhere"], "kind": "lroa"},
    ]
    text = refused({"rules": rules, "unfreeze": ["nobody"]}, SpecError, "5 problems")
    for part in ("rank must be above 0", "unknown kind 'lroa'", "'nowhere' m", "'elsewhere' m", "'nobody' m"):
        assert part in text


class TestBatchSize:
    @pytest.mark.parametrize(("norm", "size", "warns"), [("adapt", 7, True), ("adapt", 8, False), ("affine", 2, False)])
    def test_small_batches_are_warned_of(self, norm, size, warns):
        report = convpeft.plan(detector(), {"norm": norm}, batch_size=size)
        assert bool(report.warnings) is warns
        assert ("warning: norm: adapt with batches of 7, fewer than 8" in str(report)) is warns
        assert ("Take norm: affine, and convpeft.calibrate" in str(report)) is warns

    def test_inject_warns_as_well(self):
        with pytest.warns(UserWarning, match="norm: adapt with batches of 4") as found:
            convpeft.inject(detector(), {"norm": "adapt"}, batch_size=4)
        assert found[0].filename == __file__

    @pytest.mark.parametrize("size", [0, 2.0, True, "8"])
    def test_no_number_of_images_is_refused(self, size):
        with pytest.raises(convpeft.SpecError, match="batch_size is a whole number"):
            convpeft.plan(detector(), {"norm": "adapt"}, batch_size=size)
