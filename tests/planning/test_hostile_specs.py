"""Specs of every wrong sort: each is refused as a SpecError, in a short text and a short time, from every form."""

from __future__ import annotations

import copy
import datetime
import json
import re

import pytest
import torch
import yaml

import convpeft
from convpeft import OptionError, PatternError, Rule, Spec, SpecError, Unfreeze
from convpeft.errors import shown
from tests.detector import Untouched, detector
from tests.limits import within

GOOD = {
    "version": 1,
    "aliases": {"heads": ["box", "score"]},
    "rules": [
        {
            "match": ["body.*.conv"], "kind": "lora", "only": ["Conv2d"], "where": {"min_channels": 1}, "lr_mult": 1.0,
            "channels": None, "output": None, "place": None, "rank": 2, "dropout": 0.0, "evaluate": "auto",
        },
        {"match": "@heads", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3]},
    ],
    "unfreeze": [{"match": ["neck.0"], "lr_mult": 0.5}],
    "norm": "frozen",
}  # fmt: skip
PLACES = [
    ("version",), ("aliases",), ("aliases", "heads"), ("aliases", "heads", 0), ("rules",), ("rules", 0),
    ("rules", 0, "match"), ("rules", 0, "match", 0), ("rules", 0, "kind"), ("rules", 0, "only"), ("rules", 0, "only", 0),
    ("rules", 0, "where"), ("rules", 0, "where", "min_channels"), ("rules", 0, "where", "kernel_size"),
    ("rules", 0, "lr_mult"), ("rules", 0, "channels"), ("rules", 0, "output"), ("rules", 0, "place"), ("rules", 0, "rank"),
    ("rules", 0, "dropout"), ("rules", 0, "evaluate"), ("rules", 0, "unknown"), ("rules", 1, "kernel_sizes"),
    ("rules", 1, "kernel_sizes", 0), ("unfreeze",), ("unfreeze", 0), ("unfreeze", 0, "match"), ("unfreeze", 0, "lr_mult"),
    ("norm",), ("unknown",),
]  # fmt: skip


class Broken:
    """Its text cannot be made."""

    def __repr__(self):
        raise RuntimeError("no text")


def containing_itself():
    values = [1]
    values.append(values)
    return values


def laughing(depth=9):
    """Return 10^depth texts in some tens of objects."""
    values = ["lol"] * 10
    for _ in range(depth - 1):
        values = [values] * 10
    return values


VALUES = {
    "null": None, "true": True, "zero": 0, "huge": 10**400, "-huge": -(10**400), "digits": 10**6000, "nan": float("nan"),
    "inf": float("inf"), "fraction": 2.5, "text": "x", "empty": "", "long": "a" * 1_000_000, "bytes": b"\xff", "list": [],
    "lists": [[[[["x"]]]]], "numbers": [1, 2, 3], "many": [7] * 100_000, "mapping": {"a": 1}, "keys": {1: 2, None: 3},
    "set": {1, 2}, "date": datetime.date(2001, 1, 1), "broken": Broken(), "tensor": torch.zeros(3, 3), "type": int,
    "itself": containing_itself(), "laughs": laughing(), "deep": json.loads("[" * 900 + "]" * 900), "mixed": ["a", {"b": [1]}],
}  # fmt: skip


def with_value(place, value):
    data = copy.deepcopy(GOOD)
    target = data
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return data


@pytest.fixture(scope="module")
def model():
    return detector()


def refusal_of(function, *arguments):
    """Return the text of a SpecError, or nothing if there was none; any other error passes through."""

    def tried():
        try:
            function(*arguments)
        except SpecError as error:
            return str(error)
        return ""

    text = within(2, tried)
    assert len(text) < 20_000
    return text


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_any_value_in_any_place_is_taken_or_refused_in_words(place, model):
    before = Untouched(model)
    refused = [name for name, value in VALUES.items() if refusal_of(convpeft.plan, model, with_value(place, value))]
    before.check()
    assert {"laughs", "itself", "deep", "broken", "tensor"} <= set(refused)


@pytest.mark.parametrize(
    "make",
    [
        lambda value: Spec([Rule(value, "lora")]),
        lambda value: Spec([Rule("box", value)]),
        lambda value: Spec([Rule("box", "lora", only=value)]),
        lambda value: Spec([Rule("box", "lora", where=value)]),
        lambda value: Spec([Rule("box", "lora", where={"groups": value})]),
        lambda value: Spec([Rule("box", "lora", place=value)]),
        lambda value: Spec([Rule("box", "lora", lr_mult=value)]),
        lambda value: Spec([Rule("box", "lora", rank=value)]),
        lambda value: Spec(value),
        lambda value: Spec([value]),
        lambda value: Spec(unfreeze=value),
        lambda value: Spec(unfreeze=[value]),
        lambda value: Spec(unfreeze=[Unfreeze(value)]),
        lambda value: Spec(unfreeze=[Unfreeze("box", value)]),
        lambda value: Spec([Rule("box", "lora")], norm=value),
        lambda value: Spec([Rule("box", "lora")], aliases=value),
        lambda value: Spec([Rule("box", "lora")], aliases={"a": value}),
    ],
)
def test_dataclasses_with_any_value(make, model):
    refused = [name for name, value in VALUES.items() if refusal_of(lambda v: convpeft.plan(model, make(v)), value)]
    assert {"broken", "digits", "type"} <= set(refused)


LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
PIECES = {
    "version": "version: *a8",
    "aliases": "aliases: *a8",
    "an alias": "aliases: {heads: *a8}",
    "rules": "rules: *a8",
    "a rule": "rules: [*a8]",
    "match": "rules: [{match: *a8, kind: lora}]",
    "kind": "rules: [{match: box, kind: *a8}]",
    "only": "rules: [{match: box, kind: lora, only: *a8}]",
    "where": "rules: [{match: box, kind: lora, where: {groups: *a8}}]",
    "output": "rules: [{match: box, kind: lora, output: *a8}]",
    "an option": "rules: [{match: box, kind: rep_mona, kernel_sizes: *a8}]",
    "unfreeze": "unfreeze: [{match: *a8}]",
    "norm": "norm: *a8",
    "merge keys": "b0: &b0 {x0: 1}\n"
    + "".join(f"b{n}: &b{n}\n  <<: [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 9))
    + "rules: [{match: box, kind: lora, where: *b8}]",
}


@pytest.mark.parametrize("name", PIECES)
def test_yaml_that_expands_is_refused_unread(name, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(LAUGHS + PIECES[name])
    assert "more than 200,000 values" in refusal_of(Spec.load, path)
    assert "more than 200,000 values" in refusal_of(lambda: Spec.load(spec_file(tmp_path, GOOD), aliases=path))


def spec_file(folder, data):
    path = folder / "good.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.yaml", "rules: &a [*a]", "contains itself"),
        ("a.yaml", "rules: " + "[" * 5000, "deep in one another"),
        ("a.yaml", "rules: " + "[" * 30 + "]" * 30, "deep in one another"),
        ("a.yaml", "rules: [" + "x, " * 250_000 + "]", "more than 200,000 values"),
        ("a.yaml", "# " + "x" * 5_000_000, "more than 4,194,304 bytes"),
        ("a.json", json.dumps({"rules": ["x" * 50] * 100_000}), "more than 4,194,304 bytes"),
        ("a.json", '{"rules": ' + "[" * 100_000, "cannot be read as a spec"),
        ("a.json", '{"version": ' + "1" * 100_000 + "}", "a number of 100,000 digits"),
        (
            "a.json",
            json.dumps({"rules": [{"match": "a", "kind": "b"}] * 50_000}),
            "rules has 50,000 entries, at most 10,000 are read",
        ),
        ("a.yaml", "version: !!int ''", "cannot be read as a spec"),
        ("a.yaml", "version: !!bool maybe", "cannot be read as a spec"),
        ("a.yaml", "version: !!timestamp never", "cannot be read as a spec"),
        ("a.yaml", "? [a, b]\n: c", "cannot be read as a spec"),
        ("a.yaml", f"version: !{'t' * 100_000} x", "cannot be read as a spec"),
        ("a.yaml", "rules: [{match: a, kind: lora, 3: 4}]", "rule 1: keys are texts, not 3"),
    ],
)
def test_files_too_large_too_deep_or_broken(tmp_path, name, text, why):
    path = tmp_path / name
    path.write_text(text)
    assert why in refusal_of(Spec.load, path)


