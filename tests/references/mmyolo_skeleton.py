"""The image part of mmyolo's YOLO-World-v2 as a module tree of the same names and shapes.

mmyolo needs compiled packages that pip does not install beside a current torch, so the tests build this instead: real
convolutions of the right sizes under the names of the authors' configurations, with a forward that runs. It is written from
the published names and shapes alone, it is no port: initial values, losses, text encoder and post-processing are left out.

``ConvModule`` is mmcv's triple of convolution, norm and activation; the others follow mmyolo's YOLOv8 and YOLO-World's
necks and heads. Reference: YOLO-World, arXiv:2401.17270.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT_WIDTH = 512
BINS = 16  # of each side's distance


class ConvModule(nn.Module):
    """Convolution, BatchNorm and SiLU as ``conv``, ``bn`` and ``activate``."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1, *, active: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001, momentum=0.03)
        self.activate = nn.SiLU(inplace=True) if active else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.bn(self.conv(x)))


class DarknetBottleneck(nn.Module):
    """Two 3x3 convolutions, with a residual in the backbone and without one in the neck."""

    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        self.conv1 = ConvModule(width, width, 3)
        self.conv2 = ConvModule(width, width, 3)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        update = self.conv2(self.conv1(x))
        return x + update if self.residual else update


class CSPLayerWithTwoConv(nn.Module):
    """Split in two, run blocks on one half, and join every step's map."""

    def __init__(self, inputs: int, outputs: int, count: int, *, residual: bool, extra: int = 0) -> None:
        super().__init__()
        middle = outputs // 2
        self.main_conv = ConvModule(inputs, 2 * middle)
        self.final_conv = ConvModule((2 + count + extra) * middle, outputs)
        self.blocks = nn.ModuleList(DarknetBottleneck(middle, residual) for _ in range(count))

    def maps(self, x: Tensor) -> list[Tensor]:
        maps = list(self.main_conv(x).chunk(2, 1))
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.final_conv(torch.cat(self.maps(x), 1))


