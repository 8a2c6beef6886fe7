"""A weight of bytes as the kernels read it: four input channels of one tap a cell, for all filters of a group.

A cell is *whole* where its four channels are neighbours, which lie in one lane of an interleaved map. Kept positions
that would leave much of a whole cell empty are gathered: any four of a group make a *mixed* cell, whose lane the kernel
puts together itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoprune.repack.weights.alignment import on_cache_lines
from autoprune.repack.weights.packed import Ints, PackedWeight

QUAD = 4  # channels in a lane of 32 bits, a byte each
WHOLE = (1, 3)  # channels of a quad that are worth reading it whole: either is tried
MIXED_COST = 1.6  # of a mixed cell, in whole ones: four lanes are read for it, and a byte taken from each


@dataclass(frozen=True)
class Quads:
    """The cells of a packed weight.

    Attributes:
        pointer: ``(groups + 1,)``; group g has the whole cells ``pointer[g] .. pointer[g + 1]``.
        index: ``(cells,)``; ``quad * taps + tap`` of each, quads counted over the whole input.
        values: ``(cells, group_size)``; the weights of the four channels, a byte each.
        mixed_pointer: ``(groups + 1,)``, likewise of the mixed cells.
        mixed_index: ``(mixed, 4)``; ``channel * taps + tap`` of each byte; where there are fewer, one of them again.
        mixed_values: ``(mixed, group_size)``; zero bytes where there are fewer.
    """

    pointer: Ints
    index: Ints
    values: Ints
    mixed_pointer: Ints
    mixed_index: Ints
    mixed_values: Ints

    @property
    def cost(self) -> float:
        """What a pass over them takes, in whole cells."""
        return len(self.index) + MIXED_COST * len(self.mixed_index)


def lanes_of(channels: int) -> int:
    """Lanes that hold a position's channels."""
    return -(-channels // QUAD)


def quads(packed: PackedWeight, whole: int = 1) -> Quads:
    """The cells of a weight of bytes.

    Args:
        packed: with bytes for values.
        whole: channels that a group must keep of a quad, at one tap, for it to be read as it lies; 1: all quads are.
    """
    assert packed.scale is not None
    taps, size = packed.taps, packed.group_size
    channel, tap = np.divmod(packed.index.astype(np.int64), taps)
    group = np.repeat(np.arange(packed.groups), np.diff(packed.group_pointer))
    columns = (int(np.prod(packed.shape[1:])) * packed.conv_groups // taps + QUAD - 1) // QUAD * taps
    cell = group * columns + channel // QUAD * taps + tap
    cells, number, members = np.unique(cell, return_inverse=True, return_counts=True)
    fits = members >= whole
    place = np.cumsum(fits) - 1  # of the cells that are whole
    stays = fits[number]
    values = np.zeros((int(fits.sum()), size, QUAD), np.int8)
    values[place[number[stays]], :, channel[stays] % QUAD] = packed.values[stays]
    index = (cells[fits] % columns).astype(np.int32)
    pointer = _pointer(cells[fits] // columns, packed.groups)
    return Quads(pointer, index, _lanes(values), *_mixed(packed, np.flatnonzero(~stays), group))


def cost_of(kept: NDArray[np.bool_], size: int, whole: int) -> float:
    """`Quads.cost` of a weight whose neighbours share a group, without packing it.

    Args:
        kept: ``(out, in / conv_groups, kh, kw)`` or ``(out, in)``; quads do not straddle groups of a convolution.
        size: filters in a group.
        whole: see `quads`.
    """
    out, channels = kept.shape[:2]
    rows, lanes = -(-out // size) * size, lanes_of(channels)
    padded = np.zeros((rows, lanes * QUAD, int(np.prod(kept.shape[2:]))), np.bool_)
    padded[:out, :channels] = kept.reshape(out, channels, -1)
    members = padded.reshape(rows // size, size, lanes, QUAD, -1).any(axis=1).sum(axis=2)
    fits = members >= whole
    rest = np.where(fits, 0, members).reshape(rows // size, -1).sum(axis=1)
    return float(fits.sum() + MIXED_COST * (-(-rest // QUAD)).sum())


def _mixed(packed: PackedWeight, rest: NDArray[np.int64], group: NDArray[np.int64]) -> tuple[Ints, Ints, Ints]:
    """Kept positions, four to a cell."""
    counts = np.bincount(group[rest], minlength=packed.groups)
    cells = -(-counts // QUAD)
    first = np.cumsum(cells) - cells
    rank = np.arange(len(rest)) - np.repeat(np.cumsum(counts) - counts, counts)
    cell, byte = np.repeat(first, counts) + rank // QUAD, rank % QUAD
    total = int(cells.sum())
    index, values = np.full((total, QUAD), -1, np.int32), np.zeros((total, packed.group_size, QUAD), np.int8)
    index[cell, byte] = packed.index[rest]
    index = np.where(index < 0, index[:, :1], index)
    values[cell, :, byte] = packed.values[rest]
    pointer = np.concatenate([[0], np.cumsum(cells)]).astype(np.int32)
    return pointer, index, _lanes(values)


def _lanes(values: NDArray[np.int8]) -> Ints:
    return on_cache_lines(values).view(np.int32)[..., 0]


def _pointer(group: NDArray[np.int64], groups: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.bincount(group, minlength=groups))]).astype(np.int32)


def row_sums(packed: PackedWeight) -> NDArray[np.int64]:
    """The sum of the weights of each row, ``(groups * group_size,)``: what a zero point is multiplied by."""
    group = np.repeat(np.arange(packed.groups), np.diff(packed.group_pointer))
    sums = np.zeros((packed.groups, packed.group_size), np.int64)
    np.add.at(sums, group, packed.values.astype(np.int64))
    return sums.ravel()
