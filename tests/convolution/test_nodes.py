"""Frozen layers that keep less: the same values, the same gradients, and nothing that was not needed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convpeft
from convpeft.adapters import RepMona
from convpeft.convolution import nodes, origins
from convpeft.convolution.low_rank import Factors
from convpeft.convolution.origins import origin_of
from tests.cases import assert_relative, bits, randomised, same_bits

FORMS = ("separate", "summed", "weight")
SEES_HOOKS = pytest.mark.skipif(
    origins._HOOKS is None,
    reason="this torch does not say whether hooks for saved tensors are set, so inputs are kept",
)
LAYERS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride2-dilated": {"kernel_size": 3, "padding": 2, "stride": 2, "dilation": (2, 1)},
    "same": {"kernel_size": (3, 1), "padding": "same"},
    "groups2": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 4},
}


class Net(nn.Module):
    """Convolutions, norms and an activation, with a branch that is used twice."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.SiLU() if act is None else act
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.body_norm = nn.BatchNorm2d(8)
        self.neck = nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.act(self.body_norm(self.body(x)))
        return self.head(self.act(self.neck(self.act(x))))


def net(act: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    model = Net(act).double()
    for norm in (model.norm, model.body_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
    return model


LORA = {"rules": [{"match": "**", "kind": "lora", "rank": 2}]}
LATE = {"rules": [{"match": "head", "kind": "lora", "rank": 2}]}


def adapted(spec: dict = LORA, act: nn.Module | None = None, lean: bool = True) -> Net:
    model = net(act)
    convpeft.inject(model, spec, lean=lean)
    return randomised(model)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def kept(model: Callable[[Tensor], Tensor], x: Tensor, known: Iterable[Tensor] = ()) -> list[Tensor]:
    """Return what autograd keeps for backward, each storage once; parameters, buffers and what is known left out."""
    own = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*own, *known)}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return list(found.values())


def factors_for(layer: nn.Conv2d, form: str) -> Factors:
    groups = layer.groups
    generator = torch.Generator().manual_seed(2)
    down = torch.randn(2 * groups, *layer.weight.shape[1:], dtype=torch.float64, generator=generator)
    up = torch.randn(layer.out_channels, 2, 1, 1, dtype=torch.float64, generator=generator)
    return Factors(down.requires_grad_(), up.requires_grad_(), form)


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_convolution_with_factors_has_the_gradients_of_the_plain_one(settings, form):
    layer = nn.Conv2d(4, 8, **settings).double().requires_grad_(False)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    factors = factors_for(layer, form)

    def run(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return nodes.convolve(layer, x, Factors(down, up, form), True)

    hidden = F.conv2d(x, factors.down, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert_relative(run(x, *factors[:2]), layer(x) + F.conv2d(hidden, factors.up, groups=layer.groups))
    assert type(run(x, *factors[:2]).grad_fn).__name__ == "_ConvolutionBackward"
    assert torch.autograd.gradcheck(run, (x, *factors[:2]))
    assert torch.autograd.gradgradcheck(run, (x, *factors[:2]))
    assert torch.autograd.gradcheck(run, (x.detach(), *factors[:2]))


@pytest.mark.parametrize(("pixels", "expected"), [(15, "separate"), (16, "summed")])
def test_kernels_are_summed_from_two_pixels_for_each_output_channel_on(pixels, expected):
    layer = nn.Conv2d(4, 8, 1).double().requires_grad_(False)
    factors, x = factors_for(layer, "summed"), torch.randn(1, 4, 1, pixels, dtype=torch.float64)
    assert [factors.form_for(x, layer.weight, training) for training in (True, False)] == [expected] * 2
    assert factors.form_for(x.bfloat16(), layer.weight, True) == "separate"
    apart = torch.equal(
        nodes.convolve(layer, x, factors, True), nodes.convolve(layer, x, factors._replace(form="separate"), True)
    )
    assert apart == (expected == "separate")


@pytest.mark.parametrize("form", FORMS)
def test_only_apart_a_map_between_the_factors_is_kept(form):
    layer = nn.Conv2d(4, 8, 3).double().requires_grad_(False)
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    found = kept(lambda x: nodes.convolve(layer, x, factors_for(layer, form), True), x, layer.parameters())
    assert any(tensor.shape == (1, 2, 7, 7) for tensor in found) == (form == "separate")


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_a_frozen_convolution_has_the_gradient_of_its_input(settings):
    layer = nn.Conv2d(4, 8, **settings).double().requires_grad_(False)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    run = lambda x: nodes.convolve(layer, x, None, True)  # noqa: E731
    assert torch.equal(run(x), layer(x))
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_norm_has_the_gradient_of_its_input(affine):
    norm = net().norm if affine else nn.BatchNorm2d(8, affine=False).double()
    norm.requires_grad_(False).eval()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(nodes.normalise(norm, x), norm(x))
    assert torch.autograd.gradcheck(lambda x: nodes.normalise(norm, x), (x,))
    assert torch.autograd.gradgradcheck(lambda x: nodes.normalise(norm, x), (x,))


def test_a_channels_last_input_stays_so_both_ways():
    layer = nn.Conv2d(4, 8, 3, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    output = nodes.convolve(layer, x, None, True)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), x)[0], expected)


