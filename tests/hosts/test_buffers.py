"""Buffers that move while adapters train are the adapter's; the base's own come back, and files and checkpoints know whose."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from timm.layers import EvoNorm2dB0
from torch import nn
from torch.ao.quantization import FakeQuantize
from torch.nn.utils import parametrizations, prune, spectral_norm

import convpeft
from convpeft.hosts import buffers, kept
from tests.cases import bits, same_bits

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Centre(nn.Module):
    """Subtracts a running centre that follows the data in training, as DINO's loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(8, 1, 1))

    def forward(self, y):
        if self.training:
            self.centre = (
                0.9 * self.centre + 0.1 * y.detach().mean((0, 2, 3))[:, None, None]
            )  # another object each time
        return y - self.centre


class Codebook(nn.Module):
    """Adds the nearest code, and moves the codes through ``data``, which no version counter sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.arange(4.0))
        self.register_buffer("used", torch.zeros(4, dtype=torch.long))

    def forward(self, y):
        nearest = (y.detach()[..., None] - self.codes).abs().argmin(-1)
        if self.training:
            self.codes.data.lerp_(y.detach().mean() + self.codes, 0.1)
            self.used += torch.bincount(nearest.flatten(), minlength=4)
        return y + self.codes[nearest]


class Bank(nn.Module):
    """Remembers what it saw: the buffer grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.ones(1))

    def forward(self, y):
        if self.training:
            self.bank = torch.cat([self.bank, y.detach().mean()[None]])
        return y * self.bank.mean()


class LazyCentre(nn.Module):
    """Takes its centre from the first batch of training."""

    def forward(self, y):
        if not hasattr(self, "centre"):
            self.register_buffer("centre", y.detach().mean())
        return y - self.centre


class Hidden(nn.Module):
    """Counts in a buffer that no state_dict shows, and scales by it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones(()), persistent=False)

    def forward(self, y):
        if self.training:
            self.count += 1
        return y * self.count


class Initialised(nn.Module):
    """Takes its scale from the first batch of training, and says so in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.ready = False

    def forward(self, y):
        if self.training and not self.ready:
            self.scale.copy_(y.detach().std())
            self.ready = True
        return y / self.scale


class Quantised(FakeQuantize):
    """Rounds as quantising would, and observes the range in training only."""

    def train(self, mode=True):
        (self.enable_observer if mode else self.disable_observer)()
        return super().train(mode)


MOVING = {
    "centre": Centre,
    "codebook": Codebook,
    "bank": Bank,
    "hidden": Hidden,
    "initialised": Initialised,
    "lazy": LazyCentre,
    "spectral": lambda: spectral_norm(nn.Conv2d(8, 8, 1)),
    "parametrised spectral": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
    "timm's EvoNorm": lambda: EvoNorm2dB0(8),
    "fake quantisation": Quantised,
    "two in a block": lambda: nn.Sequential(Centre(), nn.ReLU(), Bank()),
}
LORA = {"rules": [{"match": "0", "kind": "lora", "rank": 2}]}


def net(middle, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), middle(), nn.Conv2d(8, 4, 1)).eval()


