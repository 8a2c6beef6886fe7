"""Reshapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from torch import Tensor

from autoprune.repack.graph import aten
from autoprune.repack.graph.bundles import Bundles, ChannelAxis
from autoprune.repack.graph.ops import batch_rules
from autoprune.repack.graph.ops.attributes import is_shape
from autoprune.repack.graph.ops.base import BatchRule, Op, Values


@dataclass(frozen=True, kw_only=True)
class Reshape(Op):
    """The same elements in the same order, in another shape.

    Attributes:
        shape: integers, ``{"ref": name}`` of a `Scalar`, and at most one -1 for what follows from the rest.
    """

    kind = "reshape"
    picks = True

    shape: Annotated[tuple[Any, ...], is_shape]

    @property
    def reads(self) -> tuple[str, ...]:
        """Its input, and the integers in its shape."""
        return tuple(dict.fromkeys([*self.inputs, *aten.references(self.shape)]))

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        reshaped: Tensor = x[0].reshape(aten.decode(self.shape, values))
        return reshaped

    def with_input(self, old: str, new: str) -> Op:
        inputs = tuple(new if name == old else name for name in self.inputs)
        return replace(self, inputs=inputs, shape=tuple(aten.renamed(self.shape, old, new)))

    def batch_rule(self) -> BatchRule:
        return batch_rules.refolded

    def tie_channels(self, bundles: Bundles) -> None:
        """Flattening a map, folding its positions another way, or joining axes before the last."""
        axis = bundles.axes.get(self.inputs[0])
        before, after = bundles.shapes[self.inputs[0]], bundles.shapes[self.output]
        flat = axis is not None and axis.is_map and after == (before[0], math.prod(before[1:]))
        alike = before[:2] == after[:2] and len(after) > 2
        folded = axis is not None and axis.is_map and alike and self.shape[1] == len(axis.constant)
        same = axis is not None and not axis.is_map and after[-1:] == before[-1:] and type(self.shape[-1]) is int
        if axis is None or not (flat or folded or same):
            super().tie_channels(bundles)
            return
        axis = replace(axis, is_map=False, span=math.prod(before[2:])) if flat else axis
        bundles.tie(self.output, axis, *self.inputs)

    def with_channels(self, left: int, axis: ChannelAxis) -> Op:
        if axis.is_map:
            return replace(self, shape=(self.shape[0], left, *self.shape[2:]))
        return self if self.shape[-1] == -1 else replace(self, shape=(*self.shape[:-1], left * axis.span))
