"""What belongs to the samples of a routed batch, and what is the same for all of them and only as long."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convpeft
from convpeft import StateError
from tests.cases import assert_relative, bits, same_bits

NAMES = ["a", "b", None]
COUNT = len(NAMES)


class Head(nn.Module):
    """Compares each pixel with every word; words come in a tensor, a list or a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(4, 8, 1), nn.Parameter(torch.ones(()))
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, words: Any) -> Any:
        self.sizes.append(tuple(x.shape))
        words = words["words"] if isinstance(words, dict) else words[0] if isinstance(words, (list, tuple)) else words
        return torch.einsum("bchw,kc->bkhw", self.conv(x), words) * self.scale


class Model(nn.Module):
    """A neck, a head, and ``words`` from wherever a variant has them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.neck, self.head = nn.Conv2d(3, 4, 3, padding=1), Head()
        self.table = nn.Parameter(torch.randn(count, 8))
        self.register_buffer("words", torch.randn(count, 8))
        self.plain, self.many = torch.randn(count, 8, dtype=torch.float64), [torch.randn(count, 8, dtype=torch.float64)]
        self.turned = nn.Parameter(torch.randn(8, count))
        self.project = nn.Linear(8, 8)


class Parameter(Model):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.neck(x), self.table)


class Keyword(Model):
    def forward(self, x: Tensor) -> Any:
        return self.head(words=self.words, x=self.neck(x))


class Attribute(Model):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.neck(x), [self.plain])


class Listed(Model):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.neck(x), {"words": self.many[0]})


class Computed(Model):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.neck(x), functional.normalize(self.words @ self.project.weight, dim=-1))


class Transposed(Model):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.neck(x), self.turned.t().contiguous())


class Made(Model):
    def forward(self, x: Tensor) -> Any:
        words = torch.zeros(len(self.words), 8, dtype=x.dtype)
        words[:, 2:5] = self.table[:, :3]
        return self.head(self.neck(x), words)


class Given(Model):
    """The caller passes the words."""

    def forward(self, x: Tensor, words: Tensor | None = None) -> Any:
        return self.head(self.neck(x), self.words * 2 if words is None else words)


class GivenFirst(Model):
    def forward(self, words: Tensor, x: Tensor) -> Any:
        return self.head(self.neck(x), words)


VARIANTS = [Parameter, Keyword, Attribute, Listed, Computed, Transposed, Made]
UNFREEZE = {"rules": [{"match": "neck", "kind": "lora", "rank": 2}], "unfreeze": ["head"]}


def adapted(model: nn.Module, spec: Any = UNFREEZE) -> nn.Module:
    torch.manual_seed(0)
    model = model.double().eval()
    for name in ("a", "b"):
        convpeft.inject(model, spec, name=name)
        with torch.no_grad():
            for group in convpeft.param_groups(model, lr=1.0):
                for parameter in group["params"]:
                    parameter += torch.randn_like(parameter) * 0.3
    return model


def images(count: int = COUNT) -> Tensor:
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def alone(model: nn.Module, *inputs: Tensor, batched: tuple[int, ...] = (0,), names: list = NAMES) -> Tensor:
    outputs = []
    for number, name in enumerate(names):
        own = [each[number : number + 1] if place in batched else each for place, each in enumerate(inputs)]
        with convpeft.using(model, name):
            outputs.append(model(*own))
    return torch.cat(outputs)


@pytest.mark.parametrize("count", [COUNT, COUNT + 1, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_model_has_of_its_own_is_the_same_for_all_samples(variant, count):
    model, x = adapted(variant(count)), images()
    expected, before = alone(model, x), bits(model)
    with convpeft.route(model, NAMES):
        found = [model(x), model(x)]
    assert expected.shape == (COUNT, count, 6, 6)
    for each in found:
        assert_relative(each.detach(), expected.detach())
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("count", [COUNT, 5])
def test_what_the_caller_gives(count):
    x, words = images(), torch.randn(count, 8, dtype=torch.float64)
    model, turned = adapted(Given(count)), adapted(GivenFirst(count))
    with torch.no_grad():
        expected = alone(model, x, words)
        with convpeft.route(model, NAMES):
            assert_relative(model(x, words), expected)
            assert_relative(model(x, words=words), expected)
            assert_relative(model(words=words, x=x), expected)
        expected = alone(turned, words, x, batched=(1,))
        with convpeft.route(turned, NAMES):
            assert_relative(turned(words, x), expected)
            assert_relative(turned(words, x=x), expected)


def test_gradients_reach_what_is_shared():
    model, x = adapted(Parameter(COUNT)), images()
    model.table.requires_grad_(True)
    (expected,) = torch.autograd.grad(alone(model, x).square().sum(), model.table)
    with convpeft.route(model, NAMES):
        (found,) = torch.autograd.grad(model(x).square().sum(), model.table)
    assert_relative(found, expected)


class TestMaps:
    """Several maps of the same samples go through a block once for each group, in the group's size."""

    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(()))
            self.seen: list[int] = []

        def forward(self, x: Tensor, *others: Any, **named: Tensor) -> Any:
            maps = [x, *(y for each in others for y in (each if isinstance(each, (list, tuple)) else [each]))]
            self.seen.append(len(x))
            return sum(self.weight.exp() * y for y in [*maps, *named.values()])

    class Model(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.stem, self.neck, self.how = nn.Conv2d(3, 4, 1), TestMaps.Neck(), how
            self.position = nn.Parameter(torch.randn(1, 4, 6, 6))

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            y = self.stem(x)
            skip = y.relu()
            if self.how == "skip":
                return self.neck(y, skip)
            if self.how == "tuple":
                return self.neck(y, (skip, y * 2))
            if self.how == "keyword":
                return self.neck(y, low=skip.clone())
            if self.how == "written":
                kept = torch.zeros_like(y)
                kept[:, 1:] = skip[:, 1:]
                return self.neck(y, [kept])
            if self.how == "second input":
                return self.neck(y, self.stem(other))
            return self.neck(y + self.position, skip + self.position.expand(len(x), -1, -1, -1))

    @pytest.mark.parametrize("how", ["skip", "tuple", "keyword", "written", "second input", "position"])
    def test_are_split(self, how):
        model, names = (
            adapted(self.Model(how), {"rules": [{"match": "stem", "kind": "lora"}], "unfreeze": ["neck"]}),
            NAMES * 2,
        )
        inputs = (images(6), images(6).flip(1)) if how == "second input" else (images(6),)
        expected = alone(model, *inputs, batched=(0, 1), names=names)
        model.neck.seen.clear()
        with convpeft.route(model, names):
            found = model(*inputs)
        assert model.neck.seen == [2, 2, 2]
        assert_relative(found.detach(), expected.detach())

    def test_of_which_one_is_expanded_run_whole(self):
        class Expanded(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.query, self.neck = nn.Parameter(torch.randn(1, 3, 6, 6)), TestMaps.Neck()

            def forward(self, x: Tensor) -> Tensor:
                return self.neck(x, self.query.expand(len(x), -1, -1, -1), self.query.repeat(len(x), 1, 1, 1))

        model, x = adapted(Expanded(), {"unfreeze": ["neck"]}), images()
        expected = alone(model, x)
        with convpeft.route(model, NAMES):
            assert_relative(model(x).detach(), expected.detach())


class Texts(nn.Module):
    """A branch that runs on words alone."""

    def __init__(self, how: str, count: int = COUNT) -> None:
        super().__init__()
        self.how, self.text, self.image = how, nn.Linear(8, 4), nn.Conv2d(3, 4, 1)
        self.register_buffer("words", torch.randn(count, 8))
        self.register_buffer("guide", torch.randn(1, 5, 8))

    def forward(self, x: Tensor, words: Tensor | None = None) -> Tensor:
        if self.how == "own":
            text = self.text(self.words)
        elif self.how == "computed":
            text = self.text(functional.normalize(self.words, dim=-1) + 1)
        elif self.how == "given":
            text = self.text(words)
        else:
            guide = self.guide.expand(len(x), -1, -1) if self.how == "expanded" else self.guide.repeat(len(x), 1, 1)
            text = self.text(guide)
        return torch.einsum("bchw,bkc->bkhw" if text.ndim == 3 else "bchw,kc->bkhw", self.image(x), text)


TEXT = {"rules": [{"match": ["text", "image"], "kind": "lora", "rank": 2}]}


class TestWordsAlone:
    @pytest.mark.parametrize("how", ["own", "computed"])
    def test_are_refused_whatever_their_number(self, how):
        for count, text in ((COUNT, "text runs on what is the same for all samples"), (5, "none with one entry")):
            model = adapted(Texts(how, count), TEXT)
            before = bits(model)
            with convpeft.route(model, NAMES), pytest.raises(StateError, match=text):
                model(images())
            assert same_bits(bits(model), before)

    @pytest.mark.parametrize("how", ["expanded", "repeated"])
    def test_are_routed_where_they_were_made_one_for_each_sample(self, how):
        model, x = adapted(Texts(how), TEXT), images()
        expected = alone(model, x)
        with convpeft.route(model, NAMES):
            assert_relative(model(x).detach(), expected.detach())

    def test_are_refused_where_nothing_tells(self):
        model, x = adapted(Texts("given"), TEXT), images()
        words, each = torch.randn(COUNT, 8).double(), torch.randn(COUNT, 5, 8).double()
        for given in (words, each):
            with (
                convpeft.route(model, NAMES),
                pytest.raises(StateError, match=r"text runs on an input of the model alone.*shared=\[tensor\]"),
            ):
                model(x, given)
        with convpeft.route(model, NAMES, shared=[words]), pytest.raises(StateError, match="same for all samples"):
            model(x, words)
        expected = alone(model, x, each, batched=(0, 1))
        with convpeft.route(model, NAMES, shared=[]):
            assert_relative(model(x, each).detach(), expected.detach())


class TestOutputs:
    class Hands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(()))

        def forward(self, x: Tensor, words: Tensor) -> Any:
            return {"map": x * self.weight, "words": words, "count": len(words)}

    @pytest.mark.parametrize("count", [COUNT, 5])
    def test_a_tensor_that_is_handed_through_stays_whole(self, count):
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = TestOutputs.Hands()
                self.register_buffer("words", torch.randn(count, 8))

            def forward(self, x: Tensor) -> Any:
                return self.block(x, self.words)

        model, x = adapted(Model(), {"unfreeze": ["block"]}), images()
        with convpeft.route(model, NAMES):
            found = model(x)
        expected = []
        for number, name in enumerate(NAMES):
            with convpeft.using(model, name):
                expected.append(model(x[number : number + 1])["map"])
        assert found["words"] is model.words
        assert found["count"] == count
        assert torch.equal(found["map"], torch.cat(expected))


def test_norms_that_train_do_not_see_the_samples_of_others():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = nn.BatchNorm2d(3), nn.Parameter(torch.ones(()))
            self.register_buffer("words", torch.randn(COUNT, 3))
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, self.words)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = nn.BatchNorm2d(3), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, words: Tensor) -> Tensor:
            return torch.einsum("bchw,kc->bkhw", self.norm(x), words) * self.scale

    model, x = adapted(Normed(), {"unfreeze": ["block"], "norm": "adapt"}), images()
    expected = alone(model, x)
    with convpeft.route(model, NAMES):
        assert_relative(model(x).detach(), expected.detach())
        model.train()
        before = bits(model)
        with pytest.raises(StateError, match=r"block takes tensors with 3 rows .* cannot be routed in training"):
            model(x)
        assert same_bits(bits(model), before)


