"""A plan says what each module would get, or everything that is wrong, and touches nothing."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import convpeft
from convpeft import PatternError, Rule, Spec, SpecError
from tests.cases import bits, same_bits
from tests.detector import LORA, Block, Untouched, detector, images, scrambled

Pair = namedtuple("Pair", "low high")


def rows(model, *rules, **more):
    """Return ``(module, kind, place, rule)`` of each adapter planned."""
    report = convpeft.plan(model, {"rules": list(rules), **more})
    return [(layer.name, layer.kind, layer.site.place, layer.rule) for layer in report.layers]


def refused(spec, error, text, model=None, **options):
    """Plan and inject raise the error, and nothing has changed."""
    model = detector() if model is None else model
    before = Untouched(model)
    for function in (convpeft.plan, convpeft.inject):
        with pytest.raises(SpecError, match=text) as caught:
            function(model, spec, **options)
        assert type(caught.value) is error
    before.check()
    return str(caught.value)


class TestWhatIsChosen:
    def test_the_first_rule_wins_and_the_rest_is_said(self):
        rules = [
            {"match": "body.0.**", "kind": "leave"},
            {"match": ["body.*.conv", "body.1.*"], "kind": "lora", "rank": 2, "lr_mult": 0.5},
            {"match": "**", "kind": "rep_mona", "rank": 1, "only": "Conv2d"},
        ]
        report = convpeft.plan(detector(), {"rules": rules})
        assert [(layer.name, layer.kind, layer.rule, layer.lr_mult) for layer in report.layers] == [
            ("stem.conv", "rep_mona", 3, 1.0),
            ("body.1.conv", "lora", 2, 0.5),
            ("neck.0", "rep_mona", 3, 1.0),
            ("box", "rep_mona", 3, 1.0),
        ]
        assert report.left == ("body.0", "body.0.conv", "body.0.norm", "body.0.act")
        assert set(report.shadowed) == {("body.0.conv", 2, 1), ("body.0.conv", 3, 1), ("body.1.conv", 3, 2)}
        assert len(report.shadowed) == 3
        text = str(report)
        for line in (
            "left bare (4): body.0, body.0.conv",
            "rule 2 gave way to rule 1 at: body.0.conv",
            "rule 3 gave way to rule 1 at: body.0.conv",
            "rule 3 gave way to rule 2 at: body.1.conv",
        ):
            assert line in text

    def test_leave_counts_what_it_got_only(self):
        rules = [LORA, {"match": ["body.**", "body.*.conv", "box"], "kind": "leave"}]
        with pytest.raises(PatternError, match=r"rule 2: 'body\.\*\.conv' gets nothing, because rule 1"):
            convpeft.plan(detector(), {"rules": rules})
        rules = [LORA, {"match": ["body.0.**", "body.0.norm", "box"], "kind": "leave"}]
        report = convpeft.plan(detector(), {"rules": rules})
        assert report.left == ("body.0", "body.0.norm", "body.0.act", "box")
        assert report.shadowed == (("body.0.conv", 2, 1),)

    @pytest.mark.parametrize(
        ("rule", "names"),
        [
            ({"only": "Conv2d"}, ["stem.conv", "body.0.conv", "body.1.conv", "neck.0", "box"]),
            ({"only": ["Linear"]}, ["score"]),
            ({"only": ["_ConvNd"], "where": {"max_channels": 6}}, []),
            ({"where": {"min_channels": 8}}, ["body.0.conv", "body.1.conv", "neck.0"]),
            ({"where": {"max_channels": 7}}, ["score"]),
            ({"where": {"kernel_size": 3}}, ["stem.conv", "body.0.conv", "body.1.conv"]),
            ({"where": {"kernel_size": [1, 1]}, "only": "Conv2d"}, ["neck.0", "box"]),
            ({"where": {"groups": 2}}, ["body.1.conv"]),
            ({"where": {"depthwise": False, "min_channels": 8, "kernel_size": 1}}, ["neck.0"]),
            ({"where": {"depthwise": True}}, []),
        ],
        ids=str,
    )
    def test_only_and_where(self, rule, names):
        rule = {"match": "**", "kind": "lora", **rule}
        if names:
            assert [row[0] for row in rows(detector(), rule)] == names
        else:
            refused(
                {"rules": [rule]}, PatternError, r"rule 1: '\*\*' matches \d+ modules, but none passes only/where \("
            )

    def test_depthwise(self):
        model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 1, 1))
        assert [row[0] for row in rows(model, {"match": "*", "kind": "lora", "where": {"depthwise": True}})] == ["0"]

    def test_places(self):
        wide = {"match": "**", "kind": "lora"}
        assert {row[2] for row in rows(detector(), wide)} == {"parallel"}
        assert rows(detector(), {"match": "body.0", "kind": "lora"}) == [("body.0", "lora", "output", 1)]
        named = {"match": ["stem", "neck"], "kind": "lora", "place": "output"}
        assert [row[0] for row in rows(detector(), named)] == ["stem", "neck"]
        assert rows(detector(), {"match": "box", "kind": "bottleneck"}) == [("box", "bottleneck", "output", 1)]
        root = {"match": "", "kind": "lora", "place": "output"}
        assert rows(detector(), root) == [("", "lora", "output", 1)]

    def test_a_shared_layer_is_one(self):
        model = detector()
        model.twin = model.body[0].conv
        report = convpeft.plan(model, {"rules": [{"match": "twin", "kind": "lora", "rank": 2}]})
        assert [layer.name for layer in report.layers] == ["body.0.conv"]
        refused(
            {"rules": [{"match": "twin", "kind": "lora"}, {"match": "body.0.conv", "kind": "lora"}]},
            PatternError,
            "rule 2: 'body.0.conv' gets nothing, because rule 1 already took all 1 modules",
            model,
        )


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

    def test_hosts_that_would_never_run_their_adapter(self):
        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
                self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
                self.conv = nn.Conv2d(8, 8, 1)
                self.scripted = torch.jit.script(nn.Conv2d(8, 8, 1))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = Attention()
        model.conv.forward = lambda x: x
        for match, place, text in [
            ("mha.out_proj", "parallel", r"mha\.out_proj \(NonDyn.*cannot host an adapter: its parent MultiheadAttention reads out_proj"),
            ("layer.linear1", "parallel", "its parent TransformerEncoderLayer reads linear1.weight itself"),
            ("layer.self_attn.out_proj", "output", "its parent MultiheadAttention reads out_proj.weight itself"),
            ("conv", "parallel", r"conv \(Conv2d\) cannot host an adapter: its forward was replaced on the object"),
            ("conv", "output", "its forward was replaced on the object itself"),
            ("scripted", "output", "a TorchScript module has no Python forward to extend"),
        ]:  # fmt: skip
            spec = {"rules": [{"match": match, "kind": "lora", "place": place, "channels": 8}]}
            with pytest.raises(SpecError, match=text):
                convpeft.plan(model, spec)
            with pytest.raises(SpecError, match=text):
                convpeft.inject(model, spec)
        assert type(model.conv) is nn.Conv2d

    def test_a_scripted_part_elsewhere_is_in_nobodys_way(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())))
        before, x = bits(model), torch.randn(1, 3, 4, 4)
        output = model(x)
        convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora"}]})
        assert torch.equal(model(x), output)
        assert same_bits(before, bits(convpeft.eject(model)))

    def test_a_module_with_a_child_of_our_name(self):
        model = nn.Sequential(OrderedDict(convpeft=nn.Conv2d(3, 4, 1), act=nn.ReLU()))
        spec = {"rules": [{"match": "", "kind": "lora", "place": "output", "channels": 4}]}
        text = r"\(root\) \(Sequential\) cannot host an adapter: it has a child 'convpeft' of its own"
        refused(spec, SpecError, text, model)


class TestChannels:
    @staticmethod
    def block(output):
        """Return a model whose ``block`` gives 5 channels in the form asked for, and an image to run it on."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = Block(3, 5)
                self.wrap = Wrap(self.block)

            def forward(self, x):
                return self.wrap(x)

        class Wrap(nn.Module):
            def __init__(self, block):
                super().__init__()
                self.inner = block

            def forward(self, x):
                return output(self.inner(x))

        return Model().double().eval(), torch.randn(2, 3, 4, 4).double()

    FORMS = pytest.mark.parametrize(
        ("form", "entry"),
        [
            (lambda x: x, None),
            (lambda x: (x[:, :2], x), 1),
            (lambda x: [x, 3], -2),
            (lambda x: {"low": x, "high": None}, "low"),
            (lambda x: OrderedDict(a=1, b=x), "b"),
            (lambda x: Pair(x, x[:, :1]), 0),
            (lambda x: Pair(x[:, :1], x), "high"),
        ],
        ids=["tensor", "tuple", "list", "dict", "ordered", "namedtuple", "namedtuple field"],
    )

    @FORMS
    def test_entries_of_outputs(self, form, entry):
        model, x = self.block(form)
        before, own = Untouched(model), model(x)
        rule = {"match": "wrap", "kind": "lora", "place": "output", "rank": 2}
        rule |= {} if entry is None else {"output": entry}
        (layer,) = convpeft.plan(model, {"rules": [rule]}).layers
        assert layer.site.geometry.out_channels == 5
        before.check()
        convpeft.inject(model, {"rules": [rule]})
        adapter = model.wrap.convpeft.default
        nn.init.normal_(adapter.up)
        got = model(x)

        def at(output, key):
            return getattr(output, key) if isinstance(output, Pair) and isinstance(key, str) else output[key]

        if entry is None:
            assert torch.equal(got, own + adapter(own))
            return
        assert type(got) is type(own)
        assert torch.equal(at(got, entry), at(own, entry) + adapter(at(own, entry)))
        changed = at(got, entry)
        for old, new in zip(*((o.values() if isinstance(o, dict) else o) for o in (own, got)), strict=True):
            assert new is changed or (torch.equal(old, new) if isinstance(old, torch.Tensor) else old is new)

    def test_a_transformers_output_by_name_or_index(self):
        outputs = pytest.importorskip("transformers.modeling_outputs")
        for entry in ("last_hidden_state", 0):
            model, x = self.block(lambda x: outputs.BaseModelOutput(last_hidden_state=x))
            own = model(x).last_hidden_state
            convpeft.inject(model, {"rules": [{"match": "wrap", "kind": "lora", "place": "output", "output": entry}]})
            scrambled(model)
            got, adapter = model(x), model.wrap.convpeft.default
            assert isinstance(got, outputs.BaseModelOutput)
            assert list(got.keys()) == ["last_hidden_state"]
            assert torch.equal(got.last_hidden_state, own + adapter(own))
            assert got[0] is got.last_hidden_state

    def test_where_nothing_tells_the_channels(self):
        rule = {"match": "wrap", "kind": "lora", "place": "output"}
        tell = r"channels of its output could not be found out.*channels: in the rule, output: .*example_inputs="
        model, x = self.block(lambda x: (x, x))
        refused({"rules": [rule]}, SpecError, rf"rule 1: wrap \(Wrap\): the {tell}", model)
        refused({"rules": [rule]}, SpecError, tell, model, example_inputs=x)
        refused({"rules": [{**rule, "output": 2}]}, SpecError, tell, model)
        refused({"rules": [{**rule, "output": "low"}]}, SpecError, tell, model)
        model, x = self.block(lambda x: x)
        model.wrap.inner = Block(7, 5).double().eval()  # no 3-channel image runs here
        wide = torch.randn(1, 7, 3, 3).double()
        refused({"rules": [rule]}, SpecError, tell, model)
        assert convpeft.plan(model, {"rules": [rule]}, example_inputs=wide).layers[0].site.geometry.out_channels == 5
        assert convpeft.plan(model, {"rules": [rule]}, example_inputs=(wide,)).layers[0].site.geometry.out_channels == 5
        assert convpeft.plan(model, {"rules": [{**rule, "channels": 5}]}).layers[0].site.geometry.out_channels == 5
        refused(
            {"rules": [{**rule, "channels": 4}]},
            SpecError,
            r"rule 1: wrap \(Wrap\): the rule says channels: 4, but its output has 5",
            model,
            example_inputs=wide,
        )
        with pytest.raises(RuntimeError, match="expected input"):  # the user's own example fails in the user's own way
            convpeft.plan(model, {"rules": [rule]}, example_inputs=x)

    @pytest.mark.parametrize(
        ("last", "channels"),
        [
            ([nn.ReLU(), nn.Dropout(0.1)], 8),
            ([nn.GLU(1)], 4),
            ([nn.GroupNorm(2, 8), nn.SiLU()], 8),
            ([nn.PixelShuffle(2)], 2),
            ([nn.Flatten(1)], 8 * 64 * 64),
        ],
        ids=["activation", "GLU", "norm", "shuffle", "flatten"],
    )
    def test_the_last_step_of_a_sequential(self, last, channels):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), *last)).eval()
        rule = {"match": "0", "kind": "lora", "place": "output", "rank": 1}
        (layer,) = convpeft.plan(model, {"rules": [rule]}).layers
        assert layer.site.geometry.out_channels == channels
        x = torch.randn(1, 3, 64, 64)
        own = model(x)
        convpeft.inject(model, {"rules": [rule]})
        assert torch.equal(model(x), own)


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


@pytest.mark.parametrize("norm", ["frozen", "adapt"])
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
    norms = 2 * 3 * 8 if norm == "adapt" else 0
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
