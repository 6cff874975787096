"""peft's format, both ways, beside the installed peft itself: outputs equal, merged too; what differs is refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import convpeft
from convpeft import Rule, Spec
from convpeft.files import peft_config

METHODS = {
    "lora": lambda **o: peft.LoraConfig(r=4, lora_alpha=6, rank_pattern={"head": 2}, alpha_pattern={"stem": 3}, **o),
    "rslora": lambda **o: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"^head": 2}, **o),
    "dora": lambda **o: peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.1, **o),
    "bias": lambda **o: peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, **o),
    "loha": lambda **o: peft.LoHaConfig(r=4, alpha=6, rank_pattern={"head": 2}, alpha_pattern={"stem": 3}, **o),
    "lokr": lambda **o: peft.LoKrConfig(r=2, alpha=3, **o),
    "hra": lambda **o: peft.HRAConfig(r=4, **o),
    "boft": lambda **o: peft.BOFTConfig(boft_block_size=4, **o),
    "oft": lambda **o: peft.OFTConfig(r=0, oft_block_size=4, **o),
    "ia3": lambda **o: peft.IA3Config(feedforward_modules=[], **o),
}


class Small(nn.Module):
    """Convolutions of several sorts, a norm and a Linear."""

    def __init__(self, mode: str = "zeros") -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode=mode)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.wide = nn.Conv2d(8, 8, (1, 5), dilation=(1, 2), groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.wide(self.mix(self.norm(self.stem(x)).relu())).mean((2, 3)))


def small(mode: str = "zeros") -> Small:
    torch.manual_seed(0)
    return Small(mode).double().eval()


def image(channels: int = 4, size: int = 24) -> torch.Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module) -> nn.Module:
    """Give everything that trains other values, in place."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.1 * noise.to(parameter.dtype)
    return model


