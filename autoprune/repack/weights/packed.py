"""The packed weight: only the kept positions, in the order a kernel reads them.

Filters lie in groups. The filters of a group share their kept positions, so a position is stored once a group, and its
values, one a filter, lie side by side: floats, bfloat16 numbers, or signed bytes and a scale for each filter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoprune.errors import FileError
from autoprune.quantization.grid import WEIGHT_LEVELS
from autoprune.repack.weights.alignment import on_cache_lines
from autoprune.repack.weights.grouping import GROUP_SIZES, Grouping
from autoprune.repack.weights.pairs import Halves, bits_of, from_bits, to_bf16

MAX_EXTENT = 2**31 - 1  # indices are int32

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bytes = NDArray[np.int8]
Values = Floats | Bytes | Halves


@dataclass(frozen=True)
class PackedWeight:
    """One layer's weight, packed.

    Attributes:
        shape: of the dense weight, ``(out, in / conv_groups, kh, kw)`` or ``(out, in)``.
        conv_groups: groups of a grouped convolution.
        group_size: filters in a group.
        group_pointer: ``(groups + 1,)``; group g keeps positions ``group_pointer[g] .. group_pointer[g + 1]``.
        index: ``(kept,)`` positions ``channel * kh * kw + tap``, channel counted over the whole input.
        values: ``(kept, group_size)``; zero where a group has fewer filters. Of bfloat16 numbers the bits.
        out_index: ``(groups, group_size)``; the filter each row is, -1 where a group has fewer.
        scale: ``(out,)``, what a filter's values are multiplied by where they are bytes; None where they are floats.
    """

    shape: tuple[int, ...]
    conv_groups: int
    group_size: int
    group_pointer: Ints
    index: Ints
    values: Values
    out_index: Ints
    scale: Floats | None = None

    @property
    def taps(self) -> int:
        """Kernel positions, ``kh * kw``."""
        return int(np.prod(self.shape[2:], dtype=np.int64))

    @property
    def groups(self) -> int:
        return len(self.group_pointer) - 1

    @property
    def in_bf16(self) -> bool:
        """Whether its values are bfloat16 numbers."""
        return self.values.dtype == np.uint16

    @property
    def halves(self) -> Halves:
        """Its values, which are bfloat16 numbers: the bits."""
        assert self.in_bf16
        return self.values.view(np.uint16)

    def to_bf16(self) -> PackedWeight:
        """The same weight, of floats, in bfloat16 numbers."""
        return replace(self, values=on_cache_lines(bits_of(to_bf16(torch.from_numpy(self.values)))))

    def unpack(self) -> Tensor:
        """The dense weight, zeros and all, as floats."""
        dense = self.unpack_values()
        if self.in_bf16:
            return from_bits(dense.view(np.uint16)).float()
        if self.scale is not None:
            dense = dense * self.scale.reshape(-1, *[1] * (len(self.shape) - 1))
        return torch.from_numpy(dense)

    def unpack_values(self) -> Values:
        """The values in their places, zeros and all, in the dense weight's shape."""
        out, columns = self.shape[0], int(np.prod(self.shape[1:], dtype=np.int64))
        dense = np.zeros((out, columns), self.values.dtype)
        kept = np.diff(self.group_pointer)
        rows = np.repeat(self.out_index, kept, axis=0)  # (kept, group_size)
        position = np.broadcast_to(self.index[:, None], rows.shape)
        real = rows >= 0
        first = rows // (out // self.conv_groups) * columns  # where the filter's own channels begin
        dense[rows[real], (position - first)[real]] = self.values[real]
        return dense.reshape(self.shape)

    def validate(self) -> PackedWeight:
        """Checks everything native code relies on; raises FileError that says what is wrong.

        Returns itself, so that what comes from a file is validated where it is made.
        """
        shape, groups = self.shape, self.conv_groups
        _require(len(shape) in (2, 4) and all(0 < extent <= MAX_EXTENT for extent in shape), f"shape {shape}")
        _require(int(np.prod([float(extent) for extent in shape])) <= MAX_EXTENT, f"shape {shape}")
        _require(0 < groups <= shape[0] and shape[0] % groups == 0, f"{groups} groups of {shape[0]} filters")
        _require(len(shape) == 4 or groups == 1, "groups of a Linear")
        _require(self.group_size in GROUP_SIZES, f"group size {self.group_size}")
        arrays = {"group_pointer": self.group_pointer, "index": self.index, "out_index": self.out_index}
        for name, array in arrays.items():
            _require(array.dtype == np.int32 and array.flags.c_contiguous, f"{name} is {array.dtype}")
        kinds = (np.float32, np.uint16) if self.scale is None else (np.int8,)
        _require(self.values.dtype in kinds and self.values.flags.c_contiguous, f"values are {self.values.dtype}")
        if self.scale is not None:
            _require(self.scale.dtype == np.float32 and self.scale.shape == shape[:1], f"{len(self.scale)} scales")
            fine = np.isfinite(self.scale) & (self.scale >= np.finfo(np.float32).tiny)
            _require(bool(fine.all()), "a scale that is not positive and finite")
            _require(int(self.values.min(initial=0)) >= -WEIGHT_LEVELS, "a value of -128")
        pointer, index, rows = self.group_pointer, self.index, self.out_index
        _require(pointer.ndim == 1 and len(pointer) >= 1 and index.ndim == 1, "array dimensions")
        _require(int(pointer[0]) == 0 and int(pointer[-1]) == len(index), "group_pointer's ends")
        _require(bool((pointer[1:] >= pointer[:-1]).all()), "group_pointer falls")  # a difference could wrap
        _require(self.values.shape == (len(index), self.group_size), f"values have shape {self.values.shape}")
        _require(rows.shape == (self.groups, self.group_size), f"out_index has shape {rows.shape}")
        real = rows[rows >= 0]
        _require(bool((rows >= -1).all()) and len(real) == shape[0], "out_index misses a filter")
        _require(bool((np.sort(real) == np.arange(shape[0])).all()), "out_index is no permutation")
        per_group, columns = shape[0] // groups, int(np.prod(shape[1:], dtype=np.int64))
        last = np.where(rows >= 0, rows, rows.max(axis=1, keepdims=True, initial=-1)) // per_group
        _require(bool((rows.max(axis=1, initial=-1) >= 0).all()), "an empty group")
        owner = last[:, 0]
        _require(bool((last == owner[:, None]).all()), "a group straddles groups of the convolution")
        low = np.repeat(owner.astype(np.int64) * columns, np.diff(pointer))
        _require(bool(((index >= low) & (index < low + columns)).all()), "an index is out of range")
        return self


