"""Residual networks (He et al. 2016): ResNet-18 and -50 for large images, ResNet-20 for small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn

from autoprune.tasks.zoo.initialise import he_
from autoprune.tasks.zoo.small import BasicBlock, residual_cnn

WIDTHS = (64, 128, 256, 512)
Block = Callable[[int, int, int], nn.Module]  # (in channels, width, stride)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution around a shortcut. (N, in, H, W) -> (N, 4 width, H/s, W/s)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.relu3 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm3(self.conv3(self.relu2(self.norm2(self.conv2(y)))))
        return cast("Tensor", self.relu3(y + self.shortcut(x)))


def resnet18(in_channels: int = 3, classes: int = 1000) -> nn.Sequential:
    """ResNet-18. (N, in_channels, 224, 224), or any other size -> logits (N, classes)."""
    return _resnet(BasicBlock, 1, (2, 2, 2, 2), in_channels, classes)


def resnet50(in_channels: int = 3, classes: int = 1000) -> nn.Sequential:
    """ResNet-50. (N, in_channels, 224, 224), or any other size -> logits (N, classes)."""
    return _resnet(Bottleneck, Bottleneck.expansion, (3, 4, 6, 3), in_channels, classes)


def resnet20(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """ResNet-20 for CIFAR. (N, in_channels, 32, 32), or any other size -> logits (N, classes)."""
    return he_(residual_cnn(in_channels, classes, widths=(16, 32, 64), blocks=3))


def _resnet(block: Block, expansion: int, depths: Sequence[int], in_channels: int, classes: int) -> nn.Sequential:
    """A 7x7 stem, a max pool, and `depths` blocks a width; each width after the first halves the map."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, WIDTHS[0], 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(WIDTHS[0]),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    width_in = WIDTHS[0]
    for stage, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
        for at in range(depth):
            layers.append(block(width_in, width, 2 if stage > 0 and at == 0 else 1))
            width_in = expansion * width
    return he_(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, classes)))