def peft_folder(base: nn.Module, config: peft.PeftConfig, folder: Path) -> nn.Module:
    """Let peft adapt a copy of a model and save it with random values; return the adapted copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomised(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)).eval()
        model.save_pretrained(str(folder))
    return model


def loaded_by_peft(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.utils.warning.PeftWarning)
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), autocast_adapter_dtype=False)
    return loaded.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_peft_goes_in_and_comes_out_as_peft_computes_it(method, tmp_path):
    base, x = small(), image()
    targets = ["mix", "head"] if method in ("oft", "boft", "hra") else ["stem", "mix", "head"]
    saved = {} if method == "ia3" else {"modules_to_save": ["norm"]}
    theirs = peft_folder(base, METHODS[method](target_modules=targets, **saved), tmp_path / "theirs")
    expected = theirs(x)
    ours = copy.deepcopy(base)
    plan = convpeft.from_peft(ours, tmp_path / "theirs", name="travelled")
    assert {layer.name for layer in plan.layers} == set(targets)
    own = method in ("lora", "rslora", "dora", "bias")
    assert {layer.kind for layer in plan.layers} == {"lora" if own else f"peft:{method}"}
    assert plan.owned == ({} if method == "ia3" else {"norm": 1.0})
    assert not torch.allclose(base(x), expected)
    close(ours(x), expected)
    close(convpeft.merge(ours)(x), expected)
    convpeft.to_peft(ours, tmp_path / "ours")
    again = loaded_by_peft(base, tmp_path / "ours")
    close(again(x), expected)
    close(again.merge_and_unload()(x), expected)
    convpeft.eject(ours)
    assert torch.equal(ours(x), base(x))


def test_the_adapter_trains_and_travels_on_in_a_file_of_its_own(tmp_path):
    base, x = small(), image()
    peft_folder(base, METHODS["dora"](target_modules=["stem", "head"], modules_to_save=["norm"]), tmp_path)
    model = copy.deepcopy(base)
    convpeft.from_peft(model, tmp_path)
    model(x).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.requires_grad}
    assert {"norm.weight", "stem.convpeft.default.magnitude", "head.convpeft.default.up"} <= trained
    convpeft.save_adapter(model, tmp_path / "a.safetensors")
    other = copy.deepcopy(base)
    convpeft.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), model(x))


def detector() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=64
    )
    images = [torch.rand(3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]
    return model.double().eval(), images


def test_a_detector_of_torchvision_travels_both_ways(tmp_path):
    base, images = detector()
    features = lambda model: model.backbone(torch.stack(images))["0"]  # noqa: E731
    names = [
        "backbone.fpn.inner_blocks.0.0",
        "backbone.fpn.layer_blocks.0.0",
        "rpn.head.conv.0.0",
        "roi_heads.box_predictor.cls_score",
    ]
    spec = Spec(
        rules=[Rule(names[:2], "lora", rank=8, alpha=4), Rule(names[2:], "lora", rank=4)],
        unfreeze=["rpn.head.cls_logits"],
    )
    model = copy.deepcopy(base)
    convpeft.inject(model, spec, name="screw")
    randomised(model)
    convpeft.to_peft(model, tmp_path)
    theirs = loaded_by_peft(base, tmp_path)
    expected = features(model)
    assert not torch.allclose(features(base), expected)
    close(features(theirs), expected)
    close(features(theirs.merge_and_unload()), expected)
    box = torch.randn(3, 1024, dtype=torch.float64)
    close(theirs.roi_heads.box_predictor.cls_score(box), model.roi_heads.box_predictor.cls_score(box))
    back = copy.deepcopy(base)
    plan = convpeft.from_peft(back, tmp_path)
    assert {layer.name: layer.options.rank for layer in plan.layers} == dict(zip(names, (8, 8, 4, 4), strict=True))
    close(convpeft.merge(back).backbone(torch.stack(images))["0"], expected)
    for key, value in model(images)[0].items():
        assert torch.equal(back(images)[0][key], value)


def test_a_model_of_timm_travels_both_ways(tmp_path):
    torch.manual_seed(0)
    base = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=4).double().eval()
    x = image(3, 64)
    pointwise = Rule("blocks.[0-2].**.{conv_pw,conv_pwl}", "lora", rank=4, alpha=8, dora=True)
    stem = Rule(["conv_stem", "classifier"], "lora", rank=2, dora=True)  # the stem pads as TensorFlow does
    model = copy.deepcopy(base)
    convpeft.inject(model, Spec(rules=[pointwise, stem]))
    randomised(model)
    convpeft.to_peft(model, tmp_path)
    theirs = loaded_by_peft(base, tmp_path)
    assert not torch.allclose(base(x), model(x))
    close(theirs(x), model(x))
    close(theirs.merge_and_unload()(x), model(x))
    back = copy.deepcopy(base)
    convpeft.from_peft(back, tmp_path)
    close(back(x), model(x))
    close(convpeft.merge(back)(x), model(x))


@pytest.mark.parametrize(
    ("layer", "kind", "match"),
    [
        (
            nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
            "lora",
            "pads with zeros where the layer pads by 'reflect'",
        ),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), "peft:loha", "pads by 'circular'"),
        (nn.Conv2d(4, 8, 3, dilation=2, padding=2), "lora", r"leaves out the layer's dilation \(2, 2\)"),
        (nn.Conv2d(4, 8, 3, groups=2), "lora", "reads across the layer's 2 groups"),
        (nn.ConvTranspose2d(4, 8, 3), "lora", "no adapters for transposed"),
        (nn.Conv2d(4, 8, 3), "bottleneck", "peft has no bottleneck"),
    ],
)
def test_what_peft_would_compute_wrongly_is_not_written(layer, kind, match, tmp_path):
    model = nn.Sequential(layer)
    options = {"rank": 2} if kind == "lora" else {"r": 2} if ":" in kind else {"reduction": 2}
    convpeft.inject(model, Spec(rules=[Rule("0", kind, **options)]))
    with pytest.raises(convpeft.HostError, match=match):
        convpeft.to_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


class Halved(nn.Conv2d):
    """A convolution whose constructor is its own: peft calls it with the arguments of Conv2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)


def test_what_only_peft_itself_shows_is_not_written_either(tmp_path):
    model = nn.Sequential(Halved(4))
    convpeft.inject(model, Spec(rules=[Rule("0", "lora", rank=2)]))
    with pytest.raises(convpeft.HostError, match="peft does not load it: TypeError"):
        convpeft.to_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


