"""Checkpoints find their place: a base's goes to the base, a full one to every adapter, whatever is active."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import convpeft
from convpeft.hosts.unfrozen import tensors_of
from tests.cases import bits, same_bits
from tests.detector import LORA, detector, images, scrambled

ACTIVE = pytest.mark.parametrize("active", [None, "a", "b", "c", ["a", "c"]], ids=str)
SPECS = {
    "a": {"rules": [LORA, {"match": "neck", "kind": "bottleneck"}], "unfreeze": ["score", "body.0"]},
    "b": {"rules": [LORA], "unfreeze": ["box", "score"], "norm": "adapt"},
    "c": {"rules": [{"match": "**", "kind": "lora", "only": "Conv2d"}]},
}


def adapted(active=None, names="abc") -> nn.Module:
    """Return a detector with random adapters, some of which unfroze the same layers."""
    model = detector()
    for name in names:
        convpeft.inject(model, SPECS[name], name=name)
    convpeft.set_active(scrambled(model), active)
    return model


def outputs(model, x):
    """Return the output under each adapter, and leave the active ones active."""
    found = {}
    for name in (None, *model._convpeft_state.adapters):
        with convpeft.using(model, name):
            found[name] = model(x)
    return found


def assert_same(left, right):
    assert list(left) == list(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def base_bits(model):
    """Return the base's values, wherever they are."""
    with convpeft.disabled(model):
        return {key: tensor for key, tensor in bits(model).items() if "convpeft" not in key}


@ACTIVE
def test_base_keys_keep_their_names_and_order(active):
    plain, model = detector(), adapted(active)
    assert [key for key in model.state_dict() if ".convpeft." not in key] == list(plain.state_dict())
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_parameters() if ".convpeft." not in name] == names


@ACTIVE
@pytest.mark.parametrize("assign", [False, True])
def test_a_base_checkpoint_goes_to_the_base(active, assign):
    model, x = adapted(active), images()
    checkpoint, before = bits(detector()), outputs(model, x)
    own = {name: own_tensors(model, name) for name in SPECS}
    old = base_bits(model)
    incompatible = model.load_state_dict({key: t.clone() for key, t in checkpoint.items()}, strict=True, assign=assign)
    assert incompatible.missing_keys == incompatible.unexpected_keys == []
    assert same_bits(checkpoint, base_bits(model))
    for name in SPECS:  # what was never trained is a copy of the base's, and follows it
        untouched = {key for key, value in own[name].items() if key in old and torch.equal(value, old[key])}
        assert_same(
            {key: checkpoint[key] if key in untouched else value for key, value in own[name].items()},
            own_tensors(model, name),
        )
    plain = detector()
    plain.load_state_dict(checkpoint)
    after = outputs(model, x)
    assert torch.equal(after[None], plain(x))
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert convpeft.active_adapters(model) == tuple([] if active is None else active)
    assert same_bits(checkpoint, bits(convpeft.eject(model)))


def own_tensors(model, name):
    """Return everything that belongs to an adapter."""
    record = model._convpeft_state.adapters[name]
    found = {}
    for key in record.layers:
        adapter = model.get_submodule(key).convpeft._modules[name]
        found.update({f"{key}:{k}": t.clone() for k, t in adapter.state_dict().items()})
    for key in record.owned:
        shown = tensors_of(model.get_submodule(key), name)
        found.update({f"{key}.{k}": t.detach().clone() for k, t in shown.items()})
    return found


@ACTIVE
@pytest.mark.parametrize("there", [None, "a", "b", "c"], ids=str)
def test_a_full_checkpoint_resumes(active, there):
    saved, model, x = adapted(active), adapted(there), images()
    expected = outputs(saved, x)
    assert not torch.equal(expected["a"], outputs(model, x)["a"])
    model.load_state_dict(saved.state_dict(), strict=True)
    assert_same(expected, outputs(model, x))
    for name in SPECS:
        assert_same(own_tensors(saved, name), own_tensors(model, name))
    assert same_bits(base_bits(saved), base_bits(model))
    assert convpeft.active_adapters(model) == (() if there is None else (there,))


