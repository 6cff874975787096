"""What convpeft keeps in a module is no child of it: code that walks or edits children meets what the bare class has."""

from __future__ import annotations

import copy
import importlib
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn

import convpeft
from convpeft import Rule, Spec

WIDTH = 4


class Walk(nn.Module):
    """A block whose forward runs whatever children it finds, found in the given way."""

    def __init__(self, find):
        super().__init__()
        self.first, self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.find = find

    def forward(self, x):
        for step in self.find(self):
            x = step(x).tanh()
        return x


WALKS = {
    "children": lambda m: m.children(),
    "named_children": lambda m: [step for _, step in m.named_children()],
    "items": lambda m: [step for _, step in m._modules.items()],
    "keys": lambda m: [m._modules[key] for key in m._modules],
    "reversed": lambda m: [m._modules[key] for key in reversed(m._modules)],
    "copy of a dict": lambda m: dict(m._modules).values(),
    "union": lambda m: ({} | m._modules).values(),
    "by number": lambda m: [list(m._modules.values())[i] for i in range(-len(m._modules), 0)],
}


def steps(count=4):
    torch.manual_seed(0)
    return [nn.Conv2d(WIDTH, WIDTH, 1 + 2 * (i % 2), padding=i % 2) for i in range(count)]


def adapted(model, *rules, **more):
    """Inject bottlenecks on the outputs of the named modules and move them off their start."""
    convpeft.inject(model, Spec(rules=[Rule(name, "bottleneck", channels=WIDTH) for name in rules], **more))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def x():
    return torch.randn(2, WIDTH, 6, 6, generator=torch.Generator().manual_seed(2))


class Own(nn.Sequential):
    """A Sequential with a forward of its own, which a slice of it has to keep."""

    def forward(self, x):
        for step in self:
            x = step(x).sin()
        return x


class OwnList(nn.ModuleList):
    def forward(self, x):
        return sum((number + 1) * step(x) for number, step in enumerate(self))


class TestWalks:
    @pytest.mark.parametrize("find", WALKS.values(), ids=WALKS)
    def test_a_forward_over_children(self, find, x):
        model = nn.Sequential(Walk(find)).eval()
        own = model(x)
        adapted(model, "0")
        block = model[0]
        assert torch.equal(model(x), own + block.convpeft.default(own))
        assert list(find(block))
        assert not [step for step in find(block) if type(step).__name__ == "Slots"]
        assert len(block._modules) == 2

    @pytest.mark.parametrize("find", [WALKS["children"], WALKS["named_children"], WALKS["items"]])
    def test_it_compiles_as_the_bare_one(self, find, x):
        model = adapted(nn.Sequential(Walk(find)).eval(), "0")
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))

    def test_a_leaf_stays_a_leaf(self):
        model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, 2))
        leaves = [module for module in model if not list(module.children())]
        convpeft.inject(model, Spec(rules=[Rule("[02]", "lora", rank=2)], unfreeze=["2"], norm="adapt"))
        assert [module for module in model if not list(module.children())] == leaves == list(model)
        assert all(not module._modules and dict(module.named_children()) == {} for module in model)

    def test_a_recursive_replacement_finds_the_users_layers_only(self, x):
        def replace(module):
            for name, child in module.named_children():
                if isinstance(child, (nn.Identity, nn.Dropout)):
                    setattr(module, name, nn.Tanh())
                replace(child)

        model = adapted(nn.Sequential(nn.Sequential(*steps(2), nn.Identity()), *steps(1)).eval(), "0", "1")
        kept = copy.deepcopy(model.state_dict())
        replace(model)
        assert [type(step).__name__ for step in model[0]] == ["AdaptedConv2d", "AdaptedConv2d", "Tanh"]
        assert isinstance(model[0].convpeft.default.dropout, nn.Dropout)
        assert list(model.state_dict()) == list(kept)

    def test_the_last_child_is_the_users(self, x):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.body, self.head = steps(3)

            def forward(self, x):
                return self.head(self.body(self.stem(x)))

        net = Net().eval()
        convpeft.inject(net, Spec(rules=[Rule("", "bottleneck", channels=WIDTH), Rule("body", "lora", rank=2)]))
        features = nn.Sequential(*list(net.children())[:-1])
        assert torch.equal(features(x), net.body(net.stem(x)))
        assert [name for name, _ in net.named_children()] == ["stem", "body", "head"]

    def test_everything_finds_it_that_should(self):
        model = adapted(nn.Sequential(nn.Sequential(*steps(2)), *steps(1)), "0")
        slots = model[0].convpeft
        assert model[0]._modules["convpeft"] is model[0]._modules.get("convpeft") is slots
        assert "convpeft" in model[0]._modules
        assert model.get_submodule("0.convpeft.default") is slots.default
        with pytest.raises(KeyError):
            model[0]._modules["convpeft_"]
        assert model[0]._modules.get("absent", 3) == 3
        assert slots.default in list(model.modules())
        names = [name for name, _ in model.named_parameters()]
        assert names == list(model.state_dict())
        base = ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"]
        assert names[:4] == base
        assert names[4].startswith("0.convpeft.default.")
        assert names[-2:] == ["1.weight", "1.bias"]
        assert "(convpeft): Slots(" in repr(model)
        assert "(default): Bottleneck(" in repr(model)
        assert model.get_parameter("0.convpeft.default.gate") is slots.default.gate

    @pytest.mark.parametrize("kind", [dict, OrderedDict])
    def test_eject_leaves_the_plain_dict(self, kind):
        model = nn.Sequential(nn.Sequential(*steps(2)))
        model[0]._modules = kind(model[0]._modules)
        adapted(model, "0")
        assert isinstance(model[0]._modules, kind)
        if kind is OrderedDict:
            model[0]._modules.move_to_end("0")
            assert list(model[0]._modules) == ["1", "0"]
        convpeft.eject(model)
        assert type(model[0]._modules) is kind
        assert not [key for module in model.modules() for key in vars(module) if "convpeft" in key]