def _require(fine: bool, what: str) -> None:
    if not fine:
        raise FileError(f"a packed weight is corrupt: {what}.")


def pack(
    weight: Tensor, conv_groups: int = 1, size: int | None = None, grouping: Grouping | None = None
) -> PackedWeight:
    """Packs a weight with zeros, in groups of `size`; in the largest groups its zeros allow when None.

    A group stores what any of its filters keeps. Which filters share one is found from their zeros; filters that are
    all zero come last, in groups that keep nothing.

    Args:
        weight: dense, ``(out, in / conv_groups, kh, kw)`` or ``(out, in)``, with its zeros.
        conv_groups: groups of a grouped convolution.
        size: one of GROUP_SIZES.
        grouping: of this weight, when it is known already.
    """
    grouping = grouping or Grouping(weight, conv_groups)
    return pack_rows(weight, conv_groups, grouping.rows(grouping.best_size() if size is None else size))


def pack_rows(weight: Tensor, conv_groups: int, rows: Ints, scale: Tensor | None = None) -> PackedWeight:
    """Packs a weight whose groups are known: `rows` is the `out_index` of the packed weight.

    With a `scale` for each filter the values become bytes: the nearest to each weight, as many steps from zero.
    """
    dense = weight.detach().reshape(weight.shape[0], -1).numpy()
    alive = np.concatenate([dense != 0, np.zeros((1, dense.shape[1]), np.bool_)])  # row -1 stands for no filter
    kept = np.logical_or.reduce(alive[rows], axis=1)  # (groups, columns)
    group, column = np.nonzero(kept)
    pointer = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
    owner = owners(rows, weight.shape[0], conv_groups)
    index = (column + owner[group] * dense.shape[1]).astype(np.int32)
    members = rows[group]  # (kept, size)
    values = np.where(members >= 0, dense[members, column[:, None]], 0).astype(np.float32, copy=False)
    if scale is None:
        values = on_cache_lines(values)
        return PackedWeight(tuple(weight.shape), conv_groups, rows.shape[1], pointer, index, values, rows)
    scales = np.ascontiguousarray(scale.detach().numpy(), np.float32)
    steps = np.rint(values / scales[members]).clip(-WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8)
    return PackedWeight(tuple(weight.shape), conv_groups, rows.shape[1], pointer, index, steps, rows, scales)


def owners(rows: Ints, filters: int, conv_groups: int) -> Ints:
    """The group of the convolution that each group of filters lies in."""
    owner: Ints = rows.max(axis=1) // (filters // conv_groups)
    return owner


def find_group_size(weight: Tensor, conv_groups: int = 1) -> int:
    """The largest of GROUP_SIZES in which filters that share their zeros can be grouped, up to a few stray ones."""
    return Grouping(weight, conv_groups).best_size()


def stored_density(weight: Tensor, conv_groups: int, size: int) -> float:
    """What `pack` in groups of `size` stores, padding included, as a share of the weight."""
    return Grouping(weight, conv_groups).density(size)