def test_a_large_file_of_sound_rules_is_read(tmp_path):
    """Two thousand rules in YAML, long enough for libyaml, mean what they mean in JSON."""
    data = {"rules": [{"match": f"body.layers.{n}.conv", "kind": "lora", "rank": 1 + n % 7} for n in range(2000)]}
    (tmp_path / "a.yaml").write_text(yaml.dump(data, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert (tmp_path / "a.yaml").stat().st_size > 100_000
    spec = Spec.load(tmp_path / "a.yaml")
    assert spec == Spec.load(tmp_path / "a.json")
    assert spec.rules[1999] == Rule("body.layers.1999.conv", "lora", rank=5)


def test_too_many_rules_and_patterns_are_refused_at_once(model):
    rule = Rule("body.*.conv", "lora")
    assert "100,000 rules and unfreeze entries are too many" in refusal_of(convpeft.plan, model, Spec([rule] * 100_000))
    many = Spec([Rule([f"a{n}" for n in range(30_000)], "lora")])
    assert "30,000 patterns with the aliases written out, at most 20,000" in refusal_of(convpeft.plan, model, many)
    named = Spec([Rule("@a", "lora")] * 9000, aliases={"a": ["box", "score", "neck.0"]})
    assert "27,003 patterns with the aliases written out" in refusal_of(convpeft.plan, model, named)
    wide = Spec([Rule(f"{{a,b}}{'{c,d}' * 11}{n}", "lora") for n in range(100)])
    assert "too long with the braces written out: more than 1,000,000 letters" in refusal_of(convpeft.plan, model, wide)


def test_rules_for_the_same_modules_take_time_in_proportion():
    """Each of 200 rules gives way to the one before it on all modules but one: the plan lists every one of them."""
    model = torch.nn.Sequential(*(torch.nn.Conv2d(1, 1, 1) for _ in range(200)))
    same = Spec([Rule("*", "lora", rank=1)] * 200)
    assert re.search(
        r"199 problems(.|\n)*rule 2: .* gets nothing, because rule 1 already took all 200",
        refusal_of(convpeft.plan, model, same),
    )
    rising = [Rule("{" + ",".join(map(str, range(n + 1))) + "}", "lora", rank=1) for n in range(200)]
    plan = within(5, lambda: convpeft.plan(model, Spec(rising)))
    assert len(plan.shadowed) == 199 * 200 // 2
    assert plan.shadowed[:3] == (("0", 2, 1), ("0", 3, 1), ("1", 3, 2))


def test_a_long_list_of_problems_is_cut(model):
    text = refusal_of(convpeft.plan, model, {"rules": [{"match": f"nowhere{n}", "kind": "lora"} for n in range(500)]})
    assert "500 problems, nothing was changed" in text
    assert "  100. rule 100: 'nowhere99' matches none" in text
    assert text.endswith("and 400 more like these")


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ({"lr_mult": 10**400}, OptionError, "lr_mult must be a number of at least 0, not a number of about 401 digits"),
        ({"rank": 10**18}, OptionError, "rank must be at most 65,536, not 1000000000000000000"),
        ({"channels": 10**30}, OptionError, "channels must be at most 1,048,576"),
        ({"output": 10**400}, OptionError, "output must be an index or a key, not a number of about 401 digits"),
        ({"alpha": 1e39}, OptionError, "alpha of kind 'lora' must be a finite number or null, not 1e[+]39"),
        ({"rank": ["x"] * 1000}, OptionError, r"rank of kind 'lora' must be a whole number, not \('x', 'x', 'x', 'x', 'x', 'x', \.\.\.\)"),
        ({"kind": "rep_mona", "kernel_sizes": [3] * 65}, OptionError, "kernel_sizes must be at most 64 sizes, not 65"),
        ({"kind": "conv_lora", "scales": [65]}, OptionError, "scales must be whole numbers of at least 1 and at most 64, not 65"),
        ({"kind": "q" * 10_000}, convpeft.UnknownKind, r"unknown kind 'q{100}'\.\.\. \(10,000 long\)"),
        ({"match": "q" * 20_000}, PatternError, r"pattern 'q{100}'\.\.\. \(20,000 long\) is too long: at most 10,000 letters"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_said_shortly(data, error, text):
    with pytest.raises(error, match=text) as caught:
        Spec.from_dict({"rules": [{"match": "box", "kind": "lora", **data}]})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "kind", ["lora", "rep_mona", "moe_rep_mona", "conv_lora", "bottleneck", "hierarchical", "mona"]
)
def test_any_value_of_any_option_of_any_kind(kind):
    from convpeft.adapters.registry import adapter_class

    options = adapter_class(kind).Options.__dataclass_fields__
    for name in options:
        for value in VALUES.values():
            refusal_of(Spec.from_dict, {"rules": [{"match": "box", "kind": kind, name: value}]})
        digits = {"rules": [{"match": "box", "kind": kind, name: 10**6000}]}
        assert name in refusal_of(Spec.from_dict, digits)


@pytest.mark.parametrize("option", ["r", "alpha", "init_weights", "dropout", "nothing"])
def test_any_value_of_the_options_of_peft(option):
    from convpeft.adapters.peft_kinds.kinds import peft_methods

    assert "loha" in peft_methods()  # imported: that takes longer than a refusal may
    for value in VALUES.values():
        refusal_of(Spec.from_dict, {"rules": [{"match": "box", "kind": "peft:loha", option: value}]})
    assert "peft:x" in refusal_of(Spec.from_dict, {"rules": [{"match": "box", "kind": "peft:" + "x" * 100_000}]})


def test_a_path_that_is_none_is_refused_shortly(model):
    for path in ("x" * 100_000, "a\0b", "", "."):
        text = refusal_of(convpeft.plan, model, path)
        assert "cannot be read as a spec" in text
        assert len(text) < 1000


def test_values_are_shown_as_python_does_and_cut_when_they_are_long():
    for value in (3, "a", [3], (3,), (), {}, [], {"a": [1, (2, "x")]}, None, 2.5, b"x", [[[]]]):
        assert shown(value) == repr(value)
    assert shown([1, [2, [3, [4]]]]) == "[1, [2, [3, [...]]]]"
    assert shown("x" * 300) == repr("x" * 100) + "... (300 long)"
    assert shown({n: n for n in range(9)}) == "{0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, ...}"
    assert shown(10**6000) == "a number of about 6,001 digits"
    assert shown(Broken()) == shown([Broken()]).replace("list", "Broken") == "<Broken>"
    assert len(shown(laughing())) < 500
    assert shown(containing_itself()) == "[1, [1, [1, [...]]]]"