@ACTIVE
def test_an_eject_after_a_resume_gives_the_saved_base(active):
    saved, model = adapted(active), adapted("b")
    model.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert same_bits(bits(convpeft.eject(saved)), bits(convpeft.eject(model)))


@pytest.mark.parametrize("active", [None, "a", "b"], ids=str)
@pytest.mark.parametrize("there", [None, "a", "b", "c"], ids=str)
def test_a_checkpoint_of_fewer_adapters_is_loaded_or_refused_never_half(active, there):
    """Which of two unnamed owners the plain keys belong to, nobody can tell: an error, not a guess."""
    saved, model, x = (
        adapted(active, "ac" if active == "a" else "bc" if active == "b" else "c"),
        adapted(there),
        images(),
    )
    expected, before = outputs(saved, x), outputs(model, x)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)(.|\n)*body\.0\.conv\.convpeft\.[ab]\."):
        copy.deepcopy(model).load_state_dict(saved.state_dict(), strict=True)
    try:
        lacking = model.load_state_dict(saved.state_dict(), strict=False).missing_keys
    except RuntimeError as error:
        assert active is not None
        text = str(error)
        assert "was saved with other adapters than 'a', 'b'" in text
        assert "save_adapter" in text
        return
    assert set(lacking) == set(model.state_dict()) - set(saved.state_dict())
    after = outputs(model, x)
    assert_same({name: expected[name] for name in expected}, {name: after[name] for name in expected})
    assert [name for name in before if name not in expected and name is not None] == ["a", "b"]


def test_missing_and_unexpected_keys_are_said_as_ever():
    model = adapted("a")
    state = bits(detector())
    del state["stem.conv.weight"], state["score.bias"]
    state["extra"] = torch.zeros(1)
    incompatible = model.load_state_dict(state, strict=False)
    assert incompatible.unexpected_keys == ["extra"]
    assert [key.replace("convpeft._stash._base.", "") for key in incompatible.missing_keys] == [
        "stem.conv.weight",
        "score.bias",
    ]
    with pytest.raises(RuntimeError, match=r"Missing key(.|\n)*stem\.conv\.weight"):
        model.load_state_dict(state, strict=True)
    full = adapted("a").state_dict()
    del full["body.1.conv.convpeft.c.down"]
    assert model.load_state_dict(full, strict=False).missing_keys == ["body.1.conv.convpeft.c.down"]
    with pytest.raises(RuntimeError, match=r"size mismatch for score\..*weight"):
        model.load_state_dict({**bits(detector()), "score.weight": torch.zeros(2, 2)})


def test_the_callers_checkpoint_is_left_alone():
    model, checkpoint = adapted("a"), bits(detector())
    keys, held = list(checkpoint), {key: id(tensor) for key, tensor in checkpoint.items()}
    model.load_state_dict(checkpoint)
    assert list(checkpoint) == keys
    assert {key: id(tensor) for key, tensor in checkpoint.items()} == held


def test_training_resumes_to_the_same_curve():
    batches = [images(4) for _ in range(4)]

    def train(model, optimizer, some):
        losses = []
        for batch in some:
            optimizer.zero_grad()
            loss = model.train()(batch).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    unbroken = adapted("b")
    resumed = adapted("a")
    optimizer = torch.optim.AdamW(convpeft.param_groups(unbroken, lr=0.01))
    train(unbroken, optimizer, batches[:2])
    checkpoint = copy.deepcopy({"model": unbroken.state_dict(), "optimizer": optimizer.state_dict()})
    resumed.load_state_dict(checkpoint["model"], strict=True)
    convpeft.set_active(resumed, "b")
    again = torch.optim.AdamW(convpeft.param_groups(resumed, lr=0.01))
    again.load_state_dict(checkpoint["optimizer"])
    assert train(unbroken, optimizer, batches[2:]) == train(resumed, again, batches[2:])
    assert_same(own_tensors(unbroken, "b"), own_tensors(resumed, "b"))
