"""Which rule gets what."""

from __future__ import annotations

import pytest
from torch import nn

import convpeft
from convpeft import PatternError
from tests.detector import LORA, detector
from tests.planning.refusals import refused


def rows(model, *rules, **more):
    """Return ``(module, kind, place, rule)`` of each adapter planned."""
    report = convpeft.plan(model, {"rules": list(rules), **more})
    return [(layer.name, layer.kind, layer.site.place, layer.rule) for layer in report.layers]


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
