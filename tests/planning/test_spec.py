"""A spec means the same in every form, survives a round trip, and says everything that is wrong with it at once."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import convpeft
from convpeft import OptionError, PatternError, Rule, Spec, SpecError, Unfreeze, UnknownKind
from tests.detector import LORA, Untouched, detector

DATA = {
    "version": 1,
    "aliases": {"heads": ["box", "{score,neck.0}"], "stem": ["stem.conv"]},
    "rules": [
        {"match": "body.0.norm", "kind": "leave"},
        {"match": ["@heads", "!score"], "kind": "bottleneck", "reduction": 2, "lr_mult": 1.4},
        {"match": "body.1.conv", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3, 5]},
        {"match": "**", "kind": "lora", "rank": 2, "only": ["Conv2d"], "where": {"min_channels": 8}, "alpha": 3.0},
    ],
    "unfreeze": [{"match": ["score"], "lr_mult": 0.5}],
    "norm": "adapt",
}
TYPED = Spec(
    rules=[
        Rule("body.0.norm", "leave"),
        Rule(["@heads", "!score"], "bottleneck", reduction=2, lr_mult=1.4),
        Rule("body.1.conv", "rep_mona", rank=2, kernel_sizes=(3, 5)),
        Rule("**", "lora", only="Conv2d", where={"min_channels": 8}, rank=2, alpha=3.0),
    ],
    unfreeze=[Unfreeze("score", lr_mult=0.5)],
    norm="adapt",
    aliases={"heads": ["box", "{score,neck.0}"], "stem": "stem.conv"},
)


@pytest.fixture
def file(tmp_path):
    """Write text or data to a file and return its path."""

    def write(name, content):
        path = tmp_path / name
        if not isinstance(content, str):
            content = json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content)
        path.write_text(content, encoding="utf-8")
        return path

    return write


def test_every_form_says_the_same(file):
    assert Spec.from_dict(DATA) == TYPED
    assert Spec.load(file("spec.yaml", DATA)) == TYPED
    assert Spec.load(file("spec.json", DATA)) == TYPED
    report = str(convpeft.plan(detector(), TYPED))
    for form in (DATA, file("spec.yaml", DATA), str(file("spec.json", DATA))):
        assert str(convpeft.plan(detector(), form)) == report


def test_specs_differ_in_each_word():
    for key, value in {"norm": "frozen", "unfreeze": [], "aliases": {}, "rules": DATA["rules"][:2]}.items():
        data = {**DATA, key: value}
        if key == "aliases":
            data["rules"] = [DATA["rules"][0]]
        assert Spec.from_dict(data) != TYPED
    assert Rule("a", "lora", rank=2) != Rule("a", "lora", rank=3)
    assert Rule("a", "lora", lr_mult=2) != Rule("a", "lora")
    assert repr(Rule(["a", "b"], "lora", rank=2, place="output")) == "Rule(['a', 'b'], 'lora', place='output', rank=2)"


WORDS = st.text("abc*", min_size=1, max_size=4).map(lambda text: text if text.strip("*") else "a")
LISTS = st.one_of(WORDS, st.lists(WORDS, min_size=1, max_size=3))
RATES = st.floats(0, 10)


@st.composite
def rules(draw):
    """Draw a sound rule."""
    kind = draw(st.sampled_from(["lora", "rep_mona", "bottleneck", "leave"]))
    where = st.fixed_dictionaries(
        {}, optional={"min_channels": st.integers(0, 9), "depthwise": st.booleans(), "kernel_size": st.just((3, 1))}
    )
    common = st.fixed_dictionaries(
        {"match": LISTS},
        optional={"only": LISTS, "where": where, "lr_mult": RATES, "channels": st.integers(1, 9), "output": WORDS},
    )
    options = {
        "lora": {"rank": st.integers(1, 9), "alpha": st.floats(0.5, 9), "rslora": st.booleans()},
        "rep_mona": {"rank": st.integers(1, 9), "kernel_sizes": st.just((1, 5)), "branch_norm": st.booleans()},
        "bottleneck": {"reduction": st.integers(1, 9), "norm": st.sampled_from(["none", "group"])},
        "leave": {},
    }
    return Rule(**draw(common), kind=kind, **draw(st.fixed_dictionaries({}, optional=options[kind])))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(rules(), min_size=1, max_size=3),
    st.lists(st.builds(Unfreeze, LISTS, RATES), max_size=2),
    st.sampled_from(["frozen", "adapt"]),
    st.dictionaries(WORDS, LISTS, max_size=2),
)
def test_a_spec_survives_the_round_trip(tmp_path_factory, chosen, unfreeze, norm, aliases):
    spec, folder = Spec(chosen, unfreeze, norm, aliases), tmp_path_factory.mktemp("specs")
    assert Spec.from_dict(spec.to_dict()) == spec
    for name in ("spec.yaml", "spec.json"):
        spec.save(folder / name)
        assert Spec.load(folder / name) == spec


HEADS = {"rules": [{"match": "@heads", "kind": "lora"}]}


class TestAliases:
    def test_in_a_file_of_their_own(self, file):
        spec = file("spec.yaml", HEADS)
        for content in ({"heads": ["box", "score"]}, {"version": 1, "aliases": {"heads": ["box", "score"]}}):
            for name in ("names.yaml", "names.json"):
                loaded = Spec.load(spec, aliases=file(name, content))
                assert [layer.name for layer in convpeft.plan(detector(), loaded).layers] == ["box", "score"]
        loaded = Spec.load(spec, aliases={"heads": "box"})
        assert [layer.name for layer in convpeft.plan(detector(), loaded).layers] == ["box"]

    def test_the_separate_file_wins(self, file):
        spec = file("spec.yaml", {**HEADS, "aliases": {"heads": "box", "stem": "stem.conv"}})
        loaded = Spec.load(spec, aliases={"heads": "score"})
        assert loaded.aliases == {"heads": ("score",), "stem": ("stem.conv",)}

    def test_an_excluded_alias_excludes_all_it_names(self):
        spec = Spec([Rule(["**", "!@heads"], "lora", only="Conv2d")], aliases={"heads": ["box", "body.**"]})
        assert [layer.name for layer in convpeft.plan(detector(), spec).layers] == ["stem.conv", "neck.0"]

    def test_a_dead_pattern_names_its_alias(self):
        spec = Spec([Rule("@heads", "lora")], aliases={"heads": ["box", "scoer"]})
        with pytest.raises(PatternError, match=r"rule 1: '@heads = scoer' matches none of .*Closest: score"):
            convpeft.plan(detector(), spec)

    def test_an_unknown_one_names_the_nearest(self, file):
        with pytest.raises(SpecError, match=r"spec.yaml: rule 1: no alias is named '@heads'. Closest: @head\."):
            Spec.load(file("spec.yaml", HEADS), aliases={"head": "box"})
        with pytest.raises(SpecError, match=r"no alias is named '@heads'. Give aliases in the spec, or Spec\.load"):
            Spec.load(file("spec.yaml", HEADS))
        with pytest.raises(SpecError, match="unfreeze 1: no alias is named '@heads'"):
            Spec.from_dict({"unfreeze": [{"match": ["box", "!@heads"]}]})

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            ([1], "maps? names to patterns"),
            ({"heads": 3}, "alias '@heads' must be a pattern or a list of patterns, not 3"),
        ],
    )
    def test_a_bad_alias_file(self, file, content, text):
        with pytest.raises(SpecError, match=text):
            Spec.load(file("spec.yaml", HEADS), aliases=file("names.yaml", content))

    def test_aliases_of_a_wrong_type_beside_an_alias_file(self, file):
        with pytest.raises(SpecError, match="aliases must map names to patterns"):
            Spec.load(file("spec.yaml", {**HEADS, "aliases": ["box"]}), aliases={"heads": "box"})


def one(**rule):
    return {"rules": [{**LORA, **rule}]}


# what a user may write -> the error's class and text
BAD = {
    "unknown key": ({"rulez": [], "rules": [LORA]}, OptionError, r"unknown key 'rulez' in the spec\. Closest: rules"),
    "unknown rule key": (one(lr_mul=2), OptionError, r"unknown key 'lr_mul' for kind 'lora'.*Or the rule's own key 'lr_mult'\?"),
    "unknown option": (one(rnk=2), OptionError, r"rule 1: unknown key 'rnk' for kind 'lora'\. Closest: rank"),
    "unknown unfreeze key": (
        {"unfreeze": [{"match": "box", "lr_mul": 2}]},
        OptionError,
        r"unknown key 'lr_mul' in unfreeze 1\. Closest: lr_mult",
    ),
    "unknown condition": (
        one(where={"min_chanels": 4}),
        OptionError,
        r"rule 1: unknown key 'min_chanels' in where\. Closest: min_channels",
    ),
    "unknown leave key": (
        {"rules": [{"match": "box", "kind": "leave", "onyl": "Conv2d"}]},
        OptionError,
        r"rule 1: kind 'leave' takes no option 'onyl'\. Or the rule's own key 'only'\?",
    ),
    "a key called self": (one(self=1), OptionError, "rule 1: unknown key 'self'"),
    "kind unknown": (one(kind="lroa"), UnknownKind, r"rule 1: unknown kind 'lroa'\. Closest: lora.*Registered: bottleneck"),
    "rank 0": (one(rank=0), OptionError, "rule 1: kind 'lora': rank must be above 0, not 0"),
    "version": ({"version": 2, "rules": [LORA]}, SpecError, "version 2 is not known; this convpeft reads version 1"),
    "hold": ({"norm": "adapt", "hold": 1.5}, OptionError, "hold must be a share of the steps, from 0 to 1, not 1.5"),
    "hold of nothing": ({"norm": "affine", "hold": 0.2}, OptionError, "hold is for norm: adapt; with norm: 'affine'"),
    "norm": ({"rules": [LORA], "norm": "freeze"}, OptionError, "norm must be one of frozen, affine, adapt, not 'freeze'"),
    "nothing": ({"version": 1}, SpecError, "no rules and unfreezes nothing"),
    "rules no list": ({"rules": LORA}, SpecError, "rules must be a list"),
    "a rule no mapping": ({"rules": ["box"]}, SpecError, "rule 1 must be a mapping with 'match' and 'kind', not 'box'"),
    "no kind": ({"rules": [{"match": "box"}]}, SpecError, "rule 1 must be a mapping with 'match' and 'kind'"),
    "match a number": (one(match=3), OptionError, "rule 1: match and only are texts or lists of texts"),
    "kind a list": (one(kind=["lora"]), OptionError, "rule 1: .*kind is a text"),
    "only a number": (one(only=[3]), OptionError, "rule 1: match and only are texts or lists of texts"),
    "where a list": (one(where=[3]), OptionError, r"rule 1: where must be a mapping, not \[3\]"),
    "a text for a number": (
        one(where={"min_channels": "64"}),
        OptionError,
        "rule 1: min_channels in where must be a whole number, not '64'",
    ),
    "a number for a switch": (
        one(where={"depthwise": 3}),
        OptionError,
        "rule 1: depthwise in where must be true or false, not 3",
    ),
    "kernel_size": (
        one(where={"kernel_size": [3, 3, 3]}),
        OptionError,
        r"rule 1: kernel_size in where must be a whole number or two, not \[3, 3, 3\]",
    ),
    "place": (one(place="beside"), OptionError, "rule 1: place must be 'parallel' or 'output', not 'beside'"),
    "place of a kind": (
        one(kind="bottleneck", rank=2, place="parallel"),
        OptionError,
        "rule 1: kind 'bottleneck' has no place 'parallel', only output",
    ),
    "channels": (one(channels=0), OptionError, "rule 1: channels must be a whole number above 0, not 0"),
    "channels true": (one(channels=True), OptionError, "rule 1: channels must be a whole number above 0, not True"),
    "output": (one(output=[1]), OptionError, r"rule 1: output must be an index or a key, not \[1\]"),
    "lr_mult text": (one(lr_mult="2"), OptionError, "rule 1: lr_mult must be a number of at least 0, not '2'"),
    "lr_mult negative": (one(lr_mult=-1), OptionError, "rule 1: lr_mult must be a number of at least 0, not -1"),
    "lr_mult of unfreeze": (
        {"unfreeze": [{"match": "box", "lr_mult": float("nan")}]},
        OptionError,
        "unfreeze 1: lr_mult must be a number of at least 0, not nan",
    ),
    "unfreeze a number": ({"unfreeze": [3]}, SpecError, "unfreeze 1 must be a pattern or a mapping with 'match', not 3"),
    "aliases a list": ({"rules": [LORA], "aliases": ["box"]}, SpecError, "aliases must map names to patterns"),
    "an alias a number": (
        {"rules": [LORA], "aliases": {"heads": [3]}},
        OptionError,
        r"alias '@heads' must be a pattern or a list of patterns, not 3",
    ),
    "an alias of an alias": (
        {"rules": [one(match="@a")["rules"][0]], "aliases": {"a": "@b", "b": "box"}},
        PatternError,
        "alias '@a': '@b' is another alias; write its patterns out",
    ),
    "an alias unbalanced": (
        {"rules": [LORA], "aliases": {"heads": "box["}},
        PatternError,
        r"alias '@heads': pattern 'box\[' opens a bracket it never closes",
    ),
    "a bracket": (one(match="body[0"), PatternError, "rule 1: pattern 'body.0' opens a bracket it never closes"),
    "a brace": ({"unfreeze": ["{box,score"]}, PatternError, "unfreeze 1: pattern '{box,score' opens a brace it never closes"),
    "only exclusions": (one(match="!box"), SpecError, "rule 1 needs at least one pattern that is not an exclusion"),
    "no pattern": (one(match=[]), SpecError, "rule 1 needs at least one pattern"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name):
    data, error, text = BAD[name]
    model = detector()
    before = Untouched(model)
    for function in (
        Spec.from_dict,
        lambda spec: convpeft.plan(model, spec),
        lambda spec: convpeft.inject(model, spec),
    ):
        with pytest.raises(SpecError, match=text) as caught:
            function(data)
        assert type(caught.value) is error
    before.check()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Spec([Rule(3, "lora")]), SpecError, "rule 1: a pattern is a text, not 3"),
        (lambda: Spec([Rule(["a", 3], "lora")]), SpecError, "rule 1: a pattern is a text, not 3"),
        (lambda: Spec([Rule("body.*.conv", 3)]), UnknownKind, "rule 1: unknown kind 3"),
        (lambda: Spec([Rule("body.*.conv", "lora", rank=0)]), OptionError, "rule 1: kind 'lora': rank must be above 0"),
        (lambda: Spec([Rule("body.*.conv", "lora")], norm="off"), OptionError, "norm must be one of"),
        (lambda: Spec(unfreeze=[Unfreeze(3)]), SpecError, "unfreeze 1: a pattern is a text, not 3"),
        (lambda: Spec(unfreeze="box", aliases={"a": 3}), SpecError, "alias '@a' must be a pattern or a list"),
        (lambda: 3, SpecError, "a spec is a Spec, a mapping or a path, not int"),
        (lambda: [LORA], SpecError, "a spec is a Spec, a mapping or a path, not list"),
    ],
)
def test_dataclasses_are_checked_too(make, error, text):
    model = detector()
    before = Untouched(model)
    for function in (convpeft.plan, convpeft.inject):
        with pytest.raises(error, match=text):
            function(model, make())
    before.check()


def test_all_problems_are_said_at_once():
    data = {
        "version": 7,
        "rules": [{**LORA, "rank": 0, "dropout": 2.0}, {"match": "a[", "kind": "lroa"}],
        "unfreeze": [{"match": "@b"}],
        "norm": "off",
        "extra": 1,
    }
    with pytest.raises(SpecError, match="spec: 8 problems, nothing was changed") as caught:
        convpeft.plan(detector(), data)
    for text in ("'extra'", "version 7", "rank must", "dropout must", "'a['", "'lroa'", "'@b'", "norm must"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("spec.yaml", "rules: [", "cannot be read as a spec"),
        ("spec.json", "{", "cannot be read as a spec"),
        ("spec.yaml", "- a", "a spec is a mapping with 'rules', not list"),
        ("spec.yaml", "", "a spec is a mapping with 'rules', not NoneType"),
        ("spec.yaml", "rules: []\nrules: []", "'rules' is said twice"),
        ("spec.json", '{"norm": "adapt", "norm": "frozen"}', "'norm' is said twice"),
        ("spec.yaml", "rules: !!python/object/apply:os.getcwd []", "cannot be read as a spec"),
    ],
)
def test_unreadable_files_are_named(file, name, content, text):
    path = file(name, content)
    with pytest.raises(SpecError, match=text) as caught:
        Spec.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.yaml cannot be read as a spec: .*No such file"):
        convpeft.inject(detector(), tmp_path / "nowhere.yaml")
