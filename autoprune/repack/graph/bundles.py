"""Bundles: values whose channels are the same ones, as far as the operations of a graph have told.

What lies between such values works on each channel by itself (activation, pooling, depthwise convolution) or adds them
up. An operation tells by `Op.tie_channels`; what may be removed of a bundle is decided in `channels`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from autoprune.repack.graph.activations import activate


@dataclass(frozen=True)
class ChannelAxis:
    """The channels of one value.

    Attributes:
        is_map: whether they lie on axis 1, before the positions of a map; on the last axis otherwise.
        span: features of one channel on the last axis: more than one where a map was flattened.
        constant: ``(channels,)``: what a channel holds everywhere, NaN where it varies.
    """

    is_map: bool
    span: int
    constant: Tensor

    def fits(self, other: ChannelAxis) -> bool:
        return (self.is_map, self.span, len(self.constant)) == (other.is_map, other.span, len(other.constant))

    def activated(self, name: str | None) -> ChannelAxis:
        """The channels behind an activation."""
        constant = activate(self.constant.nan_to_num(), name).masked_fill(self.constant.isnan(), math.nan)
        return replace(self, constant=constant)


class Bundles:
    """What the operations seen so far have told, in the order they run.

    Attributes:
        shapes: of every value.
        constants: weights, by name.
        axes: value -> its channels, where they are known.
        barred: values that need every channel.
        writers: layers whose filters are the channels of a bundle, by what they define.
        readers: layers that multiply the channels of a bundle, by what they define.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], constants: Mapping[str, Tensor]) -> None:
        self.shapes, self.constants = shapes, constants
        self.axes: dict[str, ChannelAxis] = {}
        self.barred: set[str] = set()
        self.writers: list[str] = []
        self.readers: list[str] = []
        self._parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        """The value that stands for the bundle of `name`."""
        while name in self._parent:
            name = self._parent[name]
        return name

    def tie(self, output: str, axis: ChannelAxis, *sources: str) -> None:
        """Gives a value an axis, whose channels are those of `sources`."""
        self.axes[output] = axis
        for name in sources:
            if self.root(name) != self.root(output):
                self._parent[self.root(name)] = self.root(output)

    def bar(self, *names: str) -> None:
        """Keeps every channel of these values."""
        self.barred.update(names)

    def tie_layer(
        self, output: str, axis: ChannelAxis, residuals: tuple[str, ...], activation: str | None, *tied: str
    ) -> None:
        """A layer's output, from `axis` before its residual and activation; its channels are those of `tied` too."""
        constant = axis.constant
        for name in residuals:
            other = self.axes.get(name)
            if other is None or not other.fits(axis):
                self.axes[output] = axis
                self.bar(output, name)
            else:
                constant = constant + other.constant
        self.tie(output, replace(axis, constant=constant).activated(activation), *tied, *residuals)

    def closed(self) -> set[str]:
        """The bundles that may lose channels, each by its root."""
        return {self.root(name) for name in self.axes} - {self.root(name) for name in self.barred}
