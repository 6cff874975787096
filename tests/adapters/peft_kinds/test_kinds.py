"""The methods of peft as kinds: their options and names are peft's, and what is off is said."""

from __future__ import annotations

import subprocess
import sys

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import convpeft
from convpeft.adapters.peft_kinds import kinds, layers
from tests.adapters.peft_kinds.methods import LINEAR_ONLY, METHODS
from tests.cases import CASES, LINEARS, net

GROUPED = ("groups2", "groups2-reflect-stride2", "depthwise", "depthwise-multiplier2")
BAD_OPTIONS = [
    (
        "loha",
        {"rank": 4},
        r"unknown key 'rank' for kind 'peft:loha'\. Closest: .*\br\b.*Its options: dropout, r, alpha",
    ),
    ("loha", {"module_dropout": 0.1}, r"unknown key 'module_dropout' for kind 'peft:loha'\. Closest: .*dropout"),
    ("loha", {"target_modules": ["x"]}, "unknown key 'target_modules'"),
    ("loha", {"r": 2.5}, r"r of kind 'peft:loha' must be a whole number, not 2\.5"),
    ("loha", {"r": 10**6}, "r must be at most 65,536, not 1000000"),
    ("lora", {"init_lora_weights": "nonsense"}, "init_lora_weights of kind 'peft:lora' must be"),
    ("boft", {"boft_n_butterfly_factor": 2}, "boft_n_butterfly_factor must be 1"),
    ("adalora", {}, "adalora moves its ranks in a callback of peft's training loop"),
    ("oft", {"r": 2}, "peft refuses these options: .*oft_block_size"),
]


@pytest.mark.parametrize(("method", "options", "text"), BAD_OPTIONS, ids=[f"{m}-{o}" for m, o, _ in BAD_OPTIONS])
def test_options_are_pefts_and_are_checked(method, options, text):
    with pytest.raises(convpeft.OptionError, match=text):
        convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "layer", "kind": f"peft:{method}", **options}]})


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(convpeft.UnknownKind, match=r"unknown kind 'peft:lhoa'\. Closest: .*loha.*installed peft"):
        convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "layer", "kind": "peft:lhoa"}]})
    with pytest.raises(convpeft.UnknownKind, match="peft:<method>"):
        convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "layer", "kind": "pftt"}]})
    with pytest.raises(convpeft.RegistrationError, match="belong to the package peft"):
        convpeft.register_adapter("peft:mine")(type("Mine", (convpeft.adapters.Lora,), {}))


def test_places_are_parallel_only():
    with pytest.raises(convpeft.OptionError, match="kind 'peft:loha' has no place 'output', only parallel"):
        convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "layer", "kind": "peft:loha", "place": "output"}]})


def test_peft_is_imported_only_when_asked_for():
    script = (
        "import sys, torch, convpeft\n"
        "assert not any(kind.startswith('peft:') for kind in convpeft.adapter_kinds())\n"
        "convpeft.plan(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), {'rules': [{'match': '0', 'kind': 'lora'}]})\n"
        "assert 'peft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("broken", ["missing", "old"])
def test_a_missing_or_old_peft_is_said(broken, monkeypatch):
    layers.peft_types.cache_clear()
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "peft", None)
        text = "need the package peft, which cannot be imported"
    else:
        monkeypatch.delattr(peft.mapping, "PEFT_TYPE_TO_TUNER_MAPPING")
        text = rf"need a newer peft than {peft.__version__}"
    with pytest.raises(convpeft.OptionError, match=text):
        kinds.peft_methods()
    layers.peft_types.cache_clear()


def test_every_layer_method_of_the_installed_peft_is_used_or_refused_with_a_sentence():
    names = kinds.peft_methods()
    assert set(METHODS) | set(LINEAR_ONLY) <= set(names) <= {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert "prompt_tuning" not in names
    for name in names:
        for case in (CASES["3x3"], LINEARS[0]):
            problem = problem_of(case, name)
            assert problem is None or f"peft:{name}" in problem


def problem_of(case, method: str) -> str | None:
    try:
        convpeft.plan(net(case), {"rules": [{"match": "layer", "kind": f"peft:{method}"}]})
    except convpeft.SpecError as error:
        return str(error)
    return None
