"""Whatever ``plan`` refuses on a model, ``load_adapter`` refuses too, in the same words; the model is as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convpeft
from tests.cases import bits, same_bits


class Net(nn.Module):
    """A stem, a block and a head that can be made unfit for an adapter in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU())
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


class Halved(nn.Conv2d):
    """Gives every other pixel: another output shape than its geometry says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., ::2, ::2]


class Doubled(nn.Conv2d):
    """Gives twice its convolution: the right shape, and not the convolution of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Functional(Net):
    """Reads the stem's weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(F.conv2d(x, self.stem.weight, self.stem.bias, padding=1)))


def fresh(kind: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    return kind().eval()


def as_class(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    """Return what makes a net whose stem is of another class, with the same weights."""

    def make() -> nn.Module:
        model = fresh()
        model.stem.__class__ = kind
        return model

    return make


def changed(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """Return what makes a net and changes it."""

    def make() -> nn.Module:
        model = fresh()
        change(model)
        return model

    return make


def replace_forward(model: Net) -> None:
    model.stem.forward = model.stem.forward


def own_child(model: Net) -> None:
    model.stem.add_module("convpeft", nn.Identity())


def script(model: Net) -> None:
    model.stem = torch.jit.script(model.stem)


def lazy(model: Net) -> None:
    model.later = nn.LazyConv2d(3, 1)


def share_the_head(model: Net) -> None:
    model.again = nn.Conv2d(6, 4, 1)
    model.again.weight = model.head.weight


def leave_chains(model: Net) -> None:
    """Merge an output adapter of the block, factored, which leaves a chain on the block's last step."""
    convpeft.inject(model, {"rules": [{"match": "stem", "kind": "rep_mona", "place": "output", "rank": 2}]})
    nn.init.normal_(model.stem.convpeft["default"].up)
    convpeft.merge(model, form="factored", inplace=True)


def list_instead(model: Net) -> None:
    model.block = nn.ModuleList(model.block)