EDITS = {
    "del first": lambda s: s.__delitem__(0),
    "del slice": lambda s: s.__delitem__(slice(1, 3)),
    "del stepped": lambda s: s.__delitem__(slice(None, None, 2)),
    "pop": lambda s: s.pop(-2),
    "insert": lambda s: s.insert(1, nn.Tanh()),
    "append": lambda s: s.append(nn.Tanh()),
    "extend": lambda s: s.extend([nn.Tanh(), nn.ReLU()]),
    "set": lambda s: s.__setitem__(-1, nn.Tanh()),
    "iadd": lambda s: s.__iadd__(type(s.copied)(*s.added)) if isinstance(s, nn.Sequential) else s.__iadd__(s.added),
    "del, append, set": lambda s: (s.__delitem__(-1), s.append(nn.Tanh()), s.__setitem__(-1, nn.ReLU())),
    "three times": lambda s: [s.__delitem__(0) for _ in range(3)],
}


class TestEditing:
    @pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
    @pytest.mark.parametrize("kind", [nn.Sequential, Own, OwnList], ids=lambda kind: kind.__name__)
    def test_as_the_bare_class(self, kind, edit, x):
        bare = kind(*steps()) if issubclass(kind, nn.Sequential) else kind(steps())
        model = nn.Sequential(copy.deepcopy(bare)).eval()
        adapted(model, "0")
        host, adapter = model[0], model[0].convpeft.default
        for each in (bare, host):
            each.__dict__["added"], each.__dict__["copied"] = [nn.Tanh(), nn.Sigmoid()], nn.Sequential()
            edit(each)
        assert [repr(step).replace("Adapted", "") for step in host] == [repr(step) for step in bare]
        assert list(host._modules) == list(bare._modules)
        assert len(host) == len(bare)
        own = bare(x)
        assert torch.equal(model(x), own + adapter(own))
        assert host._modules["convpeft"] is host.convpeft
        with convpeft.disabled(model):
            assert torch.equal(model(x), own)
        again = copy.deepcopy(model)
        again.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(again(x), model(x))
        assert type(convpeft.eject(model)[0]) is kind
        assert torch.equal(model(x), own)

    @pytest.mark.parametrize(
        "index", [slice(1), slice(-3, -1), slice(None, None, 2), slice(None, None, -1), slice(4, 9)]
    )
    @pytest.mark.parametrize("kind", [nn.Sequential, Own, OwnList], ids=lambda kind: kind.__name__)
    def test_slices(self, kind, index, x):
        bare = kind(*steps()) if issubclass(kind, nn.Sequential) else kind(steps())
        model = adapted(nn.Sequential(copy.deepcopy(bare)).eval(), "0")
        part = model[0][index]
        assert type(part) is type(bare[index]) is kind
        assert list(part._modules) == list(bare[index]._modules)
        assert list(part) == list(model[0])[index]
        assert type(part._modules) is type(bare[index]._modules)
        if len(part):
            assert torch.equal(part(x), bare[index](x))
            part.train().double()(x.double())

    def test_sums_and_products(self):
        model = adapted(nn.Sequential(nn.Sequential(*steps(2)), nn.ModuleList(steps(2))[0]), "0")
        host = model[0]
        first, second = host
        assert list(host + nn.Sequential(nn.ReLU()))[:2] == [first, second]
        assert type(host + host) is nn.Sequential
        assert len(host + host) == 4
        assert list(host * 2) == list(2 * host) == [first, second, first, second]
        assert first in host
        assert host.convpeft not in list(host)

    def test_a_subclass_makes_more_of_its_kind(self, x):
        class Copies(nn.Module):
            def __init__(self, width=WIDTH, *, scale=1.0):
                super().__init__()
                self.conv, self.scale = nn.Conv2d(width, width, 1), scale

            def forward(self, x):
                return self.scale * self.conv(x)

            def twin(self):
                return type(self)(self.conv.in_channels, scale=self.scale)

        model = adapted(nn.Sequential(Copies(scale=2.0)), "0")
        twin = model[0].twin()
        assert type(twin) is Copies
        assert twin.scale == 2.0
        twin.train()(x)
        assert type(model[0].__class__()) is Copies

    def test_a_module_dict(self):
        model = adapted(nn.Sequential(Branches({"a": nn.Conv2d(WIDTH, WIDTH, 1), "b": nn.Identity()})), "0")
        host = model[0]
        host["c"] = nn.Tanh()
        assert host.pop("b").__class__ is nn.Identity
        assert list(host) == list(host.keys()) == ["a", "c"]
        assert "convpeft" not in host
        host.update({"d": nn.ReLU()})
        assert [name for name, _ in host.items()] == ["a", "c", "d"]
        host.clear()
        assert len(host) == 0
        assert host.convpeft.default is not None

    def test_the_dict_itself_is_replaced(self, x):
        model = adapted(nn.Sequential(nn.Sequential(*steps(3))).eval(), "0")
        host = model[0]
        host._modules = OrderedDict(reversed(list(host._modules.items())))
        own = nn.Sequential(*host)(x)
        assert torch.equal(model(x), own + host.convpeft.default(own))
        assert [key for key in model.state_dict() if "convpeft" in key]
        assert sum(parameter.requires_grad for parameter in model.parameters()) == 5
        model.double()
        assert host.convpeft.default.gate.dtype == torch.float64


