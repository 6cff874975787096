"""The methods of peft as kinds: the changed weight is peft's, the geometry is the layer's, and what is off is refused."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

import convpeft
from convpeft.adapters.peft_kinds import kinds, layers
from convpeft.adapters.peft_kinds import probe as probing
from convpeft.adapters.peft_kinds.probe import probe
from tests.cases import (
    LAYERS,
    LINEARS,
    TRANSPOSED,
    Variant,
    adapted,
    assert_relative,
    bits,
    named,
    net,
    randomised,
    same_bits,
)
from tests.references.convolution import convolve, grid_of

CASES = {case.name: case for case in LAYERS}
METHODS = {
    "loha": {"r": 2, "alpha": 3},
    "lokr": {"r": 2, "decompose_factor": 2, "use_effective_conv2d": True},
    "hira": {"r": 3},
    "ia3": {},
    "hra": {"r": 4},
    "boft": {"boft_block_size": 2},
    "oft": {"r": 2, "oft_block_size": 0},
    "lora": {"r": 2, "lora_alpha": 5},
}
LINEAR_ONLY = {
    "vera": {"r": 3},
    "randlora": {"r": 2},
    "gralora": {"r": 4, "gralora_k": 2},
    "waveft": {"n_frequency": 7},
    "fourierft": {"n_frequency": 7, "init_weights": True},
}
GROUPED = ("groups2", "groups2-reflect-stride2", "depthwise", "depthwise-multiplier2")


def serves(method: str, layer: nn.Module) -> bool:
    """What the installed peft can do, by its own words and by what PEERS measured of it."""
    if isinstance(layer, nn.Linear):
        return True
    square, pointwise = layer.kernel_size[0] == layer.kernel_size[1], layer.kernel_size == (1, 1)
    return {
        "loha": True,
        "lokr": True,
        "ia3": True,
        "hira": layer.groups == 1,
        "lora": layer.groups == 1,
        "hra": layer.groups == 1 and square,
        "boft": layer.groups == 1 and square,
        "oft": layer.groups == 1 and pointwise,
    }[method]


def variant(method: str) -> Variant:
    return Variant(f"peft:{method}", "parallel", {**METHODS, **LINEAR_ONLY}[method])


PAIRS = [(case, variant(method)) for method in METHODS for case in LAYERS if case not in TRANSPOSED]
SERVED = [pair for pair in PAIRS if serves(pair[1].kind.removeprefix("peft:"), pair[0].build())]
SERVED += [(case, variant(method)) for method in LINEAR_ONLY for case in LINEARS]
REFUSED = [pair for pair in PAIRS if pair not in SERVED]
IN_SHORT = pytest.mark.parametrize("kind", named([variant(method) for method in METHODS]))


def test_a_plan_made_without_gradients_says_the_same():
    model = net(LAYERS[0])
    probe.cache_clear()
    with torch.no_grad():
        assert convpeft.plan(model, {"rules": [{"match": "layer", "kind": "peft:loha", "r": 3}]}).layers


def shaken(case, *kinds, dtype=torch.float64):
    """Return the net with adapters off their start by a little: OFT's series needs small steps."""
    model = net(case, dtype)
    for number, kind in enumerate(kinds):
        convpeft.inject(model, {"rules": [kind.rule]}, name="ab"[number])
    convpeft.set_active(model, list("ab"[: len(kinds)]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "convpeft" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.3 * noise).to(parameter.dtype))
    return model


def merged_by_peft(layer: nn.Module, adapter) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias as peft's own merge makes them of a plain layer of the same shape."""
    linear = isinstance(layer, nn.Linear)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None) if linear else nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups, bias=layer.bias is not None
    )  # fmt: skip
    plain = plain.double()
    plain.load_state_dict({key: layer.state_dict()[key] for key in plain.state_dict()})
    wrapped = layers.wrap(adapter.method, adapter.options.settings(), plain).double()
    missing, unexpected = wrapped.load_state_dict(adapter.layer.state_dict(), strict=False)
    assert not unexpected
    assert all("base_layer" in key for key in missing)
    wrapped.merge()
    base = wrapped.get_base_layer()
    return base.weight.detach(), None if base.bias is None else base.bias.detach()


@pytest.mark.parametrize(("case", "kind"), named(SERVED))
def test_fresh_is_the_identity_and_trained_is_pefts_weight_on_the_layers_geometry(case, kind):
    model, x = net(case), case.input()
    before, base = model(x), list(model.state_dict())
    report = convpeft.inject(model, {"rules": [kind.rule]})
    assert convpeft.check(model, x).ok
    assert torch.equal(model(x), before)
    assert [key for key in model.state_dict() if ".convpeft." not in key] == base
    assert report.adapter_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)

    model = shaken(case, kind)
    layer, adapter = model.layer, model.layer.convpeft.a
    weight, bias = merged_by_peft(layer, adapter)
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            expected = nn.functional.linear(x, weight, bias)
        else:
            expected = convolve(x, weight, bias, layer.groups, grid_of(layer, x))
        assert_relative(layer(x), expected)
        with convpeft.disabled(model):
            assert float((expected - layer(x)).abs().max()) > 1e-3