LORA = {"rules": [{"match": "stem", "kind": "lora", "rank": 2}]}
DORA = {"rules": [{"match": "stem", "kind": "lora", "rank": 2, "dora": True}]}
OUTPUT = {"rules": [{"match": "stem", "kind": "rep_mona", "rank": 2, "place": "output"}]}
UNFROZEN = {"rules": LORA["rules"], "unfreeze": ["head"]}
CASES: dict[str, tuple[Callable[[], nn.Module], dict, str]] = {
    "forward-replaced": (changed(replace_forward), LORA, "its forward was replaced on the object itself"),
    "another-output-shape": (as_class(Halved), LORA, "it is not the convolution it declares"),
    "bypassed": (lambda: fresh(Functional), LORA, "reads stem.weight itself and would bypass the adapter"),
    "own-child": (changed(own_child), LORA, "it has a child 'convpeft' of its own"),
    "script": (changed(script), OUTPUT, "a TorchScript module has no Python forward to extend"),
    "lazy": (changed(lazy), LORA, "later of it is lazy and has no weights yet"),
    "half-shared": (
        changed(share_the_head),
        UNFROZEN,
        "'head' shares its weight with 'again', which would stay frozen",
    ),
    "chains": (changed(leave_chains), OUTPUT, "an earlier factored merge left plain chains here"),
    "dora-parametrised": (
        changed(lambda model: nn.utils.parametrizations.weight_norm(model.stem)),
        DORA,
        "it computes with the layer's weight, which is no plain parameter here",
    ),
    "dora-weight-norm": (
        changed(lambda model: nn.utils.weight_norm(model.stem)),
        DORA,
        "it computes with the layer's weight, which is no plain parameter here",
    ),
    "dora-more-than-its-weight": (as_class(Doubled), DORA, "forward is not the convolution of its weight alone"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("any_base", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_file_is_refused_in_the_words_of_the_plan(name, any_base, tmp_path):
    make, spec, text = CASES[name]
    original = fresh()
    convpeft.inject(original, spec)
    path = convpeft.save_adapter(original, tmp_path / "a.safetensors")
    model = make()
    with pytest.raises(convpeft.SpecError, match=re.escape(text)) as planned:
        convpeft.plan(model, spec)
    said = str(planned.value).split("rule 1: ")[-1].split(": ", 1)[-1]  # without the heading and the rule's number
    before, classes = bits(model.stem), [type(module) for module in model.modules()]
    with pytest.raises(convpeft.AdapterFileError, match="the model is unchanged") as refused:
        convpeft.load_adapter(model, path, any_base=any_base)
    assert said in str(refused.value)
    assert same_bits(before, bits(model.stem))
    assert [type(module) for module in model.modules()] == classes
    assert convpeft.active_adapters(model) == ()


def test_a_module_that_is_never_called_takes_no_output_adapter(tmp_path):
    original = fresh()
    convpeft.inject(original, {"rules": [{"match": "block", "kind": "bottleneck"}]})
    path = convpeft.save_adapter(original, tmp_path / "a.safetensors")
    with pytest.raises(
        convpeft.AdapterFileError, match=r"block \(ModuleList\) cannot host an adapter: it is never called"
    ):
        convpeft.load_adapter(changed(list_instead)(), path, any_base=True)


@pytest.mark.parametrize("unfrozen", [False, True])
def test_two_modules_of_a_file_that_are_one_here_are_refused(unfrozen, tmp_path):
    both = ["stem", "other"]
    rules = [{"match": "head" if unfrozen else both, "kind": "lora", "rank": 2}]
    original = fresh()
    original.other = nn.Conv2d(3, 6, 3, padding=1)
    convpeft.inject(original, {"rules": rules, "unfreeze": both if unfrozen else []})
    path = convpeft.save_adapter(original, tmp_path / "a.safetensors")
    model = fresh()
    model.other = model.stem
    before = bits(model)
    with pytest.raises(
        convpeft.AdapterFileError, match="other: the same module as stem here, and another one in the file"
    ):
        convpeft.load_adapter(model, path, any_base=True)
    assert same_bits(before, bits(model))


def test_unfrozen_modules_may_share_a_tensor_under_another_first_name(tmp_path):
    """In the file the module is called by a name that is its second one here; both sharers train, so nothing is half shared."""

    def build(aliased: bool) -> Net:
        model = fresh()
        if aliased:
            model._modules = {"first": model.head, **model._modules}
        model.again = nn.Conv2d(6, 4, 1)
        model.again.weight = model.head.weight
        return model.eval()

    original = build(aliased=False)
    convpeft.inject(original, {"rules": LORA["rules"], "unfreeze": ["head", "again"]})
    path = convpeft.save_adapter(original, tmp_path / "a.safetensors")
    model = build(aliased=True)
    convpeft.load_adapter(model, path, any_base=True)
    assert model.again.weight is model.head.weight


def test_an_output_whose_channels_moved_to_the_last_axis_says_so(tmp_path):
    original = fresh()
    convpeft.inject(original, {"rules": [{"match": "stem", "kind": "lora", "place": "output", "rank": 2}]})
    path = convpeft.save_adapter(original, tmp_path / "a.safetensors")
    model = fresh()
    model.stem = nn.Linear(3, 6)
    with pytest.raises(convpeft.AdapterFileError, match=r"stem \(Linear\): .* in the file; not the same: linear"):
        convpeft.load_adapter(model, path, any_base=True)


@pytest.mark.parametrize("any_base", [False, True])
def test_what_plan_accepts_loads(any_base, tmp_path):
    for make, spec in ((fresh, UNFROZEN), (as_class(Doubled), LORA), (fresh, DORA), (fresh, OUTPUT)):
        original = make()
        convpeft.inject(original, spec)
        path = convpeft.save_adapter(original, tmp_path / "a.safetensors")
        model = make()
        convpeft.load_adapter(model, path, any_base=any_base)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(model(x), original(x))