class Branches(nn.ModuleDict):
    def forward(self, x):
        return sum(branch(x) for branch in self.values())


class TestProtocols:
    def test_conversions_reach_the_adapters(self):
        model = adapted(nn.Sequential(nn.Sequential(*steps(2)), *steps(1)), "0", unfreeze=["1"])
        assert {p.dtype for p in model.double().parameters()} == {torch.float64}
        assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}
        assert {p.device.type for p in model.to_empty(device="cpu").parameters()} == {"cpu"}
        model.train()
        assert all(module.training for module in model.modules() if not isinstance(module, nn.BatchNorm2d))
        assert not any(module.training for module in model.eval().modules())
        model.zero_grad()
        model.requires_grad_(False)
        assert not any(p.requires_grad for p in model.parameters())

    def test_apply_leaves_them_alone(self):
        model = adapted(nn.Sequential(nn.Sequential(*steps(2)), *steps(1)), "0", "1")
        seen = []
        model.apply(seen.append)
        assert seen == [model[0][0], model[0][1], model[0], model[1], model]

    def test_copies_and_pickles(self, x):
        model = adapted(nn.Sequential(nn.Sequential(*steps(2)), *steps(1)).eval(), "0", "1")
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(x), model(x))
            assert other[0]._modules["convpeft"] is other[0].convpeft is not model[0].convpeft
            assert list(other[0]) == list(other[0].children())
            assert len(other[0]) == 2
            assert type(convpeft.eject(other)[0]._modules) is dict

    def test_tracers(self, x):
        model = adapted(nn.Sequential(nn.Sequential(*steps(2)), *steps(1)).eval(), "0", "1")
        names = sorted(name for name, _ in model.named_parameters())
        traced = torch.jit.trace(model, (x,))
        torch.testing.assert_close(traced(x), model(x))
        assert sorted(name for name, _ in traced.named_parameters()) == names
        symbolic = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(symbolic(x), model(x))
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), model(x))
        assert sorted(exported.state_dict) == names

    @pytest.mark.parametrize("where", ["0", "0.0", "1"])
    def test_replicas_have_adapters_of_their_own(self, where, monkeypatch, x):
        replicate = importlib.import_module("torch.nn.parallel.replicate")
        monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional=False: device)
        doubled = lambda tensors, devices, detach=False: [[2 * t for t in tensors] for _ in devices]  # noqa: E731
        monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", doubled)
        model = nn.Sequential(nn.Sequential(*steps(2)), *steps(1)).eval()
        adapted(model, where)
        twice = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twice.parameters():
                parameter.mul_(2)
        for _ in range(2):
            found = replicate.replicate(model, ["cpu", "cpu"])
            own = [each.get_submodule(where).convpeft.default for each in (model, *found)]
            assert len({id(adapter) for adapter in own}) == 3
            for each in found:
                assert torch.equal(each(x), twice(x))
                assert torch.equal(each.train()(x), twice(x))
        assert not model.get_submodule(where).convpeft.replicas

    def test_replicas_give_gradients(self, monkeypatch, x):
        replicate = importlib.import_module("torch.nn.parallel.replicate")
        monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional=False: device)
        same = lambda tensors, devices, detach=False: [[t * 1 for t in tensors] for _ in devices]  # noqa: E731
        monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", same)
        model = adapted(nn.Sequential(nn.Sequential(*steps(2)), *steps(1)).train(), "0", "1")
        sum(each(x).square().sum() for each in replicate.replicate(model, ["cpu", "cpu"])).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        (2 * model(x).square().sum()).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(found[name], parameter.grad)

    def test_norms_in_adapters_are_converted_to_synchronised_ones(self):
        model = nn.Sequential(*steps(2))
        convpeft.inject(model, Spec(rules=[Rule("0", "rep_mona", rank=2, branch_norm=True)]))
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
        assert kinds == {nn.SyncBatchNorm}
