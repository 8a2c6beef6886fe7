"""Layers: the operations that have a weight which is packed."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph.activations import activate
from autoprune.repack.graph.bundles import Bundles, ChannelAxis
from autoprune.repack.graph.ops.attributes import Fused, OptionalText
from autoprune.repack.graph.ops.base import Op, Values


@dataclass(frozen=True, kw_only=True)
class LayerOp(Op):
    """An operation whose weight is packed: ``(filters, ...)``, with a bias of ``(filters,)`` or without.

    Of an int8 layer the weight holds whole multiples, -127 to 127, of each filter's scale; what it meets is on a grid.

    Attributes:
        layer: the qualified name of the module it came from; None for what a pass made.
    """

    layer: OptionalText = None

    @property
    def layer_or_output(self) -> str:
        """The module's name, which is empty where that is the whole model; the output's where a pass made the layer."""
        return self.output if self.layer is None else self.layer

    @property
    def conv_groups(self) -> int:
        """Groups of a convolution; 1 of any other layer."""
        return 1

    @property
    def in_bf16(self) -> bool:
        """Whether it multiplies bfloat16 numbers: its weight holds such, and its input is rounded to them."""
        return False

    @property
    def residual(self) -> str | None:
        """The value that it adds to its result."""
        return None

    def met(self, values: Values) -> Tensor:
        """What its weight is multiplied by, given the values of the graph, its output among them."""
        x: Tensor = values[self.inputs[0]]
        return x

    @abstractmethod
    def positions(self, shape: Sequence[int]) -> int:
        """How often it meets its weight where its output has `shape`."""

    def check(self, constants: Mapping[str, Tensor]) -> None:
        super().check(constants)
        weight = constants[self.tensors["weight"]]
        bias = constants[self.tensors["bias"]] if "bias" in self.tensors else None
        fits = bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)
        if min(weight.shape) < 1 or not fits:
            raise FileError(f"{self} has a weight of shape {tuple(weight.shape)} and a bias that does not fit it.")
        if "scale" in self.tensors and constants[self.tensors["scale"]].shape != weight.shape[:1]:
            raise FileError(f"{self} has a weight of shape {tuple(weight.shape)} and scales that do not fit it.")
        if weight.shape[0] % self.conv_groups:
            raise FileError(f"{self} has {weight.shape[0]} filters in {self.conv_groups} groups.")


@dataclass(frozen=True, kw_only=True)
class FusedLayerOp(LayerOp):
    """A layer that may add a residual to its result, and applies an activation to the sum.

    Attributes:
        inputs: its input, and the residual where there is one.
        activation: a name of `ACTIVATIONS`, or None.
    """

    activation: Fused

    @property
    def residual(self) -> str | None:
        return self.inputs[1] if len(self.inputs) > 1 else None

    @property
    def is_fused(self) -> bool:
        """Whether it has a residual or an activation."""
        return self.activation is not None or self.residual is not None

    @property
    def last_activation(self) -> str | None:
        return self.activation

    def multiplied(self, x: Tensor) -> Tensor:
        """What its weight meets of an input: rounded where it multiplies bfloat16 numbers."""
        return x.to(torch.bfloat16).to(x.dtype) if self.in_bf16 else x

    def finished(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """The output, given the weighted sums."""
        return activate(y if residual is None else y + residual, self.activation)

    def tie_filters(self, bundles: Bundles, is_map: bool) -> None:
        """Reads the channels of its input, and makes channels of its own: a filter each."""
        weight = bundles.constants[self.tensors["weight"]]
        read = bundles.axes.get(self.inputs[0])
        if read is None or read.is_map != is_map:
            bundles.bar(self.inputs[0])
        else:
            bundles.readers.append(self.output)
        varies = weight.flatten(1).any(dim=1)
        bundles.writers.append(self.output)
        axis = ChannelAxis(is_map, 1, self.bias_in(bundles).masked_fill(varies, math.nan))
        bundles.tie_layer(self.output, axis, self.inputs[1:], self.activation)

    def bias_in(self, bundles: Bundles) -> Tensor:
        """Its bias, zeros without one."""
        weight = bundles.constants[self.tensors["weight"]]
        if "bias" in self.tensors:
            return bundles.constants[self.tensors["bias"]]
        return torch.zeros(len(weight), dtype=weight.dtype)
