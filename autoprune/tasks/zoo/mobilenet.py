"""MobileNetV2 (Sandler et al. 2018): inverted residuals with depthwise convolutions and ReLU6."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from autoprune.tasks.zoo.initialise import he_

# (expansion, output channels, blocks, stride of the first)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, LAST = 32, 1280


class InvertedResidual(nn.Module):
    """Widen by a 1x1, filter each channel by a 3x3, narrow by a 1x1. (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * in_channels
        widen = [_conv_norm_relu6(in_channels, width, 1)] if expansion > 1 else []
        self.body = nn.Sequential(
            *widen,
            _conv_norm_relu6(width, width, 3, stride, groups=width),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = cast("Tensor", self.body(x))
        return x + y if self.adds else y


def mobilenet_v2(in_channels: int = 3, classes: int = 1000) -> nn.Sequential:
    """MobileNetV2 of width 1. (N, in_channels, 224, 224), or any other size -> logits (N, classes)."""
    layers: list[nn.Module] = [_conv_norm_relu6(in_channels, STEM, 3, 2)]
    width_in = STEM
    for expansion, width, blocks, stride in STAGES:
        for at in range(blocks):
            layers.append(InvertedResidual(width_in, width, stride if at == 0 else 1, expansion))
            width_in = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(LAST, classes)]
    return he_(nn.Sequential(*layers, _conv_norm_relu6(width_in, LAST, 1), *head))


def _conv_norm_relu6(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )
