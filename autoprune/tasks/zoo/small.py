"""Small image classifiers that train in minutes on a CPU.

Every convolution is followed by its own BatchNorm2d and its own ReLU module, so a tool that folds, fuses or
prunes finds one of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoprune.errors import ConfigError
from autoprune.tasks.zoo.arguments import positive


def given_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Raises ConfigError unless `widths` are positive integers, one at least."""
    if isinstance(widths, (str, bytes)) or not isinstance(widths, Sequence) or not widths:
        raise ConfigError(f"widths must be a list of positive integers such as [16, 32, 64], not {widths!r}.")
    positive("each of widths", *widths)
    return tuple(widths)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016). (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


def residual_cnn(
    in_channels: int, classes: int, widths: Sequence[int] = (16, 32, 64), blocks: int = 1
) -> nn.Sequential:
    """A CIFAR-style ResNet: a 3x3 stem, then `blocks` basic blocks a width; each width after the first halves the map.

    (N, in_channels, H, W) -> logits (N, classes).
    """
    widths = given_widths(widths)
    positive("blocks", blocks)
    layers: list[nn.Module] = [conv_norm_relu(in_channels, widths[0])]
    width_in = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(BasicBlock(width_in, width, stride=2 if stage > 0 and block == 0 else 1))
            width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, classes))


def conv_norm_relu(in_channels: int, out_channels: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def plain_cnn(in_channels: int, classes: int, widths: Sequence[int] = (16, 32, 64)) -> nn.Sequential:
    """A convolution a width, each after the first with stride 2. (N, in_channels, H, W) -> logits (N, classes)."""
    widths = given_widths(widths)
    pairs = zip((in_channels, *widths), widths, strict=False)
    layers = [conv_norm_relu(a, b, stride=2 if stage > 0 else 1) for stage, (a, b) in enumerate(pairs)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def lenet5(in_channels: int, classes: int, widths: Sequence[int] = (20, 50, 500), size: int = 28) -> nn.Sequential:
    """LeNet-5 as the pruning literature has it: 431,080 parameters at 1x28x28 (LeCun et al. 1998, Caffe's variant).

    Two 5x5 convolutions, each halved by max pooling, then a hidden layer. (N, in_channels, size, size) -> logits
    (N, classes).
    """
    widths = given_widths(widths)
    if len(widths) != 3 or size < 16:
        raise ConfigError(f"lenet5 takes three widths and images of 16x16 or more, not widths={widths}, size={size}.")
    first, second, hidden = widths
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, first, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(second * side * side, hidden), nn.ReLU(), nn.Linear(hidden, classes),
    )  # fmt: skip


def mlp(in_channels: int, classes: int, widths: Sequence[int] = (256, 128), size: int = 32) -> nn.Sequential:
    """A Linear and a ReLU a width. (N, in_channels, size, size) -> logits (N, classes)."""
    widths = given_widths(widths)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip((in_channels * size * size, *widths), widths, strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


class TinyTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) with mean pooling in place of a class token."""

    def __init__(
        self, in_channels: int, classes: int, width: int, blocks: int, heads: int, patch: int, size: int
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.randn((size // patch) ** 2, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position  # (N, tokens, width)
        logits: Tensor = self.head(self.norm(self.encoder(tokens)).mean(dim=1))
        return logits


def tiny_transformer(
    in_channels: int, classes: int, width: int = 64, blocks: int = 2, heads: int = 4, patch: int = 4, size: int = 32
) -> nn.Module:
    """Attention over `patch` x `patch` pieces of the image. (N, in_channels, size, size) -> logits (N, classes)."""
    positive("width, blocks, heads and patch", width, blocks, heads, patch)
    if width % heads or size % patch:
        raise ConfigError(
            f"tiny_transformer: heads must divide width and patch must divide the image's side, "
            f"not heads={heads}, width={width}, patch={patch}, side={size}."
        )
    return TinyTransformer(in_channels, classes, width, blocks, heads, patch, size)
