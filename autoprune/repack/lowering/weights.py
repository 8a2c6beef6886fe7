"""A layer's packed weight as the kernels read it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.kernels.rows_gemm import Twin
from autoprune.repack.weights.grouping import GROUP_SIZES
from autoprune.repack.weights.packed import PackedWeight
from autoprune.repack.weights.pairs import paired
from autoprune.repack.weights.quads import QUAD, Quads, quads, row_sums

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
T = TypeVar("T")
ORDERS = 2  # as large as the weight: those of the whole batch and of a sample
BYTE_ORDERS = 3  # of each, where it is of bytes: its cells, and whole and mixed ones in blocks


@dataclass(frozen=True, eq=False)
class Weights:
    """Packed weight and bias.

    Attributes:
        packed: the weight, validated.
        bias: ``(out,)``.
    """

    packed: PackedWeight
    bias: Floats
    _orders: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, packed: PackedWeight, bias: Tensor | None) -> Weights:
        """Takes a layer's own bias; zeros where it has none."""
        zeros = np.zeros(packed.shape[0], np.float32)
        if bias is not None and tuple(bias.shape) != packed.shape[:1]:
            raise FileError(f"a bias has shape {tuple(bias.shape)}, not {packed.shape[:1]}.")
        if (packed.out_index[:, 0] < 0).any():
            raise FileError("a packed group begins with a row that has no filter.")
        return cls(packed, zeros if bias is None else np.ascontiguousarray(bias.detach().numpy(), np.float32))

    def ordered(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, remembered for the last keys: plans for inputs of other shapes share it."""
        made: T = self._orders.get(key) or make()
        if key not in self._orders:
            most = ORDERS if self.packed.scale is None else ORDERS * BYTE_ORDERS
            for old in list(self._orders)[: 1 - most]:
                self._orders.pop(old, None)
            self._orders[key] = made
        return made

    def quads(self, whole: int) -> Quads:
        """A weight of bytes in cells of four channels; see `weights.quads`."""
        return self.ordered(("quads", whole), lambda: quads(self.packed, whole))

    @cached_property
    def pairs(self) -> tuple[Ints, Ints, Ints]:
        """Of bfloat16 numbers: each group's first pair, the kept positions of pairs, ``(pairs, 2)``, their weights."""
        made = paired(np.diff(self.packed.group_pointer).astype(np.int64))
        pointer = np.concatenate([[0], made.counts.cumsum()]).astype(np.int32)
        return pointer, np.ascontiguousarray(self.packed.index[made.places]), made.values(self.packed.halves)

    @cached_property
    def fills_lanes(self) -> bool:
        """Whether four rows of a group are the filters of one lane, in order, those without a filter at the end."""
        fours = self.packed.out_index.reshape(-1, QUAD)
        wanted = fours[:, :1] + np.arange(QUAD)
        first = (fours[:, 0] % QUAD == 0) | (fours < 0).all(axis=1)
        return bool(((fours == wanted) | (fours < 0)).all() and first.all())

    @cached_property
    def row_sums(self) -> NDArray[np.int64]:
        """The sum of each row's weights, of bytes."""
        return row_sums(self.packed)

    @cached_property
    def largest_sum(self) -> int:
        """The largest sum of a row's magnitudes, of bytes."""
        return int(row_sums(replace(self.packed, values=np.abs(self.packed.values))).max(initial=0))

    @cached_property
    def fills_groups(self) -> bool:
        """Whether each row of each group has a filter, in groups of any size; live and dead ones are grouped apart."""
        packed, largest = self.packed, max(GROUP_SIZES)
        group = np.repeat(np.arange(packed.groups), np.diff(packed.group_pointer))
        live_rows = np.zeros(packed.out_index.shape, np.bool_)
        np.logical_or.at(live_rows, group, packed.values != 0)
        own = packed.shape[0] // packed.conv_groups
        live = np.bincount(packed.out_index[live_rows] // own, minlength=packed.conv_groups)
        return own % largest == 0 and not (live % largest).any() and not (packed.out_index < 0).any()

    @cached_property
    def rows(self) -> Ints:
        """The filter of each row, ``(groups * group_size,)``; a row without one repeats its group's first."""
        index = self.packed.out_index
        return np.where(index < 0, index[:, :1], index).ravel().astype(np.int32)

    @cached_property
    def bias_rows(self) -> Floats:
        """The bias of each row."""
        return np.ascontiguousarray(self.bias[self.rows])

    @cached_property
    def first(self) -> Ints:
        """A group's first filter where its filters are neighbours, else -1."""
        index = self.packed.out_index
        neighbours = (index == index[:, :1] + np.arange(index.shape[1])).all(axis=1)
        return np.where(neighbours, index[:, 0], -1).astype(np.int32)

    @cached_property
    def twin(self) -> Ints:
        """Which groups keep the same as a neighbour whose filters are the next ones, see `rows_gemm.Twin`."""
        kept = np.split(self.packed.index, self.packed.group_pointer[1:-1])
        found = np.full(self.packed.groups, Twin.NONE, np.int32)
        for group in range(self.packed.groups - 1):
            follows = self.first[group] >= 0 and self.first[group + 1] == self.first[group] + self.packed.group_size
            if follows and found[group] == Twin.NONE and np.array_equal(kept[group], kept[group + 1]):
                found[group : group + 2] = Twin.FIRST, Twin.SECOND
        return found

    @cached_property
    def by_column(self) -> tuple[Ints, Ints, Floats] | None:
        """The kept positions column by column: where each column's begin, first row of each one's group, values.

        None where a group's rows do not lie side by side.
        """
        if not bool((self.first >= 0).all()):
            return None
        packed = self.packed
        group = np.repeat(np.arange(packed.groups), np.diff(packed.group_pointer))
        order = np.argsort(packed.index, kind="stable")
        ends = np.cumsum(np.bincount(packed.index, minlength=packed.shape[1]))
        pointer = np.concatenate([[0], ends]).astype(np.int32)
        return pointer, self.first[group[order]], packed.values[order].astype(np.float32, copy=False)