def train(model, steps=3, seed=5):
    """Train for some steps, and return the model in eval mode."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=0.05))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return model.eval()


def on_base(model, x=X):
    with convpeft.disabled(model), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("kind", MOVING)
class TestWhatMoves:
    def test_belongs_to_the_adapter_that_trained(self, kind):
        model = net(MOVING[kind])
        untouched = copy.deepcopy(model)
        before, base = bits(model), copy.deepcopy(model)(X)
        convpeft.inject(model, LORA, name="a")
        assert torch.equal(model(X), base)
        a = train(model)(X)
        assert torch.equal(on_base(model), base)
        assert torch.equal(model(X), a)
        convpeft.inject(model, LORA, name="b")
        assert torch.equal(model(X), base)
        b = train(model, seed=6)(X)
        for _ in range(2):
            convpeft.set_active(model, "a")
            assert torch.equal(model(X), a)
            convpeft.set_active(model, "b")
            assert torch.equal(model(X), b)
            convpeft.set_active(model, None)
            assert torch.equal(model(X), base)
        convpeft.set_active(model, "a")
        convpeft.eject(train(model))
        assert list(model.state_dict()) == list(untouched.state_dict())
        assert same_bits(before, bits(model))
        assert torch.equal(model(X), base)
        assert vars(model[1]).keys() == vars(untouched[1]).keys()
        for hooks in ("_load_state_dict_pre_hooks", "_state_dict_hooks"):
            assert len(getattr(model[1], hooks)) == len(getattr(untouched[1], hooks))

    def test_training_while_the_base_is_shown_does_not_move_the_base(self, kind):
        model = net(MOVING[kind])
        base = copy.deepcopy(model)(X)
        convpeft.inject(model, LORA, name="a")
        model.train()
        with convpeft.disabled(model):  # a teacher
            model(X)
            model(2 * X)
        convpeft.set_active(model.eval(), None)
        assert torch.equal(model(X), base)

    def test_the_file_loads_on_a_base_that_never_trained(self, kind, tmp_path):
        model, fresh, ran = net(MOVING[kind]), net(MOVING[kind]), net(MOVING[kind])
        base = copy.deepcopy(fresh)(X)
        ran(X)
        convpeft.inject(model, LORA, name="a")
        a = train(model)(X)
        path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
        for other in (fresh, ran):
            convpeft.load_adapter(other, path)
            if kind not in ("hidden", "lazy"):  # torch's own checkpoints lose these, too
                assert torch.equal(other(X), a)
            assert torch.equal(on_base(other), base)
            again = convpeft.save_adapter(other, tmp_path / "again.safetensors")
            assert convpeft.inspect_adapter(again).tensors == convpeft.inspect_adapter(path).tensors
        convpeft.set_active(model, None)
        assert convpeft.save_adapter(model, tmp_path / "b.safetensors", name="a").read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_copies_know_it_too(self, kind, way):
        if kind == "parametrised spectral":
            way = "deepcopy"  # torch pickles no parametrised modules
        model = net(MOVING[kind])
        base = copy.deepcopy(model)(X)
        convpeft.inject(model, LORA, name="a")
        a = train(model)(X)
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(on_base(twin), base)
        assert torch.equal(twin(X), a)
        convpeft.eject(twin)
        assert torch.equal(twin(X), base)
        assert torch.equal(model(X), a)

    def test_merging_keeps_it(self, kind):
        model = net(MOVING[kind])
        convpeft.inject(model, LORA, name="a")
        a = train(model)(X)
        plain = convpeft.merge(model)
        torch.testing.assert_close(plain(X), a)
        assert "_convpeft_buffers" not in vars(plain[1])


def test_the_very_state_that_was_trained_is_in_the_file(tmp_path):
    model = net(Codebook)
    convpeft.inject(model, LORA, name="a")
    train(model)
    codes, used = model[1].codes.clone(), model[1].used.clone()
    path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
    file = convpeft.inspect_adapter(path)
    assert {key for key in file.tensors if key.startswith("state:")} == {"state:1:codes", "state:1:used"}
    fresh = net(Codebook)
    convpeft.load_adapter(fresh, path)
    assert torch.equal(fresh[1].codes, codes)
    assert torch.equal(fresh[1].used, used)
    convpeft.set_active(fresh, None)
    assert torch.equal(fresh[1].codes, torch.arange(4.0))
    assert fresh[1].used.sum() == 0


def test_nothing_moved_nothing_in_the_file(tmp_path):
    model = net(Centre)
    convpeft.inject(model, LORA, name="a")
    model(X)
    keys = convpeft.inspect_adapter(convpeft.save_adapter(model, tmp_path / "a.safetensors")).tensors
    assert set(keys) == {"adapter:0:down", "adapter:0:up"}


def test_an_unfrozen_module_has_its_buffers_among_its_own(tmp_path):
    class Scaled(Centre):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, y):
            return super().forward(y) * self.scale

    model, base = net(Scaled), net(Scaled)(X)
    convpeft.inject(model, {**LORA, "unfreeze": ["1"]}, name="a")
    convpeft.inject(model, LORA, name="b")
    b = train(model)(X)
    convpeft.set_active(model, "a")
    a = train(model, seed=9)(X)
    path = convpeft.save_adapter(model, tmp_path / "a.safetensors", name="a")
    assert not [key for key in convpeft.inspect_adapter(path).tensors if key.startswith("state:")]
    convpeft.set_active(model, "b")
    assert torch.equal(model(X), b)
    assert torch.equal(on_base(model), base)
    fresh = net(Scaled)
    convpeft.load_adapter(fresh, path)
    assert torch.equal(fresh(X), a)
    convpeft.load_adapter(fresh, convpeft.save_adapter(model, tmp_path / "b.safetensors", name="b"))
    assert torch.equal(fresh(X), b)


def test_of_several_adapters_the_first_with_its_own_shows_it():
    model = net(Centre)
    for name in ("a", "b"):
        convpeft.inject(model, LORA, name=name)
    train(model)
    own = model[1].centre.clone()
    convpeft.set_active(model, ["a", "b"])
    assert torch.equal(model[1].centre, own)
    train(model)
    moved = model[1].centre.clone()
    assert not torch.equal(moved, own)
    convpeft.set_active(model, "a")
    assert torch.equal(model[1].centre, torch.zeros(8, 1, 1))
    convpeft.set_active(model, "b")
    assert torch.equal(model[1].centre, moved)


class Sized(nn.Module):
    """Makes a grid for each size of image, and notes the size beside it."""

    def __init__(self, persistent=True, empty=False) -> None:
        super().__init__()
        self.persistent, self.size = persistent, None
        if empty:
            self.register_buffer("grid", torch.zeros(0), persistent=persistent)

    def forward(self, y):
        if self.size != y.shape[-2:]:
            self.size = y.shape[-2:]
            grid = torch.arange(float(self.size.numel())).reshape(self.size)
            self.register_buffer("grid", grid, persistent=self.persistent)
        return y + self.grid


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_grid_is_made_again_where_it_is_missing(persistent, empty, tmp_path):
    def middle():
        return Sized(persistent, empty)

    model, small = net(middle), X[..., :4, :6]
    base, base_small = copy.deepcopy(model)(X), copy.deepcopy(model)(small)
    convpeft.inject(model, LORA, name="a")
    a = train(model)(X)
    path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
    for x, want in ((small, base_small), (X, base)):
        assert torch.equal(on_base(model, x), want)
    convpeft.set_active(model, None)
    assert torch.equal(model(small), base_small)
    convpeft.set_active(model, "a")
    assert torch.equal(model(X), a)
    for runs in ((), (X,), (small,)):
        other = net(middle)
        for x in runs:
            other(x)
        if persistent and empty and runs:
            continue  # a buffer of the base's from its constructor on, and another one here
        convpeft.load_adapter(other, path)
        assert torch.equal(other(X), a)
        assert torch.equal(on_base(other), base)


def test_a_file_of_a_base_that_ran_loads_on_one_that_did_not(tmp_path):
    ran = net(Sized)
    ran(X)
    convpeft.inject(ran, LORA, name="a")
    a = train(ran)(X)
    path = convpeft.save_adapter(ran, tmp_path / "a.safetensors")
    fresh = net(Sized)
    convpeft.load_adapter(fresh, path)
    assert torch.equal(fresh(X), a)
    wrong = net(Sized)
    with torch.no_grad():
        wrong[2].bias[1] += 1
    wrong(X)
    with pytest.raises(convpeft.BaseMismatch, match=r"1 of 3 layers differ \(2\)") as caught:
        convpeft.load_adapter(wrong, path)
    assert caught.value.layers == ("2",)


def test_another_buffer_of_the_base_is_another_base(tmp_path):
    model = net(Centre)
    convpeft.inject(model, LORA, name="a")
    path = convpeft.save_adapter(train(model), tmp_path / "a.safetensors")
    wrong = net(Centre)
    wrong[1].centre[2] = 5
    with pytest.raises(convpeft.BaseMismatch, match=r"\(1\)") as caught:
        convpeft.load_adapter(wrong, path)
    assert caught.value.layers == ("1",)
    convpeft.load_adapter(wrong, path, any_base=True)
    assert torch.equal(wrong[1].centre, model[1].centre)


@pytest.mark.parametrize("tracks", [True, False])
def test_a_norm_without_statistics_is_another_base(tracks, tmp_path):
    model = net(lambda: nn.BatchNorm2d(8, track_running_stats=tracks))
    convpeft.inject(model, LORA, name="a")
    path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(convpeft.BaseMismatch, match=r"\(1\)"):
        convpeft.load_adapter(net(lambda: nn.BatchNorm2d(8, track_running_stats=not tracks)), path)


def test_a_model_that_trains_in_eval_mode_trains_all_the_same():
    class Calls(Hidden):
        def forward(self, y):
            self.count += 1
            return y * self.count

    model = net(Calls)
    convpeft.inject(model, LORA, name="a")
    optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=0.05))
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
    convpeft.inject(model, {**LORA, "unfreeze": ["2"]}, name="b")
    assert model[1].count == 1
    convpeft.set_active(model, "a")
    assert model[1].count == 4
    optimizer.step()
    convpeft.eject(model)
    assert model[1].count == 1


def test_only_a_loss_in_training_mode():
    model = net(Bank)
    convpeft.inject(model, LORA, name="a")
    model[1].train()
    optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=0.05))
    model(X).square().mean().backward()
    optimizer.step()
    model.eval()
    assert len(model[1].bank) == 2
    convpeft.set_active(model, None)
    assert len(model[1].bank) == 1


def test_merging_what_can_be_merged_leaves_the_active_adapters_buffers():
    model = net(Centre)
    rules = [*LORA["rules"], {"match": "2", "kind": "bottleneck"}]
    convpeft.inject(model, {"rules": rules}, name="a")
    a = train(model)(X)
    convpeft.merge(model, strict=False, inplace=True)
    torch.testing.assert_close(model(X), a)
    moved = model[1].centre.clone()
    convpeft.set_active(model, None)
    assert torch.equal(model[1].centre, moved)


def test_attributes_of_other_modules_are_the_users():
    model = net(Sized)
    model[1].threshold, model[0].threshold = 0.5, 0.5
    convpeft.inject(model, LORA, name="a")
    train(model)
    model[0].threshold = 0.7
    convpeft.set_active(model, None)
    assert model[0].threshold == 0.7
    assert model[1].size is None
    convpeft.set_active(model, "a")
    assert model[1].size == (8, 8)


def test_what_is_written_by_hand_outside_of_training_stays():
    model = net(Centre)
    for name in ("a", "b"):
        convpeft.inject(model, LORA, name=name)
    words = torch.linspace(0, 1, 8).reshape(8, 1, 1)
    model[1].centre = words.clone()  # as a detector's vocabulary
    for name in ("a", None, "b"):
        convpeft.set_active(model, name)
        assert torch.equal(model[1].centre, words)
    convpeft.inject(model, {**LORA, "rules": [{"match": "2", "kind": "lora"}]}, name="c")
    assert torch.equal(model[1].centre, words)


def test_what_others_put_into_a_module_stays():
    class Own(nn.Conv2d):
        pass

    model = net(lambda: Own(8, 8, 1))
    convpeft.inject(model, LORA, name="a")
    prune.l1_unstructured(model[1], "weight", 0.5)
    pruned = train(model)(X)
    convpeft.set_active(model, None)
    assert model[1].weight_mask.sum() == 32
    convpeft.set_active(model, "a")
    assert torch.equal(model(X), pruned)
    convpeft.eject(model)
    assert model[1].weight_mask.sum() == 32


def test_modules_that_share_a_buffer_go_on_sharing_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Centre(), Centre()
            self.two.centre = self.one.centre

        def forward(self, y):
            if self.training:
                self.one.centre.add_(1)
            return y + self.one.centre * self.two.centre

    model = net(Two)
    convpeft.inject(model, LORA, name="a")
    train(model)
    for name, value in ((None, 0), ("a", 3)):
        convpeft.set_active(model, name)
        assert model[1].one.centre is model[1].two.centre
        assert torch.equal(model[1].one.centre, torch.full((8, 1, 1), float(value)))


@pytest.mark.parametrize("back", [False, True])
def test_a_model_that_is_converted_keeps_both(back):
    model = net(Centre).double()
    x = X.double()
    base = model(x)
    convpeft.inject(model, LORA, name="a")
    a = train(model.float())(X)
    model.double()
    if back:
        torch.testing.assert_close(on_base(model, x), base, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x), a.double(), rtol=1e-5, atol=1e-5)
    convpeft.set_active(model, None)
    assert model[1].centre.dtype == torch.float64
    convpeft.set_active(model, "a")
    assert model[1].centre.dtype == torch.float64
    convpeft.eject(model)
    torch.testing.assert_close(model(x), base, rtol=1e-5, atol=1e-5)


class TestCheckpoints:
    def test_a_base_checkpoint_is_the_base_from_then_on(self):
        other = net(Centre, seed=1)
        other[1].centre.fill_(0.25)
        checkpoint = copy.deepcopy(other.state_dict())
        for trained in (False, True):
            model = net(Centre)
            convpeft.inject(model, LORA, name="a")
            if trained:
                train(model)
                convpeft.set_active(model, None)
                convpeft.set_active(model, "a")
                own = model[1].centre.clone()
            assert not any(model.load_state_dict(checkpoint, strict=False))
            assert torch.equal(model[1].centre, own if trained else torch.full((8, 1, 1), 0.25))
            convpeft.set_active(model, None)
            assert torch.equal(model[1].centre, torch.full((8, 1, 1), 0.25))
            convpeft.eject(model)
            assert same_bits(bits(model), bits(other))

    def test_statistics_of_norms_are_loaded_for_good(self):
        model, other = net(lambda: nn.BatchNorm2d(8)), net(lambda: nn.BatchNorm2d(8), seed=1)
        other[1].running_mean.fill_(2)
        convpeft.inject(model, LORA, name="a")
        model.load_state_dict(other.state_dict())
        train(model)
        convpeft.eject(model)
        assert same_bits(bits(model), bits(other))

    @pytest.mark.parametrize("saved", [False, True])
    def test_going_back_to_the_best_step_brings_its_buffers(self, saved):
        model = net(Codebook)
        base = copy.deepcopy(model)(X)
        convpeft.inject(model, LORA, name="a")
        best = train(model)(X)
        state = copy.deepcopy(model.state_dict())
        if saved:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        train(model, steps=2, seed=8)
        assert not torch.equal(model(X), best)
        model.load_state_dict(state)
        assert torch.equal(model(X), best)
        assert torch.equal(on_base(model), base)
        assert torch.equal(model(X), best)

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_whole_checkpoint_resumes_in_a_model_that_never_saw_the_base(self, assign):
        model = net(Codebook)
        base = copy.deepcopy(model)(X)
        for name in ("a", "b"):
            convpeft.inject(model, LORA, name=name)
        b = train(model)(X)
        convpeft.set_active(model, "a")
        a = train(model, seed=7)(X)
        state = copy.deepcopy(model.state_dict())
        for active in ("a", "b"):
            other = net(Codebook, seed=4)
            other[1].codes.fill_(9)
            for name in ("a", "b"):
                convpeft.inject(other, LORA, name=name)
            convpeft.set_active(other, active)
            other.load_state_dict(state, assign=assign)
            for name, want in ((active, a if active == "a" else b), ("b", b), (None, base), ("a", a)):
                convpeft.set_active(other, name)
                assert torch.equal(other(X), want), (active, name)


@pytest.mark.parametrize("at", range(6))
def test_a_switch_that_was_interrupted_can_be_done_again(at, monkeypatch):
    model = net(lambda: nn.Sequential(Centre(), Codebook(), Initialised()))
    base = copy.deepcopy(model)(X)
    outputs = {None: base}
    for name in ("a", "b"):
        convpeft.inject(model, LORA, name=name)
        outputs[name] = train(model)(X)
    own, calls = kept.put_in, []

    def interrupted(module, values, names, copies):
        calls.append(module)
        if len(calls) == at + 1:
            own(module, values, names[:1], copies)
            raise KeyboardInterrupt
        own(module, values, names, copies)

    monkeypatch.setattr(buffers, "put_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convpeft.set_active(model, "a")
    monkeypatch.undo()
    for name in ("b", "a", None, "b"):
        convpeft.set_active(model, name)
        assert torch.equal(model(X), outputs[name])
    convpeft.eject(model)
    assert torch.equal(model(X), base)


def test_a_failed_inject_leaves_no_trace():
    model = net(Centre)
    names = set(vars(model[1]))

    class Stubborn(nn.Conv2d):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise TypeError("no")
            super().__setattr__(name, value)

    model.append(Stubborn(4, 4, 1))
    with pytest.raises(convpeft.HostError):
        convpeft.inject(model, {"rules": [{"match": "3", "kind": "lora"}]})
    assert set(vars(model[1])) == names
    assert not model[1]._load_state_dict_pre_hooks
