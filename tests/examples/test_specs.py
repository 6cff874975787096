"""The user's eleven configurations: what they train on YOLO-World-v2-L, in both frameworks, and what each can do."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import convpeft

pytest.importorskip("ultralytics")

from examples.yolo_world.training.model import build_world_model, use_classes
from tests.references.mmyolo_skeleton import WorldImagePart, copy_values, ultralytics_name

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "examples" / "yolo_world" / "specs"
FRAMEWORKS = ("ultralytics", "mmyolo")
BASE = 46_832_050
WITH_TEXT = BASE + 63_428_096
EXACT, ABOUT = 0.02, 0.20


@dataclass(frozen=True)
class Row:
    """One row of the user's table: the trainable parameters they give and how exact that is, and what is ours."""

    user: float
    tolerance: float
    places: int
    unfrozen: int = 0
    rates: tuple[float, ...] = (1.0,)
    kinds_kept: tuple[str, ...] = ()


HEAD_2 = 2_238_272
REDUCED = 2 * HEAD_2 + 656_896
AGGRESSIVE = 20_526_668
TABLE = {
    "phase1_option1_strategy_a": Row(0.5e6, ABOUT, 4, kinds_kept=("bottleneck",)),
    "phase1_option2_strategy_a": Row(1.5e6, ABOUT, 4, kinds_kept=("hierarchical",)),
    "phase1_option1_strategy_b": Row(1.5e6, ABOUT, 13, kinds_kept=("bottleneck",)),
    "phase1_option2_strategy_b": Row(3.0e6, ABOUT, 13, kinds_kept=("hierarchical",)),
    "phase2_lora": Row(0.25e6, EXACT, 17),
    "phase2_hybrid": Row(2.49e6, EXACT, 17, HEAD_2, (1.0, 0.5)),
    "phase2_hybrid_aggressive": Row(20.78e6, EXACT, 17, AGGRESSIVE, (1.0, 0.5, 0.1)),
    "phase2_step4_1_rep_mona": Row(2.51e6, EXACT, 17, HEAD_2, (1.0, 1.4, 0.5)),
    "phase2_step4_1_rep_mona_parallel": Row(2.51e6, EXACT, 12, HEAD_2, (1.0, 1.4, 0.5)),
    "phase2_step4_2_rep_mona": Row(5.3e6, ABOUT, 17, REDUCED, (1.0, 1.4, 0.5, 0.1)),
    "phase2_step5_moe_mona": Row(0.06 * WITH_TEXT, ABOUT, 17, REDUCED, (1.0, 1.4, 0.5, 0.1), ("moe_rep_mona",)),
    "phase2_step5_moe_mona_v2": Row(0.07 * WITH_TEXT, ABOUT, 17, REDUCED, (1.0, 1.4, 0.5, 0.1), ("moe_rep_mona",)),
}
OUT_OF_REACH = {"phase1_option1_strategy_b"}  # docs/user-setup.md has the arithmetic
NAMES = tuple(TABLE)
both_frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)
every_spec = pytest.mark.parametrize("name", NAMES)


def load(name: str, framework: str = "ultralytics") -> convpeft.Spec:
    return convpeft.Spec.load(SPECS / f"{name}.yaml", aliases=SPECS / "aliases" / f"{framework}.yaml")


@pytest.fixture(scope="module")
def large() -> dict[str, nn.Module]:
    """Both frameworks' L models, which are only planned for."""
    return {"ultralytics": build_world_model("l").eval(), "mmyolo": WorldImagePart("l").eval()}


@pytest.fixture(scope="module")
def planned(large) -> Callable[..., convpeft.Plan]:
    """Return the plan of a spec on L; each is made once."""
    return lru_cache(maxsize=None)(lambda name, framework: convpeft.plan(large[framework], load(name, framework)))


@pytest.fixture(scope="module")
def trunk() -> dict[str, nn.Module]:
    """Both frameworks' n models with the same random weights, for copies."""
    world = use_classes(build_world_model("n", seed=3), torch.randn(1, 3, 512)).eval()
    generator = torch.Generator().manual_seed(1)
    for module in world.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn(module.num_features, generator=generator)
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    skeleton = WorldImagePart("n", class_count=3).eval()
    copy_values(skeleton, world)
    return {"ultralytics": world, "mmyolo": skeleton}


@pytest.fixture
def small(trunk) -> dict[str, nn.Module]:
    return {framework: copy.deepcopy(model) for framework, model in trunk.items()}


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    """One image. With more, the text features are expanded over the batch, and there torch's own ``linear`` takes another
    kernel, with other last bits, when its weight stops requiring a gradient: freezing the bare base changes them too."""
    return torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