@pytest.mark.parametrize(
    "act", [nn.SiLU(), nn.SiLU(inplace=True), nn.ReLU(), nn.GELU("tanh"), nn.LeakyReLU(0.2)], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_do_not_depend_on_lean(act, training):
    models = [adapted(act=act, lean=flag).train(training) for flag in (True, False)]
    first, second = (model(images()) for model in models)
    assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(models[0](images()), first)
    found, expected = (gradients(model, images()) for model in models)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_relative(gradient, expected[name])


@pytest.mark.parametrize(("rank", "form"), [(4, "one kernel"), (16, "one kernel"), (17, "one pass")])
def test_rep_mona_in_one_kernel_or_one_pass_is_the_sum_of_its_branches(rank, form):
    model = net()
    convpeft.inject(model, {"rules": [{"match": "**", "kind": "rep_mona", "rank": rank}]})
    randomised(model)
    first, found = model(images()), gradients(model, images())
    adapters = [module for module in model.modules() if isinstance(module, RepMona)]
    assert {adapter.form for adapter in adapters if adapter.site.geometry.groups == 1} == {form}
    assert {adapter.form for adapter in adapters if adapter.site.geometry.groups > 1} == {"one pass"}
    for apart in ("dense", "together"):
        for adapter in adapters:
            setattr(adapter, apart, None)
        assert_relative(model(images()), first)
        for name, gradient in gradients(model, images()).items():
            assert_relative(gradient, found[name])


def test_nothing_is_kept_upstream_of_the_first_adapter():
    model = adapted(LATE)
    shapes = {tuple(tensor.shape[1:]) for tensor in kept(model, images())}
    assert shapes
    assert all(shape[-2:] == (6, 6) and shape[0] in (2, 6) for shape in shapes if len(shape) == 3)
    assert not any(tensor.shape[1:] == (8, 6, 6) for tensor in kept(model, images()))


def test_a_frozen_layer_downstream_keeps_no_map():
    chain = nn.Sequential(
        nn.Conv2d(3, 4, 1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5)), nn.BatchNorm2d(4)
    ).double()
    counts = {}
    for flag in (True, False):
        model = copy.deepcopy(chain)
        convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 1}]}, lean=flag)
        counts[flag] = sum(tensor.shape[1:] == (4, 12, 12) for tensor in kept(model.train(), images()))
    assert counts == {True: 0, False: 6}


@SEES_HOOKS
def test_an_input_that_its_activation_can_make_again_is_not_kept():
    """Three blocks keep the map before each activation, and no map after one."""
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()) for _ in range(3)]
    model = nn.Sequential(*blocks).double()
    convpeft.inject(model, {"rules": [{"match": "**.0", "kind": "lora", "rank": 1}]})
    x = images().repeat(1, 2, 1, 1)[:, :4]
    maps = [tensor for tensor in kept(model.train(), x) if tensor.shape[1:] == (4, 12, 12)]
    assert len(maps) == 4  # the input, and three