@pytest.mark.parametrize(("case", "kind"), named(SERVED))
def test_merges_exactly_alone_and_beside_a_lora(case, kind):
    x = case.input()
    for several in ((kind,), (kind, Variant("lora", "parallel", {"rank": 2, "dora": True}))):
        model = shaken(case, *several)
        merged = convpeft.merge(model)
        with torch.no_grad():
            assert_relative(merged(x), model(x))
        assert type(merged.layer) is type(net(case).layer)


@pytest.mark.parametrize(("case", "kind"), named(REFUSED))
def test_what_peft_gets_wrong_is_refused_at_plan_time(case, kind):
    model = net(case)
    before = bits(model)
    for function in (convpeft.plan, convpeft.inject):
        with pytest.raises(
            convpeft.SpecError, match=rf"rule 1: layer \(\w+\) cannot take kind '{kind.kind}': peft's \w+ (does|gives)"
        ):
            function(model, {"rules": [kind.rule]})
    assert same_bits(before, bits(model))


REASONS = [
    ("c3a", {"block_size": 2}, "linear", "is not the identity when fresh: it changes the weight by up to"),
    ("c3a", {"block_size": 2, "init_weights": True}, "linear", "does not compute the convolution"),  # float32 inside
    ("loha", {"init_weights": False}, "3x3", "is not the identity when fresh"),
    ("hra", {"r": 3}, "3x3", "is not the identity when fresh"),
    ("oft", {"r": 2, "oft_block_size": 0}, "3x3", "does not compute the convolution with its changed weight"),
    ("oft", {"oft_block_size": 3}, "1x1", "would not take the options as they are: .*Adjusted `oft_block_size`"),
    ("oft", {"r": 2, "oft_block_size": 0, "coft": True}, "1x1", "gives its parameters no gradient|does not compute"),
    ("hira", {"r": 2}, "groups2", "does not serve it: NotImplementedError: HiRA does not support .*groups > 1"),
    ("boft", {"boft_block_size": 7}, "3x3", r"does not serve it: ValueError: .*must be divisible"),
    ("lora", {"r": 2, "use_dora": True}, "3x3", "does not compute the convolution|starts from the layer's own weight"),
    ("osf", {}, "linear", "starts from the layer's own weight"),
    ("pvera", {"r": 2}, "linear", "does not compute the convolution with its changed weight"),
    ("road", {"group_size": 2}, "linear", "works on activations and offers no delta weight"),
    ("vera", {"r": 2}, "3x3", "does not serve it"),
    (
        "loha",
        {"r": 65536, "use_effective_conv2d": True},
        "3x3",
        r"would need [\d,]+ numbers here; at most 67,108,864 are allowed",
    ),
]


@pytest.mark.parametrize(("method", "options", "name", "why"), REASONS, ids=[f"{m}-{o}" for m, o, _, _ in REASONS])
def test_refusals_say_what_was_seen(method, options, name, why):
    rule = {"match": "layer", "kind": f"peft:{method}", **options}
    with pytest.raises(convpeft.SpecError, match=rf"cannot take kind 'peft:{method}': peft's {method} .*({why})"):
        convpeft.plan(net(CASES[name]), {"rules": [rule]})


BAD_OPTIONS = [
    (
        "loha",
        {"rank": 4},
        r"unknown key 'rank' for kind 'peft:loha'\. Closest: .*\br\b.*Its options: dropout, r, alpha",
    ),
    ("loha", {"module_dropout": 0.1}, r"unknown key 'module_dropout' for kind 'peft:loha'\. Closest: .*dropout"),
    ("loha", {"target_modules": ["x"]}, "unknown key 'target_modules'"),
    ("loha", {"r": 2.5}, r"r of kind 'peft:loha' must be a whole number, not 2\.5"),
    ("loha", {"r": 10**6}, "r must be at most 65,536, not 1,000,000"),
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


@IN_SHORT
@pytest.mark.parametrize("name", ["1x1", "linear"])
def test_saved_loaded_copied_and_pickled_is_the_same(kind, name, tmp_path):
    case = CASES[name]
    model, x = shaken(case, kind), case.input()
    with torch.no_grad():
        expected = model(x)
        convpeft.save_adapter(model, tmp_path / "a.safetensors", name="a")
        keys = convpeft.inspect_adapter(tmp_path / "a.safetensors").tensors
        assert not [key for key in keys if "base_layer" in key]
        other = copy.deepcopy(model)
        convpeft.eject(other)
        convpeft.load_adapter(other, tmp_path / "a.safetensors")
        assert torch.equal(other(x), expected)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert torch.equal(again(x), expected)
        assert again.layer.convpeft.a.options == model.layer.convpeft.a.options
    convpeft.set_active(model, None)
    assert not torch.equal(model(x), expected)
    base = net(case)
    base.load_state_dict(convpeft.eject(model).state_dict())
    assert torch.equal(model(x), base(x))


@IN_SHORT
def test_a_base_loaded_later_and_an_unfrozen_host_are_read_as_they_are_then(kind):
    case = CASES["1x1"]
    x, kinds = case.input(), (kind,)
    model = shaken(case, *kinds)
    base = net(case)
    model.load_state_dict(base.state_dict(), strict=True)
    weight, bias = merged_by_peft(model.layer, model.layer.convpeft.a)
    with torch.no_grad():
        assert_relative(model.layer(x), nn.functional.conv2d(x, weight, bias))
    unfrozen = net(case)
    convpeft.inject(unfrozen, {"rules": [kind.rule], "unfreeze": ["layer"]}, name="a")
    with torch.no_grad():
        unfrozen.layer.weight.mul_(1.5)
    randomised_a_little(unfrozen)
    merged = convpeft.merge(unfrozen)
    with torch.no_grad():
        assert_relative(merged(x), unfrozen(x))


def randomised_a_little(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "convpeft" in name and "_stash" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))