class Doubled(nn.Conv2d):
    """A convolution that does more than one: peft makes A of its class, so that A does it too."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_whose_adapter_peft_computes_otherwise_is_neither_written_nor_read(tmp_path):
    base = nn.Sequential(Doubled(4, 4, 1)).double().eval()
    peft_folder(base, peft.LoraConfig(r=2, target_modules=["0"]), tmp_path / "theirs")
    with pytest.raises(convpeft.AdapterFileError, match="0: peft's own layer computes something else"):
        convpeft.from_peft(base, tmp_path / "theirs")
    convpeft.inject(base, Spec(rules=[Rule("0", "lora", rank=2)]))
    randomised(base)
    with pytest.raises(convpeft.HostError, match="0: peft's own layer computes something else"):
        convpeft.to_peft(base, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_ranks_of_layers_whose_names_end_alike_are_kept_apart(tmp_path):
    torch.manual_seed(0)
    base = nn.ModuleDict({"block": nn.ModuleDict({"mix": nn.Linear(4, 4)}), "mix": nn.Linear(4, 4)}).double().eval()
    model = copy.deepcopy(base)
    rules = [Rule("block.mix", "lora", rank=3, alpha=2), Rule("mix", "lora", rank=1, alpha=5)]
    convpeft.inject(model, Spec(rules=rules))
    randomised(model)
    convpeft.to_peft(model, tmp_path)
    theirs = loaded_by_peft(base, tmp_path).base_model.model
    x = torch.randn(2, 4, dtype=torch.float64)
    close(theirs["mix"](x), model["mix"](x))
    close(theirs["block"]["mix"](x), model["block"]["mix"](x))


def test_one_folder_has_one_method_and_one_of_each_setting(tmp_path):
    model = small()
    rules = [Rule("stem", "lora", rank=2, rslora=True), Rule("mix", "lora", rank=2), Rule("head", "peft:loha", r=2)]
    convpeft.inject(model, Spec(rules=rules[:2]), name="two")
    with pytest.raises(convpeft.HostError, match="its layers have rslora False, True"):
        convpeft.to_peft(model, tmp_path / "a")
    convpeft.inject(model, Spec(rules=rules[1:]), name="mixed")
    with pytest.raises(convpeft.HostError, match="kinds lora, peft:loha, and a peft folder has one method"):
        convpeft.to_peft(model, tmp_path / "a", name="mixed")
    convpeft.set_active(model, None)
    with pytest.raises(convpeft.StateError, match="which adapter"):
        convpeft.to_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_names_that_peft_would_match_too_are_kept_apart(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(12)]).double().eval()
    x = image()
    model = copy.deepcopy(base)
    convpeft.inject(model, Spec(rules=[Rule("0", "lora", rank=2)], unfreeze=["1"]))  # peft takes "11" as well
    randomised(model)
    convpeft.to_peft(model, tmp_path)
    theirs = loaded_by_peft(base, tmp_path)
    close(theirs(x), model(x))
    convpeft.eject(model)
    convpeft.inject(model, Spec(rules=[Rule("11", "lora", rank=2)], unfreeze=["1"]))
    with pytest.raises(convpeft.HostError, match="modules_to_save would take 11 along"):
        convpeft.to_peft(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"lora_bias": True}, "stem: lora_A or lora_B, or its bias, is missing"),
        ({"use_qalora": True}, "'use_qalora' is True, which has no counterpart"),
        ({"trainable_token_indices": [1]}, "no counterpart"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING' is none of"),
        ({"rank_pattern": {"stem": 3}}, "stem: its rank is 4, and the configuration says 3"),
        ({"alpha_pattern": {"(a+)+": 3}}, "could take too long"),
        ({"alpha_pattern": {"stem": "x"}}, "no numbers by pattern"),
        ({"target_modules": ["stem", "mix", "head"]}, "mix: its target_modules name it, and the file has no tensors"),
        ({"target_modules": "stem"}, "head: the file has tensors for it, and its target_modules do not name it"),
        ({"use_dora": True}, "use_dora is True, and its magnitudes say otherwise"),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(change, match, tmp_path):
    base = small()
    peft_folder(base, peft.LoraConfig(r=4, target_modules=["stem", "head"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert_refused(base, tmp_path, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("base_model.model.stem.lora_B.weight"), "stem: lora_A or lora_B, or its bias, is missing"),
        (lambda t: t.update({"stem.lora_C.weight": torch.ones(1)}), "does not begin with"),
        (lambda t: t.update({"base_model.model.gone.lora_A.weight": torch.ones(1)}), "no layer of this model"),
        (lambda t: t.update({"base_model.model.head.lora_B.bias": torch.ones(4)}), "lora_B.bias has no counterpart"),
        (lambda t: t.update({"base_model.model.head.lora_A.weight": torch.ones(4, 9)}), r"down is \(4, 9, 1, 1\)"),
        (lambda t: t.clear(), "target_modules name it"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, match, tmp_path):
    base = small()
    peft_folder(base, peft.LoraConfig(r=4, target_modules=["stem", "head"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert_refused(base, tmp_path, match)


def assert_refused(base, folder, match):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(convpeft.AdapterFileError, match=match):
        convpeft.from_peft(base, folder)
    assert type(base) is Small
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|a?)" * 40 + "b",
        ".*" * 12 + "x",
        "(a*)*b",
        "(?:a{1,40}){1,40}b",
        "(a|a|a|a)" * 30,
        "[" * 99_000,
        "(a)" * 9 + r"\1",
    ],
    ids=lambda pattern: pattern[:12],
)
def test_patterns_that_could_take_forever_are_not_tried(pattern, tmp_path):
    base = nn.ModuleDict({"a" * 60: nn.Linear(4, 4)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": pattern}))
    save_file({f"base_model.model.{'a' * 60}.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(convpeft.AdapterFileError, match=r"could take too long|no regular expression"):
        convpeft.from_peft(base, tmp_path)


def test_patterns_as_people_write_them_are_read():
    for pattern in (
        r"model\.layers\.(\d+)\.(q|k|v)_proj",
        ".*\\.cv[12]\\.conv",
        "|".join(["backbone.stage.0.conv"] * 2000),
    ):
        assert peft_config._pattern_problem(pattern) is None


def test_what_was_trained_with_other_padding_is_not_read(tmp_path):
    base = small("reflect")
    peft_folder(base, peft.LoraConfig(r=4, target_modules=["stem", "head"]), tmp_path)
    assert_refused(base, tmp_path, "stem: peft's adapter pads with zeros where the layer pads by 'reflect'")


def test_a_pickle_is_not_read(tmp_path):
    base = small()
    model = peft_folder(base, peft.LoraConfig(r=4, target_modules=["stem"]), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(peft.get_peft_model_state_dict(model), tmp_path / "adapter_model.bin")
    assert_refused(base, tmp_path, "cannot be read.*bin files are pickles")
    assert_refused(base, tmp_path / "nothing", "cannot be read.*A peft folder has adapter_config.json")


def test_biases_that_peft_trained_come_along(tmp_path):
    base, x = small(), image()
    theirs = peft_folder(base, peft.LoraConfig(r=4, target_modules=["stem"], bias="all"), tmp_path)
    model = copy.deepcopy(base)
    plan = convpeft.from_peft(model, tmp_path)
    assert set(plan.owned) == {"stem", "norm", "mix", "wide", "head"}
    close(model(x), theirs(x))


def test_in_float32_outputs_differ_by_rounding_only(tmp_path):
    base, x = small().float(), image().float()
    theirs = peft_folder(base, METHODS["dora"](target_modules=["stem", "mix", "head"]), tmp_path / "theirs")
    model = copy.deepcopy(base)
    convpeft.from_peft(model, tmp_path / "theirs")
    close(model(x), theirs(x), 1e-6)
    convpeft.to_peft(model, tmp_path / "ours")
    close(loaded_by_peft(base, tmp_path / "ours")(x), theirs(x), 1e-6)


@pytest.mark.parametrize("options", [{"dora": True}, {"bias": True, "alpha": 3.0}], ids=str)
def test_adapters_in_half_precision_are_written_as_they_are(options, tmp_path):
    model = small().bfloat16()
    convpeft.inject(model, Spec(rules=[Rule("{stem,head}", "lora", rank=2, **options)]))
    randomised(model)
    convpeft.to_peft(model, tmp_path)  # what peft makes of it differs by less than 1e-6, or it is refused
    written = load_file(tmp_path / "adapter_model.safetensors")
    down = dict(convpeft.AdaptedModel.of(model).adapters("default"))["stem"].down
    assert torch.equal(written["base_model.model.stem.lora_A.weight"], down)
    back = small().bfloat16()
    convpeft.from_peft(back, tmp_path)
    torch.testing.assert_close(back(image().bfloat16()), model(image().bfloat16()))


def test_values_rounded_on_demand_are_those_that_are_checked(tmp_path):
    base = small().float()
    peft_folder(base, peft.LoraConfig(r=4, target_modules=["stem", "head"], use_dora=True), tmp_path)
    convpeft.from_peft(base, tmp_path, dtype="bfloat16")
    adapter = dict(convpeft.AdaptedModel.of(base).adapters("default"))["stem"]
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}


def test_another_adapters_values_of_the_layer_do_not_count(tmp_path):
    base, x = small(), image()
    theirs = peft_folder(base, METHODS["dora"](target_modules=["stem", "head"]), tmp_path)
    model = copy.deepcopy(base)
    convpeft.inject(model, Spec(unfreeze=["stem"]), name="other")
    randomised(model)  # the stem shows the other adapter's weight now
    convpeft.from_peft(model, tmp_path)
    close(model(x), theirs(x))
    convpeft.set_active(model, "other")
    convpeft.to_peft(model, tmp_path / "again", name="default")
    close(loaded_by_peft(base, tmp_path / "again")(x), theirs(x))


def test_a_layer_with_two_names_is_found_by_either(tmp_path):
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Identity()}).double()
    base["b"] = base["a"]
    tensors = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.b.{key}": each for key, each in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    convpeft.from_peft(base, tmp_path)
    x = torch.randn(3, 4, dtype=torch.float64)
    close(base["a"](x), nn.functional.linear(x, base["a"].weight + 2, base["a"].bias))


def test_half_precision_is_not_rounded_away(tmp_path):
    base = small().float()
    peft_folder(base, peft.LoraConfig(r=4, target_modules=["stem", "head"]), tmp_path)
    half = copy.deepcopy(base).bfloat16()
    convpeft.from_peft(half, tmp_path)
    down = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.stem.lora_A.weight"]
    adapter = dict(convpeft.AdaptedModel.of(half).adapters("default"))["stem"]
    assert torch.equal(adapter.down.data, down)
    assert half(image().bfloat16()).dtype == torch.bfloat16
