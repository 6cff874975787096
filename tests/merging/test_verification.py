"""A merge changes no output that the adapter did not change: what others read is not rewritten, and inputs verify it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convpeft
from tests.cases import assert_relative, bits, randomised, same_bits
from tests.detector import detector, images, scrambled
from tests.usage.test_copies import each_spec, two_adapters


class Both(nn.Module):
    """Calls its layer, and reads its weight: always, or only of tokens."""

    def __init__(self, *, always: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.always = always

    def forward(self, x):
        if x.ndim == 3 or self.always is not False:
            return F.linear(self.layer(x), self.layer.weight)
        return self.layer(x)


class OneOrOther(Both):
    """Which of the two happens, only the input tells."""

    def forward(self, x):
        return F.linear(x, self.layer.weight) if x.ndim == 3 else self.layer(x)


def project(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight)


class Hidden(Both):
    """Reads where no source of the model's own shows it."""

    def forward(self, x):
        return project(self.layer, self.layer(x))


class Counting(Both):
    """Gives something that depends on being adapted, and on no layer's output."""

    def forward(self, x):
        return self.layer(x), x * sum(parameter.numel() for parameter in self.parameters())


def adapted(model: nn.Module) -> nn.Module:
    convpeft.inject(model.eval(), {"rules": [{"match": "layer", "kind": "lora", "rank": 2}]})
    return randomised(model)


def assert_refused(model: nn.Module, x: torch.Tensor, text: str, **options) -> convpeft.MergeError:
    before, output = bits(model), model(x)
    for inplace in (True, False):
        with pytest.raises(convpeft.MergeError, match=text) as caught:
            convpeft.merge(model, inplace=inplace, **options)
        assert same_bits(before, bits(model))
        assert convpeft.active_adapters(model) == ("default",)
        assert torch.equal(torch.as_tensor(model(x)[0]), torch.as_tensor(output[0]))
    return caught.value


READS = r"layer: its parent \w+ reads layer\.weight itself, so rewriting them would change an output"
RUNS = r"layer: its weights are read by \(root\) \(\w+\) in aten\.\w+"


@pytest.mark.parametrize("build", [Both, OneOrOther, lambda: Both(always=False)])
def test_a_layer_that_its_parent_calls_and_reads_is_not_rewritten(build):
    model, x = adapted(build()), torch.randn(2, 3, 4)
    assert dict(assert_refused(model, x, READS).reasons).keys() == {"layer"}
    assert convpeft.plan_merge(model).refused.keys() == {"layer"}
    assert "merge(model, example_inputs=...) finds out by running" in convpeft.plan_merge(model).refused["layer"]
    kept = convpeft.merge(model, strict=False)
    assert torch.equal(kept(x), model(x))


@pytest.mark.parametrize("build", [OneOrOther, lambda: Both(always=False)])
def test_inputs_that_take_the_other_branch_decide(build):
    model, read, called = adapted(build()), torch.randn(2, 3, 4), torch.randn(3, 4)
    assert_refused(model, read, RUNS, example_inputs=read)
    assert convpeft.plan_merge(model, example_inputs=(read,)).refused.keys() == {"layer"}
    assert convpeft.plan_merge(model, example_inputs=called).refused == {}
    merged = convpeft.merge(model, example_inputs=called)
    torch.testing.assert_close(merged(called), model(called))


def test_a_read_that_no_source_shows_is_found_by_running():
    model, x = adapted(Hidden()), torch.randn(3, 4)
    assert_refused(model, x, RUNS, example_inputs=x)
    kept = convpeft.merge(model, strict=False, example_inputs=x)
    assert torch.equal(kept(x), model(x))


def test_a_chain_that_leaves_the_weight_alone_may_stay():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 1, bias=False)
            self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

        def forward(self, x):
            return self.block(self.layer(x)) + F.conv2d(x, self.block[0].weight)

    model, x = Images().double().eval(), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    convpeft.inject(model, {"rules": [{"match": "block", "kind": "rep_mona", "rank": 1}]})
    randomised(model)
    assert_relative(convpeft.merge(model, example_inputs=x)(x), model(x))


def test_outputs_that_would_differ_are_refused_with_both_numbers():
    model, x = adapted(Counting()), torch.randn(3, 4)
    text = r"(?s)would not give what it gives.*output 1 of shape \(3, 4\).*differs by \d"
    assert_refused(model, x, text, example_inputs=x)


@pytest.mark.parametrize(
    ("output", "text"),
    [(lambda y: "a text", "returned 0 tensors"), (lambda y: y.float().numpy().astype(1), "failed in float64")],
)
def test_what_cannot_be_compared_is_said(output, text):
    class Odd(Both):
        def forward(self, x):
            return output(self.layer(x)) if self.layer.weight.dtype == torch.float64 else self.layer(x)

    assert_refused(adapted(Odd()), torch.randn(3, 4), text, example_inputs=torch.randn(3, 4))


@pytest.mark.parametrize("form", ["auto", "single", "factored"])
@each_spec
def test_a_merge_that_holds_is_made(name, form):
    model, x = two_adapters(name).float(), images().float()
    merged = convpeft.merge(model, form=form, example_inputs=x)
    assert same_bits(bits(merged), bits(convpeft.merge(model, form=form)))
    wrapped = nn.Sequential(nn.Identity(), model)
    inplace = convpeft.merge(wrapped, form=form, inplace=True, example_inputs=(x,))
    assert inplace is wrapped
    assert same_bits(bits(merged), bits(model))


def test_a_model_that_draws_numbers_draws_the_same_twice():
    class Noisy(Both):
        def forward(self, x):
            return self.layer(x) + torch.rand(())

    before = torch.get_rng_state()
    convpeft.merge(adapted(Noisy()), example_inputs=torch.randn(3, 4))
    torch.set_rng_state(before)


def test_a_held_norm_that_was_replaced_is_said_before_it_trains():
    """As ``convert_sync_batchnorm`` does: the new norm would not be held."""
    model = detector()
    convpeft.inject(model, {"rules": [{"match": "body.*.conv", "kind": "lora"}]})
    scrambled(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for function in (lambda: convpeft.param_groups(model, lr=0.1), lambda: convpeft.check(model, images())):
        with pytest.raises(
            convpeft.StateError, match=r"stem\.norm' was adapted and has been replaced by a plain SyncBatch"
        ):
            function()
