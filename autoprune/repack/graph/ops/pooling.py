"""Poolings of maps ``(batch, channels, height, width)``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph.bundles import Bundles
from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import Flag, Key, Padding, Pair, Window, integer, optional, pair
from autoprune.repack.graph.ops.base import BatchRule, Op, Values


@dataclass(frozen=True, kw_only=True)
class PoolOp(Op):
    """An operation on each channel of a map by itself."""

    def batch_rule(self) -> BatchRule:
        return batch_rules.first

    def tie_channels(self, bundles: Bundles) -> None:
        """A window over a constant gives the constant."""
        axis = bundles.axes.get(self.inputs[0])
        if axis is None or not axis.is_map:
            super().tie_channels(bundles)
        else:
            bundles.tie(self.output, axis, *self.inputs)


@dataclass(frozen=True, kw_only=True)
class WindowPoolOp(PoolOp):
    """A pooling by a window that slides.

    Attributes:
        ceil_mode: whether a last window may reach beyond the border.
    """

    kernel: Window
    stride: Window
    padding: Padding
    ceil_mode: Flag = False

    def check(self, constants: Mapping[str, Tensor]) -> None:
        super().check(constants)
        if any(2 * padding > kernel for kernel, padding in zip(self.kernel, self.padding, strict=True)):
            raise FileError(f"{self} pads more than half its kernel.")


@dataclass(frozen=True, kw_only=True)
class MaxPool2d(WindowPoolOp):
    """The largest of each window; the border is below everything."""

    kind = "max_pool2d"
    picks = True

    dilation: Window

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return F.max_pool2d(x[0], self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)


@dataclass(frozen=True, kw_only=True)
class AvgPool2d(WindowPoolOp):
    """The mean of each window.

    Attributes:
        count_include_pad: whether the border's zeros count.
        divisor: what each sum is divided by, instead of how many count.
    """

    kind = "avg_pool2d"

    count_include_pad: Flag
    divisor: Annotated[int | None, optional(integer(1)), Key("divisor_override")] = None

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return F.avg_pool2d(
            x[0], self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor
        )

    def tie_channels(self, bundles: Bundles) -> None:
        """A window over a constant gives the constant, unless it averages zeros of the border in."""
        axis = bundles.axes.get(self.inputs[0])
        keeps = self.divisor is None and not (any(self.padding) and self.count_include_pad)
        if axis is None or not axis.is_map or keeps:
            super().tie_channels(bundles)
            return
        constant = axis.constant.masked_fill(axis.constant != 0, math.nan)
        bundles.tie(self.output, replace(axis, constant=constant), *self.inputs)


@dataclass(frozen=True, kw_only=True)
class AdaptiveAvgPool2d(PoolOp):
    """Means over as many windows as the output has positions.

    Attributes:
        size: (height, width) of the output.
    """

    kind = "adaptive_avg_pool2d"

    size: Annotated[Pair, pair(1), Key("output")]

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        extents = x[0].shape[-2:]
        if any(type(extent) is not int or extent % parts for extent, parts in zip(extents, self.size, strict=True)):
            return F.adaptive_avg_pool2d(x[0], self.size)
        kernel = [extent // parts for extent, parts in zip(extents, self.size, strict=True)]
        same: Tensor = x[0]
        return same if kernel == [1, 1] else F.avg_pool2d(same, kernel)


@dataclass(frozen=True, kw_only=True)
class GlobalAvgPool(PoolOp):
    """The mean of each channel: ``(batch, channels)``, or ``(batch, channels, 1, 1)`` with `keepdim`."""

    kind = "global_avg_pool"

    keepdim: Flag

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        mean: Tensor = x[0].mean((2, 3), keepdim=self.keepdim)
        return mean

    def tie_channels(self, bundles: Bundles) -> None:
        axis = bundles.axes.get(self.inputs[0])
        if axis is None or not axis.is_map:
            super().tie_channels(bundles)
        else:
            bundles.tie(self.output, replace(axis, is_map=self.keepdim), *self.inputs)