class TestOneOfAKind:
    @pytest.mark.parametrize("names", [["a"], ["b", "b", "b"]])
    def test_nothing_is_split_for_one_group(self, names):
        model, x = adapted(Parameter(len(names))), images(len(names))
        expected = alone(model, x, names=names)
        model.head.sizes.clear()
        with convpeft.route(model, names):
            found = model(x)
        assert_relative(found.detach(), expected.detach())
        assert model.head.sizes == [(len(names), 4, 6, 6)]


class TestCopies:
    """A copy made inside the block is a model like any other, with the adapters active that were active outside."""

    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
    )
    @pytest.mark.parametrize("start", ["a", None])
    def test_of_a_routed_model(self, how, start):
        model, x = adapted(Parameter(COUNT)), images()
        convpeft.set_active(model, start)
        expected, before = model(x), bits(model)
        trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        with convpeft.route(model, ["b", None, "b"]):
            twin = how(model)
            assert not torch.equal(model(x), expected)
            assert torch.equal(twin(x), expected)
        assert torch.equal(twin(x), expected)
        assert convpeft.active_adapters(twin) == convpeft.active_adapters(model) == (() if start is None else (start,))
        assert same_bits(bits(twin), before)
        assert [name for name, parameter in twin.named_parameters() if parameter.requires_grad] == trains
        convpeft.set_active(twin, "b")
        with convpeft.route(twin, NAMES):
            assert_relative(twin(x).detach(), alone(model, x).detach())
        assert list(bits(convpeft.eject(twin))) == [key for key in before if "convpeft" not in key]

    def test_of_a_model_inside_using(self):
        model, x = adapted(Parameter(COUNT)), images()
        outside = model(x)
        with convpeft.using(model, "a"):
            twin, expected = copy.deepcopy(model), model(x)
        assert torch.equal(twin(x), expected)
        convpeft.set_active(twin, "b")
        assert torch.equal(twin(x), outside)
        assert torch.equal(model(x), outside)
        assert convpeft.active_adapters(model) == ("b",)
