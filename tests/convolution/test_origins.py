"""Where a map came from: the activation that made it can make it again, bit for bit, and that is proved."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convpeft
from convpeft.convolution.origins import origin_of
from tests.lean import SEES_HOOKS, adapted, gradients, images
from tests.saved import kept


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

    @SEES_HOOKS
    @pytest.mark.parametrize("shape", [(2, 4, 6, 6), (1, 3, 5, 5), (2, 4, 0, 3)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "not a number"])
    def test_there_is_one_for_every_size_dtype_and_layout(self, shape, dtype, layout):
        source = torch.randn(shape, dtype=dtype, requires_grad=True) * 1
        if layout == "channels last":
            source = source.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            source = source.transpose(2, 3)
        x = F.hardswish(source if layout != "not a number" else source / 0)
        origin = origin_of(x)
        assert origin is not None or (
            layout == "not a number" and shape[1] == 3
        )  # words of eight bytes compare all bits
        assert origin is None or torch.equal(origin.remake(origin.source).nan_to_num(), x.nan_to_num())

    @pytest.mark.parametrize(
        "write",
        [
            lambda x, source: x.data.mul_(2),
            lambda x, source: x.data[0, 0, 0, 0].add_(1e-7),
            lambda x, source: x.detach().numpy().sort(),
            lambda x, source: x.data.copy_(x.data.flip(-1)),
            lambda x, source: x[:, 1:].data.zero_(),
            lambda x, source: torch.from_dlpack(x.detach()).neg_(),
            lambda x, source: source.data.add_(1),
            lambda x, source: setattr(x, "data", x.data + 1),
        ],
        ids=["data", "one bit", "numpy", "flipped", "view", "dlpack", "its source", "other data"],
    )
    @pytest.mark.parametrize("function", [F.silu, F.gelu, F.mish, lambda x: F.leaky_relu(x, 0.3)])
    def test_there_is_none_for_a_map_that_was_written_to_without_autograds_knowledge(self, function, write):
        source = torch.randn(2, 3, 5, 5, requires_grad=True) * 1
        x = function(source)
        version = x._version
        write(x, source)
        assert x._version == version
        assert origin_of(x) is None

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("before", [lambda x: x * 1, torch.clone, lambda x: x.clone().add_(1), lambda x: x.add_(1)])
    def test_there_is_none_for_a_map_that_was_written_to_under_no_grad(self, before, inplace):
        x = F.silu(before(torch.randn(2, 3, 5, 5, requires_grad=True) * 1), inplace=inplace)
        with torch.no_grad():
            x[:, :1] = 0
        assert origin_of(x) is None

    @SEES_HOOKS
    def test_it_can_be_in_place_on_whatever_was_written_to_before(self):
        """A version counter would not tell these from maps written to afterwards."""
        source = (torch.randn(2, 3, 5, 5, requires_grad=True) * 1).clone().add_(1)
        with torch.no_grad():
            source.mul_(2)
        x = F.silu(source, inplace=True)
        origin = origin_of(x)
        assert torch.equal(origin.remake(origin.source), x)

    @pytest.mark.parametrize(
        "prepared", [lambda x: x.register_hook(lambda grad: grad * 2), lambda x: None], ids=["hook", "meta"]
    )
    def test_there_is_none_for_what_cannot_be_compared_or_is_hooked(self, prepared, request):
        device = "meta" if "meta" in request.node.name else "cpu"
        x = F.silu(torch.empty(2, 3, 5, 5, device=device, requires_grad=True) * 0)
        prepared(x)
        assert origin_of(x) is None

    def test_there_is_none_while_a_checkpoint_records(self):
        asked = []

        def run(x: Tensor) -> Tensor:
            y = F.silu(x * 2)
            asked.append(origin_of(y))
            return y.sum()

        checkpoint(run, torch.ones(3, requires_grad=True), use_reentrant=False).backward()
        assert set(asked) == {None}


class TestHooks:
    """Hooks for saved tensors are called in backward, once for each saved tensor, and never by us."""

    @staticmethod
    def hooked(pack, where: str = "both") -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
        """Return how often ``pack`` and its unpacking ran in forward and backward, and the gradients without and with hooks."""
        calls, found = [0, 0, 0], []
        for hooks in (False, True):
            model = adapted(lean=hooks).train()
            phase = [1]

            def note(t: Tensor, phase=phase):
                calls[0] += 1
                return pack(t)

            def unpack(packed, phase=phase):
                calls[phase[0]] += 1
                return packed[0] if isinstance(packed, tuple) else packed

            context = torch.autograd.graph.saved_tensors_hooks(note, unpack) if hooks else contextlib.nullcontext()
            if where == "activation":
                model.act.forward = lambda x, context=context: _within(context, F.silu, x)
                loss = model(images()).square().sum()
            else:
                with context:
                    loss = model(images()).square().sum()
            phase[0] = 2
            loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        return calls, found[0], found[1]

    @pytest.mark.parametrize("where", ["both", "activation"])
    @pytest.mark.parametrize(
        "pack",
        [lambda t: (t,), lambda t: t, lambda t: (t.clone(),), lambda t: t.detach(), lambda t: t.clone()],
        ids=["wrapped", "itself", "wrapped copy", "detached", "copy"],
    )
    def test_unpacking_happens_in_backward_only(self, pack, where):
        (packed, early, late), expected, got = self.hooked(pack, where)
        assert early == 0
        assert 0 < late <= packed
        assert expected.keys() == got.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-12, atol=1e-12)

    def test_a_checkpoint_of_the_activation_alone_is_not_recomputed_early(self):
        ran = []

        def act(x: Tensor) -> Tensor:
            ran.append(torch._C._current_graph_task_id() != -1)
            return F.silu(x)

        model, plain = adapted().train(), adapted(lean=False).train()
        model.act.forward = lambda x: checkpoint(act, x, use_reentrant=False)
        got, expected = gradients(model, images()), gradients(plain, images())
        assert ran == [False] * 4 + [True] * 4
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-12, atol=1e-12)


def _within(context, function, x: Tensor) -> Tensor:
    with context:
        return function(x)