@IN_SHORT
def test_only_the_methods_own_parameters_learn(kind):
    case = CASES["1x1"]
    model, x = shaken(case, kind), case.input()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".convpeft." in name), name
        assert parameter.requires_grad == (".convpeft." in name), name


@IN_SHORT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_follows_the_host(kind, dtype):
    case = CASES["1x1"]
    model, x = shaken(case, kind, dtype=dtype), case.input(dtype)
    own = model.layer.convpeft.a
    assert {p.dtype for p in model.parameters()} == {dtype}
    got = model.layer(x)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in own.parameters())
    with torch.no_grad():
        wide = copy.deepcopy(model).double().layer(x.double())
    assert got.dtype == dtype
    # the changed weight is worked out in float32 and rounded once, like each of the two convolutions and their sum
    assert_relative(got.detach().double(), wide, 16 * torch.finfo(dtype).eps)


@IN_SHORT
def test_dropout_is_of_the_updates_input(kind):
    case = CASES["1x1"]
    model, x = shaken(case, Variant(kind.kind, "parallel", {**kind.options, "dropout": 0.5})), case.input()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_scales_are_not_decayed_to_zero():
    for method, name in (("ia3", "ia3_l"), ("boft", "boft_s")):
        adapter = adapted(CASES["1x1"], variant(method)).layer.convpeft.a
        assert [key for key in adapter.no_decay() if name in key]


def test_a_layer_that_is_not_its_weights_convolution_is_refused():
    class Doubling(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(4, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    for rule in ({"kind": "peft:loha", "r": 2}, {"kind": "lora", "dora": True}):
        with pytest.raises(convpeft.SpecError, match=r"forward is not the convolution of its weight alone.*differ by"):
            convpeft.plan(model, {"rules": [{"match": "0", **rule}]})
        with pytest.raises(convpeft.SpecError, match="which is no plain parameter here"):
            convpeft.plan(model, {"rules": [{"match": "1", **rule}]})
    assert convpeft.plan(model, {"rules": [{"match": "*", "kind": "lora"}]}).layers


def test_the_probe_leaves_the_random_state_alone():
    probe.cache_clear()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "stem", "kind": "peft:loha"}]})
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
    probe.cache_clear()
    model = net(CASES["3x3"])
    before = torch.get_rng_state()
    convpeft.plan(model, {"rules": [{"match": "layer", "kind": "peft:loha"}]})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_method_that_keeps_a_choice_outside_its_tensors_is_seen(monkeypatch):
    def wrap(method, settings, layer):
        wrapped = layers.wrap(method, settings, layer)
        wrapped.__dict__["choice"] = torch.rand(())
        return wrapped

    def change_of(method, wrapped, weight, bias):
        change = layers.change_of(method, wrapped, weight, bias)
        return layers.Change(change.weight * wrapped.choice, change.bias)

    shape = convpeft.ConvGeometry(4, 6, (3, 3))
    probing._check_round_trip("loha", {"r": 2}, shape)
    monkeypatch.setattr(probing, "wrap", wrap)
    monkeypatch.setattr(probing, "change_of", change_of)
    with pytest.raises(probing._Seen, match="keeps a random choice outside its tensors"):
        probing._check_round_trip("loha", {"r": 2}, shape)


def test_randomised_buffers_still_merge():
    """VeRA's frozen projections are part of its change: whatever they hold is merged."""
    case = LINEARS[0]
    model = net(case)
    convpeft.inject(model, {"rules": [variant("vera").rule]})
    randomised(model)
    x = case.input()
    with torch.no_grad():
        assert_relative(convpeft.merge(model)(x), model(x))
