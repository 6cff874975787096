"""Compilers, exporters and checkpointing over adapted and merged models: same numbers, same operators, same gradients."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import convpeft
from tests.cases import assert_relative
from tests.detector import detector, images
from tests.usage.test_copies import SPECS, each_spec, two_adapters

FIRST = ("lora-parallel", "rep_mona-output")  # the others are compiled in `make nightly`


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    for (name, parameter), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.nightly) for name in SPECS]
)
def test_compiled_in_training_and_eval_it_follows_every_switch(name):
    torch._dynamo.reset()
    model, x = two_adapters(name), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        model.train(training)
        for key in ("a", "b", None, "a"):
            convpeft.set_active(compiled, key)
            reference = copy.deepcopy(model)
            output, expected = compiled(x), reference(x)
            assert_relative(output, expected)
            if training and key is not None:
                model.zero_grad()
                output.square().sum().backward()
                expected.square().sum().backward()
                assert_same_gradients(model, reference)
                for (buffer, value), (_, other) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
                    torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12, msg=buffer)
    with convpeft.disabled(compiled):
        assert_relative(compiled(x), model(x))
    with convpeft.using(model, "b"):
        assert_relative(compiled(x), model(x))
    assert_relative(compiled(x), model(x))
    assert_relative(torch.compile(convpeft.merge(model), fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("form", [None, "single", "factored"])
@each_spec
def test_export_and_trace_adapted_and_merged(name, form):
    model, x, other = two_adapters(name), images(), images()
    expected = model(other)
    plain = model if form is None else convpeft.merge(model, form=form)
    assert_relative(torch.export.export(plain, (x,)).module()(other), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_relative(torch.jit.trace(plain, (x,))(other), expected)


def onnx_run(model: nn.Module, path: Path, x: torch.Tensor, *, dynamo: bool) -> tuple[Counter, torch.Tensor]:
    """Export a model, and return how often each operator occurs, and what onnxruntime makes of another input."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.zeros_like(x),), path, dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return Counter(node.op_type for node in onnx.load(path).graph.node), torch.from_numpy(output)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize(
    ("kind", "match", "place"),
    [("lora", "body.*.conv", "parallel"), ("lora", "body.0.conv", "output"), ("rep_mona", "body.*.conv", "parallel")],
)
def test_onnx_of_a_merged_model_has_the_bases_operators(kind, match, place, dynamo, tmp_path):
    base, x = detector().float(), images().float()
    model = copy.deepcopy(base)
    rule = {"match": match, "kind": kind, "place": place, "rank": 2}
    convpeft.inject(model, {"rules": [rule], "unfreeze": ["score"]})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    merged = convpeft.merge(model, form="single")
    assert {row.form for row in convpeft.plan_merge(model, form="single").rows} <= {"absorbed", "single"}
    operators, plain = onnx_run(base, tmp_path / "base.onnx", x, dynamo=dynamo)
    found, output = onnx_run(merged, tmp_path / "merged.onnx", x, dynamo=dynamo)
    with torch.no_grad():
        torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(output, plain, rtol=1e-2)
    assert found == operators
    _, output = onnx_run(model, tmp_path / "adapted.onnx", x, dynamo=dynamo)
    with torch.no_grad():
        torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "match", "place"),
    [
        ("mona", "neck", "output"),
        ("hierarchical", "neck", "output"),
        ("bottleneck", "neck", "output"),
        ("moe_rep_mona", "neck", "output"),
        ("moe_rep_mona", "body.1.conv", "parallel"),
        ("conv_lora", "body.1.conv", "parallel"),
    ],
)
def test_adapters_that_cannot_merge_run_in_onnxruntime_after_the_older_exporter(kind, match, place, tmp_path):
    """``dynamo=False`` is what ultralytics exports with; ``body.1`` has groups."""
    model, x = detector().float(), images().float()
    convpeft.inject(model, {"rules": [{"match": match, "kind": kind, "place": place}]})
    with torch.no_grad():
        for group in convpeft.param_groups(model, lr=1.0):
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    _, output = onnx_run(model, tmp_path / "adapted.onnx", x, dynamo=False)
    with torch.no_grad():
        torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-6)
        with convpeft.disabled(model):
            assert not torch.allclose(output, model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@each_spec
def test_checkpointing_gives_the_same_outputs_and_gradients(name, reentrant):
    model = two_adapters(name).train()
    reference, x = copy.deepcopy(model), images().requires_grad_()
    other = x.detach().clone().requires_grad_()
    for module, value in ((model, x), (reference, other)):
        for _ in range(2):  # the norms move along
            stem = module.stem(value)
            for block in module.body:
                stem = checkpoint(block, stem, use_reentrant=reentrant) if module is model else block(stem)
            module.score(module.box(module.neck(stem)).mean((2, 3))).square().sum().backward()
    assert torch.equal(x.grad, other.grad)
    for (key, parameter), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None), key
        assert parameter.grad is None or torch.equal(parameter.grad, expected.grad), key


@each_spec
def test_hooks_put_on_a_host_afterwards_fire_once_and_see_the_sum(name):
    model, x = two_adapters(name), images().requires_grad_()
    hosts = {
        key: module for key, module in model.named_modules() if hasattr(module, "convpeft") and module.convpeft.active
    }
    fired: Counter = Counter()
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(key: str, what: str):
        def hook(module, *arguments):
            fired[key, what] += 1
            if what == "forward":
                sums[key] = (arguments[0][0], arguments[1])

        return hook

    for key, host in hosts.items():
        host.register_forward_pre_hook(note(key, "before"))
        host.register_forward_hook(note(key, "forward"))
        host.register_full_backward_pre_hook(note(key, "gradient"))
        host.register_full_backward_hook(note(key, "backward"))
    model(x).sum().backward()
    assert fired == {(key, what): 1 for key in hosts for what in ("before", "forward", "gradient", "backward")}
    assert len(hosts) > 1
    for key, host in hosts.items():
        own = host.adapted_from.forward(host, sums[key][0])
        adapter = host.convpeft._modules["a"]
        added = adapter(sums[key][0] if adapter.site.place == "parallel" else own)
        assert_relative(sums[key][1], own + added)
        assert not torch.equal(sums[key][1], own)
