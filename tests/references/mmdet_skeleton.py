"""mmdet's YOLOX and RTMDet as module trees of the same names and shapes, without a forward that runs.

mmdet needs compiled packages that pip does not install beside a current torch. These are the names and the sizes of its
configurations ``yolox_s_8xb8-300e_coco.py`` and ``rtmdet_tiny_8xb32-300e_coco.py``, read in mmdetection's ``csp_darknet.py``,
``yolox_pafpn.py`` and ``yolox_head.py``; nothing of their code is here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .mmyolo_skeleton import ConvModule


def _csp(inputs: int, outputs: int, count: int) -> nn.Module:
    block, middle = nn.Module(), outputs // 2
    block.main_conv, block.short_conv = ConvModule(inputs, middle), ConvModule(inputs, middle)
    block.final_conv = ConvModule(2 * middle, outputs)
    block.blocks = nn.ModuleList(_bottleneck(middle) for _ in range(count))
    return block


def _bottleneck(width: int) -> nn.Module:
    block = nn.Module()
    block.conv1, block.conv2 = ConvModule(width, width), ConvModule(width, width, 3)
    return block


def _pafpn(widths: list[int], out: int, count: int) -> nn.Module:
    low, middle, high = widths
    neck = nn.Module()
    neck.reduce_layers = nn.ModuleList([ConvModule(high, middle), ConvModule(middle, low)])
    neck.top_down_blocks = nn.ModuleList([_csp(2 * middle, middle, count), _csp(2 * low, low, count)])
    neck.downsamples = nn.ModuleList([ConvModule(low, low, 3, 2), ConvModule(middle, middle, 3, 2)])
    neck.bottom_up_blocks = nn.ModuleList([_csp(2 * low, middle, count), _csp(2 * middle, high, count)])
    neck.out_convs = nn.ModuleList(ConvModule(width, out) for width in widths)
    return neck


def yolox_s(class_count: int = 4) -> nn.Module:
    """Return the module tree of mmdet's YOLOX-s."""
    widths = [64, 128, 256, 512]
    backbone = nn.Module()
    backbone.stem = nn.Module()
    backbone.stem.conv = ConvModule(12, 32, 3)
    for number, (inputs, width, count) in enumerate(zip([32, *widths], widths, (1, 3, 3, 1), strict=False), 1):
        stage = [ConvModule(inputs, width, 3, 2), _csp(width, width, count)]
        if number == 4:
            pool: Any = nn.Module()
            pool.conv1, pool.conv2 = ConvModule(width, width // 2), ConvModule(2 * width, width)
            stage.insert(1, pool)
        backbone.add_module(f"stage{number}", nn.Sequential(*stage))
    head: Any = nn.Module()
    for branch in ("cls", "reg"):
        towers = (nn.Sequential(ConvModule(128, 128, 3), ConvModule(128, 128, 3)) for _ in range(3))
        head.add_module(f"multi_level_{branch}_convs", nn.ModuleList(towers))
    for name, channels in (("cls", class_count), ("reg", 4), ("obj", 1)):
        head.add_module(f"multi_level_conv_{name}", nn.ModuleList(nn.Conv2d(128, channels, 1) for _ in range(3)))
    model = nn.Module()
    model.backbone, model.neck, model.bbox_head = backbone, _pafpn(widths[1:], 128, 1), head
    return model


def rtmdet_named(model: nn.Module) -> nn.Module:
    """Return libreyolo's RTMDet, whose parts have mmdet's names, under mmdet's name for the head."""
    named = nn.Module()
    named.backbone, named.neck, named.bbox_head = model.backbone, model.neck, model.head
    return named