class TestOrigin:
    @SEES_HOOKS
    @pytest.mark.parametrize(
        "function",
        [F.silu, F.hardswish, F.mish, F.gelu, F.relu6, F.leaky_relu, lambda x: F.silu(x, inplace=True)],
        ids=["silu", "hardswish", "mish", "gelu", "relu6", "leaky-relu", "silu-in-place"],
    )
    def test_it_makes_the_very_bits(self, function):
        source = torch.randn(2, 3, 5, 5, requires_grad=True) * 3
        x = function(source)
        origin = origin_of(x)
        assert torch.equal(origin.remake(origin.source), x)

    @pytest.mark.parametrize("change", [lambda x: x.relu(), lambda x: x[:, :1], lambda x: x.detach(), lambda x: x + 1])
    def test_there_is_none_for_what_no_such_activation_made(self, change):
        assert origin_of(change(F.silu(torch.randn(2, 3, 5, 5, requires_grad=True)))) is None

    def test_there_is_none_for_a_map_that_was_written_to(self):
        x = F.silu(torch.randn(2, 3, 5, 5, requires_grad=True) * 1)
        with torch.no_grad():
            x.clamp_(max=0.5)
        assert origin_of(x) is None

    def test_there_is_none_while_a_checkpoint_records(self):
        asked = []

        def run(x: Tensor) -> Tensor:
            y = F.silu(x * 2)
            asked.append(origin_of(y))
            return y.sum()

        checkpoint(run, torch.ones(3, requires_grad=True), use_reentrant=False).backward()
        assert set(asked) == {None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, x = adapted().train(), images().requires_grad_()
    expected = gradients(model, x)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for name, gradient in expected.items():
        assert_relative(model.get_parameter(name).grad, gradient)


def test_autocast_runs_in_its_dtype_and_keeps_no_copy_of_a_weight():
    models = [adapted(lean=flag).float().train() for flag in (True, False)]
    x = images().float()
    results = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        output.float().square().sum().backward()
        results.append((output, model.body.convpeft.default.down.grad))
        assert output.dtype == torch.bfloat16
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=2e-2 * float(results[1][1].abs().max()))
    assert results[0][1].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert not [t for t in kept(models[0], x) if t.shape == models[0].body.weight.shape]


@pytest.mark.parametrize("training", [True, False])
def test_a_compiler_sees_torchs_own_operations_and_follows_the_switch(training):
    model, x = adapted().train(training), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model, x)
    for name, gradient in gradients(compiled, x).items():
        assert_relative(gradient, expected[name.removeprefix("_orig_mod.")])
    convpeft.set_active(model, None)
    assert_relative(compiled(x), model(x))


def test_functional_transforms_run_torchs_own_operations():
    model, x = adapted(), images()
    expected = torch.autograd.functional.jacobian(lambda x: model(x).sum(), x)
    assert_relative(torch.func.grad(lambda x: model(x).sum())(x), expected)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert tangent.shape == model(x).shape


def test_state_dict_pickle_copy_and_eject_see_nothing_of_it():
    model, base = adapted(LATE), net()
    assert [key for key in model.state_dict() if "convpeft" not in key] == list(base.state_dict())
    assert isinstance(model.body, nn.Conv2d)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(other(images()), model(images()))
        assert gradients(other, images()).keys() == gradients(model, images()).keys()
        assert len(kept(other, images())) == len(kept(model, images()))
    convpeft.eject(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert same_bits(bits(model), bits(base))


def test_off_means_that_no_other_layer_is_touched():
    model = adapted(LATE, lean=False)
    assert type(model.body) is nn.Conv2d
    convpeft.inject(model, LATE, name="second", lean=True)
    assert type(model.body) is not nn.Conv2d
    convpeft.inject(model, LATE, name="third", lean=False)
    assert not any(module.convpeft.lean for module in model.modules() if "convpeft" in module._modules)
    convpeft.eject(model)
    assert type(model.body) is nn.Conv2d


def test_a_failed_inject_leaves_it_on(monkeypatch):
    model = adapted(LATE)
    monkeypatch.setattr("convpeft.injection.install.train_only", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convpeft.inject(model, LATE, name="second", lean=False)
    assert all(module.convpeft.lean for module in model.modules() if "convpeft" in module._modules)


def test_hooks_on_a_frozen_layer_fire():
    model, seen = adapted(LORA), []
    model.body.register_forward_hook(lambda module, args, output: seen.append("forward"))
    model.body.register_full_backward_hook(lambda module, inner, outer: seen.append("backward"))
    model(images()).sum().backward()
    assert seen == ["forward", "backward"]


def test_a_thawed_layer_trains_as_torch_trains_it():
    model, twin = adapted(LATE), adapted(LATE, lean=False)
    for each in (model, twin):
        each.body.weight.requires_grad_(True)
        each.norm.weight.requires_grad_(True)
    found, expected = gradients(model, images()), gradients(twin, images())
    assert {"body.weight", "norm.weight"} <= found.keys()
    for name, gradient in found.items():
        assert_relative(gradient, expected[name])
