"""What is exported or traced once runs on other batches and other image sizes, with no more operators than it needs."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convpeft
from tests.cases import assert_relative, randomised

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2},
    "lora-scaled": {"kind": "lora", "rank": 2, "alpha": 5},
    "lora-separate": {"kind": "lora", "rank": 2, "evaluate": "separate"},
    "lora-weight": {"kind": "lora", "rank": 2, "evaluate": "weight"},
    "lora-pointwise": {"kind": "lora", "rank": 2, "pointwise": True},
    "dora": {"kind": "lora", "rank": 2, "dora": True},
    "rep_mona": {"kind": "rep_mona", "rank": 2},
    "conv_lora": {"kind": "conv_lora", "rank": 2},
    "moe_rep_mona": {"kind": "moe_rep_mona", "rank": 2},
    "bottleneck": {"kind": "bottleneck"},
    "mona": {"kind": "mona", "rank": 2},
}
SIZES = ((2, 3, 4, 4), (3, 3, 24, 10), (2, 3, 8, 30))  # below and above the size from which kernels are summed


def net(rule: dict[str, Any]) -> nn.Sequential:
    """Return convolutions with a stride, groups, norms and activations; all are adapted, none is the identity."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2),
        nn.SiLU(), nn.Conv2d(32, 8, 1),
    ).double()  # fmt: skip
    convpeft.inject(model, {"rules": [{"match": "**", "only": "Conv2d", **rule}]})
    return randomised(model)


def images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# each kind once; all ways to export it in `make nightly`
WAYS = [
    pytest.param(
        rule,
        training,
        strict,
        id=f"{kind}-{'training' if training else 'eval'}-{'strict' if strict else 'plain'}",
        marks=[pytest.mark.nightly] if (training or strict) and kind != "lora" else [],
    )
    for kind, rule in KINDS.items()
    for training in (False, True)
    for strict in (False, True)
]


@pytest.mark.parametrize(("rule", "training", "strict"), WAYS)
def test_an_export_takes_any_batch_and_any_image_size(rule, training, strict):
    model, dim = net(rule).train(training), torch.export.Dim
    sizes = {0: dim("batch", min=2, max=64), 2: 2 * dim("rows", min=2, max=512), 3: 2 * dim("columns", min=2, max=512)}
    exported = torch.export.export(model, (images((2, 3, 16, 16)),), dynamic_shapes=(sizes,), strict=strict).module()
    for shape in SIZES:
        assert_relative(exported(images(shape)), model(images(shape)), 1e-11)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("rule", KINDS.values(), ids=KINDS)
def test_a_trace_passes_torchs_own_check_and_takes_other_sizes(rule, training):
    model = net(rule).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (images((2, 3, 16, 16)),), check_trace=True)
    for shape in SIZES:
        assert_relative(traced(images(shape)), model(images(shape)), 1e-11)


@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_is_the_same_with_gradients_and_without(grad):
    model = net(KINDS["lora"]).eval()
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = Counter(node.kind() for node in torch.jit.trace(model, (images((2, 3, 16, 16)),)).inlined_graph.nodes())
    assert kinds["aten::_convolution"] == 9
    assert not [kind for kind in kinds if "bmm" in kind or kind in ("aten::size", "aten::flatten", "aten::expand")]


def onnx_operators(model: nn.Module, x: Tensor, path: Path, **options: Any) -> Counter[str]:
    """Return how often each operator occurs in the ONNX file of a model; constants and names of equal tensors left out."""
    onnx = pytest.importorskip("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=False, verbose=False, **options)
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    return Counter({name: count for name, count in operators.items() if name not in ("Constant", "Identity")})


@pytest.mark.parametrize("rule", ["lora", "lora-scaled", "lora-separate", "lora-weight"])
def test_an_onnx_file_has_three_operators_for_each_update_and_takes_other_sizes(rule, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = net(KINDS[rule]).float().eval()
    axes = {"x": {0: "batch", 2: "rows", 3: "columns"}}
    x = images((2, 3, 16, 16)).float()
    adapted = onnx_operators(model, x, tmp_path / "a.onnx", input_names=["x"], dynamic_axes=axes)
    with convpeft.disabled(model):
        base = onnx_operators(model, x, tmp_path / "base.onnx")
    assert adapted - base == Counter(Conv=6, Add=3, BatchNormalization=1)  # the sum is between the layer and its norm
    assert base - adapted == Counter()
    session = runtime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for shape in SIZES:
        (output,) = session.run(None, {"x": images(shape).float().numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(output), model(images(shape).float()), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_yolo_with_lora_everywhere_has_three_operators_more_for_each_layer(tmp_path):
    ultralytics = pytest.importorskip("ultralytics")
    model, x = ultralytics.YOLO("yolov8n.yaml", verbose=False).model.float().eval(), torch.rand(1, 3, 64, 64)
    model.model[-1].export, model.model[-1].format = True, "onnx"
    base = onnx_operators(model, x, tmp_path / "base.onnx")
    convpeft.inject(model, {"rules": [{"match": "**", "only": "Conv2d", "kind": "lora", "rank": 2}]})
    model, layers = randomised(model.eval()), 64
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    adapted = onnx_operators(model, x, tmp_path / "a.onnx")
    assert adapted - base == Counter(Conv=2 * layers, Add=layers, BatchNormalization=norms)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (x,), check_trace=True)
    other = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(traced(other)[0], model(other)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("sides", [(1, 1), (0, 2), (3, 0)], ids=str)
def test_padding_of_every_mode_is_traced_for_other_sizes(mode, sides):
    geometry = convpeft.ConvGeometry.of(nn.Conv2d(3, 4, 3, padding=sides, padding_mode=mode)).resized((1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(geometry.sample, (images((1, 3, 9, 8)),))
    for shape in ((1, 3, 9, 8), (2, 3, 12, 7)):
        assert torch.equal(traced(images(shape)), geometry.sample(images(shape)))
