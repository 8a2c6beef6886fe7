"""Operations an element at a time, on any shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autoprune.repack.graph.activations import activate
from autoprune.repack.graph.bundles import Bundles
from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import Fused, Named
from autoprune.repack.graph.ops.base import BatchRule, Op, Values


@dataclass(frozen=True, kw_only=True)
class ElementwiseOp(Op):
    """A sum of its inputs, which have one shape, and an activation of it."""

    def batch_rule(self) -> BatchRule:
        return batch_rules.aligned

    def tie_channels(self, bundles: Bundles) -> None:
        axes = [bundles.axes.get(name) for name in self.inputs]
        first = axes[0]
        if first is None or not all(axis is not None and axis.fits(first) for axis in axes):
            super().tie_channels(bundles)
            return
        constant = torch.stack([axis.constant for axis in axes if axis is not None]).sum(dim=0)
        bundles.tie(self.output, replace(first, constant=constant).activated(self.last_activation), *self.inputs)


@dataclass(frozen=True, kw_only=True)
class Activation(ElementwiseOp):
    """An activation by itself.

    Attributes:
        name: of `ACTIVATIONS`.
    """

    kind = "activation"

    name: Named

    @property
    def last_activation(self) -> str:
        return self.name

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return activate(x[0], self.name)


@dataclass(frozen=True, kw_only=True)
class Add(ElementwiseOp):
    """The sum of two values of one shape, and an activation of it.

    Attributes:
        activation: a name of `ACTIVATIONS`, or None.
    """

    kind = "add"
    operands = (2, 2)

    activation: Fused

    @property
    def last_activation(self) -> str | None:
        return self.activation

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        return activate(x[0] + x[1], self.activation)