class MaxSigmoidAttnBlock(nn.Module):
    """Weigh the pixels of each head's channels by their best match with a text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.guide_fc = nn.Linear(TEXT_WIDTH, width)
        self.bias = nn.Parameter(torch.zeros(heads))
        self.project_conv = ConvModule(width, width, 3, active=False)
        self.heads = heads

    def forward(self, x: Tensor, texts: Tensor) -> Tensor:
        guide = self.guide_fc(texts).unflatten(-1, (self.heads, -1))
        split = x.unflatten(1, (self.heads, -1))
        match = torch.einsum("bmchw,bnmc->bmhwn", split, guide).amax(-1) / split.shape[2] ** 0.5
        gate = (match + self.bias[:, None, None]).sigmoid()
        return (self.project_conv(x).unflatten(1, (self.heads, -1)) * gate.unsqueeze(2)).flatten(1, 2)


class MaxSigmoidCSPLayerWithTwoConv(CSPLayerWithTwoConv):
    """The same with a text-guided map besides."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__(inputs, outputs, count, residual=False, extra=1)
        self.attn_block = MaxSigmoidAttnBlock(outputs // 2, max(1, outputs // 64))

    def forward(self, x: Tensor, texts: Tensor) -> Tensor:  # type: ignore[override]
        maps = self.maps(x)
        return self.final_conv(torch.cat([*maps, self.attn_block(maps[-1], texts)], 1))


class SPPFBottleneck(nn.Module):
    """Three poolings in a row between two 1x1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvModule(width, width // 2)
        self.poolings = nn.MaxPool2d(5, 1, 2)
        self.conv2 = ConvModule(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.conv1(x)]
        for _ in range(3):
            maps.append(self.poolings(maps[-1]))
        return self.conv2(torch.cat(maps, 1))


class YOLOv8CSPDarknet(nn.Module):
    """Stem and four stages; the last three give the maps."""

    def __init__(self, stem: int, widths: list[int], depths: list[int]) -> None:
        super().__init__()
        self.stem = ConvModule(3, stem, 3, 2)
        before = [stem, *widths]
        for number, (width, count) in enumerate(zip(widths, depths, strict=True), 1):
            stage = [
                ConvModule(before[number - 1], width, 3, 2),
                CSPLayerWithTwoConv(width, width, count, residual=True),
            ]
            stage += [SPPFBottleneck(width)] if number == len(widths) else []
            self.add_module(f"stage{number}", nn.Sequential(*stage))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for number in range(1, 5):
            maps.append(self.get_submodule(f"stage{number}")(maps[-1]))
        return maps[2:]


class YOLOWorldPAFPN(nn.Module):
    """Down and up again; ``reduce_layers`` and ``out_layers`` are identities."""

    def __init__(self, widths: list[int], count: int) -> None:
        super().__init__()
        low, middle, high = widths
        self.reduce_layers = nn.ModuleList(nn.Identity() for _ in widths)
        self.upsample_layers = nn.ModuleList(nn.Upsample(scale_factor=2, mode="nearest") for _ in range(2))
        self.top_down_layers = nn.ModuleList(
            [
                MaxSigmoidCSPLayerWithTwoConv(high + middle, middle, count),
                MaxSigmoidCSPLayerWithTwoConv(middle + low, low, count),
            ]
        )
        self.downsample_layers = nn.ModuleList([ConvModule(low, low, 3, 2), ConvModule(middle, middle, 3, 2)])
        self.bottom_up_layers = nn.ModuleList(
            [
                MaxSigmoidCSPLayerWithTwoConv(low + middle, middle, count),
                MaxSigmoidCSPLayerWithTwoConv(middle + high, high, count),
            ]
        )
        self.out_layers = nn.ModuleList(nn.Identity() for _ in widths)

    def forward(self, maps: list[Tensor], texts: Tensor) -> list[Tensor]:
        low, middle, high = (layer(x) for layer, x in zip(self.reduce_layers, maps, strict=True))
        middle = self.top_down_layers[0](torch.cat([self.upsample_layers[0](high), middle], 1), texts)
        low = self.top_down_layers[1](torch.cat([self.upsample_layers[1](middle), low], 1), texts)
        middle = self.bottom_up_layers[0](torch.cat([self.downsample_layers[0](low), middle], 1), texts)
        high = self.bottom_up_layers[1](torch.cat([self.downsample_layers[1](middle), high], 1), texts)
        return [layer(x) for layer, x in zip(self.out_layers, (low, middle, high), strict=True)]


class BNContrastiveHead(nn.Module):
    """Similarity of each pixel's embedding to each text."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(TEXT_WIDTH, eps=0.001, momentum=0.03)
        self.bias = nn.Parameter(torch.zeros([]))
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def forward(self, embeddings: Tensor, texts: Tensor) -> Tensor:
        similar = torch.einsum("bchw,bnc->bnhw", self.norm(embeddings), F.normalize(texts, dim=-1))
        return similar * self.logit_scale.exp() + self.bias


class YOLOWorldHeadModule(nn.Module):
    """For each scale the texts' logits and the bins of the four distances."""

    def __init__(self, widths: list[int], class_count: int) -> None:
        super().__init__()
        sides, inner = max(16, widths[0] // 4, 4 * BINS), max(widths[0], class_count)
        self.cls_preds = nn.ModuleList(_branch(width, inner, TEXT_WIDTH) for width in widths)
        self.reg_preds = nn.ModuleList(_branch(width, sides, 4 * BINS) for width in widths)
        self.cls_contrasts = nn.ModuleList(BNContrastiveHead() for _ in widths)
        self.register_buffer("proj", torch.arange(float(BINS)), persistent=False)

    def forward(self, maps: list[Tensor], texts: Tensor) -> list[tuple[Tensor, Tensor]]:
        branches = zip(maps, self.cls_preds, self.reg_preds, self.cls_contrasts, strict=True)
        return [(contrast(cls(x), texts), reg(x)) for x, cls, reg, contrast in branches]


def _branch(inputs: int, inner: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvModule(inputs, inner, 3), ConvModule(inner, inner, 3), nn.Conv2d(inner, outputs, 1))


class WorldImagePart(nn.Module):
    """YOLO-World-v2 without its text encoder: text features are given, or are the random ones in ``texts``.

    Args:
        scale: ``n`` or ``l``.
        class_count: number of texts.
    """

    def __init__(self, scale: str = "l", class_count: int = 4) -> None:
        super().__init__()
        deepen, widen, last = {"n": (0.33, 0.25, 1024), "l": (1.0, 1.0, 512)}[scale]
        widths = [int(width * widen) for width in (128, 256, 512, last)]
        depths = [max(1, round(count * deepen)) for count in (3, 6, 6, 3)]
        self.backbone = nn.Module()
        self.backbone.image_model = YOLOv8CSPDarknet(int(64 * widen), widths, depths)
        self.neck = YOLOWorldPAFPN(widths[1:], depths[0])
        self.bbox_head = nn.Module()
        self.bbox_head.head_module = YOLOWorldHeadModule(widths[1:], class_count)
        self.texts = torch.randn(1, class_count, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))

    def forward(self, images: Tensor, texts: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return logits ``(N, classes, H, W)`` and distances ``(N, 64, H, W)`` for strides 8, 16 and 32."""
        texts = (self.texts if texts is None else texts).to(images).expand(len(images), -1, -1)
        return self.bbox_head.head_module(self.neck(self.backbone.image_model(images), texts), texts)


_PARTS = {
    "backbone.image_model.stem": "model.0",
    "backbone.image_model.stage1.0": "model.1",
    "backbone.image_model.stage1.1": "model.2",
    "backbone.image_model.stage2.0": "model.3",
    "backbone.image_model.stage2.1": "model.4",
    "backbone.image_model.stage3.0": "model.5",
    "backbone.image_model.stage3.1": "model.6",
    "backbone.image_model.stage4.0": "model.7",
    "backbone.image_model.stage4.1": "model.8",
    "backbone.image_model.stage4.2": "model.9",
    "neck.top_down_layers.0": "model.12",
    "neck.top_down_layers.1": "model.15",
    "neck.downsample_layers.0": "model.16",
    "neck.bottom_up_layers.0": "model.18",
    "neck.downsample_layers.1": "model.19",
    "neck.bottom_up_layers.1": "model.21",
    "bbox_head.head_module.cls_preds": "model.22.cv3",
    "bbox_head.head_module.reg_preds": "model.22.cv2",
    "bbox_head.head_module.cls_contrasts": "model.22.cv4",
}
_INSIDE = {
    "main_conv": "cv1",
    "final_conv": "cv2",
    "blocks": "m",
    "conv1": "cv1",
    "conv2": "cv2",
    "attn_block": "attn",
    "guide_fc": "gl",
    "project_conv": "proj_conv",
}


def ultralytics_name(name: str) -> str:
    """Return the name of the same module or tensor in ultralytics' YOLO-World-v2."""
    part = next(part for part in _PARTS if name == part or name.startswith(part + "."))
    rest = name[len(part) :].split(".")
    return _PARTS[part] + ".".join(_INSIDE.get(step, step) for step in rest)


def copy_values(skeleton: WorldImagePart, model: nn.Module) -> None:
    """Give the skeleton the tensors of an ultralytics model of the same scale, and its text features, in place."""
    theirs = model.state_dict()
    values = {key: theirs[ultralytics_name(key)].reshape(own.shape) for key, own in skeleton.state_dict().items()}
    skeleton.load_state_dict(values)
    skeleton.texts = model.txt_feats
