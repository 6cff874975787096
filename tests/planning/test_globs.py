"""Globs over module names: what each wildcard crosses, against a slow matcher, and patterns that are none."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import convpeft
from convpeft import PatternError
from convpeft.planning.globs import Glob, is_literal, matches, quoted
from tests.limits import within
from tests.references import matching as reference

# pattern, the names it matches, the names it does not
TABLE = [
    ("neck.top.conv", ["neck.top.conv"], ["neck.top.conv.conv", "neck.top", "xneck.top.conv", "neckAtop.conv", ""]),
    ("", [""], ["neck"]),
    ("*", ["neck", "0", "convpeft"], ["", "neck.top"]),
    ("neck.*", ["neck.top", "neck.0"], ["neck", "neck.top.conv", "necks.top"]),
    ("cv*", ["cv", "cv1", "cv_long"], ["cv1.conv", "acv"]),
    ("*v*1", ["cv1", "v1", "vv11"], ["cv2", "cv1.x"]),
    ("cv?", ["cv1", "cvx"], ["cv", "cv12", "cv."]),
    ("model.?.conv", ["model.1.conv"], ["model.12.conv", "model..conv"]),
    ("cv[12]", ["cv1", "cv2"], ["cv3", "cv12", "cv"]),
    ("model.[0-9].**", ["model.7", "model.7.cv1.conv"], ["model.12", "model.x"]),
    ("cv[!12]", ["cv3", "cvx"], ["cv1", "cv", "cv.", "cv3.conv"]),
    ("cv[^12]", ["cv3"], ["cv2"]),
    ("cv[]x]", ["cv]", "cvx"], ["cv[", "cv"]),
    ("cv[a-c-]", ["cva", "cvb", "cv-"], ["cvd", "cv"]),
    (r"cv[\d]", ["cvd", "cv\\"], ["cv1"]),
    ("**", ["", "neck", "neck.top.conv"], []),
    ("neck.**", ["neck", "neck.top", "neck.top.0.conv"], ["necks", "", "backbone.neck"]),
    ("**.conv", ["conv", "neck.conv", "neck.top.conv"], ["neck.convs", "conv.neck", ""]),
    ("neck.**.conv", ["neck.conv", "neck.a.conv", "neck.a.b.conv"], ["neck.conv.a", "neck.xconv", "neck"]),
    ("**.a.**.b.**", ["a.b", "x.a.y.b.z", "a.a.b.b"], ["b.a", "a", "xa.b"]),
    ("a**b", ["ab", "axxb"], ["a.b"]),
    ("model.{12,15}.cv1", ["model.12.cv1", "model.15.cv1"], ["model.1.cv1", "model.12,15.cv1"]),
    ("{a,b{1,2{x,y}},c.d}.e", ["a.e", "b1.e", "b2x.e", "b2y.e", "c.d.e"], ["b.e", "b2.e", "c.e", "d.e"]),
    ("neck{,.top}", ["neck", "neck.top"], ["neck.", "necktop"]),
    ("{a,b}.{**,*}", ["a", "a.x", "b.x.y"], ["c", "c.x"]),
    ("{neck,[bh]*d}.*", ["neck.0", "head.1", "bd.x"], ["neck", "hea.1"]),
    ("a.+.b", ["a.+.b"], ["a.aa.b"]),
    ("(a|b)$", ["(a|b)$"], ["a", "b"]),
    ("layer[[]0]", ["layer[0]"], ["layer0", "layer[", "layer[[]0]"]),
    ("a[{]b[}]", ["a{b}"], ["ab", "a{b"]),
    ("{x[,]y,z[}]}", ["x,y", "z}"], ["x", "y", "z"]),
    ("[*].[?]", ["*.?"], ["a.b", "*.a"]),
    ("{!}a.{@}b", ["!a.@b"], ["a.b", "a"]),
    ("[]]x]", ["]x]"], ["xx]"]),
    ("[{,}]a", ["{a", ",a", "}a"], ["a", "xa"]),
    ("*a*b*.**.*c*.**.d*", ["xaxbx.c.d", "ab.q.cc.q.q.dd"], ["ab.c", "ba.c.d", "ab.d.c"]),
    ("**.a.*.**.b.*", ["a.x.b.y", "a.a.b.b.b", "q.a.a.q.b.b"], ["a.b.x", "b.y", "a.x.b"]),
]


@pytest.mark.parametrize(("pattern", "yes", "no"), TABLE, ids=[row[0] or "root" for row in TABLE])
def test_what_a_pattern_matches(pattern, yes, no):
    assert [name for name in yes if not matches(pattern, name)] == []
    assert [name for name in no if matches(pattern, name)] == []


@pytest.mark.parametrize(
    ("pattern", "literal"),
    [
        ("a.b", True),
        ("model.{12,15}.cv1", True),
        ("", True),
        ("a[[]0]", True),
        ("{!}a", True),
        ("a.*", False),
        ("{a,b?}", False),
        ("a[12]", False),
    ],
)
def test_no_wildcard_means_that_very_name(pattern, literal):
    assert is_literal(pattern) is literal


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("a[1", "opens a bracket it never closes"),
        ("a[]", "opens a bracket it never closes"),
        ("a[1.b]", "opens a bracket it never closes"),
        ("a[!]", "has an empty bracket"),
        ("a[^]", "has an empty bracket"),
        ("a[3-1]", "has a range that runs backwards"),
        ("{a,b", "opens a brace it never closes"),
        ("{a,{b}", "opens a brace it never closes"),
        ("a}", "closes a brace it never opened"),
        ("{a}}", "closes a brace it never opened"),
        ("a..b", "has an empty part"),
        (".a", "has an empty part"),
        ("a.", "has an empty part"),
        ("model.{a,}", "has an empty part"),
        ("{a,b}" * 13, "has more than 4096 alternatives"),
    ],
)
def test_patterns_that_are_none(pattern, text):
    with pytest.raises(PatternError, match=text) as caught:
        matches(pattern, "a")
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "*" * 5000 + "z",
        "*a" * 900 + "z",
        "?*" * 700 + "z",
        "[!b]*a*" * 500 + "z",
        "**." * 2000 + "zzz",
        "**.*a*." * 400 + "z",
        "**.a.*.a." * 300 + "z",
        "{a,b*}" * 11 + "z",
        "{*a*,**.*a}." * 8 + "z",
    ],
    ids=lambda pattern: f"{pattern[:9]} {len(pattern)}",
)
def test_no_pattern_takes_long(pattern):
    names = ["a" * 1000, ".".join("a" * 500), ".".join(["aaab"] * 200), ("a" * 60 + ".") * 15 + "a"]

    def matched():
        with contextlib.suppress(PatternError):
            glob = Glob(pattern)
            assert [name for name in names if glob.matches(name)] == []

    within(4, matched)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("a" * 10_001, "is too long: at most 10,000 letters"),
        ("{a,b}" * 2000, "has more than 4096 alternatives"),
        ("{a,{b,{c,d}{e,f}}{g,h}}" * 20, "has more than 4096 alternatives"),
        ("{" * 51 + "a" + "}" * 51, "has braces in more than 50 others"),
        ("{" * 5000, "has braces in more than 50 others"),
        ("{a,b}" * 12 + "x" * 500, "is too large with its braces written out"),
        ("{a*,b*}" * 12, "has too many wildcards with its braces written out"),
    ],
)
def test_what_braces_multiply_is_counted_first(pattern, text):
    def refusal():
        with pytest.raises(PatternError, match=text) as caught:
            matches(pattern, "a")
        return str(caught.value)

    assert len(within(0.5, refusal)) < 400


@pytest.mark.parametrize(
    "name", ["", "a.b", "a[0].b", "{x}.y", "!a", "@a.b", "a*b?c", "]", "[", "a,b", "[!x]", "**", "a{,}"]
)
def test_a_quoted_name_matches_that_name_alone(name):
    assert matches(quoted(name), name)
    assert is_literal(quoted(name))
    assert not matches(quoted(name), name + "x")
    assert not quoted(name).startswith(("!", "@"))


def test_names_with_wildcards_are_suggested_so_that_they_match():
    model = nn.Sequential()
    model.add_module("branch[0]", nn.Conv2d(1, 1, 1))
    model.add_module("{x}", nn.Conv2d(1, 1, 1))
    with pytest.raises(PatternError, match=r"'branch\[0\]' matches none .* Closest: branch\[\[\]0\]"):
        convpeft.plan(model, {"rules": [{"match": "branch[0]", "kind": "lora"}]})
    found = convpeft.plan(model, {"rules": [{"match": ["branch[[]0]", "[{]x[}]"], "kind": "lora"}]})
    assert [layer.name for layer in found.layers] == ["branch[0]", "{x}"]


NAMES = st.lists(st.text("ab1", min_size=1, max_size=3), max_size=4).map(".".join)
PIECES = st.sampled_from(
    ["a", "b", "1", "*", "?", "[ab]", "[!a]", "[a-b1]", "{a,1}", "{*,b{a,?}}", "{a,b.1}", "{ab,}a"]
)
PARTS = st.one_of(st.just("**"), st.lists(PIECES, min_size=1, max_size=3).map("".join))
PATTERNS = st.lists(PARTS, max_size=4).map(".".join)
STARRED = st.lists(st.sampled_from(["a", "b", "*", "?", "[ab]", "[!a]"]), min_size=1, max_size=7).map("".join)
CROSSING = st.lists(st.one_of(st.just("**"), STARRED), max_size=6).map(".".join)
LONG_NAMES = st.lists(st.text("ab", min_size=1, max_size=6), max_size=6).map(".".join)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(CROSSING, LONG_NAMES)
@example("*a*ab", "aaab")
@example("**.a*.**.a*b", "aa.ab.aab")
def test_many_wildcards_match_as_the_slow_matcher_does(pattern, name):
    assert matches(pattern, name) == reference.matches(pattern, name)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(PATTERNS, NAMES)
@example("**.a.**", "a")
def test_matches_as_the_slow_matcher_does(pattern, name):
    assert matches(pattern, name) == reference.matches(pattern, name)


@pytest.mark.filterwarnings("error")
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text("ab1.*?[[[]]]!^-{},\\(|&~", max_size=10), NAMES)
@example("a[b||c--d]", "a")
def test_any_text_is_a_pattern_or_a_pattern_error(pattern, name):
    with contextlib.suppress(PatternError):
        assert isinstance(matches(pattern, name), bool)
