"""What a packed layer is made of, and the group sizes it may have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autoprune.repack.lowering.weights import Weights
from autoprune.repack.weights.grouping import GROUP_SIZES, Grouping
from autoprune.repack.weights.packed import pack, pack_rows
from autoprune.repack.weights.quads import QUAD, WHOLE, cost_of

# What a kept weight costs in groups of this size, relative to the largest: smaller groups load more for each.
# A vector holds positions, or the filters of a group.
COST_BY_POSITION = {16: 1.0, 8: 1.0, 4: 1.08, 2: 1.6, 1: 2.4}
COST_BY_FILTER = {16: 1.0, 8: 1.4, 4: 2.8, 2: 5.0, 1: 8.0}
COST_OF_BYTES = {16: 1.0, 8: 1.0, 4: 1.1}  # by position
COST_OF_BYTES_BY_FILTER = {16: 1.0, 8: 1.6, 4: 3.0}
WORTH_TRYING = 1.35  # candidates up to this much dearer than the cheapest are timed


@dataclass(frozen=True)
class Layer:
    """What a packed layer is made of.

    Attributes:
        weight: dense, ``(out, in / groups, kh, kw)`` or ``(out, in)``, with its zeros.
        bias: ``(out,)`` or None.
        groups: of a grouped convolution.
        together: neighbouring filters that live or die together, so that only they share a packed group; 0: any may.
        scale: of each filter where the weight becomes bytes; neighbours share a packed group then.
        bf16: whether the weight, which holds bfloat16 numbers, is packed as such.
    """

    weight: Tensor
    bias: Tensor | None
    groups: int
    together: int = 0
    scale: Tensor | None = None
    bf16: bool = False

    @cached_property
    def grouping(self) -> Grouping:
        """Its filters in groups of each size."""
        return Grouping(self.weight, self.groups)

    def pack(self, size: int) -> Weights:
        """Its weights in groups of `size`; 0: in the largest that its zeros allow."""
        if self.scale is not None:
            rows = neighbours(len(self.weight), size or self.sizes()[0])
            return Weights.of(pack_rows(self.weight, self.groups, rows, self.scale), self.bias)
        if self.together:
            rows = np.arange(len(self.weight), dtype=np.int32).reshape(-1, size or self.sizes()[0])
            return Weights.of(pack_rows(self.weight, self.groups, rows), self.bias)
        packed = pack(self.weight, self.groups, size or None, self.grouping)
        return Weights.of(packed.to_bf16() if self.bf16 else packed, self.bias)

    def sizes(self, by_position: bool = False) -> list[int]:
        """Group sizes worth timing, the most promising first."""
        factors = COST_BY_POSITION if by_position else COST_BY_FILTER
        if self.scale is not None:
            factors = COST_OF_BYTES if by_position else COST_OF_BYTES_BY_FILTER
            cost = {size: self._cells[size] * factors[size] for size in self._cells}
        elif self.together:
            fitting = [size for size in GROUP_SIZES if len(self.weight) % size == 0 and size <= max(4, self.together)]
            cost = {size: self.neighbours_density(size) * factors[size] for size in fitting}
        else:
            cost = {size: self.grouping.density(size) * factors[size] for size in GROUP_SIZES}
        best = min(cost.values())
        return sorted((size for size in cost if cost[size] <= best * WORTH_TRYING + 1e-9), key=cost.__getitem__)

    @cached_property
    def _cells(self) -> dict[int, float]:
        """Of bytes: group sizes that fill their lanes -> what groups of that size take, in cells of a filter.

        The last group of a Linear need not be full.
        """
        filters = -(-len(self.weight) // QUAD) * QUAD if self.groups == 1 else len(self.weight) // self.groups
        fitting = [size for size in COST_OF_BYTES if filters % size == 0 or self.weight.ndim == 2]
        kept = self.weight.numpy() != 0
        return {size: size * min(cost_of(kept, size, whole) for whole in WHOLE) for size in fitting}

    def density(self, size: int) -> float:
        """What groups of `size` take, as a share of the dense layer; 0 where there are none of the size."""
        if self.scale is None:
            return self.grouping.density(size)
        dense = self.weight.numel() / QUAD
        return self._cells.get(size, 0.0) / dense

    def neighbours_density(self, size: int) -> float:
        """What is stored where neighbours share a group, as a share of the weight."""
        alive = (self.weight.reshape(len(self.weight) // size, size, -1) != 0).any(dim=1)
        return float(alive.double().mean())


def neighbours(filters: int, size: int) -> NDArray[np.int32]:
    """Filters in order, `size` to a group; -1 behind the last."""
    rows = np.full(-(-filters // size) * size, -1, np.int32)
    rows[:filters] = np.arange(filters)
    return rows.reshape(-1, size)
