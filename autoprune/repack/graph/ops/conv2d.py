"""Convolutions, dense or gated channel by channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.errors import FileError
from autoprune.model.channel_gates import scaled
from autoprune.repack.graph.bundles import Bundles, ChannelAxis
from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import Flag, Padding, Size, Window, integer
from autoprune.repack.graph.ops.base import BatchRule, Op, Roles, Values
from autoprune.repack.graph.ops.layer import FusedLayerOp


@dataclass(frozen=True, kw_only=True)
class ConvolutionOp(FusedLayerOp):
    """A 2d convolution. Maps ``(batch, channels, height, width)``, weight ``(filters, channels / groups, h, w)``."""

    roles: ClassVar[Roles] = {"weight": (4, True), "bias": (1, False), "scale": (1, False)}

    stride: Window
    padding: Padding
    dilation: Window
    groups: Size

    @property
    def conv_groups(self) -> int:
        return self.groups

    def positions(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // shape[1]

    def batch_rule(self) -> BatchRule:
        return batch_rules.first

    def convolved(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """The weighted sums."""
        return F.conv2d(x, w["weight"], w.get("bias"), self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True, kw_only=True)
class Conv2d(ConvolutionOp):
    """A convolution of every channel.

    Attributes:
        bf16: whether it multiplies bfloat16 numbers.
    """

    kind = "conv2d"
    operands = (1, 2)

    bf16: Flag = False

    @property
    def in_bf16(self) -> bool:
        return self.bf16

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return self.finished(self.convolved(self.multiplied(x[0]), w), x[1] if len(x) > 1 else None)

    def tie_channels(self, bundles: Bundles) -> None:
        if self.groups == 1:
            self.tie_filters(bundles, is_map=True)
        else:
            self._tie_depthwise(bundles)

    def with_channels(self, left: int, axis: ChannelAxis) -> Op:
        return replace(self, groups=left) if self.groups > 1 else self

    def _tie_depthwise(self, bundles: Bundles) -> None:
        """Each channel is filtered by itself; padding shows unless the channel is zero."""
        weight, axis = bundles.constants[self.tensors["weight"]], bundles.axes.get(self.inputs[0])
        if axis is None or not axis.is_map or weight.shape[1] != 1 or self.groups != len(weight):
            bundles.bar(self.output, *self.inputs)
            return
        total = weight.flatten(1).sum(dim=1)
        silent = ~weight.flatten(1).any(dim=1) | (axis.constant == 0)
        constant = axis.constant * (math.nan if any(self.padding) else total)
        axis = replace(axis, constant=constant.masked_fill(silent, 0.0) + self.bias_in(bundles))
        bundles.tie_layer(self.output, axis, self.inputs[1:], self.activation, self.inputs[0])


@dataclass(frozen=True, kw_only=True)
class GatedConv2d(ConvolutionOp):
    """A convolution whose channels are scaled by gates, those at zero left out.

    Attributes:
        inputs: its input; the factors of its filters where there is a `gate`; those of its input's channels where it
            is `live`; and the residual where there is one.
        gate: whether its filters are scaled.
        live: whether channels of its input whose factor is zero are zero, so that they need not be read.
    """

    kind = "gated_conv2d"
    operands = (2, 4)
    roles: ClassVar[Roles] = {"weight": (4, True), "bias": (1, False)}

    groups: Annotated[int, integer(1, 1)]
    gate: Flag
    live: Flag

    @classmethod
    def of(cls, conv: ConvolutionOp, output: str, inputs: tuple[str, ...], *, gate: bool, live: bool) -> GatedConv2d:
        """A convolution with gates: its weights and attributes, other inputs."""
        return cls(
            output, inputs, conv.tensors, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
            groups=conv.groups, activation=conv.activation, layer=conv.layer, gate=gate, live=live,
        )  # fmt: skip

    @property
    def residual(self) -> str | None:
        operands = 1 + self.gate + self.live
        return self.inputs[operands] if len(self.inputs) > operands else None

    @property
    def filter_factors(self) -> str | None:
        """The value that scales its filters."""
        return self.inputs[1] if self.gate else None

    @property
    def channel_factors(self) -> str | None:
        """The value that tells which channels of its input are zero."""
        return self.inputs[1 + self.gate] if self.live else None

    def check(self, constants: Mapping[str, Tensor]) -> None:
        super().check(constants)
        operands = 1 + self.gate + self.live
        if operands == 1 or len(self.inputs) not in (operands, operands + 1):
            raise FileError(f"{self} has {len(self.inputs)} inputs.")

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        given, rest = x[0], list(x[1:])
        factors = rest.pop(0) if self.gate else None
        if self.live:
            silent = scaled(torch.ones_like(given[:, :, :1, :1]), rest.pop(0)) == 0
            given = given.masked_fill(silent, 0.0)
        y = self.convolved(given, w)
        return self.finished(y if factors is None else scaled(y, factors), rest[0] if rest else None)