@torch.no_grad()
def raw(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the logits and the distances of the three scales, before any decoding."""
    if isinstance(model, WorldImagePart):
        return [tensor for pair in model(x) for tensor in pair]
    head, seen = model.model[-1], {}
    pairs = [pair for scale in zip(head.cv4, head.cv2, strict=True) for pair in scale]
    handles = [
        module.register_forward_hook(lambda module, args, output, at=at: seen.update({at: output}))
        for at, module in enumerate(pairs)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return [seen[at] for at in range(len(pairs))]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def disturb(model: nn.Module, *, adapters_only: bool = False) -> None:
    """Move every tensor that trains away from where it began."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (".convpeft." in name or not adapters_only):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter.dtype))


def test_there_is_one_file_for_every_row_and_no_other():
    assert {path.stem for path in SPECS.glob("*.yaml")} == {*NAMES, "rep_mona"}
    assert {path.stem for path in (SPECS / "aliases").glob("*.yaml")} == set(FRAMEWORKS)


# the table, on L


@both_frameworks
@every_spec
def test_the_table_of_trainable_parameters(planned, name, framework):
    row, plan = TABLE[name], planned(name, framework)
    assert len(plan.layers) == row.places
    assert plan.owned_parameters == row.unfrozen
    difference = plan.trainable_parameters / row.user - 1
    assert (abs(difference) <= row.tolerance) is (name not in OUT_OF_REACH), f"{difference:+.1%}"


def test_the_models_are_the_users(large):
    assert sum(parameter.numel() for parameter in large["ultralytics"].parameters()) == BASE
    fixed = large["ultralytics"].get_submodule("model.22.dfl.conv").weight.numel()
    assert sum(parameter.numel() for parameter in large["mmyolo"].parameters()) == BASE - fixed == BASE - 16
    theirs = large["ultralytics"].state_dict()
    own = {ultralytics_name(key): value.numel() for key, value in large["mmyolo"].state_dict().items()}
    assert own == {key: value.numel() for key, value in theirs.items() if not key.startswith("model.22.dfl")}


@every_spec
def test_both_frameworks_train_the_same_parts(planned, name):
    plans = {framework: planned(name, framework) for framework in FRAMEWORKS}
    shapes = {f: sorted((p.kind, str(p.site), p.lr_mult, p.parameters) for p in plans[f].layers) for f in FRAMEWORKS}
    assert shapes["ultralytics"] == shapes["mmyolo"]
    owned = {ultralytics_name(key): rate for key, rate in plans["mmyolo"].owned.items()}
    assert owned == plans["ultralytics"].owned


def test_the_documented_table_is_true(planned):
    page = (ROOT / "docs" / "user-setup.md").read_text(encoding="utf-8").partition("## How they compare")[0]
    cells = {
        row[1]: [cell.strip() for cell in row[2].split("|")]
        for row in re.finditer(r"^\| `(phase\w+)` \|(.*)\|$", page, re.MULTILINE)
    }
    assert set(cells) == set(NAMES)
    for name, (places, adapters, unfrozen, ours, _, difference) in cells.items():
        plan = planned(name, "ultralytics")
        counts = [len(plan.layers), plan.adapter_parameters, plan.owned_parameters, plan.trainable_parameters]
        assert [places, adapters, unfrozen, ours] == [f"{count:,}" for count in counts], name
        assert difference.replace("−", "-") == f"{100 * (plan.trainable_parameters / TABLE[name].user - 1):+.1f} %", (
            name
        )


def test_seventeen_places_are_the_eighteen_named_less_one_of_the_neck(planned):
    """The user's three exact figures leave only one reading, whichever of the 512-channel neck places is left out."""
    rank_and_channels = [(8, c) for c in (512, 512)]
    rank_and_channels += [(16, c) for c in (256, 512, 512, 512, 256, 512, 512, 256, 512, 512)]
    rank_and_channels += [(32, c) for c in (512, 512, 512, 64, 64, 64)]
    sizes = [2 * rank * channels for rank, channels in rank_and_channels]
    figures = [(0, 0.25), (HEAD_2, 2.49), (AGGRESSIVE, 20.78)]
    fits = {
        (rank, channels)
        for (rank, channels), size in zip(rank_and_channels, sizes, strict=True)
        if all(round((sum(sizes) - size + unfrozen) / 1e6, 2) == figure for unfrozen, figure in figures)
    }
    assert len(sizes) == 18
    assert fits == {(16, 512)}
    assert planned("phase2_lora", "ultralytics").adapter_parameters == sum(sizes) - 2 * 16 * 512


def test_what_the_docs_say_would_reach_the_row_that_is_out_of_reach(large):
    (name,) = OUT_OF_REACH
    data = load(name).to_dict()
    data["rules"][0]["reduction"] = 3
    assert convpeft.plan(large["ultralytics"], data).trainable_parameters == 1_494_150
    assert abs(1_494_150 / TABLE[name].user - 1) < EXACT


# positions


def test_both_alias_files_name_the_same_positions_and_all_exist(trunk):
    names = {}
    for framework in FRAMEWORKS:
        aliases = convpeft.Spec.load(
            SPECS / "phase2_lora.yaml", aliases=SPECS / "aliases" / f"{framework}.yaml"
        ).aliases
        names[framework] = {name: len(patterns) for name, patterns in aliases.items()}
        for name in aliases:
            entry = convpeft.Spec(unfreeze=[f"@{name}"], aliases=aliases)
            if framework == "mmyolo" and name.startswith(("neck.reduce", "neck.out")):  # identities
                with pytest.raises(convpeft.PatternError, match="has parameters to unfreeze"):
                    convpeft.plan(trunk[framework], entry)
            else:
                assert convpeft.plan(trunk[framework], entry).owned_parameters > 0
    assert names["ultralytics"] == names["mmyolo"]


def outputs_of(position: str, framework: str) -> list[str]:
    return list(load("phase2_lora", framework).aliases[position])


POSITIONS = (
    *(f"backbone.stage{number}" for number in (2, 3, 4)),
    *("neck.reduce", "neck.top_down", "neck.bottom_up", "neck.out", "head.cls", "head.reg"),
)


def copy_adapters(models: dict[str, nn.Module], skip: tuple[str, ...] = ()) -> None:
    """Give mmyolo's adapters the values of ultralytics', position by position; those in ``skip`` stay fresh in both."""
    for position in POSITIONS:
        pairs = zip(outputs_of(position, "ultralytics"), outputs_of(position, "mmyolo"), strict=True)
        for number, (theirs, ours) in enumerate(pairs):
            first, second = (
                models[framework].get_submodule(module)
                for framework, module in (("ultralytics", theirs), ("mmyolo", ours))
            )
            if "convpeft" not in first._modules:
                assert "convpeft" not in second._modules
                continue
            if f"{position}.{number}" in skip:
                nn.init.zeros_(first.convpeft["default"].up)
            second.convpeft["default"].load_state_dict(first.convpeft["default"].state_dict())


SHARED = ("neck.reduce.0", "neck.reduce.1", "neck.out.0", "neck.out.1")


@pytest.mark.parametrize("name", ["phase1_option1_strategy_b", "phase1_option2_strategy_b"])
def test_the_positions_are_the_same_function_in_both_frameworks(small, name):
    for framework, model in small.items():
        convpeft.inject(model.double(), load(name, framework))
    disturb(small["ultralytics"])
    copy_adapters(small)
    x = images(torch.float64)
    expected, got = (raw(small[framework], x) for framework in FRAMEWORKS)
    assert not same(expected, raw_of_base(small["ultralytics"], x))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def raw_of_base(model: nn.Module, x: Tensor) -> list[Tensor]:
    with convpeft.disabled(model):
        return raw(model, x)


@pytest.mark.parametrize("name", ["phase2_lora", "phase2_step4_1_rep_mona"])
def test_reduce_and_out_differ_only_in_who_else_reads_them(small, name):
    """ultralytics has no module on the neck's or the head's branch alone; with those four fresh both are one function."""
    for framework, model in small.items():
        convpeft.inject(model.double(), load(name, framework))
    disturb(small["ultralytics"], adapters_only=True)
    x = images(torch.float64)
    copy_adapters(small)
    for a, b in zip(raw(small["ultralytics"], x), raw(small["mmyolo"], x), strict=True):
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)
    copy_adapters(small, skip=SHARED)
    for a, b in zip(raw(small["ultralytics"], x), raw(small["mmyolo"], x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


# each spec


@both_frameworks
@every_spec
def test_injecting_changes_no_output(small, name, framework):
    model = small[framework]
    before = raw(model, images())
    convpeft.inject(model, load(name, framework))
    assert same(raw(model, images()), before)
    assert convpeft.check(model, images()).ok


@every_spec
def test_round_trips(name, tmp_path):
    spec = load(name)
    assert convpeft.Spec.from_dict(spec.to_dict()) == spec
    for suffix in ("yaml", "json"):
        spec.save(tmp_path / f"spec.{suffix}")
        assert convpeft.Spec.load(tmp_path / f"spec.{suffix}") == spec


@every_spec
def test_without_an_alias_file_the_error_says_what_is_missing(name):
    with pytest.raises(convpeft.SpecError, match=r"no alias is named '@\w+.*Spec\.load\(path, aliases=\.\.\.\)"):
        convpeft.Spec.load(SPECS / f"{name}.yaml")


@every_spec
def test_learning_rates_are_the_users(small, name):
    model, row = small["ultralytics"], TABLE[name]
    plan = convpeft.inject(model, load(name))
    assert {group["lr_mult"] for group in convpeft.param_groups(model, lr=1e-3)} == set(row.rates)
    neck = {
        key
        for position in ("reduce", "top_down", "bottom_up", "out")
        for key in outputs_of(f"neck.{position}", "ultralytics")
    }
    for layer in plan.layers:
        in_neck = layer.name in neck or layer.name.endswith(".cv2.conv")
        assert layer.lr_mult == (1.4 if "rep_mona" in layer.kind and in_neck else 1.0), layer.name
    for key, rate in plan.owned.items():
        assert rate == (0.1 if re.match(r"model\.[789]\.", key) else 0.5), key


@pytest.mark.slow
@every_spec
def test_every_adapter_and_unfrozen_tensor_gets_a_gradient_and_the_base_none(small, name):
    model = small["ultralytics"].train()
    plan = convpeft.inject(model, load(name))
    disturb(model)
    generator = torch.Generator().manual_seed(4)
    batch = {
        "img": torch.rand(2, 3, 64, 64, generator=generator),
        "cls": torch.tensor([[0.0], [2.0], [0.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.4, 0.2, 0.2], [0.6, 0.5, 0.5, 0.5]]),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        "txt_feats": model.txt_feats.expand(2, -1, -1),
    }
    losses, _ = model(batch)
    (losses.sum() + convpeft.auxiliary_loss(model)).backward()
    grouped = {id(p) for group in convpeft.param_groups(model, lr=1e-3) for p in group["params"]}
    learning = {key: p for key, p in model.named_parameters() if p.grad is not None}
    assert {id(p) for p in learning.values()} == grouped
    assert sum(p.numel() for p in learning.values()) == plan.trainable_parameters
    for key, parameter in learning.items():
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.slow
@every_spec
def test_saves_reloads_bit_for_bit_and_swaps(small, name, tmp_path):
    model, x = small["ultralytics"], images()
    other = copy.deepcopy(model)
    base = raw(model, x)
    convpeft.inject(model, load(name), name="screw")
    disturb(model)
    trained = raw(model, x)
    assert not any(torch.equal(a, b) for a, b in zip(trained, base, strict=True))
    convpeft.save_adapter(model, tmp_path / "screw.safetensors")
    convpeft.inject(other, load("phase2_lora"), name="bottle")
    convpeft.load_adapter(other, tmp_path / "screw.safetensors", name="screw")
    assert same(raw(other, x), trained)
    convpeft.set_active(other, None)
    assert same(raw(other, x), base)
    convpeft.set_active(other, "screw")
    assert same(raw(other, x), trained)
    convpeft.eject(other)
    assert same(raw(other, x), base)


@pytest.mark.slow
@every_spec
def test_merges_or_names_what_cannot(small, name):
    model, x = small["ultralytics"].double(), images(torch.float64)
    plan = convpeft.inject(model, load(name))
    disturb(model)
    expected = raw(model, x)
    kept = [layer.name for layer in plan.layers if layer.kind in TABLE[name].kinds_kept]
    if kept:
        with pytest.raises(convpeft.MergeError) as refusal:
            convpeft.merge(model)
        assert re.findall(r"^  (\S+): ", str(refusal.value), re.MULTILINE) == kept
    merged = convpeft.merge(model, strict=not kept)
    adapted = [
        key
        for key, module in merged.named_modules()
        if "convpeft" in module._modules and any(True for _ in module.convpeft.children())
    ]
    assert adapted == kept
    for a, b in zip(raw(merged, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_beside_the_last_conv_rep_mona_becomes_part_of_that_conv(small):
    model = small["ultralytics"]
    convpeft.inject(model, load("phase2_step4_1_rep_mona_parallel"))
    disturb(model)
    merged = convpeft.merge(model, form="single")
    for block in (12, 15, 18, 21):
        before, after = (each.get_submodule(f"model.{block}.cv2.conv") for each in (model, merged))
        assert type(after) is nn.Conv2d
        assert (before.kernel_size, after.kernel_size) == ((1, 1), (7, 7))
