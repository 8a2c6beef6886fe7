"""More small image classifiers, each of another build, so that what is learned on some can be tried on others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoprune.errors import ConfigError
from autoprune.tasks.zoo.arguments import positive
from autoprune.tasks.zoo.mobilenet import InvertedResidual
from autoprune.tasks.zoo.small import conv_norm_relu, given_widths


def depthwise_cnn(in_channels: int, classes: int, widths: Sequence[int] = (32, 64, 128)) -> nn.Sequential:
    """After MobileNet (Howard et al. 2017): a stem, then a 3x3 depthwise and a 1x1 convolution a width.

    Each width after the first halves the map. (N, in_channels, H, W) -> logits (N, classes).
    """
    widths = given_widths(widths)
    layers: list[nn.Module] = [conv_norm_relu(in_channels, widths[0])]
    before = widths[0]
    for stage, width in enumerate(widths):
        depthwise = nn.Conv2d(before, before, 3, 2 if stage > 0 else 1, 1, groups=before, bias=False)
        pointwise = nn.Conv2d(before, width, 1, bias=False)
        layers += [depthwise, nn.BatchNorm2d(before), nn.ReLU(), pointwise, nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def inverted_cnn(
    in_channels: int, classes: int, widths: Sequence[int] = (16, 24, 40), blocks: int = 1, expansion: int = 4
) -> nn.Sequential:
    """Inverted residuals (Sandler et al. 2018): `blocks` a width, each width after the first halves the map.

    (N, in_channels, H, W) -> logits (N, classes).
    """
    widths = given_widths(widths)
    positive("blocks and expansion", blocks, expansion)
    layers: list[nn.Module] = [conv_norm_relu(in_channels, widths[0])]
    before = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(InvertedResidual(before, width, 2 if stage > 0 and block == 0 else 1, expansion))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def vgg(
    in_channels: int, classes: int, widths: Sequence[int] = (16, 32, 64), hidden: int = 128, size: int = 32
) -> nn.Sequential:
    """After VGG (Simonyan and Zisserman 2015): two 3x3 convolutions and a max pooling a width, then a hidden layer.

    (N, in_channels, size, size) -> logits (N, classes).
    """
    widths = given_widths(widths)
    positive("hidden", hidden)
    side = size >> len(widths)
    if side < 1:
        raise ConfigError(f"vgg halves the image at each width: {len(widths)} are too many for a side of {size}.")
    layers: list[nn.Module] = []
    before = in_channels
    for width in widths:
        layers += [conv_norm_relu(before, width), conv_norm_relu(width, width), nn.MaxPool2d(2)]
        before = width
    head = [nn.Flatten(), nn.Linear(before * side * side, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    return nn.Sequential(*layers, *head)


class _Inception(nn.Module):
    """A 1x1, a 3x3 and a 5x5 (two 3x3) convolution side by side (Szegedy et al. 2016). Each gives a third or so."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        small, large = out_channels - 2 * (out_channels // 3), out_channels // 3
        self.one = conv_norm_relu(in_channels, small, stride, kernel=1)
        self.three = nn.Sequential(conv_norm_relu(in_channels, large, kernel=1), conv_norm_relu(large, large, stride))
        self.five = nn.Sequential(
            conv_norm_relu(in_channels, large, kernel=1),
            conv_norm_relu(large, large),
            conv_norm_relu(large, large, stride),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x)], dim=1)


def inception(in_channels: int, classes: int, widths: Sequence[int] = (24, 48, 96)) -> nn.Sequential:
    """A stem, then branches side by side a width; each width after the first halves the map.

    (N, in_channels, H, W) -> logits (N, classes).
    """
    widths = given_widths(widths)
    if min(widths) < 3:
        raise ConfigError(f"inception shares each width among three branches: 3 at least, not {min(widths)}.")
    layers: list[nn.Module] = [conv_norm_relu(in_channels, widths[0])]
    before = widths[0]
    for stage, width in enumerate(widths):
        layers.append(_Inception(before, width, 2 if stage > 0 else 1))
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class _MixerBlock(nn.Module):
    """Mixes tokens, then channels. (N, tokens, width) -> the same."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        y: Tensor = x + self.channels(self.norm2(x))
        return y


class _Mixer(nn.Module):
    def __init__(self, in_channels: int, classes: int, width: int, blocks: int, patch: int, size: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(_MixerBlock((size // patch) ** 2, width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)  # (N, tokens, width)
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


def mixer(
    in_channels: int, classes: int, width: int = 64, blocks: int = 2, patch: int = 4, size: int = 32
) -> nn.Module:
    """MLP-Mixer (Tolstikhin et al. 2021) of `patch` x `patch` pieces. (N, in_channels, size, size) -> (N, classes)."""
    positive("width, blocks and patch", width, blocks, patch)
    if size % patch:
        raise ConfigError(f"mixer: patch must divide the image's side, not patch={patch}, side={size}.")
    return _Mixer(in_channels, classes, width, blocks, patch, size)
